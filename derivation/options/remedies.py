"""What ``recommend`` offers for an option: the change, its cost, the line of Python, its place in their order."""

from __future__ import annotations

from derivation.options.choices import FUSED
from derivation.options.row import Remedy

DTYPE = (Remedy("float16", {"dtype": "float16"}, "none that is visible; faster", "pipe.to(torch.float16)", 2),)
ATTENTION = (Remedy("fused attention", {"attention": "efficient"}, "none: the same result, faster", FUSED, 1),)
SAFETY_CHECKER = (Remedy("no safety checker", {"safety_checker": False}, "no filter", "pipe.safety_checker = None", 8),)
NUM_IMAGES_PER_PROMPT = (
    Remedy("one image a prompt", {"num_images_per_prompt": 1}, "one call an image", "num_images_per_prompt=1", 4),
)
VAE_SLICING = (
    Remedy(
        "VAE slicing",
        {"vae_slicing": True},
        "none at batch 1; slightly slower",
        "pipe.vae.enable_slicing()",
        3,
    ),
)
VAE_TILING = (
    Remedy("VAE tiling", {"vae_tiling": True}, "slower; tones may differ at seams", "pipe.vae.enable_tiling()", 5),
)
ATTENTION_SLICING = (
    Remedy("sliced attention", {"attention_slicing": "auto"}, "slower", "pipe.enable_attention_slicing()", 6),
)
OFFLOAD = (
    Remedy(
        "model offload",
        {"offload": "model"},
        "weights cross the bus once a call",
        "pipe.enable_model_cpu_offload()",
        7,
    ),
    Remedy(
        "sequential offload",
        {"offload": "sequential"},
        "many times slower",
        "pipe.enable_sequential_cpu_offload()",
        9,
    ),
)
