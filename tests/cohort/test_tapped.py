"""Modules that a method names: at any depth, in every member that has them, refused before the first step."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import okdc
from okdc.cohort import Branch, Cohort, CohortOutput
from okdc.errors import CutError, MethodError
from okdc.losses import cross_entropy
from tests.helpers.networks import Depthwise, Tiny, Tokens, TwoStreams
from tests.helpers.traps import CalledTwice

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
NAMES = {"norm": "late.1", "cut": "early", "inner": "stem.1"}


def test_a_module_of_any_depth_is_looked_at_in_every_member() -> None:
    cohort = Cohort(Tiny(), IMAGES, [Branch("early"), Branch()], tapped=NAMES)
    assert cohort.tapped_shapes[1] == {"norm": (32, 8, 8), "cut": (16, 16, 16), "inner": (8, 32, 32)}
    target, branch, peer = cohort.train()(IMAGES).tapped
    assert target["norm"].min() < 0 and branch["norm"].min() < 0  # before the activation, which works in place
    assert not torch.equal(target["norm"], branch["norm"])
    assert branch["cut"] is target["cut"] and branch["inner"] is target["inner"]  # of the trunk that both have
    assert not torch.equal(peer["inner"], target["inner"])
    branch["norm"].square().mean().backward()
    parts = cohort.target.stem, cohort.branches[0].late, cohort.target.late
    assert [part[0].weight.grad is not None for part in parts] == [True, True, False]
    twin = copy.deepcopy(cohort).eval()(IMAGES)
    assert torch.equal(twin.tapped[2]["norm"], cohort.eval()(IMAGES).tapped[2]["norm"])


def test_of_a_branch_of_a_branch_and_of_views_they_are_its_own() -> None:
    tree = Cohort(Tiny(), IMAGES, [Branch("stem"), Branch("early", parent=1)], tapped=NAMES)
    target, branch, twig = tree(IMAGES).tapped
    assert twig["cut"] is branch["cut"] is not target["cut"] and twig["inner"] is target["inner"]
    cohort = Cohort(Tiny(), IMAGES, [Branch("early")], taps=("exit_maps",), tapped=NAMES).eval()
    out = cohort(torch.stack([IMAGES, -IMAGES]))
    for i, view in enumerate((IMAGES, -IMAGES)):
        alone = cohort(view)
        for name, value in alone.tapped[i].items():
            torch.testing.assert_close(out.tapped[i][name], value, msg=f"{name} of member {i}")
    torch.testing.assert_close(out.exit_maps[0], cohort(IMAGES).exit_maps[0])  # the target's, not the last view's


def test_a_peer_of_another_kind_has_what_it_has() -> None:
    names = {"cut": "early", "end": "late.2"}
    cohort = Cohort(Tiny(), IMAGES, [Branch(network=Depthwise()), Branch(network=Tokens())], tapped=names)
    of_members = cohort(IMAGES).tapped
    assert [set(each) for each in of_members] == [{"cut", "end"}, {"cut"}, set()]
    assert of_members[1]["cut"].shape == (2, 16, 8, 8)
    with pytest.raises(MethodError, match="'act' of CalledTwice is called 3 times in a pass"):
        Cohort(Acting(), IMAGES, [Branch(network=CalledTwice())], tapped={"act": "act"})


class Acting(Tiny):
    """One activation after its head, by the name of another network's."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))


@pytest.mark.parametrize("network", [Tokens, TwoStreams])
def test_a_network_of_one_stage_gives_what_its_modules_give(network: type[nn.Module]) -> None:
    name = "blocks.1" if network is Tokens else "pairs.3"
    out = Cohort(network(), IMAGES, tapped={"block": name})(IMAGES)
    given = out.tapped[0]["block"]
    shapes = [tuple(x.shape) for x in (given if isinstance(given, tuple) else [given])]
    assert shapes == ([(2, 17, 16)] if network is Tokens else [(2, 64, 16), (2, 16, 16)])


class Sparse(okdc.Method):
    """What a module gives is kept small; which module, the user says."""

    members = 1

    def __init__(self, cohort: Cohort, *, layer: str = "late.1") -> None:
        super().__init__(cohort)
        self.scale = nn.Parameter(torch.ones(cohort.tapped_shapes[0]["x"][0]))

    @classmethod
    def tapped(cls, anatomy: okdc.Anatomy, *, layer: str = "late.1", **settings: Any) -> dict[str, str]:
        return {"x": layer}

    def losses(self, out: CohortOutput, labels: Tensor) -> dict[str, Tensor]:
        x = out.tapped[0]["x"]
        size = (x * self.scale.view(-1, 1, 1)).abs().mean()
        return {"ce": cross_entropy(out.logits[0], labels), "sparse": 0.01 * size}


def test_a_method_names_modules_by_its_settings_and_is_told_what_there_is_not() -> None:
    network = Tiny()
    method = okdc.build(network, IMAGES, Sparse, layer="early.0")
    assert method.scale.shape == (16,) and "modules by name" in Sparse.asks()
    wrong = {
        "late.7": r"Tiny has no module 'late.7' to look at. Did you mean late",
        "": "'' of Tiny is called 0 times in a pass",
    }
    method.strip()
    for layer, words in wrong.items():
        with pytest.raises(MethodError, match=words):
            okdc.build(network, IMAGES, Sparse, layer=layer)
    with pytest.raises(MethodError, match=r"tapped is \['late'\]; expected a dictionary that gives modules names"):
        Cohort(Tiny(), IMAGES, tapped=["late"])  # type: ignore[arg-type]
    assert not any(m._forward_hooks for m in network.modules())
    with pytest.raises(CutError, match=r"out\.tapped is looked at, and no module was named. Write a classmethod"):
        Cohort(Tiny(), IMAGES)(IMAGES).tapped[0]["early"]
