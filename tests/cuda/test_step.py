"""A step on the GPU: the numbers of the CPU in float32, mixed precision, and a state that is put back."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from okdc.methods import Method
from okdc.recipe import TrainSettings
from okdc.system.randomness import own_randomness, seed_everything
from okdc.system.signals import StopSignal
from okdc.training import checkpoint
from okdc.training.machine import Machine
from okdc.training.restoring import restore
from okdc.training.state import Run, TrainState, build
from okdc.training.step import stepper
from tests.helpers import training
from tests.methods import test_contract

EXACT = TrainSettings(batch_size=8, lr=0.05, amp=False, channels_last=False)


@pytest.fixture(autouse=True)
def no_tf32() -> Iterator[None]:
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def begun(method: Method, settings: TrainSettings, device: torch.device) -> tuple[TrainState, Run]:
    settings = replace(settings, device=str(device))
    run = Run(settings, Path(), "tiny", {}, Machine.of(settings), 4)
    state = build(method, run)
    method.train()
    return state, run


def steps(method: Method, batch: tuple[Tensor, ...], settings: TrainSettings, device: torch.device, count: int) -> list:
    state, run = begun(method, settings, device)
    take, found = stepper(state, run, StopSignal()), []
    for state.step in range(count):
        found.append(take([batch] * settings.grad_accum_steps))
    return found


@pytest.mark.parametrize("name", test_contract.NAMES)
def test_two_steps_of_every_method_are_the_cpus(name: str, device: torch.device) -> None:
    results = []
    for place in (torch.device("cpu"), device):
        method = test_contract.build(name)
        results.append(steps(method, test_contract.asked(method), EXACT, place, 2))
    drawn = type(method).needs().indices  # negatives from a bank, by random numbers that each device has for itself
    for number, (cpu, gpu) in enumerate(zip(*results, strict=True)):
        assert cpu.keys() == gpu.keys() and cpu
        for term in cpu:
            assert gpu[term] == pytest.approx(cpu[term], rel=0.3 if drawn else (1e-3, 2e-2)[number], abs=1e-3), term


@pytest.mark.parametrize("name", test_contract.NAMES)
def test_every_method_trains_as_the_device_likes_it_best(name: str, device: torch.device, on_gpu: bool) -> None:
    method = test_contract.build(name)
    state, run = begun(method, replace(EXACT, amp=None if on_gpu else True, channels_last=None), device)
    batch, take, found = test_contract.asked(method), stepper(state, run, StopSignal()), []
    for state.step in range(3):
        found.append(take([batch]))
    assert all(found), "a step was skipped"
    assert all(math.isfinite(value) for losses in found for value in losses.values())
    assert {p.device.type for p in (*method.parameters(), *method.buffers())} == {device.type}
    assert state.optimizer.defaults["fused"] is True
    weights = [p for p in method.cohort.parameters() if p.dim() == 4]
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in weights)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "lamb"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mixed_precision_trains(optimizer: str, dtype: str, device: torch.device) -> None:
    settings = replace(EXACT, amp=True, amp_dtype=dtype, channels_last=True, opt=optimizer, lr=1e-3, clip_grad=1.0)
    method = training.Tiny()
    state, run = begun(method, replace(settings, model_ema=True, grad_accum_steps=2), device)
    take, data = stepper(state, run, StopSignal()), training.tiny_data()
    batches = list(data.train.batches(0))
    losses = [take(batches[i : i + 2]) for i in (0, 2, 4)]
    assert state.scaler.is_enabled() == (dtype == "float16")
    assert any(losses) and all(math.isfinite(value) for each in losses for value in each.values())
    assert next(state.student.parameters()).device.type == device.type


def test_a_step_that_float16_overflows_is_skipped_and_leaves_nothing_behind(device: torch.device) -> None:
    method = training.Tiny()
    state, run = begun(method, replace(EXACT, amp=True, amp_dtype="float16"), device)
    state.scaler = torch.amp.GradScaler(device.type, init_scale=2.0**40)
    before = {name: value.clone() for name, value in method.state_dict().items() if isinstance(value, Tensor)}
    batch = next(training.tiny_data().train.batches(0))
    take = stepper(state, run, StopSignal())
    assert take([batch]) == {} and state.skipped_in_a_row == 1
    after = method.state_dict()
    assert [name for name in before if name != "lr" and not torch.equal(before[name], after[name])] == []
    assert state.scaler.get_scale() == 2.0**39
    while not take([batch]):
        assert state.skipped_in_a_row < 40
    assert state.skipped_in_a_row == 0


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_what_a_checkpoint_puts_back_is_what_was_saved(optimizer: str, device: torch.device, tmp_path: Path) -> None:
    settings = replace(training.SETTINGS, opt=optimizer, device=str(device), channels_last=True, model_ema=True)
    settings = replace(settings, epochs=1)
    state = training.run(tmp_path, settings)
    again = training.Tiny()
    run = Run(settings, tmp_path, "tiny", {"train": {"epochs": 1}}, Machine.of(settings), training.STEPS)
    back = build(again, run)
    restore(back, checkpoint.load_run(run.last), run.last, run)
    for one, other in ((state.method, again), (state.student, back.student)):
        theirs = other.state_dict()
        assert [k for k, v in one.state_dict().items() if not training.same(v, theirs[k])] == []
    kept = zip(state.optimizer.state.values(), back.optimizer.state.values(), strict=True)
    for one, other in ((a, b) for left, right in kept for a, b in zip(left.values(), right.values(), strict=True)):
        if isinstance(one, Tensor):
            assert torch.equal(one, other) and one.device == other.device and one.stride() == other.stride()


def test_a_run_that_is_interrupted_goes_on_as_if_nothing_had_been(device: torch.device, tmp_path: Path) -> None:
    settings = replace(training.SETTINGS, device=str(device), model_ema=True)
    whole = training.run(tmp_path / "whole", settings)
    with pytest.raises(training.Crash):
        data = training.tiny_data(training.crash_at(1, 3))
        training.run(tmp_path / "parts", replace(settings, recovery_interval=1), data=data)
    parts = training.run(tmp_path / "parts", settings, resume=tmp_path / "parts" / checkpoint.LAST)
    ours, theirs = whole.method.state_dict(), parts.method.state_dict()
    for name, value in ours.items():
        if isinstance(value, Tensor):  # to the bit on the CPU; a GPU adds up in any order
            torch.testing.assert_close(theirs[name], value, rtol=1e-3, atol=1e-4)
    assert parts.epoch == settings.epochs and len(parts.history) == settings.epochs


def test_random_numbers_are_a_function_of_the_seed_and_given_back(device: torch.device) -> None:
    torch.rand(1, device=device)
    seed_everything(1)
    first = torch.rand(8, device=device)
    with own_randomness():
        seed_everything(2)
        other = torch.rand(8, device=device)
    going_on = torch.rand(8, device=device)
    seed_everything(1)
    assert torch.equal(torch.rand(8, device=device), first) and torch.equal(torch.rand(8, device=device), going_on)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("name", "mode", "accumulated"),
    [("baseline", "reduce-overhead", 1), ("ahbf", "reduce-overhead", 1), ("ahbf", "default", 2)],
)
def test_a_compiled_step_is_the_eager_one(name: str, mode: str, accumulated: int, device: torch.device) -> None:
    torch._dynamo.reset()
    settings, results = replace(EXACT, grad_accum_steps=accumulated), []
    for changes in ({}, {"torchcompile": True, "torchcompile_mode": mode}):
        method = test_contract.build(name)
        results.append(steps(method, test_contract.asked(method), replace(settings, **changes), device, 4))
    for eager, compiled in zip(*results, strict=True):
        assert compiled == pytest.approx(eager, rel=2e-2, abs=1e-3)
