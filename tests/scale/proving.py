"""What it takes to build a cohort: where it is proved, where that is known, and the proof's share.

    python tests/scale/proving.py [NETWORK ...]

Networks by name at 224 pixels with 1,000 classes; CPU seconds of one thread. *Known* is what ranks other than the first
do, and a run that goes on: it takes the digest of target and settings, and what the proof has found.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from statistics import median

import torch
from torch import nn

from okdc import networks
from okdc.cohort import Found
from okdc.pipeline.assemble_cohort import build_method
from okdc.recipe import NetworkSettings, Recipe
from tests.scale.measuring import cpu_seconds, table

COHORTS = (("resnet18", "ahbf"), ("resnet50", "one"), ("efficientnet_b0", "mcl_okd"), ("mobilenetv3_small_100", "pcl"))


def build(target: nn.Module, recipe: Recipe, known: Callable[[str, Callable[[], Found]], Found]) -> float:
    torch.manual_seed(0)
    labels, start = torch.arange(10_000) % 1000, cpu_seconds()
    method = build_method(target, recipe, (3, 224, 224), 1000, named=True, train_labels=labels, known=known)
    took = cpu_seconds() - start
    method.strip()
    return took


def row(model: str, method: str, n: int = 1) -> tuple[str, ...]:
    recipe = Recipe(network=NetworkSettings(model=model), method={"name": method})
    target, found, times = networks.load(recipe.network, 1000), dict[str, Found](), ([], [])

    def prove(digest: str, proof: Callable[[], Found]) -> Found:
        return found.setdefault(digest, proof())

    for _ in range(n):
        for took, known in zip(times, (prove, lambda digest, proof: found[digest])):
            took.append(build(target, recipe, known))
    proved, trusted = map(median, times)
    return model, method, f"{proved:.1f}", f"{trusted:.1f}", f"{100 * (1 - trusted / proved):.0f}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    row("test_resnet", "one")  # what Python and torch do once is not to count
    head = ("network", "method", "build and prove, CPU s", "known", "less, %")
    table(head, (row(*each) for each in COHORTS if not sys.argv[1:] or each[0] in sys.argv[1:]))
