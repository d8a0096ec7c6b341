"""The public API: round trips, fixed sizes, errors in one line."""

from __future__ import annotations

import pickle

import pytest

from derivation import Derivation, DerivationError, derive
from derivation.config import bundled

SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"


@pytest.mark.parametrize("name", bundled())
def test_round_trips_keep_everything(name):
    pipeline = "inpaint" if "inpaint" in name else "img2img"
    derivation = derive(name, pipeline=pipeline, dtype="bfloat16").at(batch_size=2)
    for back in (pickle.loads(pickle.dumps(derivation)), Derivation.from_json(derivation.to_json())):
        assert back.checkpoint == derivation.checkpoint
        assert (back.options, back.fixed) == (derivation.options, derivation.fixed)
        assert back.stage_peaks(64, 64, 2) == derivation.stage_peaks(64, 64, 2)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"checkpoint": {}, "options": {}, "fixed": {}}', "null", "3"])
def test_other_json_is_refused_in_one_line(text):
    with pytest.raises(DerivationError) as caught:
        Derivation.from_json(text)
    assert "\n" not in str(caught.value)


def test_fixed_sizes_leave_fewer_symbols():
    derivation = derive(SD15)
    whole = derivation.at(height=512, width=768, batch_size=1, prompt_length=77)
    exact = derivation.estimate(height=512, width=768)["peak_tensor_bytes"]
    assert not whole.peak.free_symbols
    assert 0 <= exact - int(whole.peak) <= max(t.rounding_bytes for t in whole.pipeline_stage().terms)
    assert {str(s) for s in derivation.at(batch_size=1, prompt_length=77).peak.free_symbols} == {"H", "W"}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"height": 0, "width": 512}, "height = 0 is not supported"),
        ({"height": 512, "width": -8}, "width = -8 is not supported"),
        ({"height": 512, "width": 512, "batch_size": -1}, "batch_size = -1 is not supported"),
        ({"height": 512.0, "width": 512}, "height = 512.0 is not supported"),
        ({"height": 512, "width": 512, "prompt_length": 0}, "prompt_length = 0 is not supported"),
        ({"height": 1 << 40, "width": 512}, "height = 1099511627776 is not supported"),
    ],
)
def test_bad_sizes_are_one_line(call, message):
    with pytest.raises(DerivationError, match=message):
        derive(SD15).estimate(**call)


def test_txt2img_needs_multiples_of_the_vae_factor():
    with pytest.raises(DerivationError, match=r"height = 515 is not supported \(supported: multiples of 8\)"):
        derive(SD15, pipeline="txt2img").stage_peaks(515, 512)
    assert derive(SD15).stage_peaks(515, 389) == derive(SD15).stage_peaks(512, 384)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpu": "rtx-9999"}, "rtx-9999"),
        ({"attention": "sage"}, "attention = 'sage' is not supported"),
        ({"dtype": "int8"}, "dtype = 'int8' is not supported"),
        ({"steps": 5}, "unexpected keyword argument 'steps'"),
        ({"method": "guess"}, "method = 'guess' is not supported"),
    ],
)
def test_bad_options_are_one_line(options, message):
    with pytest.raises(DerivationError, match=message) as caught:
        derive(SD15, **options).estimate(512, 512)
    assert "\n" not in str(caught.value)


def test_a_gpu_adds_the_allocator_and_the_device():
    found = derive(SD15, gpu="t4", attention="sdpa").estimate(height=512, width=512)
    assert found["requested"] <= found["allocated"] <= found["reserved"] < found["device"]
    assert found["device"] - found["reserved"] == found["context"]
    assert found["headroom"] == found["total"] - found["device"]
    assert found["verdict"] == "fits"
    eager = derive(SD15, gpu="t4", attention="eager").estimate(height=1024, width=1024)
    assert eager["verdict"].startswith("out of memory at unet.")
