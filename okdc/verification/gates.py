"""What may ship, and which of it should: the rules of a release, applied to the rows of a verification.

- The student in torch, the float32 files and predict.py are required: if one fails, nothing ships (exit code 3).
- fp16 and int8 files are variants. One that fails is left out of the bundle, its row says why, and the rest ships;
  unless nothing else was exported, or all of it failed: then what was asked for is not there, and nothing ships.
- onnxruntime's providers for GPUs, and runtimes such as OpenVINO, are further ways to run a file, which its own row
  judges. What one of them cannot do is told in its row, and stops nothing: it is of this machine's libraries, not of
  the bundle. A file that fails its own row is not in the bundle, so no runtime can pass with it.
- A variant that passes and does not save a twentieth of float32 ONNX's time at the smallest batch size stays, as
  another device may gain by it, but is not worth shipping for this one.
- A bundle that is verified again is held to all of its files, variants too, by the same rule for providers; and to what
  its float32 files do in float32 in the runtimes that were asked for, as it was asked whether they can run it.
- Recommended is the fastest file that is worth shipping, in the fastest runtime of those that were asked for; float32
  ONNX in onnxruntime unless another one saves a twentieth of its time. Of several that are as fast, up to a twentieth,
  it is the one that agrees most with torch.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from okdc import tasks
from okdc.tasks.task import Task
from okdc.verification.schema import Recommended, Row, score

# Largest loss of the task's metric (points), smallest agreement with torch (per cent), of each precision.
DEFAULTS = {"fp32": (0.5, 99.9), "fp16": (0.5, 99.5), "bf16": (0.5, 99.5), "int8": (1.0, 97.0)}
_PLAIN = "onnx"  # the row that the others are weighed against
_PAYS = 0.95  # of the time of float32 ONNX: less is lost in the noise


@dataclass(frozen=True)
class Gates:
    """What a row must reach; what is None is that of its precision in `DEFAULTS`.

    max_drop: largest fall of the task's metric, points; min_agreement: with torch, %; expected: what torch has of
    it, %; known_from: how many images that was measured on; None: on these. margin: points that it may fall beside
    max_drop.
    """

    max_drop: float | None = None
    min_agreement: float | None = None
    expected: float | None = None
    known_from: int | None = None
    margin: float = 0.0

    def drop(self, precision: str) -> float:
        """The largest fall of the metric for a file of this precision, points."""
        return DEFAULTS[precision][0] if self.max_drop is None else self.max_drop

    def agreement(self, precision: str) -> float:
        """The smallest agreement with torch for a file of this precision, per cent."""
        return DEFAULTS[precision][1] if self.min_agreement is None else self.min_agreement


NO_WISHES = Gates()


def chance(gates: Gates, labels: Sequence[Any]) -> float:
    """Points by which a share that is known from other images may be off for these: three standard deviations."""
    if gates.expected is None or gates.known_from in (None, len(labels)):
        return 0.0
    share = gates.expected / 100
    return 300 * math.sqrt(share * (1 - share) / min(len(labels), gates.known_from))


def fail(row: Row, reason: str) -> None:
    """Mark a row as failed; the first reason stays."""
    if row["pass"]:
        row |= {"pass": False, "worth_shipping": False, "reason": reason}


def judge(
    row: Row,
    expected: float | None,
    gates: Gates,
    tolerance: float,
    *,
    task: Task | None = None,
    labelled: bool = True,
    known: str = "with torch it is",
) -> Row:
    """The row with its verdict: the first gate it fails is the reason. expected: the score that it must keep, %.

    On noise (not `labelled`) a variant may differ ten times as much, and nothing is asked of its predictions, of which
    the network itself is not sure.
    """
    task = task or tasks.get()
    figure, agreement, rel = score(row, task.metric), row["agreement"], row["rel"]
    precision = row["precision"] or "fp32"
    least, drop = gates.agreement(precision), gates.drop(precision) + gates.margin
    if row["layers"] and (precision not in row["layers"] or (precision == "fp32" and len(row["layers"]) > 1)):
        found = ", ".join(f"{count} {name}" for name, count in row["layers"].items())
        fail(row, f"it is sold as {precision}, and its layers are {found}")
    if not labelled and precision != "fp32":
        agreement, tolerance = None, 10 * tolerance
    if agreement is not None and agreement < least:
        rounded = math.floor(100 * agreement) / 100  # never up to what is asked for
        fail(row, f"it agrees with torch on {rounded:.2f}% of the {task.compared}; at least {least:g}% must agree")
    if figure is not None and expected is not None and expected - figure > drop + 1e-9:
        fail(row, f"its {task.word} is {figure:.2f}%, {known} {expected:.2f}%; {drop:.3g} points may be lost")
    if rel is not None and not rel <= tolerance:  # also when it is not a number
        fail(row, f"its logits differ from torch's by {rel:.1e} of the largest; {tolerance:.0e} is allowed")
    return row


def is_variant(row: Row) -> bool:
    """Whether the others may ship without it: a file in less than float32."""
    return row["file"] is not None and row["precision"] in ("fp16", "int8") and row["runtime"] is None


def follow(row: Row, rows: Sequence[Row]) -> Row:
    """The row of a runtime, which fails where the file failed its own, one of `rows`: it is not in the bundle."""
    own = next((each for each in rows if each["file"] == row["file"]), None)
    if own is not None and not own["pass"]:
        fail(row, f"{row['file']} failed the gates of {own['name']}")
    return row


def verdict(rows: Sequence[Row], labelled: bool, further: Collection[str] = ()) -> str:
    """pass, parity_only (there were no labelled images) or fail, by the rules above; further: rows on other devices and
    in runtimes."""
    files = [row for row in rows if row["precision"] and row["file"] and row["runtime"] is None]
    nothing = bool(files) and not any(row["pass"] for row in files)
    if nothing or not all(row["pass"] for row in rows if not is_variant(row) and row["name"] not in further):
        return "fail"
    return "pass" if labelled else "parity_only"


def weigh(rows: Sequence[Row], task: Task | None = None) -> Recommended | None:
    """Mark the variants that are not worth shipping for their speed; returns the recommended file, and why it is.

    None where no file passed. Without latencies, float32 ONNX is recommended, else the first file that passed.
    """
    plain = next((row for row in rows if row["name"] == _PLAIN and row["pass"]), None)
    limit = milliseconds(plain) if plain else None
    for row in rows:
        spent = milliseconds(row)
        if row["pass"] and is_variant(row) and limit and spent and spent > _PAYS * limit:
            row["worth_shipping"] = False
            row["reason"] = f"not clearly faster than onnx on this device: {_time(row)} against {limit:.2f} ms"
    best = _fastest([row for row in rows if row["precision"] and row["file"] and row["worth_shipping"]])
    if best is None or best["file"] is None:
        return None
    return {
        "name": best["name"],
        "file": best["file"],
        "runtime": best["runtime"],
        "why": _why(best, rows, task or tasks.get()),
    }


def for_cpu(rows: Sequence[Row], runnable: Collection[str]) -> str | None:
    """The file that predict.py runs, by onnxruntime on a CPU: the fastest there, else any; None where none passed.

    runnable: the rows of the files that it can run.
    """
    fit = [row for row in rows if row["name"] in runnable and row["pass"]]
    here = [row for row in fit if row["worth_shipping"] and row["provider"] == "CPUExecutionProvider"]
    best = _fastest(here) or next(iter(fit), None)
    return best["file"] if best else None


def _fastest(fit: Sequence[Row]) -> Row | None:
    """The row that took least time, up to a twentieth of it that which agrees most with torch; float32 ONNX unless
    another saves a twentieth of its time, or nothing was timed."""
    plain = next((row for row in fit if row["name"] == _PLAIN), None)
    timed = [row for row in fit if milliseconds(row)]
    best = min(timed, key=lambda row: milliseconds(row) or 0.0, default=plain or next(iter(fit), None))
    spent = milliseconds(best) if best else None
    if spent:
        close = [row for row in timed if _PAYS * (milliseconds(row) or 0.0) <= spent]
        best = max(close, key=lambda row: (row["agreement"] or 0.0, -(milliseconds(row) or 0.0)))
    limit = milliseconds(plain) if plain else None
    return plain if best and limit and (milliseconds(best) or 0.0) > _PAYS * limit else best


def milliseconds(row: Row) -> float | None:
    """The time of the smallest batch; on one thread of a CPU its processor time, which other programs disturb less."""
    first = min(row["latency"], key=lambda entry: entry["batch"], default=None)
    if first is None:
        return None
    return first["p50_ms"] if first["contended"] is None else first["cpu_ms"]


def _time(row: Row) -> str:
    """`milliseconds` in words: the table beside it shows the time on the wall."""
    spent, first = milliseconds(row), min(row["latency"], key=lambda entry: entry["batch"], default=None)
    if spent is None or first is None:
        return "nothing was timed"
    return f"{spent:.2f} ms{' of CPU time' if first['contended'] is not None else ''} at batch {first['batch']}"


def _why(best: Row, rows: Sequence[Row], task: Task) -> str:
    torch = next((row for row in rows if row["name"] == "torch"), None)
    spent, before = milliseconds(best), milliseconds(torch) if torch else None
    parts = [f"in {best['runtime']}"] if best["runtime"] else []
    parts.append(_time(best))
    if spent and before:
        parts.append(f"{before / spent:.1f} times as fast as torch")
    figure, exact = score(best, task.metric), score(torch, task.metric) if torch else None
    if figure is not None and exact is not None:
        parts.append(f"{task.word} {figure:.2f}% ({figure - exact:+.2f} points)")
    return ", ".join(parts)
