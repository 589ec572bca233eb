"""The model card of a bundle: README.md with the results, how to run it, and what it was made from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from okdc.deploy import runtimes, targets, triton
from okdc.deploy.bundle import WEIGHTS, is_known
from okdc.deploy.statement import UNKNOWN
from okdc.errors import counted
from okdc.networks import stem
from okdc.networks.saved import CONFIG
from okdc.system.wording import portable
from okdc.tasks.task import Task
from okdc.verification.gates import is_variant
from okdc.verification.schema import Row, Verification, score

PROGRAM = "model.pt2"

_ASSUMED = " (assumed: nobody said it of the images that it was trained on)"
_FILES = {  # beside those of the export targets
    WEIGHTS: "the weights",
    CONFIG: "architecture, classes and preprocessing, as timm and the Hugging Face hub read them",
    "preprocess.json": "how an image becomes an input",
    "labels.txt": "one class per line, in the order of the logits",
    triton.FOLDER: "a model repository: `tritonserver --model-repository triton`",
    "predict.py": "image files in, classes out; needs the packages of requirements.txt and no torch",
    "requirements.txt": "what predict.py needs: `pip install -r requirements.txt`",
    "export-errors.txt": "all that exporters said of what they could not write",
    "verification.json": "what was measured, on which machine",
    "keypoints.json": "the key points' names, and how heat maps become points on an image",
    "golden.npz": "two random inputs and the logits that they must give",
    "SHA256SUMS": "`sha256sum --check SHA256SUMS` finds damage; who changes files on purpose can make the sums anew",
}


def write_card(
    folder: Path, arch: str, config: dict, verification: Verification, info: Mapping[str, Any], task: Task
) -> None:
    """Write README.md; info may have title, licence (an id such as mit), command, recipe and metrics."""
    info = portable(dict(info))
    results = _results(verification, task, config["num_classes"])
    parts = [_head(arch, config, info, task), results, _run(folder, arch, config), _files(folder)]
    (folder / "README.md").write_text("\n\n".join([*parts, _origin(config, info)]) + "\n", encoding="utf-8")


def _head(arch: str, config: dict, info: Mapping[str, Any], task: Task) -> str:
    size = "x".join(str(side) for side in config["pretrained_cfg"]["input_size"])
    changes = config["okdc"].get("changes")
    library = "library_name: timm\n" if config["okdc"]["loader"] == "timm" and not _is_changed(config) else ""
    changed = f" Its first layers are not the architecture's: {stem.described(changes)}." if changes else ""
    return (
        f"---\n{yaml.safe_dump({'license': info.get('licence') or 'other'})}{library}"
        f"pipeline_tag: {task.hub}\ntags:\n- {task.hub}\n- okdc\n---\n\n"
        f"# {info.get('title') or portable(arch)}\n\n"
        f"{portable(arch)}, {config['num_classes']} {task.nouns[1]}, input {size}, trained and exported by "
        f"okdc {config['okdc']['version']}.{changed}"
    )


def _results(verification: Verification, task: Task, outputs: int) -> str:
    rows = verification["rows"]
    scores = [name for name in task.scores if name in task.shown(outputs)]
    batches = sorted({entry["batch"] for row in rows for entry in row["latency"]})
    head = [
        "runner",
        "file",
        "MB",
        *(f"{task.metrics[name].word} %" for name in scores),
        "agrees with torch %",
        "rel. difference",
    ]
    head += [f"ms at batch {batch} (p50)" for batch in batches] + ["verdict"]
    lines = [_line(head), _line(["---"] * len(head))]
    for row in rows:
        shares = (_number(score(row, name), "{:.2f}") for name in (*scores, "agreement"))
        times = {entry["batch"]: entry["p50_ms"] for entry in row["latency"]}
        latency = [_number(times.get(batch), "{:.2f}") for batch in batches]
        verdict = _verdict(row, verification["verdict"] != "fail")
        cells = [row["name"], row["file"] or "", _number(row["mb"], "{:.1f}"), *shares, _number(row["rel"], "{:.0e}")]
        lines.append(_line([*cells, *latency, verdict]))
    machine = verification["environment"].get("cpu" if verification["device"] == "cpu" else "gpu") or ""
    sample = verification["sample"]
    kind = "random input" if verification["verdict"] == "parity_only" else "image"
    images = sample["told"] if sample else counted(verification["images"], kind)
    images += " (there were no validation images)" * (verification["verdict"] == "parity_only")
    text = f"Measured on {images}, device {verification['device']}"
    skipped = [f"- {entry['target']} was skipped: {entry['reason']}" for entry in verification["skipped"]]
    text += f" ({machine}); latency on {counted(verification['threads'], 'thread')}."
    return "\n".join(["## Results", "", *lines, "", text, *_remarks(verification), *skipped])


def _verdict(row: Row, left_out: bool) -> str:
    if not row["pass"]:
        return f"**fail**: {row['reason']}" + (", so it is not in this folder" if left_out and is_variant(row) else "")
    return "pass" if row["reason"] is None else f"pass; {row['reason']}"


def _remarks(verification: Verification) -> list[str]:
    """What is recommended, how many parameters are left after fusing, and what int8 was calibrated on."""
    recommended, exports = verification["recommended"], verification["exports"]
    lines = [f"- **Recommended here: `{recommended['file']}`**: {recommended['why']}."] if recommended else []
    before = verification["parameters"]
    after = next((facts["parameters"] for facts in exports.values() if "parameters" in facts), None)
    if after and after != before:
        lines.append(f"- Parallel branches are fused in the exported files: {before:,} parameters become {after:,}.")
    for name, facts in exports.items():
        if "opset" in facts:
            lines.append(f"- {name} has opset {facts['opset']}, in version {facts['ir_version']} of the format.")
    for split, classes in verification["data"]["unreadable"].items():
        lost = ", ".join(f"{count} of {name}" for name, count in classes.items())
        lines.append(f"- Images of the {split} split that could not be read: {lost}.")
    drawn = verification["calibration"]
    if drawn:
        source = "as they come in training" if drawn["augmented"] else f"drawn with seed {drawn['seed']}"
        lines.append(f"- int8 is calibrated on {drawn['images']} training images, {source}.")
    for name, facts in exports.items():
        if facts.get("kept_in_float"):
            kept = ", ".join(
                f"`{each['layer']}`" if isinstance(each, dict) else each for each in facts["kept_in_float"]
            )
            lines.append(f"- {name} keeps in float: {kept}.")
    return lines


def _run(folder: Path, arch: str, config: dict) -> str:
    lines = ["## How to run it", ""]
    if (folder / "predict.py").is_file():
        lines += ["```bash", "pip install -r requirements.txt", "python predict.py IMAGE [IMAGE ...]", "```", ""]
    return "\n".join([*lines, "```python", *_loading(portable(arch), config, (folder / PROGRAM).is_file()), "```"])


def _loading(arch: str, config: dict, has_program: bool) -> list[str]:
    """The lines of Python that load the weights, or the whole program where nobody else can build the network."""
    loader, name, classes = config["okdc"]["loader"], config["architecture"], config["num_classes"]
    changed = _is_changed(config)
    if has_program and (changed or loader not in ("timm", "torchvision")) and ":" not in name:
        return ["import torch", "", f'network = torch.export.load("{PROGRAM}").module()']
    if changed and loader in ("timm", "torchvision"):
        load = 'network = networks.load(NetworkSettings(model="PATH/OF/THIS/FOLDER")).eval()'
        return ["from okdc import networks", "from okdc.recipe import NetworkSettings", "", load]
    if loader == "timm":
        registering = [] if _is_timms_own(name) else ["import okdc.networks  # registers the architecture with timm"]
        create = 'network = timm.create_model("local-dir:PATH/OF/THIS/FOLDER", pretrained=True).eval()'
        return [*registering, "import timm", "", create]
    build = f"...  # {arch} with {classes} classes, built as it was for training"
    imports = ["from safetensors.torch import load_file"]
    if loader == "torchvision":
        arguments = "".join(f", {key}={value!r}" for key, value in sorted(config["model_args"].items()))
        build = f'torchvision.models.get_model("{name.removeprefix("torchvision/")}", num_classes={classes}{arguments})'
        imports = ["import torchvision", *imports]
    return [*imports, "", f"network = {build}", f'network.load_state_dict(load_file("{WEIGHTS}"))', "network.eval()"]


def _is_changed(config: dict) -> bool:
    """Whether okdc alone builds the network: it changed an architecture, or gave it a head."""
    return bool({"changes", "head"} & config["okdc"].keys())


def _is_timms_own(architecture: str) -> bool:
    import timm

    return timm.models.model_entrypoint(architecture).__module__.startswith("timm.")


def _files(folder: Path) -> str:
    present = {path.name for path in folder.iterdir()} | {"SHA256SUMS", "verification.json"}
    known = targets.known().values()
    written = {name: what for target in known for name, what in target.files.items()}
    tools = {target.path.name: target.tool for target in known if target.tool}
    tools |= {name: f"a part of {each.path.name}" for each in known if each.tool for name in each.beside}
    tools |= {runtime.path.name: runtime.tool for runtime in runtimes.known().values()}
    every = {**written, **tools, **_FILES}.items()
    return "\n".join(["## Files", "", *(f"- `{name}`: {what}" for name, what in every if name in present)])


def _origin(config: dict, info: Mapping[str, Any]) -> str:
    cfg, assumed = config["pretrained_cfg"], config["okdc"].get("images", {}).get("assumed", ())
    keys = ("input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std")
    shown = (f"- {key}: {cfg[key]}{_ASSUMED * (key in assumed)}" for key in keys if key in cfg)
    lines = ["## Preprocessing", "", *shown]
    if not is_known(cfg):
        lines += ["", f"How an image becomes an input is not stated in this bundle: {UNKNOWN}."]
    numbers = {key: value for key, value in (info.get("metrics") or {}).items() if isinstance(value, (int, float, str))}
    if numbers:
        lines += ["", "## Training", "", *(f"- {key}: {_number(value, '{:.4g}')}" for key, value in numbers.items())]
    if info.get("command"):
        lines += ["", "## Command", "", "```bash", str(info["command"]), "```"]
    if info.get("recipe"):
        lines += ["", "## Recipe", "", "```yaml", yaml.safe_dump(info["recipe"], sort_keys=False).rstrip(), "```"]
    return "\n".join(lines)


def _number(value: Any, form: str) -> str:
    return "" if value is None else form.format(value) if isinstance(value, (int, float)) else str(value)


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
