"""What an author of a method gets wrong is said in a sentence, before the first step."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from okdc.cohort import Branch, Cohort, CohortOutput
from okdc.errors import CutError, MethodError
from okdc.methods import Method
from tests.helpers.networks import Tiny

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def cohort(*taps: str) -> Cohort:
    return Cohort(Tiny(), IMAGES, [Branch("early")], taps=taps)


# --- what is looked at ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("declared", "words"),
    [
        ({"taps": "embeddings"}, r"taps is the string 'embeddings'; expected a tuple.*taps = \('embeddings',\)"),
        ({"taps": ("embedding",)}, r"taps has 'embedding'. Did you mean embeddings"),
        ({"taps": ("feature_map",)}, "taps has 'feature_map'. Did you mean feature_maps"),
        ({"share": "trunks"}, "share is 'trunks'; expected 'trunk' or 'none'. Did you mean trunk"),
        ({"trunk_gradient": "average"}, "trunk_gradient is 'average'; expected 'sum' or 'mean'"),
        ({"members": "3"}, "members is '3'; expected a whole number"),
        ({"members": 0}, "members is 0; expected a whole number of 1 or more"),
        ({"tasks": "classify"}, r"tasks is the string 'classify'; expected a tuple"),
    ],
)
def test_a_class_that_declares_what_there_is_not_is_refused_where_it_is_written(declared: dict, words: str) -> None:
    with pytest.raises(MethodError, match=f"^Wrong: {words}"):
        type("Wrong", (Method,), declared)


@pytest.mark.parametrize(("taps", "words"), [("shared", "the string 'shared'"), (["stages"], "taps has 'stages'")])
def test_a_cohort_made_by_hand_knows_its_taps(taps: object, words: str) -> None:
    with pytest.raises(MethodError, match=words):
        Cohort(Tiny(), IMAGES, [Branch("early")], taps=taps)  # type: ignore[arg-type]


USES: dict[str, Callable[[CohortOutput], object]] = {
    "stage_maps": lambda out: out.stage_maps[0],
    "feature_maps": lambda out: [x.mean() for x in out.feature_maps],
    "embeddings": lambda out: len(out.embeddings),
    "shared": lambda out: F.relu(out.shared),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", USES)
def test_what_is_not_tapped_says_so_when_it_is_looked_at(name: str) -> None:
    others = [other for other in USES if other != name]
    untapped, tapped = cohort(*others)(IMAGES), cohort(name)(IMAGES)
    assert USES[name](tapped) is not None
    with pytest.raises(CutError, match=rf'out.{name} is looked at, and not tapped. Say taps = \("{name}",\)'):
        USES[name](untapped)
    if name == "shared":
        with pytest.raises(CutError, match="With a view for each member there is none"):
            untapped.shared.mean()  # type: ignore[union-attr]


def test_a_cohort_that_was_stripped_says_so() -> None:
    stripped = cohort("embeddings")
    student = stripped.strip()
    with pytest.raises(CutError, match=r"this cohort was stripped.*Run the network that strip\(\) gave"):
        stripped(IMAGES)
    assert isinstance(student(IMAGES), Tensor)
