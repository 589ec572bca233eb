"""A method of your own, from outside okdc: one class; `okdc check own_method.py:Consensus` tries it."""

from torch import Tensor

import okdc
from okdc.losses import cross_entropy, kl


class Consensus(okdc.Method):
    """Every member learns from labels and from the mean of all members' logits."""

    members = 3

    def __init__(self, cohort: okdc.Cohort, *, temperature: float = 3.0) -> None:
        super().__init__(cohort)
        self.temperature = temperature

    def losses(self, out: okdc.CohortOutput, labels: Tensor) -> dict[str, Tensor]:
        mean = self.ensemble(out)
        parts = {}
        for name, logits in zip(self.cohort.names, out.logits, strict=True):
            parts[f"ce/{name}"] = cross_entropy(logits, labels)
            parts[f"kl/{name}"] = kl(logits, mean, self.temperature)
        return parts


if __name__ == "__main__":
    result = okdc.compress(
        "resnet20_cifar", data="digits", img_size=32, hflip=0.0, method=Consensus, epochs=1, batch_size=64
    )
    print(f"top-1 {result.metrics['top1']:.1f} %")
