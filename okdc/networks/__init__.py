"""A name, a function or a saved student becomes an `nn.Module` that takes the data's images.

Importing this registers the 32x32 networks of the papers with timm.

Imports: `anatomy`, `errors`, `recipe`, `tasks`.
"""

from __future__ import annotations

from okdc.networks.build import arguments, load, names
from okdc.networks.frozen import freeze
from okdc.networks.input import check_input, data_config

__all__ = ["arguments", "check_input", "data_config", "freeze", "load", "names"]
