"""A method with the cohort that it asks for, put together around a network, and tried in one step."""

from __future__ import annotations

import inspect as python_inspect
import logging
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from okdc import tasks
from okdc.anatomy import inspect
from okdc.cohort import Branch, Cohort, Known
from okdc.errors import MethodError, RecipeError, nearest
from okdc.methods.shared import loading
from okdc.methods.shared.base import Method
from okdc.methods.shared.checks import misspelt, refuse_unwritten
from okdc.methods.shared.trial import try_step
from okdc.tasks.task import Task

log = logging.getLogger("okdc")


def build(
    network: nn.Module,
    example: Tensor,
    method: str | type[Method],
    *,
    members: int | None = None,
    extra_blocks: int | None = None,
    private_stages: int | None = None,
    cut: str | None = None,
    share: str | None = None,
    trunk_gradient: str | None = None,
    peers: Sequence[nn.Module] = (),
    teacher: nn.Module | None = None,
    train_labels: Tensor | None = None,
    pretrained: bool = False,
    fresh: Callable[[], nn.Module] | None = None,
    task: str | Task = tasks.DEFAULT,
    soft_labels: bool = False,
    known: Known | None = None,
    **settings: Any,
) -> Method:
    """A method around `network`, as okdc trains it: members, taps and gradient rule as its class says, and tried once.

    example: images (B >= 2, C, H, W), on which the branches are proved; where they are, the method is.
    members, extra_blocks, private_stages, cut, share, trunk_gradient, peers: other than the class says; see
    `Method.plan` and `Cohort`.
    teacher, train_labels: a trained network and the labels (N,) of all training images, for a method that takes them.
    pretrained, fresh, task, known: as for `Cohort`. soft_labels: labels will be class probabilities, as with mixup.
    settings: the keywords of the method's constructor.

    The network itself becomes member 0. MethodError for a class that cannot be trained as it is written, RecipeError
    for settings that it does not have, CutError where the network cannot be shared; the network is then as it was.
    """
    name = loading.name_of(method)
    kind, served = loading.get(name), tasks.get(task) if isinstance(task, str) else task
    loading.refuse_task(name, served)
    refuse_unwritten(kind)
    loading.refuse_settings(name, settings)
    given = _given(kind, teacher, train_labels)
    wishes = {"members": members, "share": share, "peers": peers}
    forms = {"extra_blocks": extra_blocks, "private_stages": private_stages, "cut": cut}
    options = {
        "pretrained": pretrained, "fresh": fresh, "task": served, "known": known, "trunk_gradient": trunk_gradient,
    }  # fmt: skip
    cohort = _cohort(network, example, kind, wishes, forms, settings, options)
    strip = cohort.strip
    try:
        built = _made(kind, cohort, given | settings).to(example.device)
        strip = built.strip
        for problem in misspelt(kind):
            log.warning("%s", problem)
        try_step(built, kind.needs(**settings), soft_labels)
        return built
    except BaseException:
        strip()
        raise


def _cohort(
    network: nn.Module,
    example: Tensor,
    kind: type[Method],
    wishes: dict[str, Any],
    forms: dict[str, Any],
    settings: dict[str, Any],
    options: dict[str, Any],
) -> Cohort:
    """The members that the class plans, by wishes for how many and by forms of the branches; `options` of `Cohort`."""
    apart = kind.members == 1 or bool(wishes["peers"]) or (wishes["share"] or kind.share) == "none"
    anatomy = inspect(network, example, logits_only=apart and not kind.taps, task=options["task"])
    planned = python_inspect.signature(kind.plan).parameters  # settings that the plan depends on, too
    plan = kind.plan(anatomy, **wishes, **forms, **{k: v for k, v in settings.items() if k in planned})
    _refuse_ignored(forms | {"trunk_gradient": options["trunk_gradient"]}, plan)
    options = options | {"trunk_gradient": options["trunk_gradient"] or kind.trunk_gradient}
    return Cohort(
        network, example, plan, taps=kind.taps, tapped=kind.tapped(anatomy, **settings), anatomy=anatomy, **options
    )


def _given(kind: type[Method], teacher: nn.Module | None, train_labels: Tensor | None) -> dict[str, Any]:
    """What okdc itself gives a method: the teacher, and labels where its constructor takes them."""
    if kind.needs_teacher and teacher is None:
        raise RecipeError(f"{kind.__name__} needs a trained network: give teacher=NETWORK.")
    if teacher is not None and not kind.needs_teacher:
        raise RecipeError(f"{kind.__name__} takes no teacher: leave it out, or say needs_teacher = True in the class.")
    given: dict[str, Any] = {} if teacher is None else {"teacher": teacher}
    takes = python_inspect.signature(kind.__init__).parameters.get("train_labels")
    if takes is not None and takes.default is takes.empty and train_labels is None:
        raise RecipeError(
            f"{kind.__name__} needs the labels of all training images, which are not known here. By hand, give "
            "okdc.build(..., train_labels=LABELS); with --data, a folder or a table and no stream."
        )
    if takes is not None:
        given["train_labels"] = train_labels
    return given


def _made(kind: type[Method], cohort: Cohort, settings: dict[str, Any]) -> Method:
    """The method itself; MethodError for a constructor that does not hand the cohort on."""
    missing = MethodError(
        f"the __init__ of {kind.__name__} does not call super().__init__(cohort): write that as its first line."
    )
    asked = list(python_inspect.signature(kind.__init__).parameters.values())[2:]  # after self and the cohort
    for each in asked:
        several = each.kind in (each.VAR_KEYWORD, each.VAR_POSITIONAL)
        if each.default is each.empty and not several and each.name not in settings:
            raise MethodError(
                f"{kind.__name__} cannot be made without {each.name}: give it (--method-kwargs {each.name}=VALUE), "
                f"or give it a default in __init__.{nearest(each.name, ('train_labels', 'teacher'))}"
            )
    try:
        made = kind(cohort, **settings)
    except AttributeError as error:
        if ".__init__() call" in str(error):  # torch's words for a module that was not begun
            raise missing from error
        raise
    if "_modules" not in vars(made) or "cohort" not in made._modules:
        raise missing
    return made


def _refuse_ignored(forms: dict[str, Any], plan: list[Branch]) -> None:
    """RecipeError where the method planned its branches without a setting that was given."""
    ignored = []
    if not any(branch.cut for branch in plan):
        ignored += [name for name in ("cut", "private_stages", "trunk_gradient") if forms[name]]
    if forms["extra_blocks"] and not any(any(branch.extra_blocks) for branch in plan):
        ignored.append("extra_blocks")
    if ignored:
        flags = " and ".join(f"--{name.replace('_', '-')}" for name in ignored)
        why = "are all as deep as the target" if ignored == ["extra_blocks"] else "share nothing with the target"
        raise RecipeError(f"{flags} has no effect here: the members of this method {why}. Leave it out.")
