"""diffusers/schedulers: the tensors that a scheduler keeps, and those of one denoising step.

Latents are [N, C, h, w]; ``timesteps`` and tables stay on the CPU unless a scheduler moves them.
"""

from importlib import import_module
from pkgutil import iter_modules

from derivation.walk.schedulers.base import SCHEDULERS, Scheduler, make_scheduler

__all__ = ["SCHEDULERS", "Scheduler", "make_scheduler"]

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
