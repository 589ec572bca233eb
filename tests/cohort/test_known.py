"""What is proved once is trusted by cohorts that are equal in all that the proof depends on, and by no other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from okdc.cohort import Found, has_versions
from okdc.cohort.known import digest
from okdc.methods import Method
from okdc.pipeline import assemble_cohort
from okdc.recipe import CohortSettings, NetworkSettings, Recipe
from tests.helpers.networks import Tiny
from tests.helpers.training import CLASSES, network

COHORT = CohortSettings(cut="0")
RECIPE = Recipe(network=NetworkSettings(model="of_torch"), method={"name": "one"}, cohort=COHORT)


def target(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return network(drop=0.0)


def build(network: nn.Module, recipe: Recipe = RECIPE, last: Path | None = None, side: int = 8) -> Method:
    torch.manual_seed(1)
    known = assemble_cohort.proved_once(recipe, last)
    classes = 4 if side > 8 else CLASSES
    return assemble_cohort.build_method(network, recipe, (3, side, side), classes, named=True, known=known)


@pytest.fixture
def proofs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was proved, one entry for each time."""
    made: list[str] = []
    from okdc.cohort import cohort

    prove = cohort.prove_all

    def counted(*arguments, **options) -> None:
        made.append(type(arguments[0]).__name__)
        prove(*arguments, **options)

    monkeypatch.setattr(cohort, "prove_all", counted)
    return made


def save(path: Path, method: Method) -> Path:
    torch.save({"state_dict": {}, "args": RECIPE.to_dict(), "okdc": {"proof": method.cohort.proof}}, path)
    return path


def test_a_run_that_goes_on_trusts_what_it_has_proved_and_trains_the_same(proofs: list[str], tmp_path: Path) -> None:
    began = build(target())
    last = save(tmp_path / "last.pth.tar", began)
    assert len(proofs) == 1
    goes_on = build(target(), last=last)
    assert len(proofs) == 1
    assert goes_on.cohort.tape.handling == began.cohort.tape.handling
    assert any(handling.live for handling in goes_on.cohort.tape.handling.values())
    images, labels = torch.randn(4, 3, 8, 8), torch.arange(4) % CLASSES
    losses = []
    for method in (began, goes_on):
        torch.manual_seed(2)
        losses.append(torch.stack(list(method.train()(images, labels).values())))
        losses[-1].sum().backward()
    assert torch.equal(*losses)
    gradients = [[p.grad for p in method.parameters()] for method in (began, goes_on)]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_other_settings_of_the_network_and_a_damaged_file_are_proved_anew(proofs: list[str], tmp_path: Path) -> None:
    last = save(tmp_path / "last.pth.tar", build(target()))
    other = replace(RECIPE, network=NetworkSettings(model="of_torch", drop=0.1))
    build(target(), other, last)
    last.write_bytes(b"PK\x03\x04 and no more")
    build(target(), last=last)
    build(target(), last=tmp_path / "none.pth.tar")
    assert len(proofs) == 4


def test_ranks_take_over_what_the_first_proved_unless_their_own_digest_differs(
    proofs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, Found]] = []

    def on_first(find: Callable[[], tuple[str, Found]]) -> tuple[str, Found]:
        told.append(find())
        return told[-1]

    monkeypatch.setattr(assemble_cohort, "first", on_first)
    first = build(target())
    monkeypatch.setattr(assemble_cohort, "first", lambda find: told[0])
    assert build(target()).cohort.tape.handling == first.cohort.tape.handling
    assert len(proofs) == 1
    build(target(seed=5))
    assert len(proofs) == 2


def rested(network: nn.Module) -> None:
    network.eval()


def nudged(network: nn.Module) -> None:
    with torch.no_grad():
        network[0].weight.view(-1)[0] += 1e-6  # type: ignore[union-attr,index,operator]


def frozen(network: nn.Module) -> None:
    network[0].requires_grad_(False)  # type: ignore[index]


def set_otherwise(network: nn.Module) -> None:
    network.grad_checkpointing = True  # type: ignore[assignment]


def counted(network: nn.Module) -> None:
    network[1].num_batches_tracked += 1  # type: ignore[union-attr,index,operator]


@pytest.mark.parametrize("change", [rested, nudged, frozen, set_otherwise, counted])
def test_the_digest_is_of_all_that_a_proof_depends_on(change: Callable[[nn.Module], None]) -> None:
    example, altered = torch.ones(2, 3, 8, 8), target()
    before = digest(target(), example, {"1": ["0", "1"]}, "classify", False)
    assert digest(altered, example, {"1": ["0", "1"]}, "classify", False) == before
    change(altered)
    found = {
        digest(altered, example, {"1": ["0", "1"]}, "classify", False),
        digest(target(), 2 * example, {"1": ["0", "1"]}, "classify", False),
        digest(target(), example, {"0": ["0"]}, "classify", False),
        digest(target(), example, {"1": ["0", "1"]}, "classify", True),
    }
    assert len(found | {before}) == 5


def test_code_without_a_version_is_proved_each_time(proofs: list[str]) -> None:
    assert has_versions(target()) and not has_versions(Tiny())
    method = build(Tiny(), replace(RECIPE, cohort=CohortSettings()), side=32)
    assert method.cohort.proof is None and proofs == ["Tiny"]
