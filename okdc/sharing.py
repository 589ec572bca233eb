"""Sharing a trunk: which modules a cut replaces, how their outputs travel, and the proof that a branch is exact."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from okdc.anatomy import MIN_TAIL, Anatomy
from okdc.calls import described
from okdc.errors import CutError, NetworkError
from okdc.replay import Proof, Record, Replay, Tap, Tape, random_state, set_random_state

TOLERANCE = 1e-5  # of the largest logit; measured: nearly every network is bit-equal


@contextmanager
def unchanged(module: nn.Module) -> Iterator[None]:
    """Run a module on trial: its buffers and modes, and the random numbers, are afterwards what they were."""
    buffers = [(b, b.clone()) for b in module.buffers()]
    modes = [(m, m.training) for m in module.modules()]
    state = random_state()
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        for part, mode in modes:
            part.training = mode
        set_random_state(state)


def before(target: nn.Module, anatomy: Anatomy, cut: str) -> dict[str, nn.Module]:
    """The outermost modules all of whose calls end before the cut; modules called on both sides stay in the branch."""
    anatomy.find_cut(cut)
    moment = next(c.end for c in anatomy.calls if c.name == cut)
    last: dict[str, int] = {}
    for call in anatomy.calls:
        last[call.name] = max(last.get(call.name, 0), call.end)
    names = {module: name for name, module in target.named_modules()}
    found: dict[str, nn.Module] = {}

    def walk(module: nn.Module) -> None:
        for child in module.children():
            finished = all(last.get(names[m], 0) <= moment for m in child.modules())
            if finished and names[child] in last:
                found[names[child]] = child
            else:
                walk(child)

    walk(target)
    return found


def stand_in(network: nn.Module, trunk: dict[str, nn.Module], tape: Tape, cut: str) -> None:
    """Put a `Replay` in the place (every place) of each trunk module of a copy of the target that parts at `cut`.

    timm's gradient checkpointing is turned off in it: when it computes again, what is replayed is gone.
    """
    for module in network.modules():
        if getattr(module, "grad_checkpointing", False):
            module.grad_checkpointing = False  # type: ignore[assignment]
    doomed = {network.get_submodule(name): name for name in trunk}
    for module in list(network.modules()):
        for key, child in module._modules.items():
            if child in doomed:
                module._modules[key] = Replay(tape, doomed[child], trunk[doomed[child]], cut)


def on_its_own(member: nn.Module) -> nn.Module:
    """A copy of a member that owes nothing to its cohort: trunk modules where it had replays, no hooks, no tape."""
    network = copy.deepcopy(member)  # a replay's copy has brought a copy of the module that it stands for
    while any(isinstance(module, Replay) for module in network.modules()):  # a parent's trunk is replayed, too
        for module in list(network.modules()):
            for key, child in module._modules.items():
                if isinstance(child, Replay):
                    module._modules[key] = child._original[0]
    for module in network.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for number in [n for n, hook in hooks.items() if isinstance(hook, (Record, Tap))]:
                del hooks[number]
    network.zero_grad()
    return network


def tie_unused(network: nn.Module, lineage: Sequence[nn.Module], tape: Tape, example: Tensor) -> None:
    """Point what a branch still has but never uses (position embeddings before the cut) to the target's parameters.

    `lineage` is what runs before the branch: the target, then the branches from which it parts.
    """
    with ExitStack() as trial, torch.enable_grad():
        for each in (*lineage, network):
            trial.enter_context(unchanged(each))
            each.eval()
        tape.start()
        for each in lineage:
            each(example)
            tape.rewind()
        logits = network(example)
        tape.clear()
        named = [(n, p) for n, p in network.named_parameters() if p.requires_grad]
        grads = torch.autograd.grad(logits.sum(), [p for _, p in named], allow_unused=True) if named else ()
    own = dict(lineage[0].named_parameters())
    for (name, _), grad in zip(named, grads, strict=True):
        if grad is None and name in own:
            parent, _, leaf = name.rpartition(".")
            network.get_submodule(parent)._parameters[leaf] = own[name]


def prove(target: nn.Module, network: nn.Module, anatomy: Anatomy, cut: str, tape: Tape, example: Tensor) -> None:
    """Learn how each recorded output must be handled, then show that the branch computes what the target computes."""
    with unchanged(target), unchanged(network):
        try:
            try:
                _learn_handling(target, network, tape, example)
                difference = _differences(target, network, tape, example)
            except _RAISED_BY_NETWORKS:
                difference = math.inf
            if not difference <= TOLERANCE:  # an output that seemed not to matter does: carry everything, cloned
                for replay in (m for m in network.modules() if isinstance(m, Replay)):
                    tape.handling[replay.name].add(True, True, True)
                difference = _differences(target, network, tape, example)
        except _RAISED_BY_NETWORKS as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CutError(_refusal(anatomy, cut, f"the branch does not run: {reason}")) from error
        finally:
            tape.clear()
            tape.proof = None
    if not difference <= TOLERANCE:
        where = _first_difference(target, network, tape, example)
        raise CutError(
            _refusal(anatomy, cut, f"a branch with equal weights gives other logits (by {difference:.1e}){where}")
        )


_RAISED_BY_NETWORKS = (RuntimeError, TypeError, AttributeError, KeyError, IndexError, ValueError, AssertionError)


def refuse_other_ways(network: nn.Module, anatomy: Anatomy, cut: str, tape: Tape, cuts: Collection[str]) -> None:
    """CutError if a proved branch uses anything of the trunk but the outputs of `cuts`: gradients cannot be divided.

    What the target's own tail takes from earlier in the trunk is also what the trunk itself goes on with.
    """
    replayed = {m.name for m in network.modules() if isinstance(m, Replay)}
    others = [name for name in sorted(replayed - set(cuts)) if tape.handling[name].live]
    if others:
        ways = f"the mean of its members' gradients needs one way into the trunk, and {', '.join(others)} are others"
        raise CutError(_refusal(anatomy, cut, ways))


def _refusal(anatomy: Anatomy, cut: str, reason: str) -> str:
    others = [c.name for c in anatomy.cuts if c.flops_after >= MIN_TAIL and c.name != cut and c.name.count(".") <= 1]
    return (
        f"{anatomy.name} cannot be shared up to {cut!r}: {reason}. "
        f"Cut elsewhere with --cut NAME (such as {', '.join(others[-4:])}), or train whole peer networks: --share none."
    )


def _learn_handling(target: nn.Module, network: nn.Module, tape: Tape, example: Tensor) -> None:
    """One watched run: outputs without a gradient never reach the logits; versions tell what is changed in place."""
    target.train(False), network.train(False)
    proof = tape.proof = Proof(probing=True)
    tape.start()
    with torch.enable_grad():
        target(example)
        changed_by_target = {name for name, tensor, version in proof.recorded if tensor._version != version}
        logits = network(example)
    changed_by_branch = {name for name, tensor, version in proof.replayed if tensor._version != version}
    grads = torch.autograd.grad(logits.sum(), [leaf for _, leaf in proof.leaves], allow_unused=True)
    live = {name for (name, _), grad in zip(proof.leaves, grads, strict=True) if grad is not None}
    live |= {name for name, tensor, _ in proof.replayed if not tensor.is_floating_point()}
    for name in {name for name, _, _ in proof.recorded} & {m.name for m in network.modules() if isinstance(m, Replay)}:
        tape.handling[name].add(name in live, name in changed_by_target, name in changed_by_branch)


def _first_difference(target: nn.Module, network: nn.Module, tape: Tape, example: Tensor) -> str:
    """Which module of a branch first gives something else than the target's own, or is not called, in words."""
    with unchanged(target), unchanged(network):
        for mode in ("evaluation", "training"):
            target.train(mode == "training"), network.train(mode == "training")
            tape.proof = Proof()
            tape.start()
            expected = _outputs(target, example)
            found = dict(_outputs(network, example))
            tape.clear()
            tape.proof = None
            replayed = {name for name, module in network.named_modules() if isinstance(module, Replay)}
            for name, output in expected:
                if name and not any(f"{name}.".startswith(f"{r}.") for r in replayed):
                    if name not in found:
                        return f": in {mode} mode {name!r} is not called in it"
                    if found[name].shape != output.shape or not torch.allclose(found[name], output, atol=1e-4):
                        return f": in {mode} mode {name!r} is the first that differs"
    return ""


def _outputs(network: nn.Module, example: Tensor) -> list[tuple[str, Tensor]]:
    """What each module returned, in the order of ending; those that return one tensor."""
    seen: list[tuple[str, Tensor]] = []

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda module, args, y: seen.append((name, y.clone())) if isinstance(y, Tensor) else None

    handles = [module.register_forward_hook(hook(name)) for name, module in network.named_modules()]
    try:
        with torch.no_grad():
            network(example)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _differences(target: nn.Module, network: nn.Module, tape: Tape, example: Tensor) -> float:
    """The largest difference of logits, in evaluation and in training mode (same random numbers), over the largest."""
    worst = 0.0
    for training in (False, True):
        target.train(training), network.train(training)
        tape.proof = Proof()
        tape.start()
        with torch.no_grad():
            reference = target(example)
            if not (isinstance(reference, Tensor) and reference.dim() == 2):
                raise NetworkError(
                    f"{type(target).__name__} returns {described(reference)} in training mode; expected one tensor of "
                    "logits (batch, classes) as in evaluation mode. Turn its auxiliary outputs off."
                )
            logits = network(example)
        tape.clear()
        scale = reference.abs().max().clamp_min(1e-12)
        worst = max(worst, float((logits - reference).abs().max() / scale))
    return worst
