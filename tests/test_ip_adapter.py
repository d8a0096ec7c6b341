"""An IP-Adapter and its image encoder: parameters and events equal those of the real modules and pipelines."""

from __future__ import annotations

import random

import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from conftest import SD15, SDXL
from test_pipelines import small_sd, small_xl

from derivation import DerivationError, derive
from derivation.export import compiled
from derivation.trace.modules import build_image_encoder
from derivation.trace.runs import trace_component
from derivation.trace.switches import switches
from derivation.verify import build_unet
from derivation.verify.compare import (
    compare_component,
    compare_pipeline,
    read_config,
)

TASKS = ("txt2img", "img2img", "inpaint")


def component(derivation, name, height, width, batch_size, length, guidance):
    config = read_config(derivation, name)
    values = derivation.sizes(height, width, batch_size, length)
    return compare_component(derivation, name, config, values, guidance)


@pytest.mark.parametrize(
    ("name", "options", "call"),
    [
        (SD15, {"ip_adapter_tokens": 4}, (64, 72, 1, 77, True)),
        (SD15, {"ip_adapter_tokens": 4, "attention": "eager"}, (72, 8, 2, 9, True)),
        (SD15, {"ip_adapter_tokens": 1, "attention": "math", "dtype": "float32"}, (64, 72, 2, 154, False)),
        (SD15, {"ip_adapter_tokens": 16, "attention": "flash", "dtype": "bfloat16"}, (96, 72, 1, 77, False)),
        (SD15, {"ip_adapter_tokens": 4, "lora_rank": 8}, (64, 72, 1, 77, True)),
        (SDXL, {"ip_adapter_tokens": 4}, (64, 72, 1, 77, True)),
        (SDXL, {"ip_adapter_tokens": 4, "attention": "eager", "lora_rank": 8}, (8, 72, 1, 7, False)),
    ],
    ids=str,
)
def test_the_unet_equals_the_trace(name, options, call):
    assert (found := component(derive(name, **options), "unet", *call)).match, found


@pytest.mark.parametrize("attention", ["eager", "math", "efficient", "flash"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_image_encoder_equals_the_trace(attention, dtype):
    derivation = derive(SD15, ip_adapter_tokens=4, attention=attention, dtype=dtype)
    found = component(derivation, "image_encoder", 64, 64, 3, 77, True)
    assert found.match, found


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    ("small", "attention", "guidance"),
    [(small_sd, "efficient", True), (small_sd, "eager", False), (small_xl, "efficient", True)],
)
def test_pipelines_equal_the_trace(tmp_path, task, small, attention, guidance):
    options = {"num_images_per_prompt": 2} if task == "txt2img" else {"strength": 0.9}
    derivation = derive(
        small(tmp_path), pipeline=task, attention=attention, num_inference_steps=4, ip_adapter_tokens=4, **options
    )
    for comparison in compare_pipeline(derivation, 64, 72, guidance=guidance):
        assert comparison.match, comparison


@pytest.mark.parametrize("tokens", [4, 8])
@pytest.mark.parametrize("name", [SD15, SDXL])
def test_parameters_have_the_real_names_and_shapes(name, tokens):
    derivation = derive(name, ip_adapter_tokens=tokens)
    real = build_unet(read_config(derivation, "unet"), switches=switches(derivation.options))
    expected = {f"unet.{path}": (tuple(p.shape), "float16") for path, p in real.named_parameters()}
    assert derivation.parameters["unet"] == expected
    encoder = build_image_encoder(read_config(derivation, "image_encoder"))
    stored = {**dict(encoder.named_parameters()), **dict(encoder.named_buffers())}
    shapes = {f"image_encoder.{path}": tuple(tensor.shape) for path, tensor in stored.items()}
    assert {path: shape for path, (shape, _) in derivation.parameters["image_encoder"].items()} == shapes


def test_the_image_encoder_has_the_published_number_of_parameters():
    assert derive(SD15, ip_adapter_tokens=4).parameter_counts["image_encoder"] == 632_076_800


def test_the_exported_function_equals_the_stages():
    derivation, rng = derive(SD15, pipeline="img2img", ip_adapter_tokens=4), random.Random(7)
    peak_vram = compiled(derivation.equation)
    for guidance in (True, True, False, True, False):
        height, width, length, batch = (rng.randint(*bounds) for bounds in ((8, 1400), (8, 1400), (1, 77), (1, 5)))
        stages = derivation.stage_peaks(height, width, batch, length, guidance)
        assert peak_vram(height, width, length, batch, guidance) == derivation.weights_bytes + max(stages.values())


def test_attention_slicing_is_refused_as_diffusers_fails_with_it():
    config = read_config(derive(SD15), "unet")
    for order in (("ip_adapter_tokens", "attention_slicing"), ("attention_slicing", "ip_adapter_tokens")):
        values = {"ip_adapter_tokens": 4, "attention_slicing": "max"}
        with pytest.raises((TypeError, AttributeError)):
            trace_component("unet", config, height=64, width=64, switches=tuple((name, values[name]) for name in order))
    with pytest.raises(DerivationError, match=r"^ip_adapter_tokens = 4 is not supported with attention_slicing: .*$"):
        derive(SD15, ip_adapter_tokens=4, attention_slicing="max")
