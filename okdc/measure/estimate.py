"""What training with a method would build and take, found by building it and running it once; nothing is trained."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from okdc import methods, networks, tasks
from okdc.anatomy import Anatomy
from okdc.anatomy.modes import at_rest, unchanged
from okdc.cohort import Branch, Cohort, Cost
from okdc.errors import OkdcError
from okdc.methods import FirstGradients, Method, batch_of, first_gradients
from okdc.needs import NOTHING, Needs
from okdc.pipeline import assemble_cohort, teachers
from okdc.recipe import Recipe
from okdc.system.randomness import own_randomness, seed_everything
from okdc.tasks.task import Task

IMAGES = 4  # two of each of two classes, so that methods that compare images find pairs


@dataclass(frozen=True)
class Estimate:
    """What would be built, what one forward pass costs per image, and the memory that training takes, in float32."""

    input_size: tuple[int, ...]
    classes: int
    networks: tuple[Cost, ...]  # the members, then what else the method runs
    own_params: int  # trained parameters of the method's own modules
    trained_params: int
    flops: int  # of everything that a step runs, forward, per image
    weights: int  # bytes of parameters and buffers, trained or not
    activations: int  # bytes per image that are kept for the backward pass
    gradients: FirstGradients  # of the target, before the first step
    teacher_stands_in: bool

    @property
    def relative(self) -> float:
        """FLOPs over those of the target trained alone."""
        return self.flops / self.networks[0].flops

    @property
    def fixed(self) -> int:
        """Bytes whatever the batch: weights, and a gradient and a momentum of 4 bytes for each trained parameter."""
        return self.weights + 8 * self.trained_params


def estimate(recipe: Recipe) -> Estimate:
    """Build the recipe's network and method on the CPU and measure; OkdcError where the one cannot serve the other.

    A method that needs a teacher gets the recipe's, or else a new network like the target that stands in for one.
    """
    with own_randomness():
        method, stands_in = built(recipe)
        return measure(method, assemble_cohort.needs(recipe)[0], stands_in)


def refusal(network: nn.Module, anatomy: Anatomy, cut: str, task: Task | None = None) -> str | None:
    """Why no branch can part from the network after `cut`, found by letting one part; None where one can."""
    try:
        Cohort(network, torch.randn(2, *anatomy.input_size), [Branch(cut)], anatomy=anatomy, task=task).strip()
    except OkdcError as error:
        return str(error)
    return None


def built(recipe: Recipe) -> tuple[Method, bool]:
    """The recipe's network and method on the CPU, as training would build them, and whether its teacher stands in."""
    kind, name = methods.get(recipe.method["name"]), recipe.method["name"]
    stands_in = kind.needs_teacher and recipe.cohort.teacher is None
    teachers.check(recipe.cohort, name, needed=kind.needs_teacher and not stands_in)
    seed_everything(recipe.train.seed)
    target = networks.load(recipe.network)
    networks.freeze(target, recipe.train.freeze)
    if recipe.train.grad_checkpointing:
        networks.checkpoint_gradients(target)
    input_size = networks.data_config(target, recipe.network)["input_size"]
    classes = networks.check_input(target, input_size, tasks.get(recipe.network.task)).shape[1]
    like = replace(recipe.network, pretrained=False, checkpoint=None)
    teacher = networks.load(like, classes) if stands_in else None
    if named := recipe.cohort.teacher:
        # Shapes are enough here, so a name is not downloaded.
        known = Path(named).exists()
        alike = replace(like, model=named, img_size=None, small_input=False, num_classes=None, model_kwargs={})
        teacher = (
            teachers.load(named, input_size, classes, recipe.network.model) if known else networks.load(alike, classes)
        )
    # What is remembered of the training images is not counted: how many there are is not known here.
    labels = torch.arange(max(IMAGES * classes, recipe.train.batch_size)) % classes
    method = assemble_cohort.build_method(
        target, recipe, input_size, classes, named=True, teacher=teacher, train_labels=labels
    )  # fmt: skip
    return method, stands_in


def measure(method: Method, needs: Needs = NOTHING, teacher_stands_in: bool = False) -> Estimate:
    """Run one forward pass for its FLOPs and one for what it keeps; the method is left as it was."""
    anatomy, costs = method.cohort.anatomy, method.costs()
    batch = batch_of(method, needs)
    with unchanged(method), at_rest(method), torch.no_grad(), FlopCounterMode(display=False) as counter:
        method(*batch)
    members = {id(p) for p in method.cohort.parameters()}
    others = sum(p.numel() for p in method.parameters() if p.requires_grad and id(p) not in members)
    further = costs[len(method.cohort) :]
    frozen = sum(p.numel() for p in method.parameters() if not p.requires_grad and id(p) not in members)
    outside = max(0, sum(each.own_params for each in further if each.frozen) - frozen)  # a teacher that is not saved
    held = sum(p.nbytes for p in method.parameters()) + 4 * outside
    return Estimate(
        input_size=anatomy.input_size,
        classes=anatomy.num_classes,
        networks=costs,
        own_params=others - sum(each.own_params for each in further if not each.frozen),
        trained_params=sum(p.numel() for p in method.parameters() if p.requires_grad),
        flops=counter.get_total_flops() // IMAGES,
        weights=held + sum(b.nbytes for b in method.buffers()),
        activations=_kept(method, batch) // IMAGES,
        gradients=first_gradients(method, needs),
        teacher_stands_in=teacher_stands_in,
    )


def _kept(method: Method, batch: tuple[Tensor, ...]) -> int:
    """Bytes that one training pass keeps for its gradients beyond the weights themselves; shared memory counts once."""
    weights = {t.untyped_storage().data_ptr() for t in (*method.parameters(), *method.buffers())}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with unchanged(method), saved_tensors_hooks(keep, lambda tensor: tensor):
        parts = method.train()(*batch)  # held until the end: memory that is freed could be counted twice
        total = sum(kept.values())
    del parts
    return total
