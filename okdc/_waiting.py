"""Waiting for data: how long it took, and an end to it when nothing comes."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any, TypeVar

from okdc._state import Run, TrainState, save
from okdc.errors import DataError, TrainingError

T = TypeVar("T")


class Stuck(BaseException):
    """No batch came in time; not an Exception, which whoever reads an image would take for a damaged one."""


class Waiting:
    """Counts the `seconds` that a run waits for data, and ends a wait of more than `timeout` seconds (0: never).

    A context manager around training. In any thread but the main one, and on Windows, it counts only: no alarm there.
    """

    def __init__(self, timeout: float) -> None:
        main = threading.current_thread() is threading.main_thread()
        self.timeout = timeout if main and hasattr(signal, "setitimer") else 0.0
        self.seconds = 0.0
        self.others = set(multiprocessing.active_children())

    def __enter__(self) -> Waiting:
        if self.timeout:
            self.before = signal.signal(signal.SIGALRM, self._ring)
        return self

    def __exit__(self, *_: object) -> None:
        if self.timeout:
            signal.signal(signal.SIGALRM, signal.SIG_DFL if self.before is None else self.before)

    def over(self, batches: Iterable[T]) -> Iterator[T]:
        """The batches one by one; Stuck where one takes too long, when the data workers have been ended."""
        iterator = chain(batches)  # a DataLoader starts its workers in iter(), which chain calls with the first next()
        while True:
            begin = time.perf_counter()
            try:
                self._set(self.timeout)
                batch = next(iterator)
            except StopIteration:
                return
            except Stuck:
                self._end_workers()
                raise
            finally:
                self._set(0)
                self.seconds += time.perf_counter() - begin
            yield batch

    def taken(self) -> float:
        """The seconds since this was last asked."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds

    def _set(self, seconds: float) -> None:
        if self.timeout:
            signal.setitimer(signal.ITIMER_REAL, seconds, seconds)  # again and again: a finalizer may swallow one

    def _ring(self, *_: Any) -> None:
        raise Stuck

    def _end_workers(self) -> None:
        """Kill the processes that have been started since, because Python waits at its end for what hangs."""
        self._set(0)
        for worker in set(multiprocessing.active_children()) - self.others:
            with contextlib.suppress(RuntimeError):  # torch's, that a data worker has died
                worker.kill()
                worker.join(5)


def limited(items: Iterable[T], timeout: float, where: Callable[[int], str]) -> Iterator[T]:
    """The items one by one, before training; DataError where one takes more than `timeout` seconds (0: never), which
    says `where` that was, given how many had come."""
    count = 0
    try:
        with Waiting(timeout) as waiting:
            for item in waiting.over(items):
                yield item
                count += 1
    except Stuck:
        raise DataError(
            f"no image came for {timeout:g} seconds {where(count)}. See to the disk or network that the images are "
            "on, or wait longer with --timeout SECONDS (0: for ever)."
        ) from None


@contextlib.contextmanager
def data_that_stops(state: TrainState, run: Run) -> Iterator[None]:
    """TrainingError where no data came in time, between two steps, or where a data worker died, at any time."""
    try:
        yield
    except Stuck:
        if state.step:  # else nothing has changed since the last save
            save(state, run)
        raise TrainingError(
            f"no data came for {run.settings.timeout:g} seconds, in {_place(state, run)}; what was done is saved. "
            f"See to the disk or network that the images are on, then continue {run.last}, with --timeout SECONDS (0: "
            "for ever) if that was not long enough."
        ) from None
    except (RuntimeError, EOFError, ConnectionError) as error:
        if not _of_a_dead_worker(error):
            raise
        raise TrainingError(
            f"a data worker died in {_place(state, run)} ({str(error).partition('. ')[0] or type(error).__name__}). "
            f"Was memory short, or /dev/shm? The last good state is kept: continue {run.last} with fewer workers, -j N."
        ) from error


def _place(state: TrainState, run: Run) -> str:
    return f"{f'step {state.step + 1}' if state.step < run.steps else 'the validation'} of epoch {state.epoch + 1}"


def _of_a_dead_worker(error: Exception) -> bool:
    """Whether this is torch's complaint of one, or the end of the pipe through which one handed over its tensors."""
    if isinstance(error, RuntimeError):
        return "DataLoader worker" in str(error)
    # Walked by hand and quickly: torch's own complaint may come as a signal in the middle of anything that takes long.
    frames = error.__traceback__
    while frames and frames.tb_next:
        frames = frames.tb_next
    return frames is not None and "multiprocessing" in frames.tb_frame.f_code.co_filename
