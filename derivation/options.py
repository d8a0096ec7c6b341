"""What a derivation assumes beyond the checkpoint, and the sizes that it is evaluated at."""

from __future__ import annotations

from dataclasses import dataclass, fields

from derivation import attention
from derivation.errors import DerivationError
from derivation.hardware.profile import SCRATCH
from derivation.schedulers import SCHEDULERS

PIPELINES = ("txt2img", "img2img", "inpaint")
DTYPES = ("float16", "bfloat16", "float32")
# diffusers' examples run 50 steps
DEFAULT_STEPS = 50
MAX_STEPS = 1000


@dataclass(frozen=True, slots=True)
class Options:
    """The choices of a run, named as diffusers' pipelines name them; raises DerivationError for a bad one.

    ``torch``, ``diffusers`` and ``scratch`` are read where a ``gpu`` is named; ``vae_slicing``, ``vae_tiling`` and
    ``attention_slicing`` ("auto", "max" or a number) are what the pipeline's ``enable_...`` methods set.
    ``strength`` None is the default of the pipeline's class; ``scheduler`` replaces the checkpoint's, as
    ``Class.from_config(pipe.scheduler.config)`` does; ``negative_prompt`` says whether one is given.
    """

    pipeline: str = "img2img"
    dtype: str = "float16"
    attention: str = "efficient"
    gpu: str | None = None
    torch: str | None = None
    diffusers: str | None = None
    scratch: str = "expected"
    safety_checker: bool = True
    num_images_per_prompt: int = 1
    num_inference_steps: int = DEFAULT_STEPS
    strength: float | None = None
    scheduler: str | None = None
    negative_prompt: bool = False
    clip_skip: int | None = None
    vae_slicing: bool = False
    vae_tiling: bool = False
    attention_slicing: str | int | None = None

    def __post_init__(self) -> None:
        one_of("pipeline", self.pipeline, PIPELINES)
        one_of("dtype", self.dtype, DTYPES)
        one_of("attention", self.attention, attention.names())
        positive("num_images_per_prompt", self.num_images_per_prompt)
        positive("num_inference_steps", self.num_inference_steps)
        if self.num_inference_steps > MAX_STEPS:
            raise DerivationError(
                f"num_inference_steps = {self.num_inference_steps} is above {MAX_STEPS}, the training steps"
            )
        if self.strength is not None and not 0 < self.strength <= 1:
            raise DerivationError(f"strength = {self.strength} is not in (0, 1]")
        if self.scheduler is not None:
            one_of("scheduler", self.scheduler, tuple(sorted(SCHEDULERS)))
        if self.clip_skip is not None:
            positive("clip_skip", self.clip_skip)
        if self.attention_slicing not in (None, "auto", "max"):
            positive("attention_slicing", self.attention_slicing)
        one_of("scratch", self.scratch, SCRATCH)

    def as_dict(self) -> dict[str, object]:
        """Return the options by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def one_of(key: str, value: object, supported: tuple[str, ...]) -> None:
    """Raise DerivationError unless ``value`` is one of ``supported``."""
    if value not in supported:
        raise DerivationError(f"{key} = {value!r} is not supported (supported: {', '.join(supported)})")


def positive(key: str, value: object) -> int:
    """Return ``value``; raises DerivationError unless it is an integer >= 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise DerivationError(f"{key} = {value!r} is not supported (supported: integers from 1)")
    return value
