"""Derive how much GPU memory a diffusion pipeline needs, as an equation, from its config files.

>>> from derivation import derive
>>> d = derive("stable-diffusion-v1-5/stable-diffusion-v1-5")
>>> d.component_peaks(height=512, width=512)["unet"]
136321536
"""

from derivation.api import Derivation, derive
from derivation.errors import DerivationError
from derivation.options import Options
from derivation.version import __version__

__all__ = ["Derivation", "DerivationError", "Options", "__version__", "derive"]
