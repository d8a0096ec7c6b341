"""Seeded random configs of the SD 1.x / 2.x / SDXL families: single components, and small whole checkpoints."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from derivation.walk.schedulers import SCHEDULERS

GROUPS = (1, 2, 4, 8)
POSITIONS = 77
TINY = "AutoencoderTiny"
# bos, eos and pad of a vocabulary of 100
TOKENS = {"vocab_size": 100, "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 99}

Files = dict[str, dict[str, Any]]


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


def random_controlnet(rng: random.Random, unet: Mapping[str, Any], pools: bool = False) -> dict[str, Any]:
    """Return a config of a ControlNetModel for a small checkpoint's ``unet``: what need not be alike is its own."""
    levels = len(unet["block_out_channels"])
    like = ("block_out_channels", "layers_per_block", "cross_attention_dim")
    added = ("addition_embed_type", "addition_time_embed_dim", "projection_class_embeddings_input_dim")
    return {
        "_class_name": "ControlNetModel",
        **{name: unet[name] for name in (*like, *added) if name in unet},
        "down_block_types": [rng.choice(("CrossAttnDownBlock2D", "DownBlock2D")) for _ in range(levels)],
        "mid_block_type": rng.choice(("UNetMidBlock2DCrossAttn", "UNetMidBlock2D")),
        "attention_head_dim": rng.choice((1, 2, [rng.choice((1, 2, 4)) for _ in range(levels)])),
        "norm_num_groups": rng.choice(GROUPS),
        "transformer_layers_per_block": rng.choice((1, [rng.randint(1, 2) for _ in range(levels)])),
        "use_linear_projection": rng.random() < 0.5,
        "upcast_attention": rng.random() < 0.3,
        "flip_sin_to_cos": rng.random() < 0.7,
        "act_fn": rng.choice(("silu", "gelu", "relu", "mish")),
        "conditioning_embedding_out_channels": [rng.choice((8, 16, 40)) for _ in range(4)],
        "controlnet_conditioning_channel_order": rng.choice(("rgb", "bgr")),
        "global_pool_conditions": pools,
    }


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


def random_checkpoint(rng: random.Random) -> Files:
    """Return the files of a small checkpoint folder of either family, by their paths in it."""
    xl = rng.random() < 0.5
    text = random_text_encoder(rng) | TOKENS | {"num_hidden_layers": rng.randint(2, 4)}
    second = (
        random_text_encoder(rng)
        | TOKENS
        | {
            "architectures": ["CLIPTextModelWithProjection"],
            "num_hidden_layers": rng.randint(2, 4),
            "projection_dim": rng.choice((16, 48)),
        }
    )
    scheduler = {
        "_class_name": rng.choice(sorted(SCHEDULERS)),
        "prediction_type": rng.choice(("epsilon", "v_prediction")),
        "steps_offset": 1,
    }
    if scheduler["_class_name"] == "PNDMScheduler":
        scheduler["skip_prk_steps"] = True
    encoders = [text, second] if xl else [text]
    files: Files = {
        "unet/config.json": _small_unet(rng, encoders),
        # SDXL reads a dtype off post_quant_conv
        "vae/config.json": _small_vae(rng) | ({"use_post_quant_conv": True} if xl else {}),
        "text_encoder/config.json": text,
        "scheduler/scheduler_config.json": scheduler,
    }
    if xl:
        files["text_encoder_2/config.json"] = second
    elif rng.random() < 0.5:
        files["safety_checker/config.json"] = random_safety_checker(rng)
    files["model_index.json"] = _index(files, xl, rng)
    if rng.random() < 0.2:
        files["vae/config.json"] = _tiny_vae(rng)
        files["model_index.json"]["vae"] = ["diffusers", TINY]
    return files


def _small_unet(rng: random.Random, encoders: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a UNet of one layer a level and 4 latent channels whose inputs are what ``encoders`` give."""
    config = random_unet(rng)
    levels = len(config["block_out_channels"])
    for name in ("addition_embed_type", "addition_time_embed_dim", "projection_class_embeddings_input_dim"):
        config.pop(name, None)
    config |= {
        "_class_name": "UNet2DConditionModel",
        "sample_size": 64,
        "in_channels": 4,
        "layers_per_block": 1,
        "block_out_channels": [channels // 3 for channels in config["block_out_channels"]],
        "transformer_layers_per_block": [1] * levels,
        "cross_attention_dim": sum(encoder["hidden_size"] for encoder in encoders),
    }
    config["attention_head_dim"] = rng.choice((1, 2, 4))
    if len(encoders) > 1:
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": encoders[1]["projection_dim"] + 6 * 8,
        }
    return config


def _small_vae(rng: random.Random) -> dict[str, Any]:
    """Return a VAE of 4 latent channels; the oracle's images have 8 pixels a latent, so it has 4 levels."""
    config = random_vae(rng)
    return config | {
        "_class_name": "AutoencoderKL",
        "block_out_channels": (config["block_out_channels"] * 2)[:4],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 1,
        "latent_channels": 4,
        "sample_size": rng.choice((64, 512)),
        "force_upcast": rng.random() < 0.5,
    }


def _tiny_vae(rng: random.Random) -> dict[str, Any]:
    """Return an AutoencoderTiny of 4 latent channels and 4 levels."""
    return {
        "_class_name": TINY,
        "encoder_block_out_channels": [rng.choice((8, 16, 40))] * 4,
        "decoder_block_out_channels": [rng.choice((8, 16, 40))] * 4,
        "num_encoder_blocks": [rng.randint(0, 2) for _ in range(4)],
        "num_decoder_blocks": [rng.randint(0, 2) for _ in range(4)],
        "act_fn": rng.choice(("relu", "silu", "gelu")),
    }


def _index(files: Mapping[str, Mapping[str, Any]], xl: bool, rng: random.Random) -> dict[str, Any]:
    classes = {
        "unet": "UNet2DConditionModel",
        "vae": "AutoencoderKL",
        "text_encoder": "CLIPTextModel",
        "text_encoder_2": "CLIPTextModelWithProjection",
        "safety_checker": "StableDiffusionSafetyChecker",
        "scheduler": files["scheduler/scheduler_config.json"]["_class_name"],
    }
    present = {path.split("/")[0] for path in files}
    index: dict[str, Any] = {name: ["library", cls] for name, cls in classes.items() if name in present}
    if xl:
        return index | {
            "_class_name": "StableDiffusionXLPipeline",
            "force_zeros_for_empty_prompt": rng.random() < 0.5,
        }
    return index | {"_class_name": "StableDiffusionPipeline"}
