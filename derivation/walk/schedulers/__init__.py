"""diffusers/schedulers: the tensors that a scheduler keeps, and those of one denoising step.

Latents are [N, C, h, w]; ``timesteps`` and tables stay on the CPU unless a scheduler moves them.
"""

from derivation.walk.schedulers.base import SCHEDULERS, Scheduler, make_scheduler
from derivation.walk.schedulers.ddim import DDIMScheduler
from derivation.walk.schedulers.dpmsolver_multistep import DPMSolverMultistepScheduler
from derivation.walk.schedulers.euler import EulerAncestralDiscreteScheduler, EulerDiscreteScheduler
from derivation.walk.schedulers.lcm import LCMScheduler
from derivation.walk.schedulers.pndm import PNDMScheduler
from derivation.walk.schedulers.unipc_multistep import UniPCMultistepScheduler

__all__ = [
    "SCHEDULERS",
    "DDIMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "LCMScheduler",
    "PNDMScheduler",
    "Scheduler",
    "UniPCMultistepScheduler",
    "make_scheduler",
]
