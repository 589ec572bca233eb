"""The training loop: honest about bad losses and slow data, and in step with timm."""

from __future__ import annotations

import copy
import csv
import multiprocessing
import os
import random
import signal
import time
from dataclasses import asdict, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import timm.optim
import timm.scheduler
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from okdc.cohort import Branch, Cohort
from okdc.data import wrap
from okdc.errors import DataError, RecipeError, TrainingError
from okdc.methods.ahbf import Ahbf
from okdc.training import checkpoint
from okdc.training.loggers import Loggers
from okdc.training.loop import _tell_idle
from okdc.training.machine import Machine, choose_device
from okdc.training.progress import Display, faster_data
from okdc.training.state import TrainState, save
from tests.helpers.training import (
    BATCH,
    CLASSES,
    SETTINGS,
    STEPS,
    TIMES,
    Crash,
    Tiny,
    assert_same_run,
    crash_at,
    network,
    run,
    same,
    summary,
    tiny_data,
)

# --- losses that are not finite ---------------------------------------------------------------------------------------


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


# --- the arithmetic ---------------------------------------------------------------------------------------------------


def test_accumulated_batches_equal_one_big_batch(tmp_path):
    settings = replace(SETTINGS, sched="none")
    big = run(tmp_path / "big", settings, method=Tiny(norm=False, drop=0), data=tiny_data(batch=2 * BATCH))
    accumulated = replace(settings, grad_accum_steps=2)
    small = run(tmp_path / "small", accumulated, method=Tiny(norm=False, drop=0))
    for name, value in big.method.cohort.state_dict().items():
        torch.testing.assert_close(small.method.cohort.state_dict()[name], value)
    assert small.history[-1]["train_loss"] == pytest.approx(big.history[-1]["train_loss"])


def test_each_batch_of_a_step_may_have_losses_of_other_names(tmp_path):
    class Varying(Tiny):
        """Calls the cross-entropy otherwise in every other batch, and then has no further loss."""

        batch = 0

        def losses(self, out, labels):
            parts = super().losses(out, labels)
            self.batch += 1
            return {"even": parts["ce"] + parts["kl"]} if self.batch % 2 == 0 else parts

    settings = replace(SETTINGS, epochs=1, grad_accum_steps=2)
    plain, other = (run(tmp_path / kind.__name__, settings, method=kind()) for kind in (Tiny, Varying))
    first, second = plain.history[-1], other.history[-1]
    assert second["train_loss"] == pytest.approx(first["train_loss"])
    assert 0 < second["loss/ce"] < first["loss/ce"]  # of half of the images
    assert second["loss/ce"] + second["loss/kl"] + second["loss/even"] == pytest.approx(second["train_loss"])
    for name, value in plain.method.cohort.state_dict().items():
        torch.testing.assert_close(value, other.method.cohort.state_dict()[name])


class Logging(Tiny):
    """Logs a tensor for each batch, and a number in every other step."""

    def losses(self, out, labels):
        parts = super().losses(out, labels)
        self.log("ce", 2 * parts["ce"])
        return parts

    def before_step(self):
        if self.steps_seen % 2:
            self.log("odd", self.steps_seen)


def test_what_a_method_logs_is_in_the_row_and_not_in_the_loss(tmp_path):
    settings = replace(SETTINGS, epochs=1, grad_accum_steps=2)
    plain, logging = (run(tmp_path / kind.__name__, settings, method=kind()) for kind in (Tiny, Logging))
    first, second = plain.history[-1], logging.history[-1]
    assert second["log/ce"] == pytest.approx(2 * first["loss/ce"]) and second["log/odd"] == 1  # of three steps
    assert {name: second[name] for name in first if name not in TIMES} == {
        name: value for name, value in first.items() if name not in TIMES
    }
    assert "log/ce" in (tmp_path / "Logging" / "summary.csv").read_text()


def test_a_compiled_method_logs_too():
    method = Logging()
    forward = torch.compile(method, fullgraph=True, backend="aot_eager")
    for seed in range(2):
        torch.manual_seed(seed)
        parts = forward(torch.randn(4, 3, 8, 8), torch.arange(4) % 3)
        logged = method.logged()
        assert list(logged) == ["ce"] and not logged["ce"].requires_grad
        torch.testing.assert_close(logged["ce"], 2 * parts["ce"].detach())


@pytest.mark.parametrize("on_updates", [False, True])
@pytest.mark.parametrize("sched", ["cosine", "step", "multistep", "none"])
def test_learning_rates_are_those_of_timm(tmp_path, sched, on_updates):
    seen = []
    settings = replace(
        SETTINGS, epochs=4, sched=sched, sched_on_updates=on_updates, warmup_epochs=1, decay_milestones=[2],
        decay_epochs=2,
    )  # fmt: skip
    method = Tiny()
    method.after_step = lambda batches: seen.append(state_lr())
    groups: list[dict] = []
    method.param_groups = lambda lr: groups
    groups.append({"params": list(method.parameters())})

    def state_lr() -> float:
        return groups[0]["lr"]

    run(tmp_path, settings, method=method)

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.05)
    schedule, _ = timm.scheduler.create_scheduler_v2(
        optimizer, sched, num_epochs=4, warmup_epochs=1, warmup_lr=1e-5, decay_milestones=[2], decay_epochs=2,
        step_on_epochs=not on_updates, updates_per_epoch=STEPS,
    )  # fmt: skip
    expected = []
    for update in range(4 * STEPS):
        expected.append(optimizer.param_groups[0]["lr"])
        if schedule:
            schedule.step_update(update + 1)
            if (update + 1) % STEPS == 0:
                schedule.step((update + 1) // STEPS)
    assert seen == expected


def test_a_compiled_run_learns_what_an_eager_one_does_in_one_graph(tmp_path, monkeypatch):
    from torch._dynamo.utils import counters

    def trained(compiles: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        method = Ahbf(Cohort(network(), torch.randn(2, 3, 8, 8), [Branch("1")], taps=Ahbf.taps))
        settings = replace(SETTINGS, epochs=1, torchcompile=compiles)
        return run(tmp_path / str(compiles), settings, method=method).method.state_dict()

    # What tracing gets wrong, this backend does too, and it takes a tenth of the time.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    counters.clear()
    eager, compiled = trained(False), trained(True)
    assert [name for name, value in eager.items() if not torch.equal(value, compiled[name])] == []
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_gradients_in_the_memory_of_cuda_graphs_cannot_be_added_up(tmp_path, mode):
    graphs = replace(SETTINGS, torchcompile=True, torchcompile_mode=mode, grad_accum_steps=2)
    with pytest.raises(RecipeError, match=f"--torchcompile-mode {mode} .*--grad-accum-steps 2.*no-cudagraphs"):
        run(tmp_path, graphs)
    assert not list(tmp_path.iterdir())


class Watched(Tiny):
    def losses(self, out, labels):
        self.seen = torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark
        return super().losses(out, labels)


def test_what_is_allowed_for_speed_holds_while_a_run_trains(tmp_path):
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark
    for settings, expected in (
        ({}, before),
        ({"matmul_precision": "high"}, ("high", before[1])),
        ({"cudnn_benchmark": True}, (before[0], True)),
    ):
        method = Watched()
        run(tmp_path / str(expected), replace(SETTINGS, epochs=1, **settings), method=method)
        assert method.seen == expected
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark) == before


def test_the_learning_rate_follows_the_batch_size(tmp_path):
    settings = replace(SETTINGS, epochs=1, lr=None, lr_base=0.1, batch_size=64, grad_accum_steps=2)
    assert run(tmp_path, settings).history[0]["lr"] == pytest.approx(0.05)


def test_the_moving_average_is_timms_and_is_what_is_evaluated(tmp_path):
    kept: list[nn.Module] = []
    method = Tiny()
    method.after_step = lambda batches: kept.append(copy.deepcopy(method.cohort.target))
    state = run(tmp_path, replace(SETTINGS, epochs=2, model_ema=True), method=method)
    average = timm.utils.ModelEmaV3(kept[0], 0.9998, use_warmup=True)
    for update, target in enumerate(kept, 1):
        average.update(target, step=update)
    for name, value in average.module.state_dict().items():
        assert torch.equal(state.student.state_dict()[name], value), name
    images, labels = (torch.cat(parts) for parts in zip(*tiny_data().validation))
    average.module.eval()
    top1 = 100 * (average.module(images).argmax(1) == labels).double().mean()
    assert state.history[-1]["eval_top1"] == pytest.approx(top1.item())


def test_weight_decay_reaches_biases_unless_they_are_spared(tmp_path):
    groups = run(tmp_path, replace(SETTINGS, epochs=1)).optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == [5e-4]
    spared = replace(SETTINGS, epochs=1, opt_kwargs={"filter_bias_and_bn": True})
    groups = run(tmp_path, spared).optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == [5e-4, 0.0]
    assert all(p.ndim <= 1 for p in groups[1]["params"]) and len(groups[1]["params"]) == 9


def test_betas_and_epsilon_reach_the_optimizer_and_a_run_that_goes_on(tmp_path):
    settings = replace(SETTINGS, epochs=1, opt="adamw", opt_betas=[0.8, 0.9], opt_eps=1e-6)
    (group,) = run(tmp_path, settings, recipe={"train": asdict(settings)}).optimizer.param_groups
    assert (group["betas"], group["eps"]) == ((0.8, 0.9), 1e-6)
    longer = replace(settings, epochs=2, opt_betas=[0.7, 0.9])
    resumed = run(tmp_path, longer, resume=tmp_path / "last.pth.tar", recipe={"train": asdict(longer)})
    (group,) = resumed.optimizer.param_groups
    assert (tuple(group["betas"]), group["eps"]) == ((0.7, 0.9), 1e-6)


def test_the_callers_random_numbers_are_given_back(tmp_path):
    def draw(train: bool) -> tuple:
        method = Tiny()
        torch.manual_seed(5), random.seed(5), np.random.seed(5)
        if train:
            run(tmp_path, replace(SETTINGS, epochs=1), method=method)
        return torch.rand(1), random.random(), np.random.rand()

    assert draw(train=True) == draw(train=False)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"opt": "adamww"}, "no optimizer 'adamww'. Did you mean adamw"),
        ({"opt_kwargs": {"beta": 1}}, "beta"),
        ({"opt_betas": [0.9, 0.99]}, "--opt sgd has no betas: leave out --opt-betas"),
        ({"sched": "plateau"}, "expected one of cosine"),
        ({"device": "toaster"}, "expected auto, cpu"),
        ({"device": "cuda:99"}, "CUDA devices"),
    ],
)
def test_settings_that_do_not_exist_are_named(tmp_path, settings, words):
    with pytest.raises(RecipeError, match=words):
        run(tmp_path, replace(SETTINGS, **settings))


def test_precision_and_memory_layout_follow_the_device():
    assert Machine.of(SETTINGS).dtype is None
    half, fp16 = replace(SETTINGS, amp=True), replace(SETTINGS, amp=True, amp_dtype="float16")
    assert Machine.of(half).dtype == torch.bfloat16 and Machine.of(fp16).dtype == torch.float16
    layouts = [Machine.of(each).memory_format for each in (SETTINGS, half, replace(half, channels_last=False), fp16)]
    assert layouts == [torch.preserve_format, torch.channels_last, torch.preserve_format, torch.preserve_format]
    assert choose_device("cpu") == torch.device("cpu")


# --- what is left behind ----------------------------------------------------------------------------------------------


def test_summary_has_timms_columns_first_and_one_line_per_epoch(tmp_path):
    with Loggers(["tensorboard"], tmp_path, {}) as loggers:
        state = run(tmp_path, loggers=loggers)
    lines = (tmp_path / "summary.csv").read_text().splitlines()
    header = "epoch,train_loss,eval_loss,eval_top1,eval_top5,eval_balanced,lr,loss/ce,loss/kl,"
    header += "top1/target,top1/branch1,top1/peer2,"
    assert lines[0] == header + "top1/ensemble,seconds,images_per_second,data_wait,skipped_steps"
    assert len(lines) == 1 + SETTINGS.epochs
    row = state.history[-1]
    assert row["train_loss"] == pytest.approx(row["loss/ce"] + row["loss/kl"])
    assert row["eval_top5"] == 100 and row["eval_top1"] == row["top1/target"]
    assert list(tmp_path.glob("tensorboard/events.*"))


def test_the_student_is_judged_on_every_validation_image(tmp_path):
    state = run(tmp_path)
    images, labels = (torch.cat(parts) for parts in zip(*tiny_data().validation))
    with torch.no_grad():
        out = state.method.cohort(images)
    row = state.history[-1]
    top1 = [100 * (z.argmax(1) == labels).double().mean().item() for z in (*out.logits, state.method.ensemble(out))]
    assert [row[f"top1/{name}"] for name in ("target", "branch1", "peer2", "ensemble")] == pytest.approx(top1)
    assert row["eval_loss"] == pytest.approx(F.cross_entropy(out.logits[0], labels).item(), rel=1e-5)
    assert state.best == max(row["eval_top1"] for row in state.history)
    assert state.history[state.best_epoch]["eval_top1"] == state.best


def test_without_validation_the_last_epoch_is_the_best(tmp_path):
    state = run(tmp_path, data=tiny_data(validation=False))
    assert state.best_epoch == SETTINGS.epochs - 1 and state.history[-1]["eval_top1"] is None
    best = checkpoint.load(tmp_path / "model_best.pth.tar")["state_dict"]
    assert all(torch.equal(best[name], value) for name, value in state.student.state_dict().items())


def test_the_time_that_is_left_does_not_count_on_waiting_for_a_first_batch_each_step(tmp_path):
    left = []

    def late(epoch, index):
        if (epoch, index) == (0, 0):
            time.sleep(0.5)

    class Told(Display):
        def step(self, epoch, step, losses, lr, speed, seconds):
            left.append(seconds)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("okdc.training.loop.Display", Told)
        run(tmp_path, data=tiny_data(late))
    assert left[0] < 0.5 * (STEPS * SETTINGS.epochs - 1) / 2


def test_a_first_step_that_compiles_is_not_taken_for_the_pace():
    run: Any = SimpleNamespace(settings=replace(SETTINGS, epochs=2), steps=100)
    state: Any = SimpleNamespace(epoch=0, step=3, between=0.0, late=60.0)
    state.sums = {"seconds": 61.0, "steps": 2, "skipped": 1, "waited": 1.0}
    assert TrainState.seconds_left(state, run) == pytest.approx(0.5 * 197)


@pytest.mark.parametrize("model_ema", [False, True])
def test_plain_timm_loads_the_student_from_the_best_checkpoint(tmp_path, model_ema):
    def create(**options) -> nn.Module:
        return timm.create_model("mobilenetv3_small_050", num_classes=CLASSES, **options)

    method = Tiny(create())
    settings = replace(SETTINGS, epochs=1, model_ema=model_ema)
    state = run(tmp_path, settings, method=method, arch="mobilenetv3_small_050")
    loaded = create(checkpoint_path=str(tmp_path / "model_best.pth.tar")).state_dict()
    assert loaded.keys() == method.cohort.target.state_dict().keys()
    assert all(torch.equal(loaded[name], value) for name, value in state.student.state_dict().items())
    payload = checkpoint.load(tmp_path / "model_best.pth.tar")
    assert payload["arch"] == "mobilenetv3_small_050" and payload["version"] == 2 and payload["epoch"] == 0
    assert payload["metric"] == state.best and payload["args"] == {"train": {"epochs": 1}}
    assert checkpoint.student_weights(payload).keys() == loaded.keys()


class Slow(list):
    """Validation batches that take their time."""

    def __iter__(self):
        for batch in super().__iter__():
            time.sleep(0.12)
            yield batch


@pytest.mark.parametrize("resumed", [False, True])
def test_the_time_left_is_right_at_half_of_the_steps(tmp_path, monkeypatch, resumed):
    seen = {}

    class Noting(Display):
        def step(self, epoch: int, step: int, losses, lr: float, speed: float, left: float) -> None:
            seen[epoch, step] = time.perf_counter(), left

    clock = [0.0]  # on which only sleeping takes time, whatever else the machine does

    def sleep(seconds: float) -> None:
        clock[0] += seconds

    monkeypatch.setattr("okdc.training.loop.Display", Noting)
    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    settings, middle = replace(SETTINGS, epochs=4, recovery_interval=1), (2, 1)

    def data(before=lambda *position: None) -> SimpleNamespace:
        slow = tiny_data(lambda *position: (before(*position), time.sleep(0.06)))
        slow.validation = Slow(slow.validation)
        return slow

    if resumed:
        with pytest.raises(Crash):
            run(tmp_path, settings, data=data(crash_at(1, 4)))
    run(tmp_path, settings, data=data(), resume=tmp_path / "last.pth.tar" if resumed else None)
    then, left = seen[middle]
    assert left == pytest.approx(clock[0] - then, rel=0.02) and left > 1


def test_the_time_spent_waiting_for_data_is_shown_with_advice(tmp_path, capsys):
    recipe = {"data": {"data": "images", "workers": 0}, "train": {"epochs": 2}}
    slow = tiny_data(lambda *_: time.sleep(0.1))
    state = run(tmp_path, replace(SETTINGS, epochs=2), data=slow, recipe=recipe)
    told = capsys.readouterr().err
    assert all(50 < row["data_wait"] <= 100 for row in state.history)
    assert f"data wait {state.history[0]['data_wait']:.0f} %" in told and told.count("-j ") == 1
    with open(tmp_path / "summary.csv", newline="") as file:
        assert [float(row["data_wait"]) for row in csv.DictReader(file)] == [r["data_wait"] for r in state.history]
    slow.train.resident = True
    run(tmp_path / "resident", replace(SETTINGS, epochs=1), data=slow, recipe=recipe)
    assert "kept decoded already" in capsys.readouterr().err
    method = Tiny()
    method.after_step = lambda batches: time.sleep(0.05)
    state = run(tmp_path / "quick", replace(SETTINGS, epochs=1), method=method, recipe=recipe)
    assert state.history[0]["data_wait"] < 10 and "-j " not in capsys.readouterr().err


def test_advice_for_whoever_waits_for_data_is_what_helps():
    cores = os.cpu_count() or 1
    assert "(num_workers=N)" in faster_data({"data": {"data": "loader", "workers": 0}})
    assert "--resident auto" in faster_data({"data": {"data": "images", "workers": 0, "resident": "off"}})
    assert f"-j {min(cores, 2)}." in faster_data({"data": {"data": "images", "workers": 0}}) or cores == 1
    assert "--aa" in faster_data({"data": {"data": "images", "workers": cores}})
    assert "(-b)" in faster_data({"data": {"data": "images", "workers": 0}}, resident=True)


# --- data that do not come --------------------------------------------------------------------------------------------


class Sleepy(torch.utils.data.Dataset):
    """Images of which one is never there, in the process that loads it."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int):
        time.sleep(1000 if index == 20 else 0)
        return torch.zeros(3, 8, 8), index % CLASSES


class TwoOfThree(list):
    """Three batches, of which only two come."""

    def __iter__(self):
        yield from self[:2]
        time.sleep(1000)


OWN_LOADERS = {
    "iterable": lambda: TwoOfThree([(torch.zeros(8, 3, 8, 8), torch.zeros(8, dtype=torch.int64))] * 3),
    "no workers": lambda: torch.utils.data.DataLoader(Sleepy(), 8),
    "a worker": lambda: torch.utils.data.DataLoader(Sleepy(), 8, num_workers=1),
}


@pytest.mark.parametrize("loader", OWN_LOADERS)
def test_a_loader_of_the_users_that_hangs_is_an_error(tmp_path, loader):
    data, began = wrap(OWN_LOADERS[loader](), num_classes=CLASSES), time.perf_counter()
    with pytest.raises(
        TrainingError, match=r"no data came for 3 seconds, in step 3 of epoch 1; what was done is saved"
    ):
        run(tmp_path, replace(SETTINGS, timeout=3.0), data=data)
    assert time.perf_counter() - began < 60 and multiprocessing.active_children() == []
    assert checkpoint.load_run(tmp_path / "last.pth.tar")["okdc"]["run"]["step"] == 2
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0 and signal.getsignal(signal.SIGALRM) == signal.SIG_DFL


def test_an_alarm_that_rings_late_does_not_disturb_the_saving(tmp_path, monkeypatch):
    method = Tiny()

    def late(batches):
        signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
        time.sleep(10)

    def slowly(state, run):
        time.sleep(0.3)
        save(state, run)

    method.after_step = late
    monkeypatch.setattr("okdc.training.lost_data.save", slowly)
    with pytest.raises(TrainingError, match="no data came for 60 seconds"):
        run(tmp_path, replace(SETTINGS, timeout=60.0), method=method)
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0 and signal.getsignal(signal.SIGALRM) == signal.SIG_DFL


def test_what_a_worker_raises_is_not_taken_for_its_death(tmp_path):
    class Broken(Sleepy):
        def __getitem__(self, index: int):
            raise RuntimeError("no such image")

    data = wrap([(torch.zeros(8, 3, 8, 8), torch.zeros(8, dtype=torch.int64))], num_classes=CLASSES)
    data.train.loader = torch.utils.data.DataLoader(Broken(), 8, num_workers=1)
    with pytest.raises(RuntimeError, match="Caught RuntimeError in DataLoader worker"):
        run(tmp_path, data=data)


def test_a_loader_that_hangs_when_it_is_first_looked_at_is_an_error():
    with pytest.raises(DataError, match=r"for 0\.3 seconds while looking at batch 3 of the training loader.*--timeout"):
        wrap(OWN_LOADERS["iterable"](), timeout=0.3)  # without num_classes, which it counts in all labels
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0 and signal.getsignal(signal.SIGALRM) == signal.SIG_DFL


def test_lines_are_printed_where_there_is_no_terminal(tmp_path, capsys):
    run(tmp_path, replace(SETTINGS, epochs=1, log_interval=4))
    lines = capsys.readouterr().err.splitlines()
    told = [line.split(" loss")[0] for line in lines if "waited for data" not in line]  # said on a busy machine
    assert told == ["epoch 1/1 step 4/6", "epoch 1/1:"]
    assert "ce" in lines[0] and "images/s" in lines[0] and "left" in lines[0]
    assert "Acc@1" in lines[1] and "branch1" in lines[1] and "ensemble" in lines[1]
    assert "Acc@5" not in lines[1] and "target" not in lines[1]  # of three classes; and Acc@1 is the target's


def test_a_loss_that_was_zero_in_every_step_is_told(caplog):
    rows = [{"loss/ce": 1.0, "loss/kl": 0.0, "loss/late": 0.0}, {"loss/ce": 0.0, "loss/kl": 0.0, "loss/late": 0.5}]
    _tell_idle(SimpleNamespace(history=rows, method=object()))
    assert [record.getMessage().split(" was 0")[0] for record in caplog.records] == ["the loss kl of object"]


def test_a_network_alone_is_no_ensemble(capsys):
    display = Display(2, 4, 50)
    row = {"epoch": 0, "train_loss": 1.0, "skipped_steps": 0, "seconds": 1.0, "data_wait": 0.0}
    row |= {"eval_top1": 50.0, "eval_top5": 90.0, "eval_balanced": 50.0, "top1/target": 50.0, "top1/ensemble": 50.0}
    display.epoch(row)
    said = capsys.readouterr().err
    assert "Acc@1 50.000 Acc@5 90.000" in said and "ensemble" not in said and "target" not in said


def test_on_a_narrow_terminal_the_line_of_an_epoch_ends_between_two_figures():
    display = Display(2, 4, 50)
    line = "epoch 1/2: loss 2.3 · Acc@1 50.000 Acc@5 90.000 · top-1 of branch1 40.00 · 1.0 s · data wait 0 %"
    assert display._folded(line) == line, "not in a log"
    display.console = Console(force_terminal=True, width=60)
    first, second = display._folded(line).splitlines()
    assert first.endswith("Acc@5 90.000 ·") and second == "  top-1 of branch1 40.00 · 1.0 s · data wait 0 %"


def test_a_bar_is_drawn_on_a_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    run(tmp_path, replace(SETTINGS, epochs=2))
    text = capsys.readouterr().err
    assert "1/2" in text and "━" in text and "images/s" in text and "epoch 2/2: loss" in text
    assert text.endswith("\x1b[?25h")  # the cursor is given back
