"""Ctrl-C, SIGTERM and SIGHUP: a wish that a run answers after its step, and that its data workers leave to it."""

from __future__ import annotations

import _thread
import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor

from okdc.ranks import mean_, world

SIGNALS = tuple(each for each in signal.Signals if each.name in ("SIGINT", "SIGTERM", "SIGHUP"))  # Windows has no HUP


def heeded() -> list[signal.Signals]:
    """Those of SIGNALS upon which a run saves: not a hang-up that nohup has it ignore."""
    return [each for each in SIGNALS if each == signal.SIGINT or signal.getsignal(each) is not signal.SIG_IGN]


def end_with_parent() -> None:
    """Get a SIGTERM, upon which a run saves, when the process that started this one is gone; on Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, int(signal.SIGTERM))  # PR_SET_PDEATHSIG


class StopSignal:
    """Turns the first Ctrl-C, SIGTERM or SIGHUP into a wish, `signal`, that the loop sees after its step; the second
    one ends the process at once. In any thread but the main one it does nothing."""

    def __init__(self) -> None:
        self.signal = 0
        self.agreed = 0  # by all ranks, in several processes
        self.process = os.getpid()
        self.before: dict[int, Any] = {}
        self.woken: tuple[int, int] | None = None  # what the signals are written to, and what was it before

    @property
    def wish(self) -> int:
        """The signal to leave for; of several processes the one that any of them got, when all know of it."""
        return self.signal if world() == 1 else self.agreed

    @property
    def exit_code(self) -> int:
        return 128 + self.wish

    def agree(self, values: Tensor, others: Sequence[Tensor] = ()) -> list[float]:
        """`values` (N,), averaged over the ranks together with `others` (these in place), and what to leave for."""
        asked = values.new_tensor([self.signal == number for number in SIGNALS])
        told = torch.cat([values, asked])
        mean_([told, *others])
        got = told.tolist()
        self.agreed = next((number for number, share in zip(SIGNALS, got[len(values) :]) if share), 0)
        return got[: len(values)]

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._handle) for number in heeded()}
            self._tell_at_once()
        return self

    def _tell_at_once(self) -> None:
        """Say that the wish has come while a long operation of torch, which a handler waits for, still runs."""
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        self.woken = writing, signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        # Not a threading.Thread: whoever waits for all of those would wait for a signal.
        _thread.start_new_thread(_tell, (reading, set(self.before)))

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self.woken:
            signal.set_wakeup_fd(self.woken[1], warn_on_full_buffer=False)
            os.close(self.woken[0])
        for number, handler in self.before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.process:  # a data worker forked from here: Ctrl-C is its parent's to answer
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        if self.signal:
            raise SystemExit(128 + number)
        self.signal = number


@contextmanager
def stopping(told: Callable[[], None]) -> Iterator[None]:
    """Meanwhile Ctrl-C, SIGTERM and SIGHUP end what is done, which has nothing to save; then `told` says what to type.

    SystemExit with 128 and the number of the signal. In any thread but the main one it does nothing.
    """
    process, came = os.getpid(), False

    def leave(number: int, frame: FrameType | None) -> None:
        nonlocal came
        if os.getpid() != process:  # forked from here, and not yet what it is to become
            os._exit(128 + number)
        came = True
        raise SystemExit(128 + number)

    here = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, leave) for number in heeded()} if here else {}
    try:
        yield
    except SystemExit:
        if came:
            told()
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _tell(reading: int, numbers: set[int]) -> None:
    """Say it at the first of the signals, which C writes as they come; all are read, until nothing writes any more."""
    told = False
    with os.fdopen(reading, "rb", buffering=0) as pipe:
        while came := pipe.read(1):
            if came[0] in numbers and not told:
                told = True
                with suppress(OSError):  # a terminal that has hung up
                    os.write(2, b"\nStopping: this step is finished and saved first. Once more stops at once.\n")


def leave_signals(worker: int) -> None:
    """For a data worker: a terminal's Ctrl-C and SIGHUP and a scheduler's SIGTERM, which all get, do not end it.

    The main process needs data to finish its step; it ends its workers itself, also by SIGTERM.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.set_wakeup_fd(-1)  # a fork has that of its parent
    if hasattr(signal, "sigwaitinfo"):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        main = multiprocessing.parent_process()  # not os.getppid(), which a fork server may be
        assert main is not None
        threading.Thread(target=_end_when_told, args=(main.pid,), daemon=True).start()


def _end_when_told(by: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != by:
        pass
    os._exit(0)
