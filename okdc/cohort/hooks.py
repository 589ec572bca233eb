"""Hooks of a cohort on modules of its members: they act while it lives, and no copy of a module takes them along."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

ALONG = "a cohort is being copied"  # a key of deepcopy's memo


class Hook:
    """A forward hook that belongs to a cohort."""

    def __deepcopy__(self, memo: dict[Any, Any]) -> Hook | None:
        """A hook of the copied cohort; None, which `Apart` takes out, where a module is copied without its cohort."""
        if ALONG not in memo:
            return None
        copied = copy.copy(self)
        vars(copied).update(copy.deepcopy(vars(self), memo))
        return copied


class Apart:
    """Stands as `__deepcopy__` on a module with hooks: its copy has them only where a cohort is being copied."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, memo: dict[Any, Any]) -> nn.Module:
        del vars(self.module)["__deepcopy__"]  # so that it is copied as its class says
        try:
            copied = copy.deepcopy(self.module, memo)
        finally:
            vars(self.module)["__deepcopy__"] = self
        for hooks in (copied._forward_hooks, copied._forward_pre_hooks):
            for number in [number for number, hook in hooks.items() if hook is None]:
                del hooks[number]
        if _hooked(copied):
            vars(copied)["__deepcopy__"] = Apart(copied)
        return copied


class Hooks:
    """The hooks that a cohort has put on modules, until they are cleared."""

    def __init__(self) -> None:
        self.placed: list[tuple[nn.Module, Any]] = []

    def add(self, module: nn.Module, hook: Any, before: bool = False) -> None:
        """Have a `Hook` called after each pass of the module, or `before` it."""
        attach = module.register_forward_pre_hook if before else module.register_forward_hook
        self.placed.append((module, attach(hook)))
        vars(module).setdefault("__deepcopy__", Apart(module))

    def clear(self) -> None:
        for module, handle in self.placed:
            handle.remove()
            if not _hooked(module):  # another cohort may have some on it
                vars(module).pop("__deepcopy__", None)
        self.placed.clear()


def _hooked(module: nn.Module) -> bool:
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return any(isinstance(hook, Hook) for hook in hooks)
