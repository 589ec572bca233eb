"""Alarms that end in another order than they began in: a traceback may keep the generator that holds one."""

from __future__ import annotations

import signal
import time

import pytest

from okdc.system.waiting import Alarm, Stuck, Waiting

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


def test_an_alarm_inside_another_leaves_that_one_its_time() -> None:
    with Alarm(Stuck) as outer:
        outer.set(100)
        with pytest.raises(TimeoutError), Alarm(TimeoutError()) as inner:
            inner.set(0.02)
            time.sleep(50)
        assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 99.98
        reached = []
        with pytest.raises(Stuck):
            outer.set(0.5)
            with Waiting(50.0) as waiting:
                reached += waiting.over([1])
                time.sleep(0.6)
                reached.append(2)  # the outer one, whose time is over, waits for the end of this one
        assert reached == [1, 2]
        with pytest.raises(Stuck):
            time.sleep(50)
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0 and signal.getsignal(signal.SIGALRM) == signal.SIG_DFL
