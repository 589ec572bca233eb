"""How the site is built: `sphinx-build -W docs OUT`, without a network; OKDC_DOCS_ONLINE=1 links torch, timm."""

import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "_ext"), str(HERE.parent)]

import okdc  # noqa: E402  (this checkout)

project, author, release = "okdc", "the okdc maintainers", okdc.__version__
copyright = author
extensions = [
    "myst_parser", "sphinx.ext.autodoc", "sphinx.ext.intersphinx", "sphinx_click", "sphinx_copybutton", "okdc_site",
]  # fmt: skip
exclude_patterns = ["_ext"]
default_role = "literal"  # docstrings say `this`
smartquotes = False  # -- is not a dash in an option
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
intersphinx_mapping = (
    {
        "python": ("https://docs.python.org/3", None),
        "torch": ("https://docs.pytorch.org/docs/stable", None),
        "timm": ("https://huggingface.co/docs/timm", None),
    }
    if os.environ.get("OKDC_DOCS_ONLINE")
    else {}
)

html_theme = "furo"
html_title = f"okdc {release}"
html_show_copyright = html_show_sphinx = False
