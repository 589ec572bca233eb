"""Alarms that end in another order than they began in: a traceback may keep the generator that holds one."""

from __future__ import annotations

import signal
import time

import pytest

from okdc.system.waiting import Alarm

pytestmark = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no alarms")


def test_an_alarm_that_ends_late_does_not_disarm_the_one_that_is_set() -> None:
    before = signal.getsignal(signal.SIGALRM)
    late, inner = Alarm(RuntimeError("late")), Alarm(TimeoutError("inner"))
    late.__enter__()
    with pytest.raises(TimeoutError, match="inner"), inner:
        inner.set(0.05)
        late.__exit__()  # as the garbage collector does it
        time.sleep(5)
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
    signal.signal(signal.SIGALRM, before)
