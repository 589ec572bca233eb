"""The arithmetic of a step: accumulated, logged, compiled, averaged, and with the learning rates of timm."""

from __future__ import annotations

import copy
from dataclasses import asdict, replace
from functools import partial

import pytest
import timm
import timm.optim
import timm.scheduler
import torch
from torch import Tensor, nn

from okdc.cohort import Branch, Cohort
from okdc.errors import RecipeError
from okdc.methods.ahbf import Ahbf
from tests.helpers.training import (
    BATCH,
    SETTINGS,
    STEPS,
    TIMES,
    Tiny,
    network,
    run,
    tiny_data,
)


def test_accumulated_batches_equal_one_big_batch(tmp_path):
    settings = replace(SETTINGS, sched="none")
    big = run(tmp_path / "big", settings, method=Tiny(norm=False, drop=0), data=tiny_data(batch=2 * BATCH))
    accumulated = replace(settings, grad_accum_steps=2)
    small = run(tmp_path / "small", accumulated, method=Tiny(norm=False, drop=0))
    for name, value in big.method.cohort.state_dict().items():
        torch.testing.assert_close(small.method.cohort.state_dict()[name], value)
    assert small.history[-1]["train_loss"] == pytest.approx(big.history[-1]["train_loss"])


def test_a_methods_own_clipping_holds_where_the_user_says_nothing(tmp_path):
    class Clipped(Tiny):
        clip_grad = 0.01

    def trained(name, kind, limit):
        return run(tmp_path / name, replace(SETTINGS, clip_grad=limit), method=kind()).method.cohort.state_dict()

    own, asked = trained("own", Clipped, None), trained("asked", Tiny, 0.01)
    free, plain = trained("free", Clipped, 0), trained("plain", Tiny, None)
    assert all(torch.equal(own[name], asked[name]) and torch.equal(free[name], plain[name]) for name in plain)
    assert any(not torch.equal(own[name], plain[name]) for name in plain)


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
