"""Checkpoints written beside the training, which waits for a copy in memory and not for the disk."""

from __future__ import annotations

import copy
import logging
import mmap
import threading
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from okdc.system import memory
from okdc.training.state import Contents, Run, TrainState, contents, write

SHARE = 2  # a copy takes at most this part of the memory that is free, one half; else training waits for the disk
ALIGNED = 64  # bytes

log = logging.getLogger("okdc")


class Saver:
    """Writes the checkpoints of a run while that goes on, one save at a time; a context manager, left when all is
    written. What went wrong is raised by whoever calls next: RunError, as by `state.save`."""

    def __init__(self, state: TrainState, run: Run) -> None:
        self.state, self.run = state, run
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None

    def save(self, best: bool = False, wait: bool = False) -> None:
        """Save the state as it is now, when the save before is done; written at once where memory is short or with
        `wait`."""
        self.finish()
        wanted = contents(self.state, self.run, best)
        copied = None if wait else snapshot(wanted)
        if copied is None:
            write(wanted)
            return
        self.thread = threading.Thread(target=self._write, args=(copied,), name="okdc saves")
        self.thread.start()

    def check(self) -> None:
        """Raise what went wrong, if anything has by now."""
        error, self.error = self.error, None
        if error:
            raise error

    def finish(self) -> None:
        """Wait until all is written."""
        if self.thread:
            self.thread.join()
            self.thread = None
        self.check()

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, *__: TracebackType | None) -> None:
        try:
            self.finish()
        except Exception as unsaved:
            if error is None:
                raise
            log.warning("%s", unsaved)

    def _write(self, copied: Contents) -> None:
        try:
            write(copied)
        except BaseException as error:  # whatever it is, the main thread is to say it
            self.error = error


def snapshot(values: Any) -> Any:
    """A copy of dicts, lists and tensors, all in the CPU's memory, those of one storage in one again; None where memory
    is short."""
    tensors = [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and _is_plain(leaf)]
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}
    sizes = {key: storage.nbytes() for key, storage in storages.items()}
    total = sum(_aligned(size) for size in sizes.values())
    free = memory.free()
    if free is not None and SHARE * total > free:
        return None
    room, offset, copies = _room(total), 0, {}
    for key, storage in storages.items():
        part = torch.empty(0, dtype=torch.uint8)
        if sizes[key]:
            part = torch.frombuffer(room, dtype=torch.uint8, count=sizes[key], offset=offset)
            part.copy_(torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage))
            offset += _aligned(sizes[key])
        copies[key] = part.untyped_storage()
    done: dict[int, Any] = {}  # what copy.deepcopy finds there it takes for copied
    for tensor in tensors:
        place = copies[tensor.untyped_storage()._cdata]
        shape = tensor.storage_offset(), tensor.size(), tensor.stride()
        done[id(tensor)] = torch.empty(0, dtype=tensor.dtype).set_(place, *shape)
    return copy.deepcopy(values, done)


def _is_plain(tensor: Tensor) -> bool:
    """Whether storage, type and shape are all that it is; others are copied by torch."""
    odd = tensor.is_quantized or tensor.is_conj() or tensor.is_neg() or tensor.is_meta
    return type(tensor) is Tensor and tensor.layout == torch.strided and not odd


def _aligned(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED


def _room(size: int) -> mmap.mmap:
    """Memory of the process's own, which data workers that start meanwhile do not keep for as long as they live."""
    if not hasattr(mmap, "MADV_DONTFORK"):  # only Linux forks them
        return mmap.mmap(-1, max(1, size))
    room = mmap.mmap(-1, max(1, size), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    room.madvise(mmap.MADV_DONTFORK)
    return room
