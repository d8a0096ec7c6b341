"""What a derivation assumes beyond the checkpoint, and the sizes that it is evaluated at."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, get_type_hints

from derivation.config.checks import MAX_SIZE
from derivation.config.schedulers import DEFAULTS
from derivation.errors import DerivationError, one_of, positive, shown, typed
from derivation.gpu.profile import SCRATCH

PIPELINES = ("txt2img", "img2img", "inpaint")
DTYPES = ("float16", "bfloat16", "float32")
# diffusers' AttnProcessor, what PyTorch picks on the GPU of the run ("efficient" without one), and single backends
EAGER, SDPA = "eager", "sdpa"
ATTENTION = (EAGER, SDPA, "math", "efficient", "flash")
# xformers.ops.memory_efficient_attention is the kernel that PyTorch took over as its memory-efficient backend.
ATTENTION_ALIASES = {"xformers": "efficient"}
# autoencoder_kl.py: tile_overlap_factor
TILE_OVERLAP_FACTOR = 0.25
OFFLOADS = ("model", "sequential")
# diffusers' examples run 50 steps
DEFAULT_STEPS = 50
MAX_STEPS = 1000
MAX_CONTROLNETS = 8

SLICINGS = ("auto", "max")
CHOICES: Mapping[str, Callable[[], tuple[str, ...]]] = {
    "pipeline": lambda: PIPELINES,
    "dtype": lambda: DTYPES,
    "attention": lambda: (*ATTENTION, *ATTENTION_ALIASES),
    "scheduler": lambda: tuple(sorted(DEFAULTS)),
    "offload": lambda: OFFLOADS,
    "scratch": lambda: SCRATCH,
}
# Integers from 1, and up to what: config files are held to MAX_SIZE, too.
COUNTS = {
    "num_images_per_prompt": MAX_SIZE,
    "num_inference_steps": MAX_STEPS,
    "clip_skip": MAX_SIZE,
    "tile_sample_min_size": MAX_SIZE,
    "attention_slicing": MAX_SIZE,
    "lora_rank": MAX_SIZE,
    "ip_adapter_tokens": MAX_SIZE,
}


@dataclass(frozen=True, slots=True)
class Options:
    """The choices of a run, named as diffusers' pipelines name them; raises DerivationError for a bad one.

    ``attention`` "xformers" is another name of "efficient", which replaces it.
    ``torch``, ``diffusers`` and ``scratch`` are read where a ``gpu`` is named; ``vae_slicing``, ``vae_tiling``,
    ``attention_slicing`` ("auto", "max" or a number) and ``offload`` ("model", "sequential") are what the pipeline's
    ``enable_...`` methods set; ``tile_sample_min_size`` (None: the VAE's sample_size) and ``tile_overlap_factor`` are
    the VAE's attributes. ``channels_last`` is the memory format of the weights of UNet and VAE. ``lora_rank`` is the
    rank of a LoRA on the UNet's attention projections, ``lora_fused`` whether ``fuse_lora`` merged it;
    ``controlnets`` counts ControlNets made from the UNet; ``ip_adapter_tokens`` is how many image tokens an
    IP-Adapter adds.
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
    tile_sample_min_size: int | None = None
    tile_overlap_factor: float = TILE_OVERLAP_FACTOR
    attention_slicing: str | int | None = None
    channels_last: bool = False
    offload: str | None = None
    lora_rank: int | None = None
    lora_fused: bool = False
    controlnets: int = 0
    ip_adapter_tokens: int | None = None

    def __post_init__(self) -> None:
        for name, hint in _hints(Options).items():
            typed(name, getattr(self, name), hint)
        object.__setattr__(self, "attention", ATTENTION_ALIASES.get(self.attention, self.attention))
        for name, choices in CHOICES.items():
            if getattr(self, name) is not None:
                one_of(name, getattr(self, name), choices())
        for name, most in COUNTS.items():
            if getattr(self, name) not in (None, *SLICINGS):
                positive(name, getattr(self, name), most)
        if self.strength is not None and not 0 < self.strength <= 1:
            raise DerivationError(f"strength = {self.strength} is not in (0, 1]")
        if not 0 <= self.tile_overlap_factor <= 0.5:
            raise DerivationError(f"tile_overlap_factor = {self.tile_overlap_factor} is not in [0, 0.5]")
        if not 0 <= self.controlnets <= MAX_CONTROLNETS:
            supported = f"integers from 0 to {MAX_CONTROLNETS}"
            raise DerivationError(f"controlnets = {shown(self.controlnets)} is not supported (supported: {supported})")
        self._check_together()

    def _check_together(self) -> None:
        """Raise DerivationError for options that exclude each other."""
        if self.ip_adapter_tokens is not None and self.attention_slicing is not None:
            raise DerivationError(
                f"ip_adapter_tokens = {self.ip_adapter_tokens} is not supported with attention_slicing: "
                "its processor replaces the IP-Adapter's"
            )
        if self.lora_fused and self.lora_rank is None:
            raise DerivationError("lora_fused = True is not supported without a lora_rank")

    def as_dict(self) -> dict[str, object]:
        """Return the options by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def options_of(given: Mapping[str, Any]) -> Options:
    """Return the options called ``given``; raises DerivationError for a name that is none."""
    try:
        return Options(**given)
    except TypeError as error:
        raise DerivationError(str(error).replace("Options.__init__() ", "")) from None


def flag(name: str, value: object) -> str:
    """Return the command line argument that sets an option.

    >>> flag("vae_tiling", True), flag("lora_rank", 4)
    ('--vae-tiling', '--lora-rank 4')
    """
    key = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{key}" if value else f"--no-{key}"
    return f"--{key} {value}"


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)
