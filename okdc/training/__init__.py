"""The one training loop, shared by every method, and what it stands on: state, checkpoints, precision, processes.

It is handed the method and the data, and knows no name of either. A step from batch to update, in the order of calls:

1. `loop.fit` makes the `TrainState` (`state.build`), or takes up that of a checkpoint (`state.restore`).
2. `data.train.batches(epoch, done)` gives batches, through `system.waiting` and `watch`, which end a wait for nothing.
3. `step.stepper`: the batch moves to the device (`machine`), all random numbers become a function of (seed, epoch,
   step), and `Method.forward` (inside DDP: `parallel`) runs the cohort and gives named, weighted losses.
4. Each loss is scaled and differentiated; with `grad_accum_steps` this repeats from 3 for every batch of the group.
5. `Method.before_step` may let a member sit the step out. Losses and gradient norms come back in one transfer. Where
   one is not finite, buffers are put back and the step is skipped; else gradients are clipped and the optimizer steps.
6. `Method.after_step` gets the group's batches, then the moving average follows the target, then the schedule moves.
7. After the last step `evaluation` scores all members, `saving` writes a checkpoint beside the steps that follow,
   `progress` tells a person and `loggers` whom `--log` names. `--eval-metric` says by what an epoch is the best, and
   `--patience` how long to wait for a better one.

Imports: `errors`, `ranks`, `recipe`, `system`, `tasks`.
"""

from __future__ import annotations

from okdc.training.loop import fit
from okdc.training.state import TrainState

__all__ = ["TrainState", "fit"]
