"""The training loop: its settings, and what it leaves behind."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import timm
import timm.optim
import timm.scheduler
import torch
import torch.nn.functional as F
from torch import nn

from okdc.errors import RecipeError
from okdc.training import checkpoint
from okdc.training.loggers import Loggers
from okdc.training.machine import Machine, choose_device
from tests.helpers.training import (
    CLASSES,
    SETTINGS,
    Tiny,
    run,
    tiny_data,
)


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
