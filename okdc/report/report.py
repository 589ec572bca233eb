"""The report of a run: report.html to look at, report.md to paste, report.json to compute with."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from okdc import tasks
from okdc.recipe import LOADER
from okdc.report import classes, curves, examples
from okdc.report.curves import series
from okdc.report.plots import line_chart, placer, spaced, ticks_for
from okdc.report.rendering import HUES, plain, write_all
from okdc.report.words import by_chance, chance, epoch, number, percent, signed
from okdc.tasks.task import Task

if TYPE_CHECKING:
    from okdc.verification.schema import Verification

PARTS = ("network", "method", "data", "metrics", "baseline", "environment")  # the facts that are dicts, or missing


def write(folder: Path, facts: dict[str, Any]) -> Path:
    """Write report.json (the facts), report.md, report.html and results.png (the curves) into `folder`.

    Each is written atomically. Returns the path of the html.
    """
    folder, facts = Path(folder), plain(facts)
    page = write_all(folder, "report", facts, view(folder, facts))
    curves.write(folder / "results.png", facts)
    return page


def _gain(now: Any, before: Any) -> str | None:
    """The signed difference of two percentages, `+1.4 points`; None where one is missing."""
    new, old = number(now), number(before)
    return None if new is None or old is None else f"{signed(new - old, 1)} points"


def view(folder: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """What the templates show of the facts."""
    import yaml

    facts = facts | {key: facts.get(key) or {} for key in PARTS}
    facts |= {key: facts.get(key) or [] for key in ("members", "history", "byproducts")}
    history, members, metrics = facts["history"], facts["members"], facts["metrics"]
    task, classes_of = tasks.get(facts.get("task") or tasks.DEFAULT), number(facts["data"].get("classes"))
    shown = task.shown(None if classes_of is None else int(classes_of))
    control = facts["baseline"].get("metrics") or {}
    best: dict[str, Any] = next((row for row in history if epoch(row.get("epoch")) == metrics.get("best_epoch")), {})
    images = facts["data"].get("validation_images") if task.is_share else None
    return facts | {
        "task": task,
        "headline": _headline(facts, control, task),
        "hues": HUES,
        "size": _size(facts["network"].get("input_size")),
        "gain": _gain(metrics.get(task.metric), control.get(task.metric)),
        "images": images,
        "chance": chance(metrics.get(task.metric), control.get(task.metric), images),
        "ensemble_gain": _gain(metrics.get(f"ensemble_{task.metric}"), metrics.get(task.metric)),
        "trained": facts.get("trained_params") or _trained(members),
        "costs": [_cost(members, "params"), _cost(members, "flops")],
        "accuracy": _accuracy(facts, task),
        "control": _control(facts, best, task) if facts["baseline"] else None,
        "losses": _losses(facts),
        "examples": examples.view(facts.get("examples"), task.several),
        "by_class": classes.view(facts.get("confusion")),
        "best": best,
        "shown": shown,
        "scores": [name for name in task.scores if name in shown],
        "further": [(name, each) for name, each in task.further() if name in shown],
        "milestones": [history[at] for at in spaced(len(history), 10)],
        "latency": _latency(facts.get("verification")),
        "uses": _uses(folder, facts, task),
        "recipe": yaml.safe_dump(facts.get("recipe") or {}, sort_keys=False, allow_unicode=True),
    }


def _headline(facts: dict[str, Any], control: dict[str, Any], task: Task) -> str:
    subject = f"{facts['network'].get('name') or 'network'} on {facts['data'].get('name') or 'data'}"
    after, before = number(facts["metrics"].get(task.metric)), number(control.get(task.metric))
    if after is None:
        return subject
    text = f"{subject}: {percent(after)} {task.word} after stripping"
    if before is None:
        return text
    text += f", {_gain(after, before)} {'over' if after >= before else 'against'} the baseline"
    images = number(facts["data"].get("validation_images")) if task.is_share else None
    return f"{text}, within chance" if images and abs(after - before) < by_chance(after, before, images) else text


def _size(shape: Any) -> str | None:
    sides = [shape, shape] if isinstance(shape, int) else (shape or [])[-2:]
    return " × ".join(map(str, sides)) or None


def _trained(members: list[dict[str, Any]]) -> float | None:
    """Parameters of the target and what every other member has for itself."""
    own = [_own(member, "params") for member in members[1:]]
    first = number(members[0].get("params")) if members else None
    return None if first is None or None in own else first + sum(filter(None, own))


def _own(member: dict[str, Any], what: str) -> float | None:
    total, own = number(member.get(what)), number(member.get(f"own_{what}"))
    return total - (number(member.get(f"shared_{what}")) or 0) if total is not None and own is None else own


def _cost(members: list[dict[str, Any]], what: str) -> dict[str, Any]:
    """Horizontal bars, in per cent of the longest: the shared trunk, then what the member has for itself."""
    longest = max((number(m.get(what)) or 0 for m in members), default=0)
    rows = []
    for at, member in enumerate(members):
        total, own = number(member.get(what)), _own(member, what)
        shared = (total or 0) - (own or 0)
        widths = [round(100 * part / longest, 2) if longest else 0 for part in (shared, own or 0)]
        numbers = {"total": total, "own": own, "shared": shared, "widths": widths}
        rows.append({**member, **numbers, "hue": _hue(at), "ships": at == 0})
    return {"what": what, "rows": rows, "known": longest > 0, "sharing": any(row["shared"] for row in rows)}


def _accuracy(facts: dict[str, Any], task: Task) -> dict[str, Any] | None:
    """The metric of the student, the ensemble, every branch and the control, by epoch."""
    names = [member.get("name") for member in facts["members"]]
    lines = [("student", "student", series(facts, f"eval_{task.metric}"))]
    if len(names) > 1:
        lines += [("ensemble", "ensemble", series(facts, f"{task.metric}/ensemble"))]
    for at, name in enumerate(names):
        points = series(facts, f"{task.metric}/{name}")
        if points != lines[0][2]:  # the target is the student, unless a moving average of it ships
            lines.append((str(name), _hue(at), points))
    lines.append(("baseline", "baseline", series(facts["baseline"], f"eval_{task.metric}")))
    # the steep start of a long training would press what follows into one line
    late = [y for _, _, points in lines for _, y in points[len(points) // 5 if len(points) >= 10 else 0 :]]
    return line_chart(lines, 320, floor=min(late)) if late else None


def _hue(member: int) -> str:
    return "target" if member == 0 else f"hue{(member - 1) % HUES}"


def _losses(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """One small chart for the total and for each kind of part: ce/target and ce/branch1 share one.

    The total is that of all members: the student's loss on the validation images, less by nature, has its own.
    """
    training = ("training", "student", series(facts, "train_loss"))
    validation = ("validation", "ensemble", series(facts, "eval_loss"))
    if len(facts["members"]) > 1:
        groups = {"total of all members": [training], "of the student, in validation": [validation]}
    else:
        groups = {"total": [training, validation]}
    members = [str(member.get("name")) for member in facts["members"]]
    for key in dict.fromkeys(key for row in facts["history"] for key in row if key.startswith("loss/")):
        kind, _, rest = key.removeprefix("loss/").partition("/")
        lines = groups.setdefault(kind, [])
        hue = _hue(members.index(rest)) if rest in members else f"hue{len(lines) % HUES}"
        lines.append((rest or kind, hue, series(facts, key)))
    charts = [(kind, line_chart(lines, 190)) for kind, lines in groups.items()]
    return [chart | {"title": kind} for kind, chart in charts if chart]


def _control(facts: dict[str, Any], best: dict[str, Any], task: Task) -> dict[str, Any] | None:
    """Dots on one axis: the control, the student, and who taught it, at the epoch that ships."""
    before = number((facts["baseline"].get("metrics") or {}).get(task.metric))
    after = number(facts["metrics"].get(task.metric))
    rows = [("baseline", "baseline", before), ("student", "student", after)]
    if len(facts["members"]) > 1:
        rows.append(("ensemble", "ensemble", number(facts["metrics"].get(f"ensemble_{task.metric}"))))
    names = [str(member.get("name")) for member in facts["members"]]
    rows += [(name, _hue(at), number(best.get(f"{task.metric}/{name}"))) for at, name in enumerate(names) if at]
    known = [value for _, _, value in rows if value is not None]
    if before is None or after is None:
        return None
    ticks = ticks_for(min(known), max(known), 4)
    place = placer(ticks[0], ticks[-1])
    return {
        "fewer": 100 * (after - before) / (100 - before) if before < min(after, 100) else None,
        "rows": [{"name": name, "hue": hue, "value": v, "at": place(v)} for name, hue, v in rows if v is not None],
        "ticks": [{"at": place(tick), "text": f"{tick:g}"} for tick in ticks],
    }


def _latency(verification: Verification | None) -> dict[str, Any]:
    """Bars per batch size, in per cent of the longest, and the figure of the card: onnx at the smallest batch."""
    groups: dict[int, list[dict[str, Any]]] = {}
    for row in verification["rows"] if verification else ():
        for timing in row["latency"]:
            if number(timing["p50_ms"]):
                groups.setdefault(timing["batch"], []).append({**timing, "name": row["name"]})
    for bars in groups.values():
        torch = next((_clock(bar) for bar in bars if bar["name"] == "torch"), None)
        for bar in bars:
            bar["marks"] = [number(bar.get(key)) or bar["p50_ms"] for key in ("p50_ms", "p90_ms", "p99_ms")]
        # one slow outlier must not shrink the bars to nothing: no whisker goes beyond three times the longest bar
        width = min(max(max(bar["marks"]) for bar in bars), 3 * max(bar["p50_ms"] for bar in bars))
        for bar in bars:
            bar["at"] = [round(min(100 * mark / width, 100), 2) for mark in bar["marks"]]
            bar["speedup"] = torch / _clock(bar) if torch and bar["name"] != "torch" else None
            bar["clock"] = ", by CPU time" if _clock(bar) != bar["p50_ms"] else ""
    fastest = [bar for batch in sorted(groups)[:1] for bar in groups[batch] if bar["name"] != "torch"]
    card = next((bar for bar in fastest if bar["name"] == "onnx"), fastest[0] if fastest else {})
    return {"groups": sorted(groups.items()), "card": card}


def _clock(timing: dict[str, Any]) -> float:
    """The time that speed-ups are told by, as in okdc.verification.gates: where others may be busy, that of the CPU."""
    spent = number(timing.get("cpu_ms")) if timing.get("contended") is not None else None
    return spent or timing["p50_ms"]


def _uses(folder: Path, facts: dict[str, Any], task: Task) -> list[tuple[str, str]]:
    run, bundle = shlex.quote(folder.as_posix()), shlex.quote((folder / "export").as_posix())
    settings = (facts.get("recipe") or {}).get("data") or {}
    data = str(settings.get("data") or facts["data"].get("name") or "DATA")
    data = "DATA" if data == LOADER else shlex.quote(data)  # the user's own batches have no name to type
    predict = shlex.quote((folder / "export" / "predict.py").as_posix())
    uses = [
        (f"{task.use}; needs only numpy, pillow and onnxruntime", f"python {predict} IMAGE"),
        ("Measure accuracy, agreement and latency again, on this machine", f"okdc verify {bundle} --data {data}"),
        ("Build the TensorRT engine, on the machine that will run it", f"okdc export {run} --onnx --trt"),
    ]
    lost = [each for each in (facts.get("verification") or {}).get("skipped") or () if each["target"] == "predict.py"]
    if lost and "unknown" in lost[0]["reason"]:
        uses[0] = ("Say how its images are prepared, for a predict.py", f"okdc export {run} --mean R,G,B --std R,G,B")
    return uses if facts.get("verification") else [("Export and verify first", f"okdc export {run} --onnx"), *uses[:2]]
