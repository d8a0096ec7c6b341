"""What the options can be: names, limits and defaults of PyTorch's and diffusers' own."""

from __future__ import annotations

PIPELINES = ("txt2img", "img2img", "inpaint")
DTYPES = ("float16", "bfloat16", "float32")
# What from_pretrained(variant=...) and accelerate call them.
DTYPE_ALIASES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32", "half": "float16"}
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
MAX_ADAPTER_IMAGES = 64

SLICINGS = ("auto", "max")
# options that headers leave out where they are not chosen
UNTOLD = ("vae_dtype", "alloc_conf", "lora", "controlnet", "ip_adapter", "ip_adapter_images")

# A line of Python for diffusers 0.42.1.
FUSED = "pipe.unet.set_attn_processor(AttnProcessor2_0()); pipe.vae.set_attn_processor(AttnProcessor2_0())"


def each(name: str, *values: object, **others: object) -> tuple[dict[str, object], ...]:
    """Return an option set for each of an option's values."""
    return tuple({name: value, **others} for value in values)
