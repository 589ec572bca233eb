"""A name, a function or a saved student becomes an `nn.Module` that takes the data's images.

Importing this registers the 32x32 networks of the papers with timm.

Imports: `anatomy`, `errors`, `recipe`, `tasks`.
"""

from __future__ import annotations

from okdc.networks.build import arguments, lacks_weights, load, names
from okdc.networks.input import check_input, data_config, single, states_preprocessing
from okdc.networks.steady import refuse_probabilities, refuse_unsteady
from okdc.networks.tuning import checkpoint_gradients, freeze, keep_activations

__all__ = [
    "arguments", "check_input", "checkpoint_gradients", "data_config", "freeze", "keep_activations", "lacks_weights",
    "load", "names", "refuse_probabilities", "refuse_unsteady", "single", "states_preprocessing",
]  # fmt: skip
