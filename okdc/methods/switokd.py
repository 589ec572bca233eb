"""Trains your network and a teacher side by side. The teacher pauses while it is too far ahead.

Use it when you want a larger network to teach yours (--peers NAME), and have none that is trained. Nothing is shared,
so it works for networks that cannot be cut.

Paper: B. Qian, Y. Wang, H. Yin, R. Hong, M. Wang, Switchable Online Knowledge Distillation, ECCV 2022.
Code: hfutqian/SwitOKD was read, and not copied: README.md (0924a9d), and in SwitOKD_code the files
    CIFAR-100/WRN16-2_0.5mobilenetv2/main.py, lines 35-56 and 86-117 (300f729), and ImageNet/ResNet18_34/main.py
    (574bc51). Its constants, all 1, are the defaults.
Differs: As in the code, and not in the formula of its README, the teacher pauses only where it is nearer the labels
    than your network. The paper itself was not at hand. In the code the statistics of the teacher's batch norm go on in
    a pause; here they wait, too. Temperature multiplies the KL by its square, and softens the distances from labels,
    too; the code has no other than 1. Both networks have one optimizer (--branch-lr-scale gives the teacher another
    rate). There is one teacher and one student; the paper also has three networks. Distances are means over images, of
    all devices and accumulated batches.
Costs: The teacher is one whole network, in training only. It runs in a pause, too. Each step waits once more for the
    device, to decide who learns. summary.csv has the share of pauses in each epoch (log/paused/peer1).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from okdc.cohort import Cohort, CohortOutput
from okdc.errors import MethodError, RecipeError
from okdc.methods.shared.base import Method
from okdc.methods.shared.pausing import Pause
from okdc.ranks import mean_


class Switokd(Method):
    """L_s = CE(z_s, y) + alpha KL(z_t || z_s), L_t = CE(z_t, y) + beta KL(z_s || z_t); L_s alone in a pause.

    The teacher pauses where |p_t - y| < |p_s - y| and |p_s - p_t| > |p_s - y| - exp(-|p_t - y| / (|p_s - y| +
    |p_t - y|)) |p_t - y|: sums over classes of softened probabilities, means over images.
    """

    members = 2
    share = "none"

    apart: Tensor
    """Sums (4,) over the images of a step: the three distances, and how many images. None are left when it is over."""

    def __init__(self, cohort: Cohort, *, alpha: float = 1.0, beta: float = 1.0, temperature: float = 1.0) -> None:
        super().__init__(cohort)
        if len(cohort) != 2 or cohort.cut:
            raise RecipeError(
                "switokd has one teacher, which shares nothing with your network, so that it can pause: leave out "
                "--members and --share, and give one name to --peers."
            )
        self.alpha = alpha
        self.beta = beta
        self.temperature = temperature
        self.pause = Pause(cohort.members[1])
        self.decided = False
        self.register_buffer("apart", torch.zeros(4), persistent=False)

    def losses(self, out: CohortOutput, labels: Tensor) -> dict[str, Tensor]:
        student, teacher = out.logits
        if self.training:
            self.apart += self.distances(student.detach(), teacher.detach(), labels)
        us, them = self.cohort.names
        return {
            f"ce/{us}": self.task.supervised(student, labels),
            f"kl/{us}": self.alpha * self.task.distance(student, teacher, labels, self.temperature),
            f"ce/{them}": self.task.supervised(teacher, labels),
            f"kl/{them}": self.beta * self.task.distance(teacher, student, labels, self.temperature),
        }

    def distances(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """Sums (4,) over images of |p_s - p_t|, |p_s - y| and |p_t - y|, and their number, of logits (B, C)."""
        s, t = (F.softmax(z.to(self.apart.dtype) / self.temperature, dim=1) for z in (student, teacher))
        y = F.one_hot(labels, s.shape[1]) if labels.dim() == 1 else labels
        sums = [(left - right).abs().sum() for left, right in ((s, t), (s, y), (t, y))]
        return torch.stack([*sums, sums[0].new_full((), len(s))])

    @torch.no_grad()
    def before_step(self) -> None:
        """Pause the teacher where it is too far ahead."""
        mean_([self.apart])
        gap, student, teacher, images = self.apart.tolist()
        self.apart.zero_()
        self.decided = True
        pauses = too_far(gap / images, student / images, teacher / images)
        if pauses:
            self.pause.hold()
        self.log(f"paused/{self.cohort.names[1]}", float(pauses))

    def after_step(self, batches: Iterable[tuple[Tensor, ...]]) -> None:
        """Remember how the step left the teacher."""
        if not self.decided:
            raise MethodError("switokd decides who learns in method.before_step(): call it before optimizer.step().")
        self.decided = False
        self.pause.keep()


def too_far(gap: float, student: float, teacher: float) -> bool:
    """Whether a teacher is too far ahead, by the distances of the two from one another, and of each from the labels.

    >>> too_far(1.0, 1.5, 0.8), too_far(0.9, 1.5, 0.8), too_far(1.0, 0.8, 1.5)  # the threshold is 0.94
    (True, False, False)
    """
    return teacher < student and gap > student - math.exp(-teacher / (student + teacher)) * teacher
