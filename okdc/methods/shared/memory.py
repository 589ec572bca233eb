"""What a method keeps beside its state_dict: what no optimizer sees, no checkpoint holds and no device gets."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from okdc.cohort import Cohort
from okdc.errors import MethodError
from okdc.tasks.task import Task

if TYPE_CHECKING:
    from okdc.methods.shared.base import Method

# What every module has, its parameters, buffers and modules among it, and what a method logs in a step.
_OURS = vars(nn.Module()).keys() | {"_logged"}

_CONSTANT = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, Task)

Kept = dict[str, dict[str, tuple[Any, Any]]]  # by module and attribute: the value, and what was in it


def refuse_hidden(method: Method) -> None:
    """MethodError for learning parameters in a plain list, tuple or dictionary, where neither torch nor okdc looks."""
    known = {id(parameter) for parameter in method.parameters()}
    for path, module in _own(method).items():
        for name, value in _attributes(module).items():
            for each in _inside(value):
                parameters = each.parameters() if isinstance(each, nn.Module) else [each]
                if any(isinstance(p, nn.Parameter) and p.requires_grad and id(p) not in known for p in parameters):
                    kind = "nn.ModuleDict" if isinstance(value, dict) else "nn.ModuleList"
                    raise MethodError(
                        f"{path}{name} of {type(method).__name__} is a plain {type(value).__name__} with a "
                        f"{type(each).__name__} that learns: it would be neither trained, nor saved, nor moved to a "
                        f"device. Make it an {kind} (an nn.ParameterList of parameters), or freeze what is to stay as "
                        "it is: .requires_grad_(False)."
                    )


def kept(method: Method) -> Kept:
    """What the method and its modules remember in plain attributes; those of cohorts are okdc's own."""
    return {
        path: {name: (value, _content(value)) for name, value in _attributes(module).items()}
        for path, module in _own(method).items()
    }


def put_back(method: Method, before: Kept) -> None:
    """Let every plain attribute be and hold what it did."""
    for path, module in _own(method).items():
        for name in _attributes(module).keys() - before[path].keys():
            del vars(module)[name]
        for name, (value, content) in before[path].items():
            if isinstance(value, Tensor):
                with torch.no_grad():
                    value.copy_(content)
            elif isinstance(value, list):
                value[:] = content
            elif isinstance(value, (dict, set)):
                value.clear()
                value.update(content)
            vars(module)[name] = value


def can_be_put_back(method: Method) -> bool:
    """Whether `put_back` undoes all that a step may do to plain attributes: it does not look into other objects."""
    known = {id(each) for each in (*method.parameters(), *method.buffers(), *method.modules())}
    return all(_is_plain(value, known) for module in _own(method).values() for value in _attributes(module).values())


def _is_plain(value: Any, known: set[int]) -> bool:
    """A tensor, a list, set or dictionary of what never changes, or what never changes itself."""
    if isinstance(value, (list, set, dict)):
        return all(_is_constant(each, known) for each in (value.values() if isinstance(value, dict) else value))
    return isinstance(value, Tensor) or _is_constant(value, known)


def _is_constant(value: Any, known: set[int]) -> bool:
    if isinstance(value, (tuple, frozenset)):
        return all(_is_constant(each, known) for each in value)
    if id(value) in known:  # put back elsewhere
        return True
    return value is None or isinstance(value, _CONSTANT) or (callable(value) and not isinstance(value, nn.Module))


def forgotten(method: Method, before: Kept, after: Kept) -> list[str]:
    """What a run that goes on would not have, in words: tensors that are no buffers, and numbers that changed."""
    found, kind = [], type(method).__name__
    for path, module in _own(method).items():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            continue  # its author has thought of it
        for name, (value, content) in after[path].items():
            then = before[path].get(name, (None, None))[1]
            if any(isinstance(each, Tensor) and not isinstance(each, nn.Parameter) for each in _inside(value)):
                found.append(
                    f"{kind}: {path}{name} holds a tensor that is no buffer: no checkpoint has it, and it does not "
                    f'move to a device. self.register_buffer("{name}", ...), if a later step looks at it.'
                )
            elif isinstance(value, (int, float, list)) and then != content:
                found.append(
                    f"{kind}: {path}{name} went from {then!r:.60} to {content!r:.60} in a step, and no checkpoint has "
                    "it: a run that goes on would begin anew. Make it a buffer, or write get_extra_state and "
                    "set_extra_state."
                )
    return found


def _own(method: Method) -> dict[str, nn.Module]:
    """The method and its modules, but for cohorts and what is in them, by how the class calls them."""
    inside = {module for each in method.modules() if isinstance(each, Cohort) for module in each.modules()}
    return {
        ".".join(["self", *filter(None, [name])]) + ".": module
        for name, module in method.named_modules()
        if module not in inside
    }


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if name not in _OURS}


def _content(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    return copy.copy(value) if isinstance(value, (list, dict, set)) else value


def _inside(value: Any) -> Iterator[Any]:
    """A tensor or module, and those in lists, tuples, sets and dictionaries."""
    if isinstance(value, (Tensor, nn.Module)):
        yield value
    elif isinstance(value, (list, tuple, set, frozenset)):
        for each in value:
            yield from _inside(each)
    elif isinstance(value, dict):
        yield from _inside(list(value.values()))
