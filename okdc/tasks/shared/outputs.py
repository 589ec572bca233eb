"""What a network returned, in words, and how to make it return its logits alone."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor


def described(output: object) -> str:
    """What a network returned, in words: the kinds and shapes of its parts."""
    if isinstance(output, Tensor):
        return f"a tensor {tuple(output.shape)}"
    kind = f"a {type(output).__name__}"
    if not isinstance(output, (dict, tuple, list)):
        return kind
    items = list(output.items() if isinstance(output, dict) else enumerate(output))
    shown = [f"{k!r}: {tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__}" for k, v in items[:6]]
    return f"{kind} of {len(items)} ({', '.join(shown)})"


def alone(output: object, dims: int = 2) -> str:
    """How to make a network return the logits (`dims` axes) among its `output` alone, without renaming a weight."""
    path = next((path for path, value in _nested(output) if isinstance(value, Tensor) and value.dim() == dims), None)
    if path is None:
        return "Nothing of that is such a tensor: change its forward to return one."
    return (
        f"Return the logits alone: subclass it with `def forward(self, images): return super().forward(images){path}`."
    )


def _nested(value: object) -> Iterator[tuple[str, object]]:
    """All values in dictionaries, tuples and lists, with how to get each: ['out'][0]."""
    if not isinstance(value, (dict, tuple, list)):
        yield "", value
        return
    for key, part in value.items() if isinstance(value, dict) else enumerate(value):
        yield from ((f"[{key!r}]{path}", leaf) for path, leaf in _nested(part))
