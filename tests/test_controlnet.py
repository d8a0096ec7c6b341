"""ControlNets of their own configs against the real ControlNetModel, in every pipeline that takes them."""

from __future__ import annotations

import json
import random

import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from conftest import SD15, SDXL, small_folders

from derivation import derive
from derivation.api import Derivation
from derivation.call import Call
from derivation.config import controlnet_config
from derivation.config.checkpoint import BUNDLED
from derivation.errors import DerivationError
from derivation.trace.modules import pipeline_of
from derivation.trace.runs import trace_pipeline
from derivation.verify.compare import compare_components, compare_pipeline
from derivation.verify.random_configs import random_controlnet

# Seeds of a checkpoint of each family.
SMALL = {"SD": 0, "SDXL": 3}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    found = small_folders(tmp_path_factory, SMALL)
    assert "text_encoder_2" in json.loads((found["SDXL"] / "model_index.json").read_text())
    return found


def written(folder, tmp_path, seed, **values):
    """Write a random ControlNet for the folder's UNet, with some ``values``, and return its folder."""
    unet = json.loads((folder / "unet/config.json").read_text())
    own = tmp_path / f"controlnet{seed}"
    own.mkdir()
    (own / "config.json").write_text(json.dumps(random_controlnet(random.Random(seed), unet) | values))
    return own


@pytest.mark.parametrize(
    ("family", "seeds", "options"),
    [
        ("SD", (1,), {"pipeline": "txt2img", "offload": "sequential"}),
        ("SD", (2, 3), {"pipeline": "img2img", "attention": "eager"}),
        ("SD", (4,), {"pipeline": "inpaint", "attention_slicing": "max"}),
        ("SDXL", (5, 6), {"pipeline": "txt2img", "offload": "model"}),
        ("SDXL", (7,), {"pipeline": "inpaint", "ip_adapter_tokens": 4}),
        (
            "SD",
            (10, 11),
            {"pipeline": "txt2img", "global_pool_conditions": True, "scheduler": "EulerDiscreteScheduler"},
        ),
        ("SDXL", (12,), {"pipeline": "img2img", "global_pool_conditions": True}),
        ("SDXL", (13,), {"pipeline": "inpaint", "global_pool_conditions": True}),
    ],
)
def test_controlnets_of_their_own_configs_equal_diffusers(folders, tmp_path, family, seeds, options):
    own = {"global_pool_conditions": "global_pool_conditions" in options}
    named = ",".join(str(written(folders[family], tmp_path, seed, **own)) for seed in seeds)
    chosen = {name: value for name, value in options.items() if name not in own}
    derivation = derive(str(folders[family]), controlnet=named, num_inference_steps=4, **chosen)
    guidance = len(seeds) == 1 or any(own.values())
    compared = compare_pipeline(derivation, 72, 136, len(seeds), 7, guidance)
    if "offload" not in options:
        compared += compare_components(derivation, 200, 64)
    assert [each for each in compared if not each.match] == []


@pytest.mark.parametrize("family", SMALL)
@pytest.mark.parametrize("task", ["txt2img", "img2img", "inpaint"])
def test_pooled_and_other_controlnets_are_mixed_as_diffusers_mixes_them(folders, tmp_path, family, task):
    folder = folders[family]
    files = [written(folder, tmp_path, 20 + i, global_pool_conditions=pools) for i, pools in enumerate((False, True))]
    derivation = derive(str(folder), controlnet=",".join(map(str, files)), pipeline=task, num_inference_steps=4)
    assert [each for each in compare_pipeline(derivation, 72, 136) if not each.match] == []
    backwards = ",".join(map(str, reversed(files)))
    derivation = derive(str(folder), controlnet=backwards, pipeline=task, num_inference_steps=4)
    with pytest.raises(DerivationError, match="without global_pool_conditions after a first one with"):
        _ = derivation.program(True).generic
    with pytest.raises(RuntimeError, match="broadcast shape"):
        trace_pipeline(folder, derivation.options, Call(72, 136))


def test_a_live_controlnet_of_another_architecture_is_that_of_its_config(folders, tmp_path):
    own = written(folders["SD"], tmp_path, 8)
    derivation = derive(str(folders["SD"]), controlnet=str(own), pipeline="txt2img")
    found = derive(pipeline_of(folders["SD"], derivation.options), pipeline="txt2img")
    assert found.stage_peaks(128, 128) == derivation.stage_peaks(128, 128)
    again = Derivation.from_json(found.to_json())
    assert again.stage_peaks(128, 128) == derivation.stage_peaks(128, 128)


@pytest.mark.parametrize("model", [SD15, SDXL])
def test_a_controlnet_made_from_a_published_unet_is_the_counted_one(tmp_path, model):
    unet = json.loads((BUNDLED / model / "unet/config.json").read_text())
    with torch.device("meta"):
        made = diffusers.ControlNetModel.from_unet(
            diffusers.UNet2DConditionModel.from_config(unet), load_weights_from_unet=False
        )
    (tmp_path / "config.json").write_text(json.dumps({**made.config, "_class_name": "ControlNetModel"}, default=list))
    named, counted = derive(model, controlnet=str(tmp_path)), derive(model, controlnets=1)
    assert named.weights == counted.weights
    assert named.stage_peaks(512, 768) == counted.stage_peaks(512, 768)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"layers_per_block": 2}, r"layers_per_block = \(2, .* is not supported .*the UNet's \(1, "),
        ({"cross_attention_dim": 7}, r"cross_attention_dim = \(7, .* is not supported .*the UNet's"),
        ({"in_channels": 9}, "in_channels = 9 is not supported .*the 4 of the latents"),
        ({"mid_block_type": None}, "mid_block_type = None"),
        ({"layers_per_block": [1, 1, 1]}, r"layers_per_block = \[1, 1, 1\]"),
        ({"conditioning_channels": 1}, "conditioning_channels = 1"),
        ({"global_pool_conditions": 1}, "global_pool_conditions = 1"),
        ({"controlnet_conditioning_channel_order": "gbr"}, "channel_order = 'gbr'"),
        ({"_class_name": "ControlNetUnionModel"}, "_class_name = 'ControlNetUnionModel'"),
        ({"conditioning_embedding_out_channels": [8, 8]}, "VAE of scale factor 8 is not supported"),
    ],
)
def test_a_controlnet_that_does_not_fit_is_named(folders, tmp_path, values, message):
    own = written(folders["SD"], tmp_path, 9, **values)
    with pytest.raises(DerivationError, match=message):
        _ = derive(str(folders["SD"]), controlnet=str(own), pipeline="txt2img").program(True).generic


def test_what_controlnetmodel_ignores_is_ignored():
    with pytest.warns(UserWarning, match="ignored, as by ControlNetConfig: up_block_types .*, decay"):
        controlnet_config({"up_block_types": ["X"], "decay": 0.9})


@pytest.mark.parametrize("named", ["", "a,,b", ",".join("abcdefghi"), "no/such/folder"])
def test_files_that_are_not_there_are_told_in_a_line(named):
    with pytest.raises(DerivationError, match=r"controlnet = |cannot be read"):
        _ = derive(SD15, controlnet=named).weights
