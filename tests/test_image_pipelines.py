"""Pipelines that are given images, from their configs alone: the call is given what it asks for."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")

from derivation.api import Derivation
from derivation.call import Call
from derivation.export import export
from derivation.options import Options
from derivation.trace.pipeline import TracedPipeline
from derivation.trace.regimes import record
from derivation.verify.pipelines import SIDES, checked, description, read
from derivation.verify.streams import naive_peak

ALL = read(Path(__file__).parent / "tiny_pipelines.jsonl")
DOCUMENTS = {document["class"]: document for document in ALL}
OPTIONS = Options(pipeline="txt2img", dtype="float32")


def adapter() -> dict[str, Any]:
    """T2I-Adapter on the tiny Stable Diffusion."""
    own = {"in_channels": 3, "channels": [32, 64], "num_res_blocks": 2, "downscale_factor": 2}
    document = DOCUMENTS["StableDiffusionAdapterPipeline"]
    return document | {"parts": document["parts"] | {"adapter": ["diffusers", "T2IAdapter", own]}}


def upscaler() -> dict[str, Any]:
    """The x4 upscaler: 7 channels, the noise level as a class, a scheduler of the small image's."""
    document = json.loads(json.dumps(DOCUMENTS["StableDiffusionPipeline"]))
    parts = {**document["parts"], "low_res_scheduler": ["diffusers", "DDPMScheduler", {}], "safety_checker": None}
    parts["unet"][2].update({"in_channels": 7, "num_class_embeds": 1000})
    return {"class": "StableDiffusionUpscalePipeline", "parts": parts, "call": {}}


CASES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "T2I-Adapter": (adapter(), ("image",)),
    "instruct-pix2pix": (DOCUMENTS["StableDiffusionInstructPix2PixPipeline"], ("image",)),
    "PAG inpainting": (DOCUMENTS["StableDiffusionPAGInpaintPipeline"], ("image", "mask_image")),
    "Flux img2img": (DOCUMENTS["FluxImg2ImgPipeline"], ("image",)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_call_is_given_the_images_that_it_asks_for(name: str) -> None:
    document, images = CASES[name]
    traced = TracedPipeline(description(document), OPTIONS, sides=SIDES)
    assert traced.arguments.images == images
    assert {"unet", "transformer"} & {mark.stage for mark in traced.trace(traced.base()).marks}


def test_the_upscaler_has_a_closed_form() -> None:
    plain = TracedPipeline(description(upscaler()), OPTIONS, sides=SIDES)
    derivation = Derivation(record(description(upscaler()), OPTIONS, "tiny", "tiny x4", sides=SIDES))
    rng, unit = random.Random(1), derivation.grid.unit
    for _ in range(2):
        height, width = (unit * rng.randint(4, 20) for _ in range(2))
        peak = derivation.weights_bytes + naive_peak(plain.trace(Call(height, width, 1, 77)))
        assert derivation.lambdify()(height, width, 77, 1) == peak
        assert derivation.at(height=height, width=width).lambdify()(height, width, 77, 1) == peak
    assert "def peak_vram" in export(derivation.equation, "python")


def test_sdxl_t2i_adapter_is_exact_where_held_out() -> None:
    document = next(d for d in ALL if d["class"] == "StableDiffusionXLAdapterPipeline" and d["parts"]["adapter"][2])
    assert document["parts"]["adapter"][2]["adapter_type"] == "full_adapter_xl"
    row = checked(document)
    assert row.exact, row


def test_kolors_is_exact_where_held_out() -> None:
    """ChatGLM as wide as the tiny UNet's prompts: its pooled embedding and 6 time ids of 8 are 56."""
    pytest.importorskip("sentencepiece")
    document = json.loads(json.dumps(DOCUMENTS["KolorsPipeline"]))
    document["parts"]["text_encoder"][2].update({"hidden_size": 8, "num_attention_heads": 4, "kv_channels": 2})
    row = checked(document)
    assert row.exact, row


def test_dpm_sde_is_exact_where_held_out() -> None:
    pytest.importorskip("torchsde")
    document = json.loads(json.dumps(DOCUMENTS["StableDiffusionPipeline"]))
    document["parts"]["scheduler"] = ["diffusers", "DPMSolverSDEScheduler", {"beta_schedule": "scaled_linear"}]
    row = checked(document)
    assert row.exact, row
