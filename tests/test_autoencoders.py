"""AutoencoderTiny in the place of AutoencoderKL: alone and in every pipeline, against the real class."""

from __future__ import annotations

import json
import random

import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from conftest import tiny

from derivation import derive
from derivation.api import Derivation
from derivation.config import is_live_traced, traced_folder
from derivation.errors import DerivationError
from derivation.options import Options
from derivation.trace.build import Description
from derivation.trace.modules import pipeline_of
from derivation.trace.pipeline import TracedPipeline
from derivation.verify.compare import compare_components, compare_pipeline
from derivation.verify.random_configs import random_checkpoint

# Seeds of a checkpoint of each family.
SMALL = {"SD": 0, "SDXL": 3}
ASYMMETRIC = "AsymmetricAutoencoderKL"
TINY = {
    "_class_name": "AutoencoderTiny",
    "encoder_block_out_channels": [16] * 4,
    "decoder_block_out_channels": [24] * 4,
    "num_encoder_blocks": [1, 2, 0, 1],
    "num_decoder_blocks": [2, 1, 3, 1],
    "act_fn": "silu",
}


def folder_of(root, family, **values):
    """Write a small checkpoint with an AutoencoderTiny, and return its folder."""
    files = random_checkpoint(random.Random(SMALL[family]))
    files["vae/config.json"] = TINY | values
    files["model_index.json"]["vae"] = ["diffusers", "AutoencoderTiny"]
    for name, content in files.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(json.dumps(content))
    return str(root)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("SD", {"pipeline": "txt2img", "vae_slicing": True}),
        ("SD", {"pipeline": "img2img", "attention": "eager", "channels_last": True, "offload": "sequential"}),
        ("SD", {"pipeline": "inpaint"}),
        ("SDXL", {"pipeline": "txt2img", "offload": "model"}),
        ("SDXL", {"pipeline": "img2img", "dtype": "bfloat16"}),
        ("SDXL", {"pipeline": "inpaint", "dtype": "float32"}),
    ],
)
def test_a_pipeline_with_the_tiny_vae_equals_diffusers(tmp_path, family, options):
    derivation = derive(folder_of(tmp_path, family), num_inference_steps=4, **options)
    compared = compare_pipeline(derivation, 72, 136, 2, 7, "attention" not in options)
    if "offload" not in options:
        compared += compare_components(derivation, 200, 64)
    assert [each for each in compared if not each.match] == []


def test_a_live_pipeline_with_the_tiny_vae_is_that_of_its_config(tmp_path):
    derivation = derive(folder_of(tmp_path, "SD"), pipeline="txt2img")
    live = derive(pipeline_of(tmp_path, derivation.options), pipeline="txt2img")
    again = Derivation.from_json(derivation.to_json())
    assert live.stage_peaks(128, 64) == derivation.stage_peaks(128, 64) == again.stage_peaks(128, 64)


def test_an_asymmetric_vae_is_traced_in_a_pipeline_that_is_walked(tmp_path):
    levels = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    channels = {"down_block_out_channels": [32] * 4, "up_block_out_channels": [32, 64, 128, 128]}
    folder = tiny(tmp_path)
    assert traced_folder(folder) is None
    (folder / "vae/config.json").write_text(json.dumps({"_class_name": ASYMMETRIC, **levels, **channels}))
    index = json.loads((folder / "model_index.json").read_text()) | {"vae": ["diffusers", ASYMMETRIC]}
    index["_class_name"] = "StableDiffusionInpaintPipeline"
    (folder / "model_index.json").write_text(json.dumps(index))
    assert traced_folder(folder).task == "inpaint"
    options = Options(pipeline="inpaint", dtype="float32")
    traced = TracedPipeline(Description.of(folder), options, sides=(64, 512))
    assert traced.arguments.images == ("image", "mask_image")
    assert is_live_traced(traced.pipe)
    with pytest.raises(DerivationError, match=r"vae_tiling = True is not supported for .*, which is traced"):
        derive(folder, vae_tiling=True)


def test_a_config_of_nothing_but_its_class_has_the_class_s_parameters(tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderTiny"}')
    with torch.device("meta"):
        real = diffusers.AutoencoderTiny()
    derivation = derive(str(tmp_path))
    assert derivation.parameter_counts["vae"] == sum(p.numel() for p in real.parameters())
    assert set(derivation.component_peaks(512, 512)) == {"vae_encode", "vae_decode"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"decoder_block_out_channels": [16, 16, 16, 32]}, "decoder_block_out_channels = .* 4 times the same"),
        ({"num_encoder_blocks": [1, 1, 1]}, "num_encoder_blocks = .* 4 values"),
        ({"num_decoder_blocks": [1, 1, 1, 1000]}, "num_decoder_blocks = .* at most 1000 in all"),
        ({"upsampling_scaling_factor": 3}, "upsampling_scaling_factor = 3"),
        ({"upsample_fn": "bilinear"}, "upsample_fn = 'bilinear'"),
    ],
)
def test_what_the_class_cannot_run_is_named(tmp_path, values, message):
    with pytest.raises(DerivationError, match=message):
        derive(folder_of(tmp_path, "SD", **values))


def test_tiles_of_the_tiny_vae_are_refused(tmp_path):
    with pytest.raises(DerivationError, match="vae_tiling = True is not supported with AutoencoderTiny"):
        derive(folder_of(tmp_path, "SD"), vae_tiling=True)
