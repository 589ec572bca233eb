"""The rules of a release on rows made by hand: what stops a bundle, what is left out, what is recommended."""

from __future__ import annotations

from typing import Any

import pytest

from okdc.verification import Gates
from okdc.verification.gates import (
    DEFAULTS,
    NO_WISHES,
    chance,
    for_cpu,
    is_variant,
    judge,
    milliseconds,
    verdict,
    weigh,
)


def row(name: str, precision: str = "fp32", ms: float | None = None, **changes: Any) -> dict[str, Any]:
    latency = [] if ms is None else [{"batch": 8, "p50_ms": 1, "cpu_ms": 1, "contended": False}]
    latency += [] if ms is None else [{"batch": 1, "p50_ms": 9 * ms, "cpu_ms": ms, "contended": True}]
    known = {"name": name, "file": None if name == "torch" else f"{name}.onnx", "precision": precision, "top1": 90.0}
    known |= {"agreement": 100.0, "rel": 0.0, "layers": None, "latency": latency, "runtime": None}
    return known | {"pass": True, "worth_shipping": True, "reason": None} | changes


def judged(
    precision: str, gates: Gates = NO_WISHES, tolerance: float = 1e9, labelled: bool = True, **changes: Any
) -> bool:
    done = judge(row("x", precision, **changes), 90.0, gates, tolerance, labelled=labelled)
    assert done["pass"] or (done["reason"] and done["worth_shipping"] is False)
    return done["pass"]


@pytest.mark.parametrize("precision", DEFAULTS)
def test_each_precision_has_gates_of_its_own(precision: str) -> None:
    drop, agreement = DEFAULTS[precision]
    assert judged(precision, top1=90 - drop, agreement=agreement)
    assert not judged(precision, top1=90 - drop - 0.01) and not judged(precision, agreement=agreement - 0.01)
    assert judged(precision, Gates(max_drop=5, min_agreement=80), top1=85.0, agreement=80.0)
    assert not judged(precision, Gates(max_drop=0), top1=89.9)
    assert not judged(precision, tolerance=0.1, rel=0.2) and not judged(precision, tolerance=0.1, rel=float("nan"))


@pytest.mark.parametrize(
    ("precision", "layers", "passes"),
    [
        ("int8", {"fp32": 4, "int8": 50}, True), ("int8", {"fp32": 54}, False), ("fp16", {"fp32": 54}, False),
        ("fp16", {"fp16": 54}, True), ("fp32", {"fp32": 54}, True), ("fp32", {"fp16": 1, "fp32": 53}, False),
        ("int8", {"fp16": 54}, False), ("int8", None, True),
    ],
)  # fmt: skip
def test_a_file_in_another_precision_than_it_is_sold_as_fails(precision: str, layers: Any, passes: bool) -> None:
    assert judged(precision, layers=layers) is passes


def test_a_top1_known_from_other_images_may_be_off_by_chance() -> None:
    mixed = [0, 1, 2, 3] * 100
    known = Gates(expected=90.0, known_from=5000)
    assert chance(known, mixed) == pytest.approx(300 * (0.9 * 0.1 / 400) ** 0.5)
    assert chance(known, sorted(mixed)) == chance(known, mixed)  # a sample has images of all classes, in any order
    assert chance(Gates(expected=90.0, known_from=100), mixed) == pytest.approx(2 * chance(known, mixed))
    for exact in (Gates(expected=90.0, known_from=400), Gates(expected=90.0), NO_WISHES):
        assert chance(exact, mixed) == 0
    assert judged("fp32", Gates(margin=4.5), top1=85.0) and not judged("fp32", Gates(margin=4.5), top1=84.9)


def test_of_noise_nothing_is_asked_but_that_float32_is_exact() -> None:
    assert not judged("fp32", labelled=False, agreement=99.0) and judged("int8", labelled=False, agreement=50.0)
    assert judged("fp16", tolerance=1e-2, labelled=False, rel=0.09)
    assert not judged("fp16", tolerance=1e-2, labelled=False, rel=0.11)


def test_what_stops_a_release() -> None:
    bad = {"pass": False}
    torch, plain, int8 = row("torch"), row("onnx"), row("onnx_int8", "int8")
    assert verdict([torch, plain, int8], True) == "pass" and verdict([torch, plain], False) == "parity_only"
    assert verdict([torch, plain, int8 | bad], True) == "pass"  # the others ship
    assert verdict([torch, int8 | bad], True) == "fail"  # nothing else was asked for
    assert verdict([torch, plain | bad, int8], True) == "fail"
    assert verdict([torch | bad, plain, int8], True) == "fail"
    assert verdict([torch, plain, row("predict.py", precision=None, **bad)], True) == "fail"  # type: ignore[arg-type]
    further = ["onnx on cuda"]  # by the libraries of one machine
    assert verdict([torch, plain, row("onnx on cuda", **bad)], True, further) == "pass"
    assert verdict([torch, plain | bad, row("onnx on cuda")], True, further) == "fail"
    assert verdict([torch], True) == "pass"  # weights only
    assert is_variant(int8) and not is_variant(plain) and not is_variant(torch)


def test_the_fastest_file_that_passed_is_recommended_and_slow_variants_are_marked() -> None:
    rows = [row("torch", ms=33), row("onnx", ms=18), row("fp16", "fp16", ms=20), row("int8", "int8", ms=6)]
    best = weigh(rows)
    assert best is not None and best["file"] == "int8.onnx"
    assert best["why"].startswith("6.00 ms of CPU time at batch 1, 5.5 times as fast as torch")
    assert [each["worth_shipping"] for each in rows] == [True, True, False, True]
    assert "on this device: 20.00 ms of CPU time at batch 1 against 18.00 ms" in rows[2]["reason"]
    rows = [row("torch", ms=33), row("onnx", ms=18), row("int8", "int8", ms=6, top1=None, **{"pass": False})]
    rows[2]["worth_shipping"] = False
    assert (weigh(rows) or {})["file"] == "onnx.onnx"
    assert (weigh([row("onnx", ms=18), row("int8", "int8", ms=17.5)]) or {})["file"] == "onnx.onnx"  # noise
    alike = [row("int8", "int8", ms=6, agreement=97.5), row("finetuned", "int8", ms=6.2, agreement=99.0)]
    assert (weigh([row("onnx", ms=18), *alike]) or {})["file"] == "finetuned.onnx"  # as fast, and closer to torch
    elsewhere = row("int8", "int8", ms=1) | {"worth_shipping": None}
    assert (weigh([row("onnx", ms=18), elsewhere]) or {})["file"] == "onnx.onnx"
    assert (weigh([row("int8", "int8"), row("onnx")]) or {})["file"] == "onnx.onnx"  # nothing was timed
    assert weigh([row("torch", ms=3)]) is None


def test_the_recommendation_goes_across_runtimes() -> None:
    short = row("onnx in Glass, bf16", "bf16", ms=5, file="onnx.onnx", runtime="Glass, bf16")
    rows = [row("torch", ms=33), row("onnx", ms=18), row("int8", "int8", ms=6), short]
    best = weigh(rows) or {}
    assert (best["file"], best["runtime"], best["name"]) == ("onnx.onnx", "Glass, bf16", "onnx in Glass, bf16")
    assert best["why"].startswith("in Glass, bf16, 5.00 ms of CPU time")
    assert (weigh([*rows[:3], short | {"pass": False, "worth_shipping": False}]) or {})["name"] == "int8"
    slow = row("onnx_fp16 in Glass", "fp16", ms=99, file="fp16.onnx", runtime="Glass", provider="CPUExecutionProvider")
    assert (weigh([row("onnx", ms=18), slow]) or {})["name"] == "onnx" and slow["reason"] is None
    assert verdict([row("torch"), row("onnx"), short | {"pass": False}], True, [short["name"]]) == "pass"
    alone = row("int8", "int8", **{"pass": False})  # type: ignore[arg-type]
    assert verdict([row("torch"), alone, slow], True, [slow["name"]]) == "fail", "the file is not in the bundle"


def test_predict_runs_what_is_fastest_on_a_cpu_whatever_is_recommended() -> None:
    runnable = {"onnx", "onnx_fp16", "onnx_int8"}
    cpu, gpu = {"provider": "CPUExecutionProvider"}, {"provider": "CUDAExecutionProvider"}
    here = [row("onnx", ms=18, **cpu), row("onnx_fp16", "fp16", ms=19, **cpu), row("onnx_int8", "int8", ms=6, **cpu)]
    assert for_cpu([*here, row("torch.export", ms=1, provider=None)], runnable) == "onnx_int8.onnx"
    assert for_cpu([here[0], row("onnx_int8", "int8", ms=17.5, **cpu)], runnable) == "onnx.onnx"
    assert for_cpu([row("onnx", ms=2, **gpu), row("onnx on cuda", ms=1, **gpu)], runnable) == "onnx.onnx"
    faster = row("onnx_int8_trt", "int8", ms=1, **gpu)
    assert for_cpu([faster, row("onnx_fp16", "fp16", **gpu)], runnable) == "onnx_fp16.onnx"
    assert for_cpu([here[2] | {"pass": False}, row("torch.export", ms=1, provider=None)], runnable) is None


def test_on_one_thread_of_a_cpu_processor_time_counts() -> None:
    assert milliseconds(row("x", ms=5)) == 5 and milliseconds(row("x")) is None
    assert milliseconds({"latency": [{"batch": 1, "p50_ms": 7, "cpu_ms": 2, "contended": None}]}) == 7
