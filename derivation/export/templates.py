"""Templates own layout: one environment for generated code and for the report."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from derivation.errors import DerivationError

if TYPE_CHECKING:
    from jinja2 import Environment

INSTALLED = Path("share", "diffusion-vram-derivation", "templates")


def template_folder() -> Path:
    """Return the folder of templates: beside the package, else where a wheel puts data, below a folder that holds it.

    Raises DerivationError where there is none.
    """
    beside, *above = Path(__file__).resolve().parents[2:]
    for folder in (beside / "templates", *(parent / INSTALLED for parent in (beside, *above))):
        if (folder / "formulas").is_dir():
            return folder
    raise DerivationError(f"no templates in {beside / 'templates'}, nor in {INSTALLED} below {beside} or above it")


@cache
def environment() -> Environment:
    """Return the jinja environment: an undefined name is an error, and what goes into HTML is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader(template_folder()),
        undefined=StrictUndefined,
        autoescape=lambda name: name is not None and ".html" in name,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
