"""VAE slicing and tiling, attention slicing: derived peaks equal traced ones in every call and stage."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from conftest import SD15

from derivation import DerivationError, derive
from derivation.verify.compare import compare_components, compare_pipeline


def peaks(comparisons):
    return {c.name: (c.derived_bytes, c.traced_bytes) for c in comparisons}


@pytest.mark.parametrize(
    ("slicing", "tiling", "height", "width", "batch_size"),
    [
        (True, False, 64, 72, 1),
        (True, False, 64, 72, 3),
        (False, True, 520, 640, 1),
        (False, True, 1024, 1000, 2),
        (True, True, 600, 1304, 2),
        (False, True, 512, 512, 1),
    ],
)
def test_vae_slicing_and_tiling(slicing, tiling, height, width, batch_size):
    derivation = derive(SD15, vae_slicing=slicing, vae_tiling=tiling)
    for name, (derived, traced) in peaks(compare_components(derivation, height, width, batch_size)).items():
        assert derived == traced, name


@pytest.mark.parametrize("slice_size", ["auto", "max", 2, 8])
@pytest.mark.parametrize(("height", "width", "batch_size"), [(128, 72, 1), (640, 512, 1)])
def test_attention_slicing(slice_size, height, width, batch_size):
    derivation = derive(SD15, attention="eager", attention_slicing=slice_size)
    for name, (derived, traced) in peaks(compare_components(derivation, height, width, batch_size)).items():
        assert derived == traced, name


def test_memory_options_of_the_whole_pipeline():
    sliced = {"vae_slicing": True, "vae_tiling": True, "attention_slicing": "max", "attention": "eager"}
    derivation = derive(SD15, **sliced, num_inference_steps=3)
    for name, (derived, traced) in peaks(compare_pipeline(derivation, 520, 640, 2)).items():
        assert derived == traced, name


def test_a_slice_larger_than_the_heads_is_one_line():
    with pytest.raises(DerivationError, match=r"attention_slicing = 9 is not supported .*1 to 8 heads"):
        derive(SD15, attention_slicing=9).component_peaks(64, 64)
