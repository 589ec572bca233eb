"""The seam that a method fills: what it needs from the cohort, and the losses it makes of what the members say."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from okdc.anatomy import Anatomy
from okdc.cohort import Branch, Cohort, CohortOutput, Cost
from okdc.errors import RecipeError
from okdc.methods.shared.checks import refuse_declared
from okdc.needs import Needs
from okdc.tasks.task import Task


class Method(nn.Module):
    """One rule by which the members of a cohort teach each other; it owns the cohort: it is what is trained and saved.

    A subclass declares what it needs as class attributes, its settings as keywords of `__init__`, and writes `losses`.
    """

    members: ClassVar[int] = 2
    """How many members there are if nobody says otherwise, the target included."""
    extra_blocks: ClassVar[int] = 0
    """How many blocks each branch has more than the one before it, if nobody says otherwise."""
    share: ClassVar[str] = "trunk"
    """"trunk": branches on a trunk; "none": whole peer networks."""
    taps: ClassVar[tuple[str, ...]] = ()
    """What `losses` looks at beside logits: of "feature_maps", "embeddings", "stage_maps", "exit_maps" and "shared"."""
    trunk_gradient: ClassVar[Literal["sum", "mean"]] = "sum"
    """What the trunk gets of its members' gradients."""
    clip_grad: ClassVar[float | None] = None
    """What the norm of the gradient is clipped to, if nobody says otherwise; None is not at all."""
    second_order: ClassVar[bool] = False
    """Whether it differentiates the gradients of its networks."""
    needs_teacher: ClassVar[bool] = False
    """Whether it needs a trained network, which `__init__` then takes as `teacher`, after the cohort."""
    compares: bool = True
    """Whether it compares outputs by `task.distance`, which is what --distance acts on; some settings may change it."""
    tasks: ClassVar[tuple[str, ...]] = ("classify",)
    """What its networks may be for."""

    cohort: Cohort
    """The target and its auxiliary members; `cohort.names` is what they are called."""
    epoch: Tensor
    """(), the epoch that is being trained, from 0 (`begin_epoch`)."""
    epochs: Tensor
    """(), how many there will be (`begin_epoch`)."""
    lr: Tensor
    """(), the learning rate of the first parameter group in this step; the loop fills it."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        refuse_declared(cls)

    def __init__(self, cohort: Cohort) -> None:
        super().__init__()
        self.cohort = cohort
        # Tensors, so that a compiled step is not compiled again every epoch. The loop fills them.
        self.register_buffer("epoch", torch.zeros(()))
        self.register_buffer("epochs", torch.ones(()))
        self.register_buffer("lr", torch.zeros(()))
        self._logged: dict[str, tuple[Tensor | float, int]] = {}  # sums, and of how many

    @property
    def task(self) -> Task:
        """What its networks are for: `task.supervised` and `task.distance` are its losses of labels and of members."""
        return self.cohort.task

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Named losses of one batch: images (B, C, H, W), labels (B,) or class probabilities (B, classes).

        A method that needs a view for each member gets (members, B, C, H, W) or, where the data have none, (B, C, H,
        W). One that says how many views, or how strong, gets (views, B, C, H, W) and writes its own forward. So does
        one that needs indices (B,), a third argument; it may also take a keyword `train_labels` (N,) in its
        constructor, the labels of all training images (None where the data do not say).
        """
        out = self.cohort(images)
        losses, earlier = self.losses(out, labels), self._earlier(out, labels)
        return losses | earlier if earlier else losses

    def _earlier(self, out: CohortOutput, labels: Tensor) -> dict[str, Tensor]:
        """What the members' earlier stages said, held to the labels, whatever the method."""
        return {
            f"early{i}/{name}": self.task.supervised(each, labels)
            for name, stages in zip(self.cohort.names, out.earlier)  # none where no network has any
            for i, each in enumerate(stages, 1)
        }

    def losses(self, out: CohortOutput, labels: Tensor) -> dict[str, Tensor]:
        """Named scalar losses, already weighted; the loop adds them up and logs each.

        On several devices the batch is this one's part, and the gradient of a mean over images comes out right; what
        compares images with one another, or fills a buffer, takes all of them by `okdc.ranks.gather`.
        """
        raise NotImplementedError

    def log(self, name: str, value: Tensor | float) -> None:
        """Write a scalar down that is no loss: summary.csv has its mean over the epoch's steps as `log/NAME`.

        Call it in `losses` or `before_step`, in the same steps on all devices, whose mean is taken.
        """
        so_far, times = self._logged.get(name, (0.0, 0))
        self._logged[name] = so_far + (value.detach() if isinstance(value, Tensor) else value), times + 1

    def logged(self) -> dict[str, Tensor | float]:
        """The mean of each scalar that was logged since this was last asked; the loop asks once a step."""
        means = {name: total / times for name, (total, times) in self._logged.items()}
        self._logged.clear()
        return means

    def ensemble(self, out: CohortOutput) -> Tensor:
        """Logits (B, C) of the cohort as a whole; by default the mean of what all learners say."""
        return torch.stack(self.said(out)).mean(0)

    @property
    def learners(self) -> tuple[str, ...]:
        """What is scored in each validation beside the student and the ensemble, by name; by default the members."""
        return self.cohort.names

    def said(self, out: CohortOutput) -> tuple[Tensor, ...]:
        """Logits (B, C) of each of the `learners`, a head of the method's own among them where it has one."""
        return out.logits

    def begin_epoch(self, epoch: int, of: int) -> None:
        """Say which epoch begins, from 0, and of how many, which ramps go by.

        okdc's loop does, also where a run goes on within an epoch; a loop of your own has to.
        """
        self.epoch.fill_(epoch)
        self.epochs.fill_(of)

    def clipped_to(self, asked: float | None) -> float:
        """What the norm of the gradient is clipped to where the user asks for `asked`, None being nothing; 0: not."""
        return (self.clip_grad or 0.0) if asked is None else asked

    def param_groups(self, lr: float) -> list[dict[str, Any]]:
        """Parameters and their learning rates; by default everything at `lr`."""
        return [{"params": [p for p in self.parameters() if p.requires_grad], "lr": lr}]

    def before_step(self) -> None:
        """Called when a step has its gradients, before anything looks at them or acts on them; by default nothing.

        Here a method says who sits this step out (`okdc.methods.Pause`), on all devices alike. In fp16 gradients are
        still scaled.
        """

    def after_step(self, batches: Iterable[tuple[Tensor, ...]]) -> None:
        """Called after each optimizer step: moving averages and the like; by default nothing.

        `batches` are what the step was made of, each as `forward` was given it: one, or --grad-accum-steps of them.
        They go to the device as they are read, and can be read once.
        """

    def before_epoch(self, held_out: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Called with the images that were set aside, in eval mode, where `needs` asks for some; by default nothing."""

    @property
    def student(self) -> nn.Module:
        """What is judged and ships, with the target's own state_dict keys; by default the target itself."""
        return self.cohort.target

    def byproducts(self) -> dict[str, nn.Module]:
        """Further networks that training gives beside the student, by name: images in, logits (B, C) out.

        Each is a copy that owes nothing to the cohort; by default there is none.
        """
        return {}

    @classmethod
    def has_byproducts(cls) -> bool:
        """Whether `byproducts` may give any, so that the best epoch's are kept."""
        return cls.byproducts is not Method.byproducts

    def strip(self) -> nn.Module:
        """The target, trained, with nothing left on it of all that was built around it."""
        return self.cohort.strip()

    @classmethod
    def needs(cls, **settings: Any) -> Needs:
        """What the method asks of the training data when it is given these settings; by default nothing special."""
        return Needs()

    @classmethod
    def tapped(cls, anatomy: Anatomy, **settings: Any) -> Mapping[str, str]:
        """Further modules that `losses` looks at: the author's names for them, and theirs in the network.

        They are those of `network.named_modules()`, and `out.tapped[member]["early"]` is what it gave; by default none.
        """
        return {}

    def costs(self) -> tuple[Cost, ...]:
        """What each network costs that a step runs: the members, then those that the method has beside them."""
        return self.cohort.costs

    @classmethod
    def cost(cls) -> str:
        """What one training step runs, in words; `okdc inspect MODEL --method NAME` measures it."""
        alone = cls.members == 1 or cls.share == "none"
        networks = f"{cls.members} network{'s' * (cls.members > 1)}" if alone else f"1 trunk, {cls.members} tails"
        return networks + ", ever deeper" * (cls.extra_blocks > 0) + ", 1 teacher" * cls.needs_teacher

    @classmethod
    def asks(cls) -> list[str]:
        """What it needs beside a network and labelled images, in words."""
        needs = cls.needs()
        words = {
            "trained teacher": cls.needs_teacher,
            "peer networks": cls.share == "none" and cls.members > 1,
            "embeddings": "embeddings" in cls.taps,
            "feature maps": bool({"feature_maps", "stage_maps", "exit_maps"} & set(cls.taps)),
            "modules by name": cls.tapped.__func__ is not Method.tapped.__func__,  # type: ignore[attr-defined]
            "map at the cut": "shared" in cls.taps,
            "a view per member": needs.views is True,
            f"{len(needs.strengths(1))} views": needs.views not in (False, True),
            "class-balanced batches": needs.pairs,
            "numbered images": needs.indices,
            "images set aside": needs.held_out,
        }
        return [word for word, needed in words.items() if needed]

    @classmethod
    def plan(
        cls,
        anatomy: Anatomy,
        *,
        members: int | None = None,
        extra_blocks: int | None = None,
        private_stages: int | None = None,
        cut: str | None = None,
        share: str | None = None,
        peers: Sequence[nn.Module] = (),
    ) -> list[Branch]:
        """The auxiliary members to build beside a target; what is None is the method's own default.

        A method whose plan depends on settings of its own takes them here too, as keywords of the same names.
        """
        if peers:
            return [Branch(network=peer) for peer in peers]
        members = cls.members if members is None else members
        if members < 2 and cls.members > 1:
            raise RecipeError(f"{cls.__name__} needs two members or more, got --members {members}: leave it out.")
        if members < 2:
            return []
        extra = cls.extra_blocks if extra_blocks is None else extra_blocks
        cuts: list[str | None] = [None]
        if (share or cls.share) == "trunk":
            names = (cut or anatomy.cut(private_stages or cls.private_stages(anatomy))).split(",")
            cuts = [each.name for each in sorted(map(anatomy.find_cut, names), key=lambda each: -each.flops_after)]
        return [cls._branch(i, cuts, anatomy, extra) for i in range(1, members)]

    @classmethod
    def _branch(cls, i: int, cuts: Sequence[str | None], anatomy: Anatomy, extra: int) -> Branch:
        """Member `i` of a tree that splits in two at each of `cuts`, early to late; at one cut all part at once."""
        level = max(0, len(cuts) - (i & -i).bit_length())
        cut = cuts[level]
        stages = anatomy.stages_after(cut) if cut else anatomy.stages
        return Branch(cut, cls.depth(i, len(stages), extra), parent=i & (i - 1) if level else 0)

    @classmethod
    def private_stages(cls, anatomy: Anatomy) -> int:
        """How many of the last stages every branch has for itself; by default one."""
        return 1

    @classmethod
    def depth(cls, branch: int, stages: int, extra: int) -> tuple[int, ...]:
        """Blocks that branch `branch` (1-based) has more than the target, for each of its stages, early to late."""
        return (0,) * stages
