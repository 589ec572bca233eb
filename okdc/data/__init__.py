"""Images in, batches out: open what the user names, check it before training, and load it in a stateless order.

The order of the images is f(seed, epoch) and the augmentation of an image is f(seed, epoch, image), whatever the number
of worker processes; that is what lets a run that was killed in the middle of an epoch go on as if nothing had happened.

To read it: `sources` opens what `--data` names (`folders`, with `splits`, `scan` and `names`, where that is a folder;
`tables`, with `rows`, `annotations` and `paths`, where it is a file of labels); `images` is one split and its labels,
which everything below reads; `loading.load` makes `batches` of it. `samples` says which image comes when (`pairs` and
`balance`: by their classes) and reads it by `transforms`; or `resident` keeps all decoded and `batchwise` augments
whole batches. `streams` (`stream_reading`: what its workers do) and `own_loader` go their own way; `own_preprocess` and
`own_images` say what was done to the images of the latter. Images with key points are opened by `keypoints`
(`coco_keypoints`, `deeplabcut`, `yolo_pose`, `figures`), cropped by `affine` and batched by `pose_batches`.

Imports: `errors`, `needs`, `ranks`, `recipe`, `system`, `tasks`.
"""

from __future__ import annotations

from okdc.data.loading import in_order, load
from okdc.data.own_loader import state, wrap
from okdc.data.own_preprocess import agreed, complete
from okdc.data.sources import open_source, open_together
from okdc.data.values import Data, Source, TrainBatches

__all__ = [
    "Data",
    "Source",
    "TrainBatches",
    "agreed",
    "complete",
    "in_order",
    "load",
    "open_source",
    "open_together",
    "state",
    "wrap",
]
