"""What inspect --method promises: the numbers of what training would really build and keep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from okdc import methods, recipe
from okdc.cohort import Branch, Cohort, CohortOutput
from okdc.errors import CutError, OkdcError, RecipeError
from okdc.measure.estimate import Estimate, estimate, measure
from okdc.methods.baseline import Baseline
from okdc.methods.ffl import Ffl
from okdc.methods.kd import Kd
from okdc.recipe import Recipe
from tests.helpers.networks import Tiny, Tokens

IMAGES = torch.randn(2, 3, 32, 32)


def found(method: str, **typed: Any) -> Estimate:
    typed = {"model": "resnet20_cifar", "num_classes": 10, "method": method, **typed}
    return estimate(recipe.override(Recipe(), typed, methods.settings))


def test_what_is_kept_is_what_a_person_counts() -> None:
    kept = measure(Baseline(Cohort(Tiny(), IMAGES)))
    # Of each conv-bn-relu its input, and the convolution's output; the classifier's input and the log-softmax.
    floats = 3 * 32 * 32 + 2 * 8 * 32 * 32 + 2 * 16 * 16 * 16 + 2 * 32 * 8 * 8 + 32 + 4
    assert kept.activations == pytest.approx(4 * floats, rel=0.01)
    buffers = sum(b.nbytes for b in Tiny().buffers()) + 12  # and the method's epoch, epochs and lr
    assert kept.weights == 4 * kept.trained_params + buffers and kept.fixed == kept.weights + 8 * kept.trained_params
    assert (kept.relative, kept.own_params, len(kept.networks)) == (1.0, 0, 1)


def test_a_method_is_left_as_it_was() -> None:
    torch.manual_seed(0)
    ffl = Ffl(Cohort(Tiny(), IMAGES, [Branch("early")], taps=Ffl.taps)).eval()
    before = {key: value.clone() for key, value in ffl.state_dict().items()}
    state = torch.get_rng_state()
    measured = measure(ffl)
    assert measured.own_params == sum(p.numel() for p in ffl.fusion.parameters())
    assert all(torch.equal(value, before[key]) for key, value in ffl.state_dict().items())
    assert not ffl.training and all(p.grad is None and p.requires_grad for p in ffl.parameters())
    assert torch.equal(state[-8:], torch.get_rng_state()[-8:])


def test_the_first_gradient_is_told_beside_that_of_plain_training() -> None:
    class Thrice(Baseline):
        """Plain training whose loss counts three times."""

        def losses(self, out: CohortOutput, labels: Tensor) -> dict[str, Tensor]:
            return {name: 3 * loss for name, loss in super().losses(out, labels).items()}

    cohort = Cohort(Tiny(), IMAGES)
    assert measure(Baseline(cohort)).gradients.ratio == pytest.approx(1.0)
    thrice = Thrice(cohort)
    assert measure(thrice).gradients.ratio == pytest.approx(3.0)
    images, labels = methods.batch_of(thrice)
    torch.nn.functional.cross_entropy(cohort.train().target(images), labels).backward()
    by_hand = torch.cat([p.grad.flatten() for p in cohort.target.parameters()]).norm().item()
    assert 0.5 < measure(thrice).gradients.plain / by_hand < 2  # of other noise


def test_a_teacher_is_run_and_held_but_does_not_learn() -> None:
    teacher, alone = Tokens(), measure(Baseline(Cohort(Tiny(), IMAGES)))
    with_teacher = measure(Kd(Cohort(Tiny(), IMAGES), teacher))
    cost = with_teacher.networks[1]
    assert (cost.name, cost.grown, cost.frozen) == ("teacher", "Tokens", True)
    assert with_teacher.trained_params == alone.trained_params and with_teacher.own_params == 0
    assert with_teacher.weights == alone.weights + 4 * sum(p.numel() for p in teacher.parameters())
    assert with_teacher.flops == alone.flops + cost.flops > alone.flops
    assert with_teacher.activations == pytest.approx(alone.activations, rel=0.01)


def test_branches_cost_their_tails_and_peers_all_of_it(tmp_path: Path) -> None:
    ahbf = found("ahbf", members=3, extra_blocks=1)
    assert [c.cut for c in ahbf.networks] == [None, "stages.1", "stages.1"]
    assert ahbf.trained_params == sum(c.own_params for c in ahbf.networks) + ahbf.own_params
    assert 1.5 < ahbf.relative < 3 and ahbf.networks[1].grown.startswith("1 x BasicBlock")
    dml, alone = found("dml", peers=["resnet20_cifar", "resnet20_cifar"]), found("baseline")
    assert dml.relative == 3 and dml.trained_params == 3 * alone.trained_params and dml.classes == 10
    assert dml.activations == pytest.approx(3 * alone.activations, rel=0.01)
    kd = found("kd")
    assert kd.teacher_stands_in and kd.relative == 2 and kd.networks[1].frozen
    trained = timm.create_model("resnet32_cifar", num_classes=10).state_dict()
    torch.save({"arch": "resnet32_cifar", "state_dict": trained}, tmp_path / "teacher.pth")
    kd = found("kd", teacher=str(tmp_path / "teacher.pth"))
    assert not kd.teacher_stands_in and kd.relative > 2.5


@pytest.mark.parametrize(
    ("method", "typed", "error", "said"),
    [
        ("one", {"share": "none"}, CutError, "nothing is shared"),
        ("okddip", {"members": 2}, RecipeError, "expected 3"),
        ("ahbf", {"teacher": "resnet32_cifar"}, RecipeError, "takes no teacher"),
        ("dml", {"peers": ["resnet20_cifra"]}, OkdcError, "Did you mean"),
        ("ahbf", {"cut": "stages.9"}, OkdcError, "stages"),
    ],
)
def test_what_cannot_be_is_refused_with_its_reason(
    method: str, typed: dict[str, Any], error: type[OkdcError], said: str
) -> None:
    with pytest.raises(error, match=said):
        found(method, **typed)
