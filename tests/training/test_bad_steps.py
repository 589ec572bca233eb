"""Losses that are not finite: a step changes nothing, and five in a row end the run."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from okdc.errors import TrainingError
from okdc.training import checkpoint
from tests.helpers.training import (
    SETTINGS,
    STEPS,
    Tiny,
    assert_same_run,
    run,
    same,
    summary,
)


class Poisoned(Tiny):
    """At the steps in `when` batch norm sees images that are nan, and the loss term `where` or the gradient is nan."""

    def __init__(self, when: range, where: str = "kl") -> None:
        super().__init__()
        self.when, self.where, self.calls = when, where, 0
        self.seen: list[dict] = []

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        self.seen.append(copy.deepcopy(self.state_dict()))
        self.calls += 1
        if self.calls - 1 not in self.when:
            return super().forward(images, labels)
        losses = super().forward(images * torch.nan, labels)
        if self.where == "gradient":
            return {"ce": (self.cohort.target[0].weight.sum() * 0).sqrt() + 1}
        return {name: loss if name == self.where else torch.ones(()) for name, loss in losses.items()}


@pytest.mark.parametrize("where", ["kl", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing_and_is_told_and_counted(tmp_path, capsys, where):
    state = run(tmp_path, replace(SETTINGS, epochs=1), method=Poisoned(range(1, 4), where))
    before, after = state.method.seen[1], state.method.seen[4]
    assert [name for name in before if not same(before[name], after[name])] == []
    assert not same(before["cohort.target.0.weight"], state.method.seen[5]["cohort.target.0.weight"])
    assert state.history[0]["skipped_steps"] == 3 and summary(tmp_path)[0][f"skipped/{where}"] == "3"
    told = f"step 2 of epoch 1 was skipped: {'the gradient' if where == 'gradient' else 'the loss term'}"
    shown = capsys.readouterr().err
    assert shown.count("was skipped: ") == shown.count(told) == 1 and (where == "gradient" or f"{where!r}" in shown)
    assert np.isfinite(state.history[0]["train_loss"])


def test_a_large_buffer_of_the_users_network_is_put_back_too(tmp_path):
    class Codebook(nn.Module):
        """Moves the rows that it stands for towards what it sees, as quantisers do."""

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("rows", torch.zeros(2**14 + 1))

        def forward(self, features: Tensor) -> Tensor:
            if self.training:
                self.rows.lerp_(features.detach().mean(), 0.1)
            return features

    method = Poisoned(range(1, 4))
    method.cohort.target.append(Codebook())
    state = run(tmp_path, replace(SETTINGS, epochs=1), method=method)
    rows = [seen["cohort.target.7.rows"] for seen in method.seen]
    assert same(rows[1], rows[4]) and not same(rows[4], rows[5]) and state.method.cohort.target[7].rows.isfinite().all()


def test_a_loss_that_no_trained_parameter_reaches_is_said_in_words(tmp_path):
    class Apart(Tiny):
        def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
            return {name: loss.detach() for name, loss in super().forward(images, labels).items()}

    with pytest.raises(TrainingError, match="no parameter that is trained reaches the loss"):
        run(tmp_path, method=Apart())


def test_five_bad_steps_in_a_row_stop_the_run_and_keep_the_last_good_state(tmp_path):
    with pytest.raises(
        TrainingError, match="'kl' was not finite for 5 steps in a row, up to step 5 of epoch 2"
    ) as error:
        run(tmp_path, method=Poisoned(range(STEPS, 100)))
    assert str(tmp_path / "last.pth.tar") in str(error.value)
    assert checkpoint.load_run(tmp_path / "last.pth.tar")["okdc"]["run"]["epoch"] == 1
    resumed = run(tmp_path, resume=tmp_path / "last.pth.tar", method=Poisoned(range(0)))
    assert_same_run(run(tmp_path / "whole", method=Poisoned(range(0))), resumed, tmp_path / "whole", tmp_path)
