"""Derived bytes and event streams against the real modules, zero tolerance."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from conftest import SD15

from derivation import derive
from derivation.verify.compare import compare_components, compare_pipeline
from derivation.verify.fuzz import compare_case, random_case

ATTENTION = ("eager", "math", "efficient", "flash")
# (height, width, batch_size, prompt_length, guidance): odd latents, degenerate sides, long prompts
CALLS = [
    (512, 512, 1, 77, True),
    (512, 768, 2, 77, False),
    (264, 56, 1, 5, True),
    (8, 8, 1, 1, False),
    (8, 136, 3, 2, True),
    (104, 72, 5, 154, False),
]


@pytest.mark.parametrize("call", CALLS, ids=str)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("attention", ATTENTION)
def test_components_equal_the_trace(attention, dtype, call):
    derivation = derive(SD15, attention=attention, dtype=dtype)
    for comparison in compare_components(derivation, *call):
        assert comparison.match, comparison


@pytest.mark.parametrize("call", [(520, 392, 1, 77, True), (64, 88, 2, 77, False), (8, 8, 1, 154, True)], ids=str)
@pytest.mark.parametrize("pipeline", ["img2img", "txt2img"])
@pytest.mark.parametrize("attention", ATTENTION)
def test_pipeline_stages_equal_the_trace(attention, pipeline, call):
    derivation = derive(SD15, pipeline=pipeline, attention=attention, num_inference_steps=6)
    for comparison in compare_pipeline(derivation, *call):
        assert comparison.match, comparison


@pytest.mark.parametrize(
    "options",
    [
        {"num_images_per_prompt": 3, "num_inference_steps": 6},
        {"safety_checker": False, "num_inference_steps": 1, "strength": 1.0},
        {"num_inference_steps": 2, "pipeline": "txt2img"},
        {"num_inference_steps": 20, "strength": 0.3, "dtype": "float32"},
    ],
    ids=str,
)
def test_pipeline_options_equal_the_trace(options):
    derivation = derive(SD15, **options)
    for comparison in compare_pipeline(derivation, 72, 40):
        assert comparison.match, comparison


# the last ones: what longer runs found
@pytest.mark.parametrize("seed", [*range(200), 1208, 1261, 3349, 40062, 40946])
def test_random_configs_options_and_pipelines_equal_the_trace(seed):
    case = random_case(seed)
    for comparison in compare_case(case):
        assert comparison.match, f"{comparison}\nreproduce: {case}"


def test_batches_from_64_copy_channels_last_tensors():
    derivation = derive(SD15)
    for comparison in compare_components(derivation, 64, 64, batch_size=64):
        assert comparison.match, comparison


def test_orientation_numbers():
    at_512 = {"height": 512, "width": 512, "batch_size": 1, "prompt_length": 77, "guidance": True}
    fused = derive(SD15).component_peaks(**at_512)
    assert fused["unet"] == 136_321_536
    assert fused["vae_encode"] == 335_544_320
    assert fused["vae_decode"] == 402_685_952
    assert derive(SD15, attention="eager").component_peaks(**at_512)["unet"] == 1_131_420_160


def test_parameter_counts_are_the_published_ones():
    assert derive(SD15).parameter_counts == {
        "text_encoder": 123_060_480,
        "vae": 83_653_863,
        "unet": 859_520_964,
        "safety_checker": 303_981_588,
    }
