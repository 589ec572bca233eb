"""What a run is asked to do: sections of settings, read strictly from YAML, flags and keywords; no torch.

One field in `sections` is a recipe key, a flag and its help.

Imports: `errors`, `system`.
"""

from __future__ import annotations

from okdc.recipe.presets import (
    FINETUNE,
    PRESETS,
    SCRATCH,
    default_preset,
    own_path,
    preset_recipe,
    refuse_preset,
)
from okdc.recipe.recipe import (
    DEFAULT,
    MethodSettings,
    Recipe,
    apply_sets,
    base,
    flat_settings,
    load,
    names,
    override,
    path,
    read,
    resolve,
    runs_code,
)
from okdc.recipe.sections import (
    FIGURES,
    LOADER,
    STATED,
    STREAMS,
    CohortSettings,
    DataSettings,
    ExportSettings,
    NetworkSettings,
    TrainSettings,
)

__all__ = [
    "DEFAULT",
    "FIGURES",
    "FINETUNE",
    "LOADER",
    "PRESETS",
    "SCRATCH",
    "STATED",
    "STREAMS",
    "CohortSettings",
    "DataSettings",
    "ExportSettings",
    "MethodSettings",
    "NetworkSettings",
    "Recipe",
    "TrainSettings",
    "apply_sets",
    "base",
    "default_preset",
    "flat_settings",
    "load",
    "names",
    "override",
    "own_path",
    "path",
    "preset_recipe",
    "read",
    "refuse_preset",
    "resolve",
    "runs_code",
]
