"""What scores an epoch; each task has its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor


class Scorer:
    """Scores of one epoch: of the student in full, of others beside it by the task's metric."""

    images: int = 0

    def update(self, student: Tensor, labels: Tensor, others: Sequence[Tensor] = ()) -> None:
        """Count a batch: outputs (B, C, ...) of the student and of others, with the labels."""
        raise NotImplementedError

    def add_up(self, add: Callable[[Tensor], Tensor]) -> None:
        """Take in what the scorers of other processes have; `add` gives the sum of a vector (float64) of all."""
        raise NotImplementedError

    def value(self) -> dict[str, float]:
        """`loss`, and the task's metrics, of the student."""
        raise NotImplementedError

    def others(self) -> list[float]:
        """The task's metric of each of the others."""
        raise NotImplementedError

    def counts(self) -> Tensor:
        """What is remembered with the best epoch, for `Task.detail`."""
        raise NotImplementedError
