"""The proof that a branch computes what the target computes, and how each recorded output is handled for it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from okdc.anatomy import Anatomy
from okdc.anatomy.modes import unchanged
from okdc.cohort.replay import Proof, Replay, Tape
from okdc.cohort.trunk import all_of, stand_in
from okdc.errors import CutError, NetworkError, first_line
from okdc.system.randomness import random_state
from okdc.tasks.shared.outputs import described
from okdc.tasks.task import Task

TOLERANCE = 1e-5  # of the largest logit; measured: nearly every network is bit-equal
PASSES = 4  # in training mode, of a network that draws random numbers: blocks may be left out in some of them


def prove_all(
    target: nn.Module,
    proofs: Mapping[str, nn.Module],
    trunks: Mapping[str, dict[str, nn.Module]],
    anatomy: Anatomy,
    tape: Tape,
    ways: list[Counter[str]],
    example: Tensor,
    task: Task,
    one_way: bool,
) -> None:
    """Prove every cut, the late ones first, on a copy of the target for each, then each with what the others need.

    `ways` are those of `ways_in_training`. CutError if one cannot be, or if `one_way` into the trunk is not enough.
    """
    for cut in list(proofs)[:1]:
        refuse_by_data(target, anatomy, cut, example)
        refuse_by_chance(ways, trunks[cut], anatomy, cut)
    for cut, network in proofs.items():
        stand_in(network, trunks[cut], tape, cut)
        prove(target, network, anatomy, cut, tape, example, task)
        if one_way:  # what was found until now is of this cut, and of later ones alone
            refuse_other_ways(network, anatomy, cut, tape, [cut])
    for cut, network in proofs.items() if len(proofs) > 1 else ():
        prove(target, network, anatomy, cut, tape, example, task)
        if one_way:
            refuse_other_ways(network, anatomy, cut, tape, proofs)


def prove(
    target: nn.Module, network: nn.Module, anatomy: Anatomy, cut: str, tape: Tape, example: Tensor, task: Task
) -> None:
    """Learn how each recorded output must be handled, then show that the branch computes what the target computes."""
    if not _named(network):
        raise CutError(
            _refusal(anatomy, cut, "nothing after the cut is trainable; unfreeze some of it (requires_grad_(True))")
        )
    with unchanged(target), unchanged(network):
        try:
            try:
                _learn_handling(target, network, tape, example)
                with unchanged(target), unchanged(network):  # what a wrong branch does to its buffers is no trial
                    difference = _differences(target, network, tape, example, task)
            except (CutError, *_RAISED_BY_NETWORKS):
                difference = math.inf
            if not difference <= TOLERANCE:  # an output that seemed not to matter does: carry everything, cloned
                for replay in (m for m in network.modules() if isinstance(m, Replay)):
                    tape.handling[replay.name].add(True, True, True)
                difference = _differences(target, network, tape, example, task)
            idle = _idle_in_training(target, network, tape, example)
        except CutError:  # of a replay that has nothing to give, in words already
            raise
        except _RAISED_BY_NETWORKS as error:
            raise CutError(_refusal(anatomy, cut, f"the branch does not run: {first_line(error)}")) from error
        finally:
            tape.clear()
            tape.proof = None
    if not difference <= TOLERANCE:
        where = _first_difference(target, network, tape, example)
        raise CutError(
            _refusal(anatomy, cut, f"a branch with equal weights gives other logits (by {difference:.1e}){where}")
        )
    if idle:
        order = (
            f"in training mode the modules are called in another order, so that {idle!r} of a branch would not learn"
        )
        raise CutError(_refusal(anatomy, cut, order))


def refuse_by_data(target: nn.Module, anatomy: Anatomy, cut: str, example: Tensor) -> None:
    """CutError if other images take another way through the target: what a branch needs of the trunk may be missing."""
    ways = []
    with unchanged(target), torch.no_grad():
        target.eval()
        for images in (example, *_other_images(example)):
            ways.append(_called(target, images))
    for other in ways[1:]:
        for mine, theirs in zip_longest(ways[0], other):
            if mine != theirs:
                seen = f"which modules run depends on the images: {mine!r} for some, {theirs!r} for others"
                raise CutError(_refusal(anatomy, cut, seen))


def ways_in_training(target: nn.Module, example: Tensor) -> list[Counter[str]]:
    """How often each module is called in a few passes in training mode, or in one if that draws no random numbers."""
    with unchanged(target), torch.no_grad():
        target.train()
        state, ways = random_state(), [Counter(_called(target, example))]
        drawn = any(not torch.equal(a, b) if isinstance(a, Tensor) else a != b for a, b in zip(state, random_state()))
        return ways + [Counter(_called(target, example)) for _ in range(PASSES - 1 if drawn else 0)]


def refuse_by_chance(ways: list[Counter[str]], trunk: Collection[str], anatomy: Anatomy, cut: str) -> None:
    """CutError if the calls of a trunk module are drawn anew in each pass: a branch, which draws too, may need more."""
    for name in trunk:
        if len({way[name] for way in ways}) > 1:
            seen = f"in training mode {name!r} is called in some passes and not in others"
            raise CutError(_refusal(anatomy, cut, seen))


def _other_images(example: Tensor) -> tuple[Tensor, ...]:
    """Bright ones, dark ones, and ones of strong contrast: what the data decides, they may decide otherwise."""
    return example.abs(), -example.abs(), 10 * example


def refuse_own_modules(target: nn.Module, copied: nn.Module, example: Tensor) -> None:
    """NetworkError if a copy of the target runs modules of the target: members would be one network."""
    with unchanged(target), unchanged(copied), torch.no_grad():
        target.eval(), copied.eval()
        names = _called(target, example, by=copied)
    if names:
        kind, outermost = type(target).__name__, min(names, key=lambda name: name.count("."))
        raise NetworkError(
            f"a copy of {kind} runs {outermost!r} of the {kind} that it was copied from, and branches are copies: a "
            "function stored on it (net.forward = ..., self.run = lambda x: ...) keeps the modules that it was made "
            f"with. Make that function a method of a class: class Mine({kind}): def forward(self, images): ..."
        )


def _called(network: nn.Module, images: Tensor, by: nn.Module | None = None) -> list[str]:
    """The modules of a network, in the order of ending, that are called when it, or another, is run."""
    names: list[str] = []
    handles = [
        module.register_forward_hook(lambda m, args, output, name=name: names.append(name))  # type: ignore[misc]
        for name, module in network.named_modules()
    ]
    try:
        (by or network)(images)
    finally:
        for handle in handles:
            handle.remove()
    return names


def _idle_in_training(target: nn.Module, network: nn.Module, tape: Tape, example: Tensor) -> str | None:
    """A module of a branch that gets no gradient in training mode although it is used in evaluation mode.

    Of the target's own, it gets one in both.
    """
    in_target, in_branch = _learning(target, network, tape, example, True)
    idle = in_target & _named(network) - in_branch
    if idle:
        idle &= _learning(target, network, tape, example, False)[1]
    return min(idle).rpartition(".")[0] if idle else None


def _named(network: nn.Module) -> set[str]:
    return {name for name, parameter in network.named_parameters() if parameter.requires_grad}


def _learning(
    target: nn.Module, network: nn.Module, tape: Tape, example: Tensor, training: bool
) -> tuple[set[str], set[str]]:
    """Names of the parameters of the target, and of a branch, that get a gradient from their own logits."""
    tape.proof = Proof()
    tape.start()
    with torch.enable_grad():
        logits = [all_of(member(example)) for member in (target.train(training), network.train(training))]
    tape.clear()  # as when training: a checkpoint that computes again across the cut fails here, not there
    found = []
    for member, said in zip((target, network), logits, strict=True):
        named = [(n, p) for n, p in member.named_parameters() if p.requires_grad]
        grads = torch.autograd.grad(said.sum(), [p for _, p in named], allow_unused=True, retain_graph=True)
        found.append({n for (n, _), g in zip(named, grads, strict=True) if g is not None})
    return found[0], found[1]


_RAISED_BY_NETWORKS = (RuntimeError, TypeError, AttributeError, KeyError, IndexError, ValueError, AssertionError)


def refuse_other_ways(network: nn.Module, anatomy: Anatomy, cut: str, tape: Tape, cuts: Collection[str]) -> None:
    """CutError if a proved branch uses anything of the trunk but the outputs of `cuts`: gradients cannot be divided.

    What the target's own tail takes from earlier in the trunk is also what the trunk itself goes on with.
    """
    replayed = {m.name for m in network.modules() if isinstance(m, Replay)}
    others = [name for name in sorted(replayed - set(cuts)) if tape.handling[name].live]
    if others:
        ways = f"the mean of its members' gradients needs one way into the trunk, and {', '.join(others)} are others"
        raise CutError(_refusal(anatomy, cut, ways, "give it their sum: --trunk-gradient sum"))


def _refusal(anatomy: Anatomy, cut: str, reason: str, *others: str) -> str:
    ways = anatomy.ways_out(cut, *others, "train whole peer networks: --share none")
    return f"{anatomy.name} cannot be shared up to {cut!r}: {reason}. {ways}"


def _learn_handling(target: nn.Module, network: nn.Module, tape: Tape, example: Tensor) -> None:
    """One watched run: outputs without a gradient never reach the logits; versions tell what is changed in place."""
    target.train(False), network.train(False)
    proof = tape.proof = Proof(probing=True)
    tape.start()
    with torch.enable_grad():
        target(example)
        changed_by_target = {name for name, tensor, version in proof.recorded if tensor._version != version}
        logits = all_of(network(example))
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


def _differences(target: nn.Module, network: nn.Module, tape: Tape, example: Tensor, task: Task) -> float:
    """The largest difference of logits, in evaluation and in training mode (same random numbers), over the largest.

    In evaluation mode also for other images, as far as the target gives them finite logits.
    """
    worst = 0.0
    for training, images in ((False, example), *((False, x) for x in _other_images(example)), (True, example)):
        target.train(training), network.train(training)
        tape.proof = Proof()
        tape.start()
        with torch.no_grad():
            said = target(images)
            if not task.is_output(task.result(said)):
                raise NetworkError(
                    f"{type(target).__name__} returns {described(said)} in training mode; expected {task.output} as in "
                    "evaluation mode. Turn its auxiliary outputs off."
                )
            reference, logits = all_of(said), all_of(network(images))
        tape.clear()
        if images is not example and not reference.isfinite().all():
            continue
        scale = reference.abs().max().clamp_min(1e-12)
        worst = max(worst, float((logits - reference).abs().max() / scale))
    return worst
