"""A VAE of another dtype than the UNet's: SDXL's img2img and inpaint cast it, everything else raises in diffusers."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")

from conftest import SD15, SDXL
from test_pipelines import VAE, small_sd, small_xl

from derivation import DerivationError, derive
from derivation.call import Call
from derivation.options import Options
from derivation.trace.modules import pipeline_of
from derivation.trace.runs import trace_pipeline
from derivation.verify.compare import compare_components, compare_pipeline
from derivation.verify.matrix import Entry, matrix


def checked(derivation, *call):
    return [each for each in compare_pipeline(derivation, *call) if not each.match]


@pytest.mark.parametrize("task", ["img2img", "inpaint"])
@pytest.mark.parametrize(
    ("dtype", "vae_dtype", "options"),
    [
        ("float16", "float32", {}),
        ("float16", "float32", {"offload": "model", "attention": "eager"}),
        ("float16", "float32", {"offload": "sequential", "vae_slicing": True}),
        ("float16", "bfloat16", {"controlnets": 1}),
        ("bfloat16", "float32", {"num_images_per_prompt": 2}),
        ("bfloat16", "float16", {"channels_last": True}),
        ("float32", "float16", {}),
    ],
)
def test_sdxl_casts_what_its_vae_takes(tmp_path, task, dtype, vae_dtype, options):
    derivation = derive(
        small_xl(tmp_path), pipeline=task, dtype=dtype, vae_dtype=vae_dtype, num_inference_steps=4, **options
    )
    assert checked(derivation, 72, 136, 2) == []
    if options.get("offload") is None and "controlnets" not in options:
        assert all(each.match for each in compare_components(derivation, 64, 72))


def test_the_weights_are_those_of_the_real_models(tmp_path):
    options = Options(pipeline="img2img", vae_dtype="float32")
    folder = small_xl(tmp_path)
    pipe = pipeline_of(folder, options)
    real = sum(-(-p.numel() * p.element_size() // 512) * 512 for p in pipe.vae.parameters())
    assert derive(folder, pipeline="img2img", vae_dtype="float32").weights["vae"] == real
    live = derive(pipe)
    assert (live.options.dtype, live.options.vae_dtype) == ("float16", "float32")
    assert live.weights["vae"] == real


@pytest.mark.parametrize(
    ("small", "task", "change"),
    [
        (small_sd, "txt2img", {}),
        (small_sd, "img2img", {}),
        (small_sd, "inpaint", {}),
        (small_xl, "txt2img", {}),
        (small_xl, "img2img", {"force_upcast": False}),
    ],
)
@pytest.mark.parametrize(("dtype", "vae_dtype"), [("float16", "float32"), ("float32", "bfloat16")])
def test_where_diffusers_raises_it_is_refused(tmp_path, small, task, change, dtype, vae_dtype):
    folder = small(tmp_path, vae=VAE | change) if change else small(tmp_path)
    options = Options(pipeline=task, dtype=dtype, vae_dtype=vae_dtype, num_inference_steps=4)
    with pytest.raises(RuntimeError):
        trace_pipeline(folder, options, Call(64, 64))
    derivation = derive(folder, **options.as_dict())
    with pytest.raises(DerivationError, match=f"^vae_dtype = {vae_dtype} beside dtype = {dtype} is not supported in "):
        _ = derivation.stage_peaks(64, 64)


def test_the_same_dtype_is_no_other(tmp_path):
    named = derive(SD15, vae_dtype="fp16")
    assert named.stage_peaks(512, 512) == derive(SD15).stage_peaks(512, 512)


def test_the_matrix_has_what_runs():
    entries = [entry for entry in matrix() if "vae_dtype" in entry.options]
    assert {entry.options["pipeline"] for entry in entries} == {"img2img", "inpaint"}
    assert all("xl" in entry.model for entry in entries)


def test_sdxl_beside_a_float32_vae_equals_the_trace():
    call = Call(256, 256)
    options = {"pipeline": "img2img", "num_inference_steps": 4, "strength": 0.5, "vae_dtype": "float32"}
    assert all(each.match for each in Entry(SDXL, options, call).compare())
