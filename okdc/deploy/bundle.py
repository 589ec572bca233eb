"""The files of a bundle that are not export targets: weights, configuration, check sums, model card; written and read.

Nothing here runs code that it finds in a bundle: weights are safetensors, everything else is json and text.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torchvision
from safetensors.torch import load_file, save
from timm.models._hub import save_config_for_hf  # its public caller refuses channels-last weights
from torch import nn

import okdc
from okdc import networks
from okdc.errors import ExportError
from okdc.networks import stem
from okdc.networks.pose_head import PoseNetwork
from okdc.networks.saved import CONFIG, config_of, of_bundle
from okdc.recipe import NetworkSettings
from okdc.system.wording import one_line, portable, without_paths
from okdc.verification import torch_runner

SUMS, WEIGHTS, GOLDEN = "SHA256SUMS", "model.safetensors", "golden.npz"
# How stored images are read, and what of the rest nobody said; in config.json: timm's create_transform knows it not.
IMAGES = ("exif", "pixel_bits", "assumed")
_UNKNOWN = ("mean", "std", "interpolation", "crop_pct", "crop_mode")  # what a bundle says nothing of, with the first
CACHE = "__pycache__"  # what Python leaves where predict.py was imported


def write_json(path: Path, value: Any) -> None:
    """Write json that is the same byte for byte for the same value, without absolute paths."""
    text = json.dumps(portable(value), indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """The value in a json file of a bundle; raises ExportError if it is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ExportError(f"{path} cannot be read ({error}). Export the run again: okdc export RUN") from error


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a bundle; raises ExportError if there is none, which makes the folder no bundle."""
    config = config_of(folder)
    if config is None:
        raise ExportError(f"{folder} is not an exported bundle (no {CONFIG}): give a run's export folder.")
    return config


def is_known(preprocess: Mapping[str, Any]) -> bool:
    """Whether it says how an image becomes an input, and not only of which size."""
    return "mean" in preprocess


def write_sums(folder: Path) -> None:
    """Write SHA256SUMS over every other file of the folder, in the format of `sha256sum --check`."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    lines = [f"{sha256(folder / name)}  {name}\n" for name in names if name != SUMS]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def listed(folder: Path) -> dict[str, str]:
    """File names of a bundle and their sums, from SHA256SUMS; empty if there is none."""
    if not (folder / SUMS).is_file():
        return {}
    lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}


def check_sums(folder: Path) -> list[str]:
    """What is wrong with the files of a bundle, such as "model.onnx changed"; empty if they are as exported."""
    sums = listed(folder)
    if not sums:
        return [f"{SUMS} missing"]
    problems = [f"{name} missing" for name in sums if not (folder / name).is_file()]
    changed = (name for name, digest in sums.items() if (folder / name).is_file() and sha256(folder / name) != digest)
    return problems + [f"{name} changed" for name in changed]


def sha256(path: Path) -> str:
    """The check sum of a file, as in SHA256SUMS."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_weights(student: nn.Module, path: Path) -> None:
    """Write the state_dict of the student, under its own keys."""
    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in student.state_dict().items()}
    path.write_bytes(save(tensors, metadata={"format": "pt"}))


def write_golden(student: nn.Module, input_size: Sequence[int], path: Path) -> None:
    """Write two random inputs and the logits that the student gives for them, on the CPU in fp32."""
    inputs = np.random.default_rng(0).standard_normal((2, *input_size), dtype=np.float32)
    np.savez(path, inputs=inputs, logits=torch_runner(student)(inputs))


def read_golden(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Two inputs (2, C, H, W) and the logits (2, classes) that torch gave for them when the bundle was written."""
    with np.load(folder / GOLDEN, allow_pickle=False) as arrays:
        return arrays["inputs"], arrays["logits"]


def write_config(
    student: nn.Module,
    path: Path,
    arch: str,
    classes: Sequence[str],
    preprocess: dict,
    model_args: dict | None,
    task: Mapping[str, Any],
) -> None:
    """Write config.json as timm and the Hugging Face hub read it; for other networks, with the same keys.

    task: what is noted of it (`Task.facts`).
    """
    labels, images = list(classes), {key: preprocess[key] for key in IMAGES if key in preprocess}
    preprocess = {key: value for key, value in preprocess.items() if key not in IMAGES}
    cfg = getattr(student, "pretrained_cfg", None) or {}
    head = student.made if isinstance(student, PoseNetwork) else None
    if timm.is_model(cfg.get("architecture") or "") and head is None:
        extra = {"label_names": labels}
        save_config_for_hf(student, str(path), extra, model_args=model_args, data_config=preprocess)
        config = read_json(path)
        # These are about the weights that timm has under that name, as is a preprocessing that is not the student's.
        for stale in ("tag", "license", "origin_url", *(() if is_known(preprocess) else _UNKNOWN)):
            config["pretrained_cfg"].pop(stale, None)
    else:
        known = {"num_classes": len(labels), "label_names": labels, "pretrained_cfg": preprocess}
        config = {"architecture": arch, "model_args": model_args or {}} | known
    own: dict[str, Any] = {"version": okdc.__version__, "loader": "state_dict"} | ({"images": images} if images else {})
    own |= task
    changes = stem.changes(student.backbone if isinstance(student, PoseNetwork) else student)
    if head:
        own |= {"base": config["architecture"], "head": head} | ({"changes": changes} if changes else {})
        config["architecture"] = f"{config['architecture']} (with a head of heat maps, see okdc.head)"
    elif changes:  # timm must not take the network for one that it can build by that name
        own |= {"base": config["architecture"], "changes": changes}
        config["architecture"] = f"{config['architecture']} (changed, see okdc.changes)"
    write_json(path, config | {"okdc": own})


def recommend(folder: Path, file: str | None) -> None:
    """Note in config.json which file predict.py runs; without any, there is none that it could."""
    config = read_config(folder)
    if file:
        write_json(folder / CONFIG, config | {"okdc": config["okdc"] | {"model": file}})


def settle_loader(folder: Path) -> str | None:
    """Try whether timm or torchvision rebuild the student from the folder alone, and note it in config.json.

    Returns why they cannot although they know the architecture, else None.
    """
    inputs, logits = read_golden(folder)
    config = read_config(folder)
    loader = _library(base(config))
    if loader == "state_dict":
        return None
    try:
        rebuilt = torch_runner(_build(folder, config))(inputs)
        if not np.allclose(rebuilt, logits, rtol=1e-4, atol=1e-4 * float(np.abs(logits).max())):
            return f"the network that {loader} builds from config.json gives other logits"
    except Exception as error:  # whatever a changed network makes the libraries raise
        return f"{loader} cannot rebuild the network from config.json: {one_line(error)}"
    write_json(folder / CONFIG, config | {"okdc": config["okdc"] | {"loader": loader}})
    return None


def load_student(folder: Path) -> nn.Module | None:
    """The student of a bundle, or None if neither timm nor torchvision can build it."""
    return _build(folder, read_config(folder)).eval() if can_load(folder) else None


def can_load(folder: Path) -> bool:
    """Whether timm or torchvision build the student of a bundle."""
    return loader(folder) != "state_dict"


def loader(folder: Path) -> str:
    """Who builds the student of a bundle: "timm", "torchvision", or nobody: "state_dict"."""
    config = read_config(folder)
    claimed = config.get("okdc", {}).get("loader", "state_dict")
    # Not what the file claims but what the name is decides: only these two libraries may build anything.
    return claimed if claimed == _library(base(config)) else "state_dict"


def base(config: dict[str, Any]) -> str:
    """The architecture that was changed, or that it is where nothing was."""
    return config.get("okdc", {}).get("base") or config["architecture"]


def _library(architecture: str) -> str:
    """Who can build an architecture by its name: "timm", "torchvision", or nobody: "state_dict"."""
    if architecture.startswith("torchvision/"):
        return "torchvision"
    from okdc.networks import cifar  # noqa: F401  (registers the CIFAR networks with timm)

    return "timm" if timm.is_model(architecture) else "state_dict"


def _build(folder: Path, config: dict[str, Any]) -> nn.Module:
    """The network of config.json with the weights of model.safetensors, whatever other weights lie there."""
    if "head" in config["okdc"]:
        return networks.load(of_bundle(folder, config, NetworkSettings()), config["num_classes"])
    name, changes = base(config), config["okdc"].get("changes")
    arguments = {**(config.get("model_args") or {}), "num_classes": config["num_classes"]}
    if name.startswith("torchvision/"):
        network = torchvision.models.get_model(name.removeprefix("torchvision/"), **arguments)
    elif changes:
        network = timm.create_model(name, pretrained=False, **arguments)
    else:
        network = timm.create_model(f"local-dir:{folder}", pretrained=False)
    stem.change(network, changes or {})
    network.load_state_dict(load_file(folder / WEIGHTS), strict=True)
    return network


def metadata(arch: str, classes: Sequence[str], preprocess: dict, info: Mapping[str, Any]) -> dict[str, str]:
    """What a lone file needs to be used, and where it comes from."""
    recipe = json.dumps(portable(info.get("recipe")), sort_keys=True)
    return {
        "okdc.version": okdc.__version__,
        "okdc.architecture": without_paths(arch),
        "okdc.labels": json.dumps(list(classes)),
        "okdc.preprocess": json.dumps(preprocess, sort_keys=True),
        "okdc.recipe_sha256": hashlib.sha256(recipe.encode()).hexdigest(),
    }


def refuse_foreign(folder: Path) -> None:
    """Raise ExportError if replacing the folder would delete something that is not a bundle's."""
    if not folder.name:
        raise ExportError(f"A bundle takes the place of its folder, which {folder} cannot be: --output {folder}/export")
    if not folder.exists():
        return
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    found = {name for name in found if CACHE not in Path(name).parts}
    foreign = sorted(found - set(listed(folder)) - {SUMS})
    if not folder.is_dir() or foreign:
        what = f"holds {foreign[0]}, which is not part of an exported bundle" if foreign else "is a file"
        raise ExportError(f"{folder} {what}. Move it away, or give another place: --output FOLDER")


def recover(folder: Path) -> None:
    """Put back what a `replace_folder` that was killed half-way had moved away."""
    for old in folder.parent.glob(f".{glob.escape(folder.name)}.old-*"):
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(old, folder)


def replace_folder(part: Path, folder: Path) -> None:
    """Put `part` where `folder` is; what was there goes away only once the new one is in place."""
    old = folder.with_name(f".{folder.name}.old-{os.getpid()}")
    if folder.exists():
        os.rename(folder, old)
    try:
        os.rename(part, folder)
    except OSError:
        if old.exists():
            os.rename(old, folder)
        raise
    shutil.rmtree(old, ignore_errors=True)
