"""The user's own loaders, checked and given the same face as okdc's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

from okdc import tasks
from okdc.data.names import check_lines
from okdc.data.own_batches import OwnBatches, OwnValidation, checked_batch, division, is_divided
from okdc.data.own_preprocess import agreed, preprocessing
from okdc.data.values import Batch, Data
from okdc.errors import DataError
from okdc.needs import NOTHING, Needs
from okdc.system.randomness import iterate_seeded
from okdc.system.waiting import limited
from okdc.tasks.task import Task


def wrap(
    train: Iterable[Any],
    validation: Iterable[Any] | None = None,
    *,
    num_classes: int | None = None,
    classes: Sequence[str] | None = None,
    preprocess: dict[str, Any] | None = None,
    stated: dict[str, Any] | None = None,
    name: str | None = None,
    seed: int = 0,
    needs: Needs = NOTHING,
    rank: int = 0,
    world: int = 1,
    timeout: float = 0.0,
    task: Task | None = None,
) -> Data:
    """The user's own iterables of (images (B, C, H, W) float, labels (B,) int64 or (B, classes) float) as `Data`.

    Both are read anew each epoch, with global random numbers that are f(seed, epoch, step), so that a DataLoader
    without a generator of its own gives the same order when a run is resumed. Batches stay on the device they come on,
    and their images are made float32.
    Without `classes` or `num_classes`, the classes are those of `train.dataset.classes`, else the labels are counted.
    `preprocess` says how an image becomes an input. Without it that is looked for in the validation loader, else the
    training loader, and `stated` has what the user says of it (mean, std, interpolation, crop_pct).
    Where `world` processes train together, each takes every `world`-th batch, this one from the `rank`-th on; a
    training loader with torch's DistributedSampler has been divided already. A method that `needs` a view for each
    member sees the same image with every one; where it needs so many, or weak and strong ones, training batches are (a
    list of as many tensors (B, C, H, W), labels). Pairs are those that batches happen to hold.
    Raises DataError for one-shot iterators, empty loaders, batches of a wrong type, shape or range, needs unmet, a
    validation loader with a DistributedSampler, which repeats images to make all parts equal, and loaders that give no
    batch for `timeout` seconds (0: never) when they are first looked at.
    """
    task = task or tasks.get()
    if needs.indices or needs.held_out:
        what = "which training image is which" if needs.indices else "images set aside from training"
        raise DataError(
            f"the method needs to know {what}, which a loader of your own does not say. Name the data instead "
            "(data=FOLDER), or choose another method or other settings of it (okdc methods NAME)."
        )
    _check_iterable(train, "training")
    names = classes or _dataset_classes(train) or [str(i) for i in range(num_classes or 0)]
    views = needs.strengths(1) if needs.views is not True else ("strong",)
    seen = _survey(train, "training", seed, len(names), timeout, task, views)
    names = names or [str(i) for i in range(seen.classes)]
    if len(names) < 2:
        raise DataError(
            "the training loader has labels of one class only; expected two or more. If there are more: num_classes=N"
        )
    check_lines(names, "the training data set")
    images, judged = 0, seen
    if validation is not None:
        _check_iterable(validation, "validation")
        if world > 1 and is_divided(validation):
            raise DataError(
                "the validation loader has a DistributedSampler, which repeats images to make all parts equal; "
                "expected one that gives every image once: leave out its sampler, and okdc divides its batches."
            )
        _check_same_classes(_dataset_classes(train), _dataset_classes(validation))
        judged = _survey(validation, "validation", seed, len(names), timeout, task)
        images = judged.images
    raw = None
    if preprocess is None:
        given = {key: value for key, value in (stated or {}).items() if value is not None}
        evaluates = validation is not None
        preprocess, raw = preprocessing(validation if evaluates else train, judged.first, given, evaluates)
    return Data(
        train=OwnBatches(train, seen.steps, len(names), seed, *division(train, rank, world), task, views),
        validation=None if validation is None else OwnValidation(validation, len(names), seed, task),
        validation_images=None if validation is None else raw,
        classes=tuple(names),
        preprocess=preprocess,
        name=name or type(getattr(train, "dataset", train)).__name__,
        sizes=(seen.images, images),
        bad_images={},
    )


def state(data: Data, stated: dict[str, Any]) -> Data:
    """The data of a user's own loader with what is said of its preprocessing only now, checked as by `wrap`.

    Raises DataError also where okdc itself prepared the images in another way.
    """
    if not isinstance(data.train, OwnBatches):
        return replace(data, preprocess=agreed(data.preprocess, stated, "the student was trained with"))
    judged = data.validation if isinstance(data.validation, OwnValidation) else None
    first = next(iter(judged) if judged else data.train.batches(0))
    loader = judged.loader if judged else data.train.loader
    preprocess, raw = preprocessing(loader, (first[0], first[1]), stated, judged is not None)
    return replace(data, preprocess=preprocess, validation_images=raw if judged else None)


@dataclass(frozen=True)
class Survey:
    """What is known of a loader before training."""

    steps: int
    images: int
    classes: int
    first: Batch


def _check_iterable(loader: Any, role: str) -> None:
    expected = "expected a torch DataLoader, a list of (images, labels) batches, or another iterable to read each epoch"
    if not isinstance(loader, Iterable):
        raise DataError(f"the {role} loader is a {type(loader).__name__}, which cannot be iterated over; {expected}.")
    if isinstance(loader, Iterator):
        raise DataError(
            f"the {role} loader is a {type(loader).__name__}, which can be read only once; {expected}. Pass the "
            "DataLoader itself rather than iter(loader), or list(batches) if they fit in memory."
        )


def _survey(
    loader: Any,
    role: str,
    seed: int,
    num_classes: int,
    timeout: float,
    task: Task,
    views: Sequence[str] = ("strong",),
) -> Survey:
    """Look at the first batch, and at all of them only where classes or steps cannot be told otherwise."""
    length = _length(loader)
    whole = not num_classes or length is None
    steps = images = most = 0
    first: Batch | None = None
    batches = iterate_seeded(loader, seed, 0)
    for batch in limited(batches, timeout, lambda count: f"while looking at batch {count + 1} of the {role} loader"):
        pixels, labels = checked_batch(batch, role, num_classes, task, views)
        if not pixels.isfinite().all():
            raise DataError(
                f"the {role} loader gave images that hold NaN or infinite numbers; expected finite ones. Look where "
                "they are divided: by a standard deviation of 0?"
            )
        first = first or (pixels[0] if len(views) > 1 else pixels, labels)
        steps, images = steps + 1, images + len(labels)
        most = max(most, task.outputs(labels))
        if not whole:
            break
    if first is None:
        raise DataError(
            f"the {role} loader is empty; expected at least one batch of (images, labels). Is drop_last dropping it?"
        )
    if not whole and length is not None:
        dataset_length = _length(getattr(loader, "dataset", None))
        steps, images = length, images * length if dataset_length is None else dataset_length
    return Survey(steps, images, most, first)


def _length(thing: Any) -> int | None:
    try:
        return len(thing)
    except TypeError:
        return None


def _dataset_classes(loader: Any) -> list[str]:
    dataset = getattr(loader, "dataset", None)
    while dataset is not None and not hasattr(dataset, "classes"):
        dataset = getattr(dataset, "dataset", None)  # torch's Subset keeps the data set that it is a part of
    return [str(name) for name in getattr(dataset, "classes", [])]


def _check_same_classes(trained: list[str], judged: list[str]) -> None:
    """DataError where both data sets name their classes and label 3 of one is not label 3 of the other."""
    both = list(zip_longest(trained, judged)) if trained and judged else []
    if found := [(i, *names) for i, names in enumerate(both) if names[0] != names[1]]:
        label, training, validation = found[0]
        raise DataError(
            f"the loaders have other classes: label {label} is {training!r} in the training data set and "
            f"{validation!r} in the validation data set. Make both of the same class folders, or give both "
            "data sets the same list `classes`."
        )
