"""Published community checkpoints in small: the keys that set them apart, against the real modules; or refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from conftest import SD15
from test_pipelines import SCHEDULER, TEXT, VAE, small_sd, small_xl, write

from derivation import Options, derive
from derivation.api import Derivation
from derivation.config import load, unet_config, vae_config
from derivation.errors import DerivationError
from derivation.tape.grid import Grid
from derivation.verify.compare import compare_component, compare_pipeline
from derivation.walk.subject import WalkedSubject

BASE = load(SD15)
DOWN, CROSS_DOWN, UP, CROSS_UP = "DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"
SMALL = {"norm_num_groups": 8, "cross_attention_dim": 32, "layers_per_block": 2}
FOUR = SMALL | {"block_out_channels": [32, 64, 64, 64]}
THREE = SMALL | {
    "block_out_channels": [32, 64, 64],
    "down_block_types": [DOWN, CROSS_DOWN, CROSS_DOWN],
    "up_block_types": [CROSS_UP, CROSS_UP, UP],
    "attention_head_dim": [2, 4, 4],
    "use_linear_projection": True,
}

UNETS: dict[str, dict[str, Any]] = {
    "segmind/SSD-1B": THREE
    | {
        "transformer_layers_per_block": [0, [2, 2], [4, 4]],
        "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
        "mid_block_type": "UNetMidBlock2D",
    },
    "SSD-1B with its mid block": THREE
    | {
        "transformer_layers_per_block": [0, [2, 2], [4, 3]],
        "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
    },
    "segmind/Segmind-Vega": THREE | {"transformer_layers_per_block": [1, 1, 2], "mid_block_type": None},
    "KOALA": THREE | {"transformer_layers_per_block": [1, 2, 6], "layers_per_block": 1, "mid_block_type": None},
    "segmind/tiny-sd": SMALL
    | {
        "block_out_channels": [32, 64, 64],
        "down_block_types": [CROSS_DOWN, CROSS_DOWN, DOWN],
        "up_block_types": [UP, CROSS_UP, CROSS_UP],
        "layers_per_block": 1,
        "mid_block_type": None,
    },
    "nota-ai/bk-sdm-small": FOUR | {"layers_per_block": 1, "mid_block_type": None, "upcast_attention": None},
    "OFA-Sys/small-stable-diffusion-v0": FOUR | {"layers_per_block": 1},
    "SimianLuo/LCM_Dreamshaper_v7": FOUR | {"time_cond_proj_dim": 256},
    "scales that allocate nothing": FOUR | {"mid_block_scale_factor": 1.41, "norm_eps": 1e-6, "freq_shift": 1},
}


@pytest.mark.parametrize(("height", "width", "guidance"), [(8, 8, True), (9, 13, False)])
@pytest.mark.parametrize("name", UNETS)
def test_unets_equal_the_trace(name: str, height: int, width: int, guidance: bool) -> None:
    config = UNETS[name]
    derivation = Derivation(WalkedSubject(replace(BASE, unet=unet_config(config)), Options()))
    sides = Grid(1, len(config["block_out_channels"])).sizes(height, width)
    comparison = compare_component(derivation, "unet", config, {**sides, "B": 2, "L": 77}, guidance)
    assert comparison.match, comparison


VAES: dict[str, dict[str, Any]] = {
    "madebyollin/sdxl-vae-fp16-fix": VAE | {"force_upcast": False, "scaling_factor": 0.13025},
    "one layer, other groups": VAE | {"layers_per_block": 3, "norm_num_groups": 16, "latent_channels": 16},
    "without quant convs": VAE | {"use_quant_conv": False, "use_post_quant_conv": False},
}


@pytest.mark.parametrize("call", ["vae_encode", "vae_decode"])
@pytest.mark.parametrize("name", VAES)
def test_vaes_equal_the_trace(name: str, call: str) -> None:
    derivation = Derivation(WalkedSubject(replace(BASE, vae=vae_config(VAES[name])), Options()))
    values = {**Grid(1, 4).sizes(9, 13), "B": 2, "L": 77}
    comparison = compare_component(derivation, call, VAES[name], values, True)
    assert comparison.match, comparison


EULER = {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"}
ANCESTRAL = {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"}
OLD = {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "_diffusers_version": "0.6.0"}
PIPELINES: list[tuple[str, Any, dict[str, Any], bool, dict[str, Any]]] = [
    ("stabilityai/sd-turbo", small_sd, EULER, False, {"pipeline": "txt2img", "num_inference_steps": 1}),
    ("stabilityai/sd-turbo", small_sd, EULER, False, {"num_inference_steps": 2, "strength": 0.5}),
    ("stabilityai/sdxl-turbo", small_xl, ANCESTRAL, False, {"pipeline": "txt2img", "num_inference_steps": 1}),
    ("stabilityai/sdxl-turbo", small_xl, ANCESTRAL, False, {"num_inference_steps": 2, "strength": 0.5}),
    ("ByteDance/SDXL-Lightning", small_xl, EULER, False, {"pipeline": "txt2img", "num_inference_steps": 4}),
    ("cagliostrolab/animagine-xl-3.1", small_xl, ANCESTRAL | {"timestep_spacing": "leading"}, True, {}),
    ("Linaqruf/anything-v3.0", small_sd, OLD, True, {"pipeline": "txt2img", "clip_skip": 1}),
    ("Linaqruf/anything-v3.0", small_sd, OLD | {"clip_sample": True, "steps_offset": 0}, True, {"strength": 0.75}),
]


@pytest.mark.parametrize(("name", "make", "scheduler", "guidance", "options"), PIPELINES)
def test_whole_checkpoints_equal_the_trace(
    tmp_path: Path, name: str, make: Any, scheduler: dict[str, Any], guidance: bool, options: dict[str, Any]
) -> None:
    folder = make(tmp_path, SCHEDULER | scheduler)
    for comparison in compare_pipeline(derive(folder, **options), 72, 64, guidance=guidance):
        assert comparison.match, comparison


def test_a_config_without_the_keys_of_later_versions(tmp_path: Path) -> None:
    """The UNet of v1-4 as diffusers 0.2.2 wrote it; today's writes all defaults out."""
    folder = small_sd(tmp_path)
    later = json.loads((folder / "unet/config.json").read_text()) | {"class_embed_type": None, "dropout": 0.0}
    old = {"center_input_sample": False, "downsample_padding": 1, "_diffusers_version": "0.2.2"}
    write(folder, {"unet/config.json": later | old, "text_encoder/config.json": TEXT | {"torch_dtype": "float32"}})
    for comparison in compare_pipeline(derive(folder, num_inference_steps=3), 64, 64):
        assert comparison.match, comparison


INDEX, UNET_FILE, SCHEDULER_FILE = "model_index.json", "unet/config.json", "scheduler/scheduler_config.json"
REFUSED: list[tuple[str, str, dict[str, Any], str]] = [
    ("timbrooks/instruct-pix2pix", INDEX, {"_class_name": "StableDiffusionInstructPix2PixPipeline"}, "_class_name"),
    ("lambdalabs/sd-image-variations", INDEX, {"_class_name": "StableDiffusionImageVariationPipeline"}, "_class_name"),
    ("stabilityai/stable-diffusion-x4-upscaler", UNET_FILE, {"num_class_embeds": 1000}, "num_class_embeds = 1000"),
    ("stabilityai/stable-diffusion-2-1-unclip", UNET_FILE, {"class_embed_type": "projection"}, "class_embed_type"),
    ("masterful/gligen", UNET_FILE, {"attention_type": "gated"}, "attention_type = 'gated'"),
    (
        "a tree of noise",
        INDEX,
        {"scheduler": ["diffusers", "DPMSolverSDEScheduler"]},
        "not this one: it keeps a tree of noise in torchsde",
    ),
    ("a quantized UNet", UNET_FILE, {"quantization_config": {"load_in_8bit": True}}, "quantization_config"),
]


@pytest.mark.parametrize(("name", "file", "change", "named"), REFUSED, ids=[row[0] for row in REFUSED])
def test_what_is_not_supported_is_named(
    tmp_path: Path, name: str, file: str, change: dict[str, Any], named: str
) -> None:
    folder = small_sd(tmp_path)
    write(folder, {file: json.loads((folder / file).read_text()) | change})
    with pytest.raises(DerivationError, match=named.replace("?", r"\?")) as caught:
        load(folder)
    assert str(caught.value).startswith(f"{folder / file}: ") and "supported: " in str(caught.value)


def test_eight_channels_in_a_known_pipeline_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DerivationError, match="in_channels = 8"):
        _ = derive(small_sd(tmp_path, in_channels=8)).program(True).generic
