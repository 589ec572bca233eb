"""Of several ranks, which one is late: an end to a wait that would last for ever."""

from __future__ import annotations

import faulthandler
import json
import math
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import count
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from okdc.errors import TrainingError
from okdc.ranks import rank, world

FOR_EVER = 1e8  # seconds


PHASES = ("images set aside", "training", "validation")  # of an epoch, in their order


class Watch:
    """Ends a run in which no rank comes forward for `timeout` seconds, saying which one is behind, and where.

    Every rank tells the others four times a second how far it is. A context manager; alone it does nothing.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout or FOR_EVER
        self.place: tuple[float, ...] = ()  # epoch, phase, batch, has it come: of two ranks the lesser is behind
        self.where, self.since = "the start", time.monotonic()
        self.over_and_done = threading.Event()
        self.store: Any = None

    def __enter__(self) -> Watch:
        if world() > 1:
            self.store = _get_default_store().clone()
            self.rank, self.world = rank(), world()
            self._tell()
            threading.Thread(target=self._observe, daemon=True).start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, *_: Any) -> None:
        self.over_and_done.set()
        if "static_graph" in str(error):
            raise TrainingError(
                f"the network did not use the same parameters in each step, as one that skips layers at random (rank "
                f"{self.rank}, {self.where}), and only such gradients are averaged over several devices. Use --devices "
                "1, or a network without that (layer drop of 0)."
            ) from error
        lost = isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
        if self.store is not None and lost:
            raise TrainingError(f"rank {self.rank} lost the others ({self.where}). {self._behind()}{ADVICE}") from error

    def over(self, batches: Iterable[Any], where: str, state: Any) -> Iterator[Any]:
        """The batches, while noting where this rank is: `where` (one of PHASES), batch, and epoch of `state`.

        Not how many batches it has had, of which the ranks' shares of the validation have not the same number.
        """
        iterator, phase = iter(batches), PHASES.index(where)
        for i in count():
            step = f"step {state.step + 1}" if where == "training" else f"batch {i + 1}"
            self._at(f"waiting for data of {where}, {step}", state, phase, i, False)
            try:
                batch = next(iterator)
            except StopIteration:
                self._at(f"done with {where}", state, phase, math.inf, False)
                return
            self._at(f"{where}, {step}", state, phase, i, True)
            yield batch

    def _at(self, where: str, state: Any, *place: float) -> None:
        self.place, self.where = (state.epoch, *place), f"{where} of epoch {state.epoch + 1}"
        self.since = time.monotonic()

    def _tell(self) -> None:
        self.store.set(f"okdc/{self.rank}", json.dumps([self.place, self.where]))

    def _behind(self) -> str:
        """The rank or ranks that have come least far, in words."""
        try:
            self._tell()
            told = [json.loads(each) for each in self.store.multi_get([f"okdc/{i}" for i in range(self.world)])]
        except RuntimeError:
            return "Rank 0 is gone, and what it knew of the others with it."
        least = min(place for place, _ in told)
        late = [f"rank {i} ({where})" for i, (place, where) in enumerate(told) if place == least]
        return f"Furthest behind: {', '.join(late)}."

    def _observe(self) -> None:
        while not self.over_and_done.wait(min(0.25, self.timeout / 4)):
            with suppress(RuntimeError):  # of a store that is gone with the first rank, as collectives will show
                self._tell()
            if time.monotonic() - self.since > self.timeout:
                self._give_up()

    def _give_up(self) -> None:
        behind, first, gone = self._behind(), False, True
        with suppress(RuntimeError):  # the store is gone with a first rank that has said it
            first = self.store.add("okdc/given up", 1) == 1
            gone = False
        if first:  # one message is enough
            print(f"okdc: error: nothing has happened for {self.timeout:g} s. {behind}{ADVICE}", file=sys.stderr)
        if f"rank {self.rank} (" in behind or gone:
            faulthandler.dump_traceback()  # where it hangs
        os._exit(1)


ADVICE = " The last saved state is kept: continue with --resume auto, or wait longer with --timeout SECONDS."
