"""Derive how much GPU memory a diffusion pipeline needs, as an equation, from its config files.

>>> from derivation import derive
>>> d = derive("stable-diffusion-v1-5/stable-diffusion-v1-5")
>>> d.component_peaks(height=512, width=512)["unet"]
136321536
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from derivation.errors import DerivationError
from derivation.version import __version__

if TYPE_CHECKING:
    from derivation.api import Derivation, derive
    from derivation.options import Options

__all__ = ["Derivation", "DerivationError", "Options", "__version__", "derive"]
_HOMES = {"Derivation": "derivation.api", "derive": "derivation.api", "Options": "derivation.options"}


def __getattr__(name: str) -> Any:
    """Import a public name's home when it is first used (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
