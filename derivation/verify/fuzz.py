"""Seeded random configs and sizes of the SD 1.x / 2.x / SDXL families, each compared with its real module."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from derivation.api import Derivation
from derivation.config import clip_text_config, clip_vision_config, load, unet_config, vae_config
from derivation.options import DTYPES, Options
from derivation.simplify import Grid
from derivation.verify.compare import Comparison, compare_component

BASE = "stable-diffusion-v1-5/stable-diffusion-v1-5"
GROUPS = (1, 2, 4, 8)
ATTENTION = ("eager", "math", "efficient", "flash")


@dataclass(frozen=True, slots=True)
class Case:
    """One random component: its config, options and sizes; ``seed`` reproduces it."""

    seed: int
    component: str
    config: dict[str, Any]
    options: Options
    sizes: dict[str, int]
    guidance: bool

    def __str__(self) -> str:
        o, s = self.options, self.sizes
        return (
            f"python -m derivation verify --fuzz 1 --seed {self.seed}  # {self.component} {o.dtype} {o.attention} "
            f"h0={s['h0']} w0={s['w0']} B={s['B']} L={s['L']} guidance={self.guidance}"
        )


def random_unet(rng: random.Random) -> dict[str, Any]:
    """Return a UNet2DConditionModel config with 2 to 4 levels."""
    levels = rng.randint(2, 4)
    groups = rng.choice(GROUPS)
    heads = [rng.choice((1, 2, 3, 4)) for _ in range(levels)]
    channels = [24 * groups * rng.randint(1, 3) * 4 for _ in range(levels)]
    cross = [rng.random() < 0.6 for _ in range(levels)]
    config: dict[str, Any] = {
        "in_channels": rng.choice((4, 9)),
        "block_out_channels": channels,
        "down_block_types": ["CrossAttnDownBlock2D" if c else "DownBlock2D" for c in cross],
        "up_block_types": ["CrossAttnUpBlock2D" if c else "UpBlock2D" for c in reversed(cross)],
        "mid_block_type": rng.choice(("UNetMidBlock2DCrossAttn", "UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None)),
        "layers_per_block": [rng.randint(1, 3) for _ in range(levels)] if rng.random() < 0.3 else rng.randint(1, 2),
        "attention_head_dim": heads if rng.random() < 0.5 else heads[0],
        "norm_num_groups": groups,
        "cross_attention_dim": rng.choice((32, 64, 768)),
        "transformer_layers_per_block": [rng.randint(1, 3) for _ in range(levels)],
        "use_linear_projection": rng.random() < 0.5,
        "upcast_attention": rng.random() < 0.3,
        "flip_sin_to_cos": rng.random() < 0.7,
        "act_fn": rng.choice(("silu", "gelu", "relu", "mish")),
        "conv_in_kernel": rng.choice((1, 3, 3, 5)),
        "conv_out_kernel": rng.choice((1, 3, 3)),
        "time_embedding_dim": rng.choice((None, None, 64)),
    }
    if rng.random() < 0.3:
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 32,
            "projection_class_embeddings_input_dim": 6 * 32 + 40,
        }
    return config


def random_vae(rng: random.Random) -> dict[str, Any]:
    """Return an AutoencoderKL config with 2 to 4 levels."""
    levels = rng.randint(2, 4)
    groups = rng.choice(GROUPS)
    return {
        "block_out_channels": [groups * 8 * rng.randint(1, 4) for _ in range(levels)],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": rng.randint(1, 3),
        "latent_channels": rng.choice((4, 4, 8, 16)),
        "norm_num_groups": groups,
        "act_fn": rng.choice(("silu", "gelu")),
        "use_quant_conv": rng.random() < 0.7,
        "use_post_quant_conv": rng.random() < 0.7,
        "mid_block_add_attention": rng.random() < 0.8,
    }


def random_text_encoder(rng: random.Random) -> dict[str, Any]:
    """Return a CLIPTextModel config."""
    heads = rng.choice((1, 2, 4))
    return {
        "architectures": ["CLIPTextModel"],
        "hidden_size": heads * rng.choice((8, 16, 64)),
        "intermediate_size": rng.choice((32, 100, 256)),
        "num_hidden_layers": rng.randint(1, 3),
        "num_attention_heads": heads,
        "hidden_act": rng.choice(("quick_gelu", "gelu")),
        "eos_token_id": rng.choice((2, 49407)),
        "vocab_size": 50000,
    }


def random_safety_checker(rng: random.Random) -> dict[str, Any]:
    """Return a StableDiffusionSafetyChecker config."""
    heads = rng.choice((1, 2, 4))
    vision = {
        "hidden_size": heads * rng.choice((8, 16, 64)),
        "intermediate_size": rng.choice((32, 100, 256)),
        "num_hidden_layers": rng.randint(1, 3),
        "num_attention_heads": heads,
        "image_size": rng.choice((28, 56, 224)),
        "patch_size": 14,
    }
    return {"vision_config": vision, "projection_dim": rng.choice((16, 48))}


RANDOM: dict[str, Callable[[random.Random], dict[str, Any]]] = {
    "unet": random_unet,
    "vae_encode": random_vae,
    "vae_decode": random_vae,
    "text_encoder": random_text_encoder,
    "safety_checker": random_safety_checker,
}
READERS: dict[str, tuple[str, Callable[..., Any]]] = {
    "unet": ("unet", unet_config),
    "vae_encode": ("vae", vae_config),
    "vae_decode": ("vae", vae_config),
    "text_encoder": ("text_encoder", clip_text_config),
    "safety_checker": ("safety_checker", clip_vision_config),
}


def random_case(seed: int, component: str | None = None) -> Case:
    """Return the case of ``seed``: a random component (or the one named), options and sizes."""
    rng = random.Random(seed)
    names = ("unet", "unet", "unet", "vae_encode", "vae_decode", "text_encoder", "safety_checker")
    component = component or rng.choice(names)
    config = RANDOM[component](rng)
    options = Options(dtype=rng.choice(DTYPES), attention=rng.choice(ATTENTION))
    side = (1, 2, 3, 4, 5, 7, 8, 9, 12, 16, 17, 24, 31)
    sizes = {
        "B": rng.choice((1, 1, 2, 3, 5)),
        "L": rng.choice((1, 2, 8, 77)) if component == "text_encoder" else rng.choice((1, 2, 7, 77, 154)),
        "h0": rng.choice(side),
        "w0": rng.choice(side),
    }
    return Case(seed, component, config, options, sizes, rng.random() < 0.5)


def compare_case(case: Case) -> Comparison:
    """Derive and trace one case."""
    field, read = READERS[case.component]
    checkpoint = replace(load(BASE), **{field: read(case.config)}, text_encoder_2=None)
    derivation = Derivation(checkpoint, case.options)
    sides = Grid(1, 4).sizes(case.sizes["h0"], case.sizes["w0"])
    return compare_component(derivation, case.component, case.config, {**sides, **case.sizes}, case.guidance)


def run_fuzz(count: int, seed: int = 0) -> Iterator[tuple[Case, Comparison]]:
    """Derive and trace ``count`` cases from ``seed`` on, one after the other."""
    for each in range(seed, seed + count):
        case = random_case(each)
        yield case, compare_case(case)
