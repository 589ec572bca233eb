"""The class Task: what a network is for. B batch, C outputs of one image: classes, labels, key points."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeGuard

from torch import Tensor

from okdc.errors import RecipeError
from okdc.tasks.shared.outputs import alone
from okdc.tasks.shared.scorer import Scorer
from okdc.tasks.shared.tally import Tally

MAPS = 4  # axes of outputs that are maps (B, C, h, w)


@dataclass(frozen=True)
class Metric:
    """How a figure is called, also where there is little room, what it is, its unit, and whether more is better."""

    word: str
    short: str = ""
    about: str = ""
    best: Literal["max", "min"] = "max"
    unit: str = "%"


class Task:
    """What an output and a label are, how they teach, how they are scored, and what is said of them.

    A subclass in a file of its own is its `TASK`. Outputs are tensors (B, C, ...) of `dims` axes.
    """

    name: ClassVar[str]
    dims: ClassVar[int] = 2
    output: ClassVar[str]  # what a network gives, in words
    metrics: ClassVar[dict[str, Metric]]  # of an epoch; the first, per cent, picks the best one and is what gates count
    scores: ClassVar[tuple[str, ...]]  # those of the metrics that a file is given, too
    unsupported: ClassVar[dict[str, str]] = {}  # settings that have no meaning here, and why
    distances: ClassVar[
        Mapping[str, Sequence[str]]
    ] = {}  # how outputs may be compared, and its weights; the first is usual
    compares_by: str | None = None  # which of them `distance` is, where that was said
    loss: ClassVar[str] = "cross_entropy"  # the function of okdc.losses that `supervised` is
    weighing: ClassVar[str] = "class_weights"  # the setting that weighs the outputs in it
    is_share: ClassVar[bool] = False  # whether its metric is the share of images that are right: it has that error
    several: ClassVar[bool] = False  # whether an image has any number of labels
    hub: ClassVar[str] = "image-classification"  # what the Hugging Face hub calls it
    activation: ClassVar[str] = "Softmax"  # the operator of ONNX that makes probabilities of outputs
    settles: ClassVar[bool] = False  # whether there is something to `settle` after training
    nouns: ClassVar[tuple[str, str]] = ("class", "classes")  # what one output is of, and several
    compared: ClassVar[str] = "images"  # what it is counted of how much two files agree on them
    same: ClassVar[str]  # what two files that agree predict alike, in words
    use: ClassVar[str]  # what predict.py does, in words
    program: ClassVar[str] = "predict.py"  # of export/, that which becomes it

    def __init__(self, noted: Mapping[str, Any]) -> None:
        """`noted`: what a run or a bundle knows of it, as `facts` gave it, among other things; or nothing."""

    @property
    def metric(self) -> str:
        """The metric that picks the best epoch if nothing else is asked for, and that gates count in."""
        return next(iter(self.metrics))

    @property
    def word(self) -> str:
        """That in words."""
        return self.metrics[self.metric].word

    def further(self) -> list[tuple[str, Metric]]:
        """The other metrics, those that are looked at most last."""
        return [(name, each) for name, each in reversed(self.metrics.items()) if name != self.metric]

    def shown(self, outputs: int | None) -> dict[str, Metric]:
        """The metrics that say something about networks of so many outputs; None: it is not known how many."""
        return self.metrics

    def better(self, metric: str, value: float, than: float) -> bool:
        """Whether a value of a metric is better than another."""
        return value > than if self.metrics[metric].best == "max" else value < than

    # What a network gives.

    def result(self, out: Any) -> Any:
        """Of what a network returned, that which counts."""
        return out

    def earlier(self, out: Any) -> tuple[Tensor, ...]:
        """Of what a network returned, the outputs of stages before, which are supervised, too."""
        return ()

    def is_output(self, out: object) -> TypeGuard[Tensor]:
        """Whether this is what a network of this task gives for a batch."""
        return isinstance(out, Tensor) and out.dim() == self.dims

    def advice(self, out: object) -> str:
        """How to make a network give that, which gave `out`."""
        return alone(out, self.dims)

    def are_probabilities(self, out: Tensor) -> bool:
        """Whether outputs (B, C, ...) for noise look as if their `activation` had been taken already."""
        return False

    # Labels.

    def checked_labels(self, labels: Tensor, count: int, role: str, outputs: int) -> Tensor:
        """The labels of `count` images of a user's own loader as they are trained or validated with.

        role: training or validation; outputs: C, 0 where it is not known. Raises DataError, with the way out.
        """
        raise NotImplementedError

    def outputs(self, labels: Tensor) -> int:
        """How many outputs a batch of labels asks for, at least."""
        raise NotImplementedError

    def kinds(self, labels: Tensor) -> Tensor | None:
        """What a sample of images has its share of, (N,) int64, by their labels; None: there is no such thing."""
        return None

    def per_output(self, labels: Tensor, outputs: int) -> Tensor:
        """How many of these labels are of each output (C,)."""
        raise NotImplementedError

    def made_up(self, numbers: Tensor, outputs: int) -> Tensor:
        """Labels of images that are only noise: numbers (B,) int64, alike where these are."""
        raise NotImplementedError

    def weights(self, labels: Tensor, outputs: int) -> Tensor:
        """Weights of the outputs (C,) for `weighing` auto, by the labels of all training images."""
        raise NotImplementedError

    # What teaches.

    def compare_by(self, name: str, settings: Mapping[str, Any]) -> None:
        """Let `distance` be the one of its `distances` that has this name, with these keywords; RecipeError."""
        takes = self.distances[name]
        if wrong := [key for key in settings if key not in takes]:
            known = f"expected {' or '.join(takes)}" if takes else "it has none"
            raise RecipeError(f"--distance-kwargs {wrong[0]}: --distance {name} has no such setting; {known}.")
        if wrong := [
            key for key, value in settings.items() if not (isinstance(value, int | float) and 0 <= value < math.inf)
        ]:
            raise RecipeError(f"--distance-kwargs {wrong[0]}={settings[wrong[0]]}: expected a number of 0 or more.")
        self.compares_by, self.weights_of_distance = name, dict(settings)

    @property
    def compares_as_usual(self) -> bool:
        """Whether `distance` is the task's own, the one that methods were published with."""
        return self.compares_by is None or self.compares_by == next(iter(self.distances))

    def supervised(self, out: Tensor, labels: Tensor) -> Tensor:
        """The loss of outputs (B, C, ...) with their labels."""
        raise NotImplementedError

    def distance(
        self,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor,
        temperature: float = 1.0,
        *,
        eps: float = 0.0,
        detach: bool = True,
    ) -> Tensor:
        """How far a student's outputs are from a teacher's, softened, times T^2; 0 where they are equal."""
        raise NotImplementedError

    def soft(
        self, student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 1.0, *, detach: bool = True
    ) -> Tensor:
        """`supervised` with the teacher's softened outputs for labels, without T^2: what some codes have instead."""
        raise NotImplementedError

    def blend(self, weights: Tensor, outs: Sequence[Tensor]) -> Tensor:
        """The outputs (B, C, ...) of M members, weighted by (B, M), or each output by its own of (B, M, C)."""
        return sum(  # type: ignore[return-value]
            weights[:, i].view(*weights[:, i].shape, *[1] * (out.dim() + 1 - weights.dim())) * out
            for i, out in enumerate(outs)
        )

    # What scores.

    def scorer(self, outputs: int, others: int = 0) -> Scorer:
        """What scores the student, and so many others beside it, in an epoch."""
        raise NotImplementedError

    def guessing(self, counts: Tensor) -> float:
        """The share (0 to 1) that its metric has, of images with these `counts`, where a network knows nothing."""
        raise NotImplementedError

    def tally(self) -> Tally:
        """What is counted when a runner's outputs are held against labels and against a reference."""
        raise NotImplementedError

    def detail(self, counts: Tensor | None, names: Sequence[str]) -> dict[str, Any]:
        """What the report tells of each output, from a scorer's `counts`, as plain values."""
        raise NotImplementedError

    # What is shown of single images.

    def notable(self, out: Tensor, labels: Tensor) -> tuple[Tensor, Tensor] | None:
        """Which outputs (B, C, ...) are right (B,), and how telling each is (B,) among these, or among the others.

        None: an image is not simply right or wrong.
        """
        return None

    def said(self, out: Tensor, names: Sequence[str]) -> list[tuple[str, float]]:
        """What outputs (C, ...) of one image say, in words, with probabilities, per cent."""
        raise NotImplementedError

    def truth(self, label: Tensor, names: Sequence[str]) -> list[str]:
        """What the label of one image says, in words."""
        raise NotImplementedError

    # What goes into a run's folder and its bundle.

    def settle(self, outs: Tensor, labels: Tensor) -> None:
        """Learn what a bundle must know from outputs (N, C, ...) of images of the training side, if it `settles`."""

    def files(self, out: Tensor) -> dict[str, Any]:
        """Further json files of a bundle, by name, whose network gave `out` (B, C, ...)."""
        return {}

    def facts(self) -> dict[str, Any]:
        """What `tasks.of` makes it again from, as plain values; nothing for the task that needs no mention."""
        return {"task": self.name}
