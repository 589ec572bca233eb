"""Training whose data stops coming: what was done is saved, and said where it was."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from okdc.errors import TrainingError
from okdc.system.waiting import Stuck, worker_died
from okdc.training.state import Run, TrainState, save


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
        return worker_died(error)
    # Walked by hand and quickly: torch's own complaint may come as a signal in the middle of anything that takes long.
    frames = error.__traceback__
    while frames and frames.tb_next:
        frames = frames.tb_next
    return frames is not None and "multiprocessing" in frames.tb_frame.f_code.co_filename
