"""LoRA on the UNet's attention projections: parameters and events equal those of peft's layers."""

from __future__ import annotations

import random

import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("peft")

from conftest import SD15, SDXL

from derivation import DerivationError, derive
from derivation.export import compiled
from derivation.trace.switches import switches
from derivation.verify import build_unet
from derivation.verify.compare import compare_component, compare_pipeline, read_config


def unet(derivation, height, width, batch_size, length, guidance):
    config = read_config(derivation, "unet")
    values = derivation.sizes(height, width, batch_size, length)
    return compare_component(derivation, "unet", config, values, guidance)


@pytest.mark.parametrize(
    ("name", "options", "call"),
    [
        (SD15, {"lora_rank": 4}, (64, 72, 1, 77, True)),
        (SD15, {"lora_rank": 128, "attention": "eager"}, (8, 88, 2, 9, False)),
        (SD15, {"lora_rank": 7, "attention": "flash", "dtype": "bfloat16"}, (72, 96, 1, 154, True)),
        (SD15, {"lora_rank": 2, "attention": "math", "dtype": "float32"}, (96, 8, 3, 77, False)),
        (SD15, {"lora_rank": 16, "lora_fused": True}, (64, 72, 1, 77, True)),
        (SD15, {"lora_rank": 16, "lora_fused": True, "attention": "eager"}, (64, 72, 2, 77, False)),
        (SDXL, {"lora_rank": 32}, (64, 72, 1, 77, True)),
        (SDXL, {"lora_rank": 32, "attention": "eager"}, (72, 64, 1, 77, False)),
        (SDXL, {"lora_rank": 8, "lora_fused": True}, (8, 8, 2, 77, False)),
    ],
    ids=str,
)
def test_the_unet_equals_the_trace(name, options, call):
    assert (found := unet(derive(name, **options), *call)).match, found


@pytest.mark.parametrize(
    ("options", "guidance"), [({"lora_rank": 4}, True), ({"lora_rank": 8, "lora_fused": True}, False)], ids=str
)
def test_the_pipeline_equals_the_trace(options, guidance):
    derivation = derive(SD15, num_inference_steps=3, num_images_per_prompt=2, **options)
    for comparison in compare_pipeline(derivation, 64, 72, guidance=guidance):
        assert comparison.match, comparison


def test_attention_slicing_reaches_the_same_peak():
    derivation = derive(SD15, lora_rank=64, attention="eager", attention_slicing="auto")
    found = unet(derivation, 64, 64, 1, 77, True)
    assert found.derived_bytes == found.traced_bytes


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", [SD15, SDXL])
def test_parameters_have_peft_s_names_and_shapes(name, fused):
    derivation = derive(name, lora_rank=4, lora_fused=fused)
    real = build_unet(read_config(derivation, "unet"), switches=switches(derivation.options))
    expected = {f"unet.{path}": (tuple(p.shape), "float16") for path, p in real.named_parameters()}
    assert derivation.parameters["unet"] == expected


def test_a_fused_lora_keeps_its_weights_and_adds_no_activation():
    plain, unfused, fused = derive(SD15), derive(SD15, lora_rank=64), derive(SD15, lora_rank=64, lora_fused=True)
    assert fused.weights["unet"] == unfused.weights["unet"] > plain.weights["unet"]
    assert fused.component_peaks(512, 512) == plain.component_peaks(512, 512)


def test_the_exported_function_equals_the_stages():
    derivation, rng = derive(SD15, pipeline="img2img", lora_rank=96), random.Random(5)
    peak_vram = compiled(derivation.equation)
    for _ in range(5):
        height, width, length, batch = (rng.randint(*bounds) for bounds in ((8, 1400), (8, 1400), (1, 77), (1, 5)))
        stages = derivation.stage_peaks(height, width, batch, length)
        assert peak_vram(height, width, length, batch) == derivation.weights_bytes + max(stages.values())


def test_fusing_nothing_is_one_line():
    with pytest.raises(DerivationError, match=r"^lora_fused = True is not supported without a lora or a lora_rank$"):
        derive(SD15, lora_fused=True)


def test_a_fused_lora_of_an_offloaded_unet_stays_on_the_cpu():
    derivation = derive(SD15, lora_rank=33, lora_fused=True, offload="sequential")
    comparison = unet(derivation, 64, 72, 1, 77, True)
    assert comparison.match, comparison
