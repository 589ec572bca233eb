"""The optimizer and the schedule that the settings name: timm's, fused where torch can."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import timm.optim
import timm.scheduler
import torch
from torch.utils._pytree import tree_map_only

from okdc.errors import RecipeError, nearest
from okdc.recipe import TrainSettings
from okdc.training.rates import scaled

if TYPE_CHECKING:
    from okdc.methods import Method


def make_optimizer(method: Method, settings: TrainSettings) -> torch.optim.Optimizer:
    lr = settings.peak_lr
    groups, extra = scaled(method.param_groups(lr), method, settings), dict(settings.opt_kwargs)
    if extra.pop("filter_bias_and_bn", False):
        groups = [part for group in groups for part in _spare_biases_and_norms(group)]
    # adahessian differentiates twice and keeps random numbers of its own, so it would not resume exactly.
    known = [str(name) for name in timm.optim.list_optimizers() if name != "adahessian"]
    if settings.opt.lower().removeprefix("lookahead_") not in known:
        raise RecipeError(f"timm has no optimizer {settings.opt!r}.{nearest(settings.opt, known)}")
    options = {"weight_decay": settings.weight_decay, "momentum": settings.momentum, **_own(settings), **extra}
    if not {"fused", "foreach", "differentiable"} & extra.keys():
        parameters = [parameter for group in groups for parameter in group["params"]]
        options |= _fused(settings.opt, options) if all(map(_is_dense, parameters)) else {}
    try:
        optimizer = timm.optim.create_optimizer_v2(groups, settings.opt, lr=lr, **options)
    except (AssertionError, ImportError, TypeError, ValueError) as error:
        raise RecipeError(f"--opt {settings.opt} cannot be made with {options}: {error}") from error
    inner = getattr(optimizer, "_base_optimizer", optimizer)  # of timm's Lookahead
    if isinstance(inner, torch.optim.SGD):
        inner.register_step_pre_hook(_start_momentum)
    return optimizer


def _own(settings: TrainSettings) -> dict[str, Any]:
    """Betas and epsilon where they are given; RecipeError for an optimizer without, for which timm leaves them out."""
    info = timm.optim.get_optimizer_info(settings.opt.lower().removeprefix("lookahead_"))
    given = {"betas": settings.opt_betas and tuple(settings.opt_betas), "eps": settings.opt_eps}
    own = {name: value for name, value in given.items() if value}
    for name in own:
        if not getattr(info, f"has_{name}"):
            raise RecipeError(f"--opt {settings.opt} has no {name}: leave out --opt-{name}.")
    return own


def _fused(name: str, options: dict[str, Any]) -> dict[str, bool]:
    """The option that makes a step one pass over the weights, eight times as fast on a CPU, where there is one."""
    kind = timm.optim.get_optimizer_class(name.lower().removeprefix("lookahead_"), bind_defaults=False)
    known = kind in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)
    return {"fused": True} if known and not options.get("dampening") else {}


def _is_dense(parameter: torch.Tensor) -> bool:
    """Whether its numbers are all of a piece of memory, which fused optimizers take for granted."""
    return parameter.is_contiguous() or (
        parameter.dim() == 4 and parameter.is_contiguous(memory_format=torch.channels_last)
    )


def _start_momentum(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Momentum from zero for parameters that get their first gradient in this step.

    Without dampening that is torch's own first step; its fused SGD fails where only some parameters have momentum.
    """
    for group in optimizer.param_groups:
        if group["fused"] and group["momentum"] and not group["dampening"]:
            for parameter in group["params"]:
                if parameter.grad is not None and "momentum_buffer" not in optimizer.state[parameter]:
                    optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def _spare_biases_and_norms(group: dict) -> list[dict]:
    """The group in two, the one-dimensional parameters without weight decay."""
    parameters = list(group["params"])
    decayed, spared = [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim <= 1]
    parts = [{**group, "params": decayed}, {**group, "params": spared, "weight_decay": 0.0}]
    return [part for part in parts if part["params"]]


def make_schedule(optimizer: torch.optim.Optimizer, settings: TrainSettings, steps: int) -> Any:
    known = ("cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant", "none")
    if settings.sched not in known:  # not timm's plateau: it cannot be resumed exactly and is about to leave timm
        raise RecipeError(f"--sched {settings.sched}: expected one of {', '.join(known)}.")
    names = ("sched", "warmup_epochs", "warmup_lr", "min_lr", "decay_milestones", "decay_epochs", "decay_rate")
    try:
        schedule, _ = timm.scheduler.create_scheduler_v2(
            optimizer,
            num_epochs=settings.epochs,
            step_on_epochs=not settings.sched_on_updates,
            updates_per_epoch=steps,
            **{name: getattr(settings, name) for name in names},
        )
    except (AssertionError, ValueError) as error:
        raise RecipeError(f"--sched {settings.sched} cannot be made for {settings.epochs} epochs: {error}") from error
    if schedule is None:  # which else multiplies the rates of layers and branches
        for group in optimizer.param_groups:
            group["lr"] *= group.get("lr_scale", 1.0)
    return schedule


def lay_out(optimizer: torch.optim.Optimizer) -> None:
    """Put what the optimizer remembers in the memory layout that its parameters have in this run.

    Fused optimizers walk through memory whatever the strides, and another --amp or device brings another layout.
    """
    inner = getattr(optimizer, "_base_optimizer", optimizer)  # of timm's Lookahead
    for parameter, remembered in inner.state.items():
        for name, value in remembered.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                remembered[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
            else:  # a copy too, because what is read from a checkpoint is mapped from its file
                remembered[name] = tree_map_only(torch.Tensor, torch.clone, value)
