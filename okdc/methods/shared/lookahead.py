"""What a few steps of SGD with momentum lead to, differentiated by what the steps were told (Yang et al., TPAMI 2023).

The look-ahead is functional: parameters come and go as lists of tensors, and no module or optimizer is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from okdc.ranks import mean_
from okdc.system.randomness import random_state, set_random_state

Objective = Callable[..., Tensor]  # of what is stepped (theta), of what is asked for (phi), and of a part's values


def hypergradient(
    steps: Sequence[Objective],
    final: Objective,
    theta: list[Tensor],
    phi: list[Tensor],
    parts: Sequence[tuple[Any, ...]] = ((),),
    *,
    lr: float | Tensor,
    momentum: float,
    weight_decay: float,
) -> list[Tensor]:
    """d final / d phi, each like its phi, after one step of SGD from `theta` on each of the objectives in `steps`.

    The buffers of the momentum start at zero. It is the exact gradient, by the reverse recursion: the way there is gone
    again backwards, so that the graph of one step at a time is in memory, not of all. Random numbers are replayed.
    With `parts` an objective is the sum of what it says of each, one part at a time in memory.
    """
    begin, states, velocity = theta, [], [torch.zeros_like(t) for t in theta]
    visited = []
    for objective in steps:
        visited.append(begin)
        states.append(random_state())
        gradient, _ = _gradients(objective, begin, phi, parts)
        velocity = [momentum * v + g + weight_decay * t for v, g, t in zip(velocity, gradient, begin, strict=True)]
        begin = [t - lr * v for t, v in zip(begin, velocity, strict=True)]
    towards, found = _gradients(final, begin, phi, parts)  # towards: d final / d parameters after the step being undone
    carried = [torch.zeros_like(t) for t in theta]  # d final / d velocity after it, by way of later steps
    for objective, point, state in zip(reversed(steps), reversed(visited), reversed(states), strict=True):
        set_random_state(state)
        inflow = [b - lr * a for a, b in zip(towards, carried, strict=True)]  # d final / d gradient of the step
        to_theta, to_phi = _vector_hessian(objective, point, phi, parts, inflow)
        found = [h + d for h, d in zip(found, to_phi, strict=True)]
        towards = [a + weight_decay * u + d for a, u, d in zip(towards, inflow, to_theta, strict=True)]
        carried = [momentum * u for u in inflow]
    return found


def _gradients(
    objective: Objective, theta: list[Tensor], phi: list[Tensor], parts: Sequence[tuple[Any, ...]]
) -> tuple[list[Tensor], list[Tensor]]:
    leaves = [t.detach().requires_grad_() for t in (*theta, *phi)]
    found = [torch.zeros_like(t, memory_format=torch.contiguous_format) for t in leaves]
    for part in parts:
        value = objective(leaves[: len(theta)], leaves[len(theta) :], *part)
        gradients = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
        torch._foreach_add_(found, gradients)
    mean_(found)  # each rank has seen its part of the batch
    return found[: len(theta)], found[len(theta) :]


def _vector_hessian(
    objective: Objective,
    theta: list[Tensor],
    phi: list[Tensor],
    parts: Sequence[tuple[Any, ...]],
    vector: list[Tensor],
) -> tuple[list[Tensor], list[Tensor]]:
    """The gradients of <d objective / d theta, vector> by theta and by phi."""

    def product(inputs: list[Tensor], told: list[Tensor], *part: Any) -> Tensor:
        gradient = torch.autograd.grad(objective(inputs, told, *part), inputs, create_graph=True, allow_unused=True)
        return torch.stack([(g * v).sum() for g, v in zip(gradient, vector, strict=True) if g is not None]).sum()

    return _gradients(product, theta, phi, parts)


@torch.no_grad()
def descend(
    parameters: list[Tensor], gradient: list[Tensor], velocity: Tensor, lr: Tensor, *, momentum: float,
    weight_decay: float,
) -> None:  # fmt: skip
    """One step of SGD with Nesterov's momentum, in place; none where the gradient is not finite: the device knows.

    `velocity` (P,) is that of all parameters in a row: a buffer of the method, so that it is saved and put back.
    """
    here, slope = parameters_to_vector(parameters), parameters_to_vector(gradient)
    finite, slope = slope.isfinite().all(), slope + weight_decay * here
    velocity.copy_(torch.where(finite, momentum * velocity + slope, velocity))
    vector_to_parameters(torch.where(finite, here - lr * (slope + momentum * velocity), here), parameters)
