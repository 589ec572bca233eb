"""What a bundle says of itself: how an image becomes an input, what its classes are, whose programs it has."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import okdc
from okdc.deploy.bundle import IMAGES, is_known, read_config, read_json, sha256, write_json
from okdc.errors import ExportError
from okdc.networks.saved import CONFIG
from okdc.system import shipped
from okdc.system.wording import portable

PREPROCESS, LABELS = "preprocess.json", "labels.txt"
UNKNOWN = (
    "its preprocessing is unknown: say what was done to pixels from 0 to 1 with mean=[R, G, B], std=[R, G, B] and "
    "perhaps interpolation, crop_pct, in okdc.compress, Result.export or okdc.export, or type: okdc export RUN --mean "
    "R,G,B --std R,G,B"
)


def write_preprocess(folder: Path, preprocess: Mapping[str, Any]) -> None:
    """Write preprocess.json: what timm's `create_transform` takes, and nothing else; no file where that is unknown."""
    if is_known(preprocess):
        write_json(folder / PREPROCESS, {key: value for key, value in preprocess.items() if key not in IMAGES})


def read_preprocess(folder: Path) -> dict[str, Any]:
    """All that was done to the images in training, and how stored images are read; input_size alone where unknown."""
    config = read_config(folder)
    if not is_known(config["pretrained_cfg"]):
        return {"input_size": config["pretrained_cfg"]["input_size"]}
    return read_json(folder / PREPROCESS) | config.get("okdc", {}).get("images", {})


def write_labels(path: Path, classes: Sequence[str]) -> None:
    """Write the names of the classes, a line each; raises ExportError for a name that is no line of text."""
    if broken := [name for name in classes if "\n" in name or "\r" in name]:
        raise ExportError(
            f"the class name {broken[0]!r} has a line break, and {path.name} has one name per line: rename it."
        )
    path.write_text("".join(f"{name}\n" for name in classes), encoding="utf-8", newline="\n")


def read_labels(folder: Path) -> tuple[str, ...]:
    """The classes of labels.txt; only a line break ends a name, not all that str.splitlines takes for one."""
    return tuple((folder / LABELS).read_text(encoding="utf-8").removesuffix("\n").split("\n"))


def contradictions(folder: Path) -> dict[str, str]:
    """How preprocess.json and labels.txt differ from what config.json and model.onnx say of the same, by file."""
    config = read_config(folder)
    claims = [(CONFIG, config["pretrained_cfg"], config["label_names"])]
    if (folder / "model.onnx").is_file():
        import onnx

        with contextlib.suppress(Exception):  # of a file that is broken, its own row tells
            known = {entry.key: entry.value for entry in onnx.load(folder / "model.onnx").metadata_props}
            claims.append(("model.onnx", json.loads(known["okdc.preprocess"]), json.loads(known["okdc.labels"])))
    labels, found = read_labels(folder), dict[str, str]()
    preprocess = read_json(folder / PREPROCESS) if is_known(config["pretrained_cfg"]) else {}
    for source, how, names in claims:
        for key, value in preprocess.items():
            if key in how and how[key] != value:
                found.setdefault(PREPROCESS, f"its {key} is {value}, that in {source} is {how[key]}")
        if portable(names) != portable(labels):
            found.setdefault(LABELS, f"its classes are not those in {source}")
    return found


def note_programs(folder: Path) -> None:
    """Note in config.json the check sums of the programs in a bundle, which are okdc's own."""
    config = read_config(folder)
    sums = {path.name: sha256(path) for path in sorted(folder.glob("*.py"))}
    write_json(folder / CONFIG, config | {"okdc": config["okdc"] | {"programs": sums}})


def odd_programs(folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """How programs of a bundle differ from those of this okdc: those that are not what the bundle says, and the others.

    Whoever changes a program can change what the bundle says of it, too: that is then told, and cannot be judged.
    """
    noted = read_config(folder)["okdc"]
    wrong, other = dict[str, str](), dict[str, str]()
    for path in sorted(folder.glob("*.py")):
        ours, there = shipped.folder("export") / path.name, sha256(path)
        stated = noted.get("programs", {}).get(path.name)
        mine = sha256(ours) if ours.is_file() else None
        if there == mine or mine is stated is None:  # the last is a program of a user's own
            continue
        if stated not in (there, None):
            by = "this okdc" if stated == mine else f"okdc {noted.get('version')}"
            wrong[path.name] = f"it was changed: it is not the {path.name} of {by}, which config.json says it is"
        else:
            other[path.name] = (
                f"it differs from the {path.name} of this okdc ({okdc.__version__}), which ran in its place; the "
                f"bundle says that it was made by okdc {noted.get('version')}, and nothing here can tell"
            )
    return wrong, other
