"""Sphinx configuration. Build with `sphinx-build -W --keep-going docs SITE`."""

import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import generate  # noqa: E402

project = "ev3-distill"
author = "the ev3-distill authors"
html_title = "ev3-distill"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "_generated", "explanation/architecture-map.md"]
html_theme = "furo"
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
default_role = "code"  # docstrings write `name` for code
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints = "none"
autodoc_preserve_defaults = True
napoleon_use_ivar = True


def _escape(*arguments: Any) -> None:
    """Escapes what reStructuredText takes for markup, in place: docstrings are plain text with `code`."""
    lines: list[str] = arguments[-1]
    for i, line in enumerate(lines):
        parts = line.split("`")
        parts[::2] = [part.replace("*", "\\*").replace("|", "\\|") for part in parts[::2]]
        lines[i] = "`".join(parts)


def _hide(*arguments: Any) -> tuple[str, None] | None:
    """Hides the signature of a class whose fields stand in a table below it."""
    what, value = arguments[1], arguments[3]
    return ("", None) if what == "class" and generate.fields_of(value) else None


def setup(app: Any) -> None:
    """Writes the generated pages before Sphinx reads the others."""
    generate.write_all(HERE / "_generated")
    app.connect("autodoc-process-docstring", _escape, priority=400)  # before napoleon
    app.connect("autodoc-process-signature", _hide)
