"""What the workers of all ranks do with a stream: each reads its share of it whole, and decodes what is wanted of that.

Worker w of rank r reads what worker w * ranks + r of one process would read that had the workers of all: so ranks take
the batches of such a process in turn. timm's readers are told so, and asked for their images as stored, so that those
of a resumed run's past cost a read and no decoding (but for `tfds/`, which TensorFlow decodes).
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from okdc.data.values import log
from okdc.system.randomness import derive_seed, reseed
from okdc.system.signals import leave_signals

Sample = tuple[Any, Any]  # an image, decoded or not, and the index of its class


class StreamReading(IterableDataset):
    """Batches of images (B, C, H, W) uint8 and labels (B,) as the data workers of rank `rank` of `world` read them.

    A batch is one worker's. What is random in it is f(seed, epoch, which of all ranks' workers, place in its share).
    With `full` the place of an image that cannot be read goes to another of its batch, else it is left out.
    """

    def __init__(
        self,
        dataset: Any,
        transform: Callable[[Image.Image], Tensor],
        mode: str,
        size: int,
        *,
        workers: int = 1,
        rank: int = 0,
        world: int = 1,
        seed: int = 0,
        full: bool = False,
    ):
        self.dataset, self.transform, self.mode, self.size = dataset, transform, mode, size
        self.workers, self.rank, self.world, self.seed, self.full = workers, rank, world, seed, full
        self.epoch = self.start = 0  # steps done of the epoch
        self.first, self.every = 0, 1  # of a worker's batches each `every`-th from the `first` on is decoded
        dataset.reader.input_img_mode = ""  # an image as it is stored

    def begin(self, worker: int) -> None:
        """In worker `worker` of a DataLoader: have the readers, which ask torch who they are, read its share of all."""
        leave_signals(worker)
        which = (worker + self.start) % self.workers * self.world + self.rank  # the next batch is the first worker's
        seed = derive_seed(self.seed, self.epoch, which)
        for name, value in (("id", which), ("num_workers", self.workers * self.world), ("seed", seed)):
            object.__setattr__(get_worker_info(), name, value)  # its class may be frozen

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        worker: Any = get_worker_info()  # as `begin` has it
        which = worker.id
        done = (self.start - which // self.world + self.workers - 1) // self.workers  # of its batches
        samples, decode = _undecoded(self.dataset)
        for number, batch in enumerate(iter(lambda: list(islice(samples, self.size)), [])):
            if number >= done and number % self.every == self.first:
                made = [*self._made(batch, decode, (self.seed, self.epoch, which, number))]
                if self.full:
                    made = self._filled(made)
                if made:
                    yield torch.stack([image for image, _ in made]), torch.tensor([int(label) for _, label in made])

    def _made(
        self, batch: list[Sample], decode: Callable[[Any], Image.Image], key: tuple[int, ...]
    ) -> Iterator[tuple[Tensor, Any]]:
        for place, (stored, label) in enumerate(batch):
            try:
                image = decode(stored)
                image = image if image.mode == self.mode else image.convert(self.mode)
            except Exception as error:  # Pillow's decoders raise nearly anything on broken files
                log.warning("skipped an unreadable image of a stream: %s: %s", type(error).__name__, error)
                continue
            reseed(*key, place, 4)
            yield self.transform(image), label

    def _filled(self, made: list[tuple[Tensor, Any]]) -> list[tuple[Tensor, Any]]:
        if not made:
            raise RuntimeError(f"none of the {self.size} images of a batch can be read.")
        return [made[place % len(made)] for place in range(self.size)]


def shards(dataset: Any) -> int | None:
    """How many files a data set of webdataset has, which its workers divide; None of other streams."""
    return len(dataset.reader.split_info.filenames) if _kind(dataset) == "ReaderWds" else None


def _kind(dataset: Any) -> str:
    return type(dataset.reader).__name__  # a class of timm's may be there only with the package that it reads by


def _undecoded(dataset: Any) -> tuple[Iterator[Sample], Callable[[Any], Image.Image]]:
    """The samples of a data set of timm's, with images as stored where its reader can leave them, and what decodes."""
    if _kind(dataset) == "ReaderWds":
        return iter(_files_of_shards(dataset.reader)), _decoded
    if _kind(dataset) == "ReaderHfids":
        return iter(_files_of_hub(dataset.reader)), _decoded_by_datasets
    return iter(dataset), lambda image: image


def _files_of_shards(reader: Any) -> Any:
    reader._lazy_init()
    decoding = reader.ds.stage(-2)
    decoding.args = (partial(_labelled, decoding.args[0], reader.input_key.split(";")),)
    return reader


def _labelled(decode: Callable[[dict[str, Any]], Any], names: list[str], sample: dict[str, Any]) -> Any:
    """What timm's reader makes of a sample, which may be nothing, but with the file of its image as it is."""
    name = next((name for name in names if name in sample), "")
    made = decode(sample | {name: _PIXEL} if name else sample)
    return made and made | {"jpg": sample[name]}


def _decoded(file: bytes) -> Image.Image:
    with io.BytesIO(file) as opened:
        image = Image.open(opened)
        image.load()
    return image


def _files_of_hub(reader: Any) -> Any:
    from datasets import Image as Feature

    reader._lazy_init()
    reader.ds = reader.ds.cast_column(reader.input_key, Feature(decode=False))
    return reader


def _decoded_by_datasets(stored: dict[str, Any]) -> Image.Image:
    from datasets import Image as Feature

    return Feature().decode_example(stored)


def _png() -> bytes:
    with io.BytesIO() as file:
        Image.new("L", (1, 1)).save(file, "png")
        return file.getvalue()


_PIXEL = _png()
