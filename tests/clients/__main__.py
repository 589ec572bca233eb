"""How far the files of four networks agree with torch in other people's runtimes, as a table; run by hand, in minutes.

python -m tests.clients --data FOLDER   (train/CLASS and val/CLASS, small colour images)
pip install --target OLD onnxruntime==1.16.3 "numpy<2"; python -m tests.clients --data FOLDER --opset 18 --old OLD

Each network is trained for some epochs only, and every file is tried whatever the gates would say of it: the table is
about the clients. Each runs in a process of its own, as some die. Clients that are not installed have a line that says
so; node looks for its own in the folder where this is typed.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

import okdc
from okdc.deploy import runtimes, targets
from okdc.deploy.calibration import draw
from okdc.system import shipped
from okdc.system.wording import one_line, without_paths
from okdc.verification import torch_runner
from okdc.verification.alone import Alone

HERE = Path(__file__).parent
FILES = {"fp32": "onnx", "fp16": "onnx_fp16", "int8": "onnx_int8", "int8.trt": "onnx_int8_trt"}
SLOW = {"onnx's reference evaluator": 8}  # one image takes so many times as long: fewer are run


def networks(data: str) -> dict[str, dict[str, Any]]:
    """The settings of each network's run, by what it is called in the table."""
    digits: dict[str, Any] = {"data": "digits", "img_size": 64}
    adamw = {"epochs": 40, "opt": "adamw", "lr": 1e-3, "weight_decay": 0.05}
    return {
        "digits, mobilenetv3_small_050": {"model": "mobilenetv3_small_050", "epochs": 8, **digits},
        "RGB, resnet20_cifar": {"model": "resnet20_cifar", "epochs": 2, "data": data, "img_size": 32},
        "digits, test_vit": {"model": "test_vit", **adamw, **digits},
        "digits, test_convnext": {"model": "test_convnext", **adamw, **digits},
    }


def clients(old: list[str]) -> Iterator[tuple[str, Path, dict[str, Any], str]]:
    """Each client's name, the file that runs it, its options, and the folder where Python looks for it first."""
    for path in sorted(HERE.glob("run_*.py")):
        yield shipped.load(path).NAME, path, {}, ""
    for runtime in runtimes.known().values():
        if runtime.device == "cpu":
            yield runtime.module.NAME, runtime.path, {"precision": "fp32"}, ""
    for folder in old:
        yield "onnxruntime", HERE / "run_onnxruntime.py", {}, folder


def files(settings: dict[str, Any], folder: Path, images: int, opset: int) -> tuple[float, np.ndarray, np.ndarray]:
    """Write every file; returns the network's top-1 (%), images drawn by a seed, and torch's choices for them."""
    result = okdc.compress(output=folder, method="baseline", workers=0, onnx=False, **settings)
    student, calibration = result.student.cpu(), draw(result.data, 128)[0]
    options = {"onnx": folder / "model.onnx", "calibration": calibration, "opset": opset}
    for target in map(targets.find, FILES.values()):
        taken = {name: value for name, value in options.items() if name in target.options}
        example = torch.zeros(2, *result.data.preprocess["input_size"])
        target.module.write(student, example, folder / target.file, **taken)
    inputs = np.concatenate([np.asarray(batch) for batch, _ in result.data.validation or ()])
    chosen = inputs[torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))[:images].numpy()]
    return result.metrics["top1"], chosen, torch_runner(student)(chosen).argmax(1)


def lines(folder: Path, inputs: np.ndarray, choices: np.ndarray, old: list[str]) -> Iterator[list[str]]:
    """One line per client: its name and version, images, and agreement with torch for each file, per cent."""
    for name, path, options, place in clients(old):
        if (reason := shipped.load(path).available()) is not None:
            yield [f"{name}: {reason}", "-", *["-"] * len(FILES)]
            continue
        count = max(1, len(inputs) // SLOW.get(name, 1))
        told, cells = name, list[str]()
        for target in FILES.values():
            file = folder / targets.find(target).file
            try:
                with mock.patch.dict(os.environ, {"PYTHONPATH": place} if place else {}):
                    run = Alone(str(path), file, "cpu", options)
                told = run.provider if run.provider.startswith(name) else f"{name} {run.provider}"
                logits = np.concatenate([run(inputs[i : i + 1]) for i in range(count)])
                cells.append(f"{100 * (logits.argmax(1) == choices[:count]).mean():.1f}")
            except RuntimeError as error:
                cells.append(without_paths(one_line(error)))
        yield [told, str(count), *cells]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a folder of colour images: train/CLASS and val/CLASS")
    parser.add_argument("--images", type=int, default=200, help="validation images for each client")
    parser.add_argument("--only", default="", help="the networks with this in their name, such as vit")
    parser.add_argument("--opset", type=int, default=20, help="of the files")
    parser.add_argument("--old", action="append", default=[], help="a folder with another onnxruntime for Python")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| network | client | images | " + " | ".join(FILES) + " |\n|---|---|---|" + "---|" * len(FILES))
    chosen = {name: each for name, each in networks(options.data).items() if options.only in name}
    for name, settings in chosen.items():
        with tempfile.TemporaryDirectory() as scratch:
            top1, *asked = files(settings, Path(scratch), options.images, options.opset)
            for line in lines(Path(scratch), *asked, options.old):
                print(f"| {name}, top-1 {top1:.1f} % | " + " | ".join(line) + " |", flush=True)


if __name__ == "__main__":
    main()
