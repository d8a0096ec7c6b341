"""channels_last weights: nothing changes on meta; on a GPU convolutions copy their input and hand on the format."""

from __future__ import annotations

import random

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from conftest import SD15
from test_pipelines import small_xl

from derivation import Options, derive
from derivation.export import compiled
from derivation.tape.tape import Tape
from derivation.trace.switches import switches
from derivation.verify import build_unet
from derivation.verify.compare import (
    compare_components,
    compare_pipeline,
    read_config,
)
from derivation.walk.ops import Conv2d, add, cat, given, pad, upsample_nearest2d


@pytest.mark.parametrize("attention", ["eager", "efficient"])
@pytest.mark.parametrize("guidance", [True, False])
def test_components_equal_the_trace(attention, guidance):
    derivation = derive(SD15, channels_last=True, attention=attention)
    for comparison in compare_components(derivation, 64, 72, guidance=guidance):
        assert comparison.match, comparison


def test_pipelines_equal_the_trace(tmp_path):
    for source in (SD15, small_xl(tmp_path)):
        derivation = derive(source, channels_last=True, num_inference_steps=3, strength=0.9)
        for comparison in compare_pipeline(derivation, 64, 72):
            assert comparison.match, comparison


def test_every_weight_of_the_oracle_is_channels_last():
    derivation = derive(SD15, channels_last=True)
    unet = build_unet(read_config(derivation, "unet"), switches=switches(derivation.options))
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in unet.parameters() if p.ndim == 4)


def real_convolution(x, kernel, channels_last):
    weight = torch.zeros(6, x.shape[1], kernel, kernel)
    weight = weight.to(memory_format=torch.channels_last) if channels_last else weight
    return torch.nn.functional.conv2d(x, weight, padding=kernel // 2)


@pytest.mark.parametrize("shape", [(2, 4, 5, 7), (1, 4, 8, 8), (1, 8, 1, 5)])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("weight_last", [False, True])
@pytest.mark.parametrize("input_last", [False, True])
def test_layouts_equal_those_of_the_cpu(shape, kernel, weight_last, input_last):
    """ATen decides formats by the same rule for oneDNN and cuDNN, and once for cat, pad, upsample and add."""
    x = torch.zeros(shape)
    x = x.to(memory_format=torch.channels_last) if input_last else x
    tape = Tape(Options(channels_last=weight_last), derive(SD15, gpu="t4").subject.hardware)
    with tape.running(), tape.scope("unet"):
        ours = given(shape, "float32").view_as(shape, tuple(x.stride()))
        out, real = Conv2d("conv", ours, 6, kernel, padding=kernel // 2), real_convolution(x, kernel, weight_last)
        row_major = given(real.shape, "float32")
        pairs = [
            (out, real),
            (cat([out, out], 1), torch.cat([real, real], 1)),
            (cat([out, row_major], 1), torch.cat([real, torch.zeros(real.shape)], 1)),
            (pad(out, 1, 1), torch.nn.functional.pad(real, (0, 1, 0, 1))),
            (upsample_nearest2d(out, (20, 22)), torch.nn.functional.interpolate(real, (20, 22))),
            (add(out, row_major), real + torch.zeros(real.shape)),
            (add(row_major, out), torch.zeros(real.shape) + real),
        ]
        for mine, theirs in pairs:
            assert mine.is_contiguous() == theirs.is_contiguous()
            last = theirs.is_contiguous(memory_format=torch.channels_last)
            assert mine.permute(0, 2, 3, 1).is_contiguous() == last


def test_on_a_gpu_inputs_are_copied_and_weights_are_not():
    both = [derive(SD15, gpu="t4", channels_last=value) for value in (False, True)]
    plain, last = (derivation.component("unet").generic.tape for derivation in both)
    assert not [a for a in last.allocations if a.op == "convolution weight"]
    copies = [a for a in last.allocations if a.op == "clone" and a.path.endswith("conv_in")]
    assert [a.shape[1] for a in copies] == [4]
    assert not [a for a in plain.allocations if a.op == "clone" and a.path.endswith("conv_in")]


def test_the_exported_function_equals_the_stages():
    derivation, rng = derive(SD15, pipeline="img2img", channels_last=True), random.Random(3)
    peak_vram = compiled(derivation.equation)
    for _ in range(3):
        height, width, length, batch = (rng.randint(*bounds) for bounds in ((8, 1400), (8, 1400), (1, 77), (1, 5)))
        stages = derivation.stage_peaks(height, width, batch, length)
        assert peak_vram(height, width, length, batch) == derivation.weights_bytes + max(stages.values())
