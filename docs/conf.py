"""Sphinx's settings."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import sparsec

project = "sparsec"
author = "the sparsec developers"
release = sparsec.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "mask_gallery"]
exclude_patterns = ["_build"]
default_role = "code"

html_theme = "furo"
html_title = f"sparsec {release}"

myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_custom_sections = [("Source", "notes")]
