"""Waiting for data: how long it took, and an end to it when nothing comes."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any, ClassVar, TypeVar

from okdc.errors import DataError

T = TypeVar("T")


class Stuck(BaseException):
    """No batch came in time; not an Exception, which whoever reads an image would take for a damaged one."""


def worker_died(error: BaseException) -> bool:
    """Whether this is torch's complaint of a data worker that has died, raised at any time, in whatever is running.

    Not what a worker itself has raised, which comes as "Caught ... in DataLoader worker process 0".
    """
    return isinstance(error, RuntimeError) and "DataLoader worker (pid" in str(error)


AGAIN = 2.0  # seconds after which an alarm rings once more, at least


class Alarm:
    """Raises `error` in whatever takes longer than it was set to; inside another alarm, that one goes on afterwards.

    A context manager. In any thread but the main one, on Windows, and with `rings` False, it never rings.
    """

    innermost: ClassVar[Alarm | None] = None

    def __init__(self, error: BaseException | type[BaseException], rings: bool = True) -> None:
        main = threading.current_thread() is threading.main_thread()
        self.error, self.rings = error, rings and main and hasattr(signal, "setitimer")

    def __enter__(self) -> Alarm:
        if self.rings:
            self.began, self.outer = time.monotonic(), signal.setitimer(signal.ITIMER_REAL, 0)
            self.before = signal.signal(signal.SIGALRM, self._ring)
            self.around, Alarm.innermost = Alarm.innermost, self
        return self

    def __exit__(self, *_: object) -> None:
        # Another one stands where a generator that holds this one was kept by a traceback, and is closed meanwhile.
        if not self.rings or Alarm.innermost is not self:
            return
        self.set(0)
        Alarm.innermost = self.around
        # None: the handler was not Python's.
        signal.signal(signal.SIGALRM, signal.SIG_DFL if self.before is None else self.before)
        left, again = self.outer
        if left:  # at once where it should have rung meanwhile
            signal.setitimer(signal.ITIMER_REAL, max(left + self.began - time.monotonic(), 1e-6), again)

    def set(self, seconds: float) -> None:
        """Ring in so many seconds from now; 0 is never."""
        if self.rings:
            # Again, as a finalizer may swallow one; but not while the first is still on its way out, which may collect
            # garbage.
            signal.setitimer(signal.ITIMER_REAL, seconds, seconds and max(seconds, AGAIN))

    def _ring(self, *_: Any) -> None:
        raise self.error


class Waiting:
    """Counts the `seconds` that a run waits for data, and ends a wait of more than `timeout` seconds (0: never).

    A context manager around training. In any thread but the main one, and on Windows, it counts only: no alarm there.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout, self.seconds = timeout, 0.0
        self.alarm = Alarm(Stuck, rings=timeout > 0)
        self.others = set(multiprocessing.active_children())

    def __enter__(self) -> Waiting:
        self.alarm.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.alarm.__exit__()

    def over(self, batches: Iterable[T]) -> Iterator[T]:
        """The batches one by one; Stuck where one takes too long, when the data workers have been ended."""
        iterator = chain(batches)  # a DataLoader starts its workers in iter(), which chain calls with the first next()
        while True:
            begin = time.perf_counter()
            try:
                self.alarm.set(self.timeout)
                batch = next(iterator)
            except StopIteration:
                return
            except Stuck:
                self._end_workers()
                raise
            finally:
                self.alarm.set(0)
                self.seconds += time.perf_counter() - begin
            yield batch

    def taken(self) -> float:
        """The seconds since this was last asked."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds

    def _end_workers(self) -> None:
        """Kill the processes that have been started since, because Python waits at its end for what hangs."""
        self.alarm.set(0)
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
