"""A run that was stopped, killed or moved goes on as if nothing had happened, or says why it cannot."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from okdc.errors import RunError
from okdc.needs import Needs
from okdc.pipeline.facts import metrics_of
from okdc.system.signals import StopSignal
from okdc.training import TrainState, checkpoint
from tests.helpers.training import (
    SETTINGS,
    STEPS,
    Crash,
    Tiny,
    assert_same_run,
    crash_at,
    network,
    run,
    same,
    tiny_data,
)

# --- resuming ---------------------------------------------------------------------------------------------------------

HARD = replace(
    SETTINGS, epochs=3, model_ema=True, grad_accum_steps=2, recovery_interval=1, amp=True, sched_on_updates=True,
    warmup_epochs=1, clip_grad=1.0, checkpoint_hist=2,
)  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "position"),
    [
        pytest.param(SETTINGS, (1, 0), id="epoch"),
        pytest.param(replace(SETTINGS, recovery_interval=2), (1, 5), id="step"),
        pytest.param(replace(SETTINGS, recovery_interval=1, opt="adamw", sched="multistep"), (2, 3), id="adamw"),
        pytest.param(HARD, (1, 4), id="ema-accumulation-bf16-updates"),
        pytest.param(replace(HARD, amp_dtype="float16", grad_accum_steps=1), (1, 2), id="fp16"),
    ],
)
def test_a_run_that_crashed_and_resumes_equals_one_that_did_not(tmp_path, settings, position):
    whole = run(tmp_path / "whole", settings)
    with pytest.raises(Crash):
        run(tmp_path / "cut", settings, data=tiny_data(crash_at(*position)))
    torch.manual_seed(99)  # nothing may depend on the random state in which a run is resumed
    resumed = run(tmp_path / "cut", settings, resume=tmp_path / "cut" / "last.pth.tar")
    assert_same_run(whole, resumed, tmp_path / "whole", tmp_path / "cut")
    assert resumed.epoch == settings.epochs
    assert whole.method.steps_seen == settings.epochs * STEPS // settings.grad_accum_steps


@pytest.mark.parametrize("settings", [{}, {"opt": "adamw"}, {"opt": "lookahead_sgd"}])
def test_a_run_goes_on_in_another_memory_layout_as_in_its_own(tmp_path, settings):
    before = replace(SETTINGS, model_ema=False, lr=1e-3, **settings)
    calm = partial(Tiny, drop=0.0, norm=False)  # Adam makes much of the rounding in what a norm takes out again
    with pytest.raises(Crash):
        run(tmp_path / "run", before, method=calm(), data=tiny_data(crash_at(2, 0)))
    same_layout = run(tmp_path / "whole", before, method=calm())
    other = run(
        tmp_path / "run", replace(before, channels_last=True), method=calm(), resume=tmp_path / "run" / "last.pth.tar"
    )
    for name, value in same_layout.method.state_dict().items():
        if isinstance(value, Tensor):
            assert torch.allclose(value, other.method.state_dict()[name], atol=1e-6), name


def test_a_parameter_that_is_a_view_is_trained_alone(tmp_path):
    """Of a wider tensor, of which the rest belongs to somebody else; fused optimizers would write there."""
    wide = torch.randn(4, 6, 3, 3)
    method = Tiny(drop=0.0)
    method.cohort.target[0].weight = nn.Parameter(wide[:, :3])
    mine, others = wide[:, :3].clone(), wide[:, 3:].clone()
    run(tmp_path, method=method)
    assert same(wide[:, 3:], others) and not same(method.cohort.target[0].weight, mine)


class Late(nn.Conv2d):
    """Skipped in the first passes in training mode: its weights have no gradient in the first epoch."""

    def __init__(self) -> None:
        super().__init__(3, 3, 1)
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.passes += self.training
        return super().forward(x) if self.passes > STEPS + 2 else x


@pytest.mark.parametrize("opt", ["sgd", "lookahead_sgd", "adamw"])
def test_a_first_gradient_may_come_late(tmp_path, opt):
    """The step in one pass is that of each parameter by itself, also resumed from before the first gradient."""
    torch.manual_seed(0)
    target = nn.Sequential(Late(), network(norm=False))
    settings = replace(SETTINGS, recovery_interval=1, opt=opt)

    def method() -> Tiny:
        return Tiny(copy.deepcopy(target))

    whole = run(tmp_path / "whole", settings, method=method())
    with pytest.raises(Crash):
        run(tmp_path / "cut", settings, method=method(), data=tiny_data(crash_at(1, 1)))
    resumed = run(tmp_path / "cut", settings, method=method(), resume=tmp_path / "cut" / "last.pth.tar")
    assert_same_run(whole, resumed, tmp_path / "whole", tmp_path / "cut")
    plain = run(tmp_path / "plain", replace(settings, opt_kwargs={"fused": False}), method=method())
    for mine, theirs in zip(whole.student.parameters(), plain.student.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)
    assert not torch.equal(whole.student[0].weight, target[0].weight)


def test_a_complete_run_is_returned_without_training(tmp_path):
    whole = run(tmp_path)
    again = run(tmp_path, resume=tmp_path / "last.pth.tar", data=tiny_data(crash_at(3, 0)))
    assert_same_run(whole, again, tmp_path, tmp_path)


def test_a_run_whose_pairs_an_older_okdc_drew_is_told_that_others_come(tmp_path, capsys, monkeypatch):
    last = tmp_path / "last.pth.tar"

    def told() -> bool:
        run(tmp_path, resume=last)
        return "draws the images that the method compares in another order" in capsys.readouterr().err

    run(tmp_path)
    payload = checkpoint.load(last)
    del payload["okdc"]["draws"]
    checkpoint.save(tmp_path / "old.pth.tar", payload)
    current = last.read_bytes()
    last.write_bytes((tmp_path / "old.pth.tar").read_bytes())
    assert not told()
    monkeypatch.setattr(Tiny, "needs", classmethod(lambda cls, **settings: Needs(pairs=True)))
    assert told()
    last.write_bytes(current)
    assert not told()


@pytest.mark.parametrize("opt", ["sgd", "adamw"])
def test_what_ships_and_what_goes_on_are_two_files_and_none_of_them_stays_open(tmp_path, opt):
    settings = replace(SETTINGS, opt=opt)
    run(tmp_path, replace(settings, epochs=2))
    last, best = (checkpoint.load(tmp_path / name) for name in (checkpoint.LAST, checkpoint.BEST))
    assert sorted(best) == ["arch", "args", "epoch", "metric", "state_dict", "version"]
    assert sorted(set(last) - set(best)) == ["okdc", "optimizer"]
    resumed = run(tmp_path, settings, resume=tmp_path / checkpoint.LAST)
    if sys.platform == "linux":
        assert ".pth.tar" not in Path("/proc/self/maps").read_text()
    assert resumed.epoch == 3


def test_a_complete_run_can_be_made_longer(tmp_path):
    run(tmp_path)
    longer = run(tmp_path, replace(SETTINGS, epochs=4), resume=tmp_path / "last.pth.tar")
    assert [row["epoch"] for row in longer.history] == [0, 1, 2, 3]
    assert longer.history[3]["lr"] == pytest.approx(0.05 * 0.5 * (1 + np.cos(np.pi * 3 / 4)))


def test_a_damaged_last_checkpoint_is_replaced_by_the_one_before(tmp_path, caplog):
    settings = replace(SETTINGS, checkpoint_hist=2)
    whole = run(tmp_path / "whole", settings)
    run(tmp_path / "cut", settings)
    last = tmp_path / "cut" / "last.pth.tar"
    size = last.stat().st_size
    last.unlink()  # a link to model_best.pth.tar, which is to stay whole
    last.write_bytes((tmp_path / "cut" / "last.1.pth.tar").read_bytes()[: size // 2])
    resumed = run(tmp_path / "cut", settings, resume=last)
    assert "damaged or cut short" in caplog.text and "last.1.pth.tar" in caplog.text
    assert_same_run(whole, resumed, tmp_path / "whole", tmp_path / "cut")


def test_a_best_checkpoint_that_is_damaged_is_made_anew_or_told_of(tmp_path, capsys):
    run(tmp_path, replace(SETTINGS, epochs=2))
    best, last = tmp_path / checkpoint.BEST, tmp_path / "last.pth.tar"
    content = best.read_bytes()
    best.unlink()  # not the last one too, which may be the same file
    best.write_bytes(content[: len(content) // 2])
    with pytest.raises(RunError, match=rf"finished run whose {checkpoint.BEST} is damaged.*--epochs 3"):
        run(tmp_path, replace(SETTINGS, epochs=2), resume=last)
    state = run(tmp_path, replace(SETTINGS, lr=1e-12), resume=last)
    assert f"{checkpoint.BEST} is damaged, so the next epoch is kept" in capsys.readouterr().err
    assert state.best_epoch == 2 and checkpoint.load(best)["epoch"] == 2
    assert metrics_of(state.history, state.best_epoch, 3)["top1"] == state.best == state.history[2]["eval_top1"]


def test_settings_that_are_changed_act_from_where_a_run_goes_on(tmp_path, capsys):
    plain = replace(SETTINGS, sched="none", lr=0.1, weight_decay=1e-4, recovery_interval=1)
    with pytest.raises(Crash):
        run(tmp_path, plain, data=tiny_data(crash_at(0, 2)), recipe={"train": asdict(plain)})
    other = replace(plain, lr=0.05, weight_decay=3e-4)
    state = run(tmp_path, other, resume=tmp_path / "last.pth.tar", recipe={"train": asdict(other)})
    assert {group["lr"] for group in state.optimizer.param_groups} == {0.05}
    assert {group["weight_decay"] for group in state.optimizer.param_groups} == {3e-4}
    said = capsys.readouterr().err
    assert "train.lr is 0.05 from here on, before it was 0.1." in said and "train.weight_decay is 0.0003" in said


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (lambda: {"arch": "resnet18"}, "network 'tiny', this run 'resnet18'"),
        (lambda: {"settings": replace(SETTINGS, opt="adamw")}, "optimizer 'sgd', this run 'adamw'"),
        (lambda: {"settings": replace(SETTINGS, model_ema=True)}, "model_ema False, this run True"),
        (
            lambda: {"method": Tiny(width=8)},
            r"target.0.weight is \(4, 3, 3, 3\) in the checkpoint and \(8, 3, 3, 3\) here",
        ),
        (lambda: {"method": Tiny(nn.Sequential(network()))}, "target.0.0.weight is missing from the checkpoint"),
        (lambda: {"data": tiny_data(batch=4)}, "saved within an epoch of 6 steps, this run has 12"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_by_name(tmp_path, other, words):
    with pytest.raises(Crash):
        run(tmp_path, replace(SETTINGS, recovery_interval=1), data=tiny_data(crash_at(0, 2)))
    with pytest.raises(RunError, match=words):
        run(tmp_path, **other(), resume=tmp_path / "last.pth.tar")


# --- being killed -----------------------------------------------------------------------------------------------------


KILLED = replace(SETTINGS, recovery_interval=2, model_ema=True)
SIGNALS = (signal.SIGKILL, signal.SIGINT, signal.SIGTERM)


def run_and_be_killed(root: str) -> None:
    """One process per signal, forked because the imports take long; each kills itself while it waits for a batch."""
    torch.set_num_threads(1)
    codes = {}
    for number in SIGNALS:
        if pid := os.fork():
            codes[number.name] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            continue

        def before(epoch: int, index: int, number=number) -> None:
            if (epoch, index) == (1, 3):
                for saving in set(threading.enumerate()) - {threading.main_thread()}:
                    saving.join()  # so that it is known which state is on the disk
                os.kill(os.getpid(), number)

        with open(f"{root}/{number.name}.txt", "w") as output:
            os.dup2(output.fileno(), 2)
        run(Path(root, number.name), KILLED, data=tiny_data(before))
        os._exit(0)  # it was not stopped
    Path(root, "codes.json").write_text(json.dumps(codes))


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> Path:
    """A folder of runs that got each signal in the middle of their second epoch."""
    root = tmp_path_factory.mktemp("killed")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, __file__, root], env=environment, check=True, timeout=300)
    return root


@pytest.mark.parametrize(("number", "code", "step"), list(zip(SIGNALS, (-9, 130, 143), (2, 4, 4))))
def test_a_killed_process_resumes_exactly(tmp_path, killed, one_thread, number, code, step):
    folder, output = killed / number.name, (killed / f"{number.name}.txt").read_text()
    assert json.loads((killed / "codes.json").read_text())[number.name] == code, output
    saved = checkpoint.load_run(folder / "last.pth.tar")["okdc"]["run"]
    assert (saved["epoch"], saved["step"]) == (1, step)
    if number != signal.SIGKILL:  # the step was finished and saved
        assert f"Continue with: okdc compress --resume {folder / 'last.pth.tar'}" in output
    whole = run(tmp_path, KILLED)
    resumed = run(folder, KILLED, resume=folder / "last.pth.tar")
    assert_same_run(whole, resumed, tmp_path, folder)


def test_a_signal_during_validation_does_not_lose_the_epoch(tmp_path):
    class Interrupted(list):
        def __iter__(self):
            for batch in super().__iter__():
                signal.raise_signal(signal.SIGTERM)
                yield batch

    data = tiny_data()
    data.validation = Interrupted(data.validation)
    with pytest.raises(SystemExit, match="143"):
        run(tmp_path / "cut", data=data)
    saved = checkpoint.load_run(tmp_path / "cut" / "last.pth.tar")["okdc"]["run"]
    assert (saved["epoch"], saved["step"], saved["history"]) == (0, STEPS, [])
    resumed = run(tmp_path / "cut", resume=tmp_path / "cut" / "last.pth.tar")
    assert_same_run(run(tmp_path / "whole"), resumed, tmp_path / "whole", tmp_path / "cut")


def test_the_second_ctrl_c_ends_at_once_and_the_handlers_come_back():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit, match="130"), StopSignal() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.signal == signal.SIGINT
        signal.raise_signal(signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_training_in_a_thread_leaves_the_signals_alone(tmp_path):
    states: list[TrainState] = []
    thread = threading.Thread(target=lambda: states.append(run(tmp_path, replace(SETTINGS, epochs=1))))
    thread.start()
    thread.join()
    assert states[0].epoch == 1


if __name__ == "__main__":
    run_and_be_killed(*sys.argv[1:])


def test_a_checkpoint_of_before_peers_had_a_name_goes_on(tmp_path):
    with pytest.raises(Crash):
        run(tmp_path, data=tiny_data(crash_at(1, 2)))
    last = tmp_path / "last.pth.tar"
    payload = torch.load(last, weights_only=True)
    saved = payload["okdc"]["run"]
    old = [{key.replace("peer2", "branch2"): value for key, value in row.items()} for row in saved["history"]]
    assert "top1/branch2" in old[0]
    saved["history"] = old
    torch.save(payload, last)
    rows = run(tmp_path, resume=last).history
    assert all(row.keys() == rows[0].keys() for row in rows) and "top1/peer2" in rows[0]
