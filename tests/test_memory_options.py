"""VAE slicing and tiling, attention slicing: component peaks equal the traced modules'."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from derivation import DerivationError, derive
from derivation.verify.compare import checkpoint_folder, read_config
from derivation.verify.modules import build_unet, build_vae
from derivation.verify.runs import sdpa_mode
from derivation.verify.tracer import Tracer

SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"


def meta(*shape, dtype=torch.float16):
    return torch.empty(*shape, dtype=dtype, device="meta")


def traced_peak(module, call, inputs, attention="efficient"):
    tracer = Tracer({"": module}, inputs)
    with torch.no_grad(), sdpa_mode(attention), tracer:
        _output = call()
    return tracer.trace.peak_bytes


@pytest.fixture
def folder():
    return checkpoint_folder(derive(SD15))


@pytest.mark.parametrize(("slicing", "tiling", "height", "width", "batch_size"), [
    (True, False, 64, 72, 1),
    (True, False, 64, 72, 3),
    (False, True, 520, 640, 1),
    (False, True, 1024, 1000, 2),
    (True, True, 600, 1304, 2),
    (False, True, 512, 512, 1),
])
def test_vae_slicing_and_tiling(folder, slicing, tiling, height, width, batch_size):
    vae = build_vae(read_config(folder, "vae_decode"), "float16", "efficient")
    latents = meta(batch_size, 4, height // 8, width // 8)
    image = meta(batch_size, 3, height, width)
    peaks = derive(SD15, vae_slicing=slicing, vae_tiling=tiling).component_peaks(height, width, batch_size)
    try:
        vae.use_slicing, vae.use_tiling = slicing, tiling
        decode = traced_peak(vae, lambda: vae.decode(latents, return_dict=False), [latents])
        encode = traced_peak(vae, lambda: vae.encode(image).latent_dist.sample(), [image])
    finally:
        vae.use_slicing = vae.use_tiling = False
    assert (peaks["vae_decode"], peaks["vae_encode"]) == (decode, encode)


@pytest.mark.parametrize("slice_size", ["auto", "max", 2, 8])
@pytest.mark.parametrize(("height", "width", "batch_size"), [(128, 72, 1), (640, 512, 1)])
def test_attention_slicing(folder, slice_size, height, width, batch_size):
    unet = build_unet(read_config(folder, "unet") | {"sample_size": 63}, "float16", "eager")
    unet.set_attention_slice(slice_size)
    inputs = (
        meta(2 * batch_size, 4, height // 8, width // 8),
        meta(1, dtype=torch.int64),
        meta(2 * batch_size, 77, 768),
    )
    derivation = derive(SD15, attention="eager", attention_slicing=slice_size)
    traced = traced_peak(unet, lambda: unet(*inputs, return_dict=False), inputs, "eager")
    assert derivation.component_peaks(height, width, batch_size)["unet"] == traced


def test_a_slice_larger_than_the_heads_is_one_line():
    with pytest.raises(DerivationError, match=r"attention_slicing = 9 is not supported .*1 to 8 heads"):
        derive(SD15, attention_slicing=9).component_peaks(64, 64)
