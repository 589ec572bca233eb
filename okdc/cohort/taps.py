"""What a method looks at beside logits: feature maps, embeddings, stages' outputs, what the trunk gave at the cut."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from okdc.anatomy import Anatomy
from okdc.anatomy.shapes import layout
from okdc.cohort.plan import member_name
from okdc.cohort.replay import Replay, Tap, Tape, as_map
from okdc.errors import CutError, MethodError, nearest

NAMES = ("feature_maps", "embeddings", "stage_maps", "exit_maps", "shared")


def checked(taps: Sequence[str]) -> tuple[str, ...]:
    """Taps by name; MethodError for a string, which would be its letters, and for what there is not."""
    if isinstance(taps, str):
        raise MethodError(f"taps is the string {taps!r}; expected a tuple, even of one: taps = ({taps!r},).")
    for name in taps:
        if name not in NAMES:
            raise MethodError(f"taps has {name!r}.{nearest(str(name), NAMES)} There are {', '.join(NAMES)}.")
    return tuple(taps)


def checked_modules(tapped: Mapping[str, str], network: nn.Module, anatomy: Anatomy) -> dict[str, str]:
    """Modules by the author's names for them; MethodError for those that the network does not have or call once."""
    if not isinstance(tapped, Mapping):
        raise MethodError(
            f'tapped is {tapped!r}; expected a dictionary that gives modules names, such as {{"early": "layer1.1"}}.'
        )
    calls, known = Counter(call.name for call in anatomy.calls), dict(network.named_modules())
    for name in tapped.values():
        if name not in known:
            raise MethodError(
                f"{anatomy.name} has no module {name!r} to look at.{nearest(str(name), known)} print(network) shows "
                "all that it has."
            )
        if calls[name] != 1:
            raise MethodError(
                f"{name!r} of {anatomy.name} is called {calls[name]} times in a pass; expected a module that is called "
                "once. Name the module that it is in."
            )
    return dict(tapped)


class Taps:
    """Which layers of the members are looked at, and what they gave in this pass.

    `kinds` are some of NAMES, `modules` others by the author's names for them. `cut` is that of the first branch, None
    where nothing is shared. CutError where the method looks at what is shared and that is nothing, or neither map nor
    tokens.
    """

    def __init__(
        self, kinds: Sequence[str], modules: dict[str, str], tape: Tape, target: Anatomy, cut: str | None
    ) -> None:
        self.kinds, self.modules, self.tape, self.cut = tuple(kinds), modules, tape, cut
        self.givers: list[dict[str, int]] = []  # of each member: whose modules those are, by the author's names
        self.shared_layout = _layout_at_cut(target, tape, cut) if "shared" in kinds else None
        self.stages: list[int] = []  # how many of each member
        self.exits: list[tuple[str, str]] = []  # of the target
        self.members = 0

    def of_next(self, anatomy: Anatomy, cut: str | None, ways: Sequence[Counter[str]]) -> list[tuple[str, Tap]]:
        """The modules to be tapped of the next member, made as `anatomy` says, which parts at `cut`.

        CutError for one that is not called in all `ways`, the passes in training mode that were watched.
        """
        places: list[tuple[str, str, str]] = []
        if "feature_maps" in self.kinds:
            places.append(("feature_map", anatomy.feature_map, anatomy.layout))
        if "embeddings" in self.kinds:
            places.append(("embedding", anatomy.classifier, anatomy.layout))
        if "stage_maps" in self.kinds:
            outputs = _stage_outputs(anatomy, cut)
            self.stages.append(len(outputs))
            places += [(f"stage{s}", name, where) for s, (name, where) in enumerate(outputs)]
        if "exit_maps" in self.kinds and not self.members:
            self.exits = _exit_outputs(anatomy)
            places += [(f"exit{s}", name, where) for s, (name, where) in enumerate(self.exits)]
        for name in [*(place[1] for place in places), *self.modules.values()]:
            if not all(way[name] for way in ways):
                raise CutError(_untapped(f"{name!r} of {anatomy.name}"))
        self.members += 1
        return [(name, Tap(self.tape, kind, where)) for kind, name, where in places]

    def modules_of_next(self, network: nn.Module, anatomy: Anatomy, parent: int) -> list[tuple[str, Tap]]:
        """Those of the modules with names that are the next member's own; others it has from its `parent`, or not."""
        own, place = dict(network.named_modules()), len(self.givers)
        givers: dict[str, int] = {}
        for key, name in self.modules.items():
            if _replayed(own, name):
                givers[key] = self.givers[parent][key]
            elif name in own:
                givers |= dict.fromkeys(checked_modules({key: name}, network, anatomy), place)
        self.givers.append(givers)
        mine = [key for key, giver in givers.items() if giver == place]
        return [(self.modules[key], Tap(self.tape, f"module {key}")) for key in mine]

    def found(self, alone: bool) -> dict[str, Any]:
        """What the kinds gave in this pass, by name; nothing is shared where each member ran the trunk `alone`."""
        found: dict[str, Any] = {}
        if "feature_maps" in self.kinds:
            found["feature_maps"] = self._of_all("feature_map")
        if "embeddings" in self.kinds:
            found["embeddings"] = self._of_all("embedding")
        if "stage_maps" in self.kinds:
            found["stage_maps"] = tuple(
                tuple(self._look(f"stage{s}", i) for s in range(n)) for i, n in enumerate(self.stages)
            )
        if "exit_maps" in self.kinds:
            found["exit_maps"] = tuple(self._look(f"exit{s}", 0) for s in range(len(self.exits)))
        if self.modules:
            found["tapped"] = tuple(
                {key: self._look(f"module {key}", i if alone else giver) for key, giver in givers.items()}
                for i, givers in enumerate(self.givers)
            )
        if self.cut and self.shared_layout and not alone:
            found["shared"] = as_map(self.tape.outputs[self.cut][0], self.shared_layout)
        return found

    def _of_all(self, kind: str) -> tuple[Tensor, ...]:
        return tuple(self._look(kind, i) for i in range(self.members))

    def _look(self, kind: str, member: int) -> Any:
        if (kind, member) not in self.tape.tapped:
            words = repr(kind) if kind.startswith("module ") else f"the {kind.replace('_', ' ')}'s module"
            raise CutError(_untapped(f"{words} of the {member_name(member)}"))
        return self.tape.tapped[kind, member]


def _untapped(what: str) -> str:
    return (
        f"the method looks at what {what} gives, and in training mode that is not called in every pass. Let it run for "
        "each batch, or choose a method that looks at logits alone, such as --method dml."
    )


def _replayed(modules: dict[str, nn.Module], name: str) -> bool:
    """Whether a module of that name is in the trunk of a branch that has these modules."""
    parts = name.split(".")
    return any(isinstance(modules.get(".".join(parts[: i + 1])), Replay) for i in range(len(parts)))


def _layout_at_cut(anatomy: Anatomy, tape: Tape, cut: str | None) -> str:
    """Where the channels of the cut's output are; CutError when nothing is shared or it is no map and no tokens."""
    if cut is None:
        raise CutError(
            "this method looks at what the branches share, and nothing is shared. Leave out --share none and "
            "--peers, and give it at least 2 --members."
        )
    shape = anatomy.find_cut(cut).shape
    if len(shape) not in (2, 3) or not tape.handling[cut].live:
        raise CutError(
            f"this method looks at what the branches share, and {cut!r} gives {shape or 'no single tensor'}, "
            "expected a map or tokens. "
            + anatomy.ways_out(cut, "choose a method that looks at logits alone, such as --method dml")
        )
    return layout(shape, anatomy.input_size[-2] / anatomy.input_size[-1])


def _stage_outputs(anatomy: Anatomy, cut: str | None) -> list[tuple[str, str]]:
    """The module that each stage after the cut ends with, and the layout of its output, early to late."""
    shapes = {c.name: c.output for c in anatomy.calls}
    aspect = anatomy.input_size[-2] / anatomy.input_size[-1]
    ends = [stage.last for stage in (anatomy.stages_after(cut) if cut else anatomy.stages)]
    return [(name, layout(shape, aspect)) for name in ends if len(shape := shapes[name] or ()) in (2, 3)]


def _exit_outputs(anatomy: Anatomy) -> list[tuple[str, str]]:
    """The modules after which the network could be left early, and the layouts of their outputs; CutError for none."""
    aspect = anatomy.input_size[-2] / anatomy.input_size[-1]
    names = anatomy.exits()
    if not names:
        raise CutError(
            f"this method looks at {anatomy.name} before its end, and there is no place between its stages or blocks. "
            "Choose a method that looks at logits alone, such as --method dml."
        )
    return [(name, layout(anatomy.find_cut(name).shape, aspect)) for name in names]
