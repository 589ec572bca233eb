"""How much memory a call takes at its height: what torch holds, without what the libraries take for themselves."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def rise(call: Callable[[], Any], device: torch.device) -> int:
    """Bytes by which the memory that is held rises during a call."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    with _Watch() as watch:
        call()
    return watch.height


class _Watch(TorchDispatchMode):
    """Adds up the tensors that are made, until they are gone."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.height = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._see((args, kwargs), new=False)
        output = func(*args, **(kwargs or {}))
        self._see(output, new=True)
        return output

    def _see(self, tree: Any, new: bool) -> None:
        for tensor in tree_leaves(tree):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self.known:
                size = storage.nbytes() if new else 0
                self.known.add(storage._cdata)
                self.held += size
                self.height = max(self.height, self.held)
                weakref.finalize(storage, self._forget, storage._cdata, size)

    def _forget(self, storage: int, size: int) -> None:
        self.known.discard(storage)
        self.held -= size
