"""Ctrl-C is answered as it comes, though what it asks for is done after the step."""

from __future__ import annotations

import hashlib
import os
import signal
import threading

import pytest

from okdc.system import signals


def test_that_it_stops_is_said_while_a_long_operation_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[bytes, int]] = []
    write = os.write
    with signals.StopSignal() as stop:

        def caught(file: int, text: bytes) -> int:
            told.append((text, stop.signal))
            return len(text) if file == 2 else write(file, text)

        monkeypatch.setattr(os, "write", caught)
        threading.Timer(0.05, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        while not stop.signal:
            hashlib.pbkdf2_hmac("sha256", b"", b"", 1_000_000)  # as in a step of torch, no handler runs meanwhile
    assert len(told) == 1 and b"saved first" in told[0][0] and told[0][1] == 0, "said before a handler could run"
    assert signal.set_wakeup_fd(-1) == -1, "nothing is left of it"
