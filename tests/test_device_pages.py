"""Expandable segments in closed form, held to the numeric replay."""

from __future__ import annotations

import random
import re
from itertools import product

import pytest
from conftest import SD15

from derivation import Derivation, derive
from derivation.allocator.allocator import CachingAllocator
from derivation.allocator.config import AllocatorConfig
from derivation.allocator.memory import load_pipeline
from derivation.allocator.replay import ReplayResult
from derivation.allocator.simulate import replay
from derivation.ask.quick import Quick
from derivation.call import Call
from derivation.equation.device import N
from derivation.errors import DerivationError
from derivation.export import export
from derivation.tape.grid import H, W

SIZES = list(product(range(512, 2049, 64), repeat=2))
CONF = "expandable_segments:True"
PAGE, UNIT = 20 << 20, 2 << 20
KINDS = [
    (SD15, "img2img", "sdpa", "t4", 1),
    ("stabilityai/stable-diffusion-2-1", "txt2img", "eager", "t4", 2),
    ("stabilityai/stable-diffusion-xl-base-1.0", "txt2img", "sdpa", "h100", 1),
]


@pytest.fixture(scope="module")
def sd15() -> Derivation:
    return derive(SD15, pipeline="img2img", attention="sdpa", gpu="t4", num_inference_steps=10, alloc_conf=CONF)


def replayed(d: Derivation, call: Call) -> ReplayResult:
    """The call on a card that has room."""
    allocator, values = CachingAllocator(AllocatorConfig.parse(CONF)), d.sizes(call)
    return replay(d.program().at(values).tape, values, load_pipeline(allocator, d.resident)).run(allocator)


@pytest.mark.parametrize(("model", "pipeline", "attention", "gpu", "batch_size"), KINDS)
def test_exports_with_expandable_segments_are_the_replay(
    model: str, pipeline: str, attention: str, gpu: str, batch_size: int
) -> None:
    made = derive(model, pipeline=pipeline, attention=attention, gpu=gpu, num_inference_steps=10, alloc_conf=CONF)
    d = made.at(batch_size=batch_size)
    form, code = d.equation.device, d.equation.device_code
    assert code is not None
    for height, width in random.Random(model).sample(SIZES, 8):
        found = replayed(d, Call(height, width, batch_size))
        counted = code.unit * code.counted[height * width // 64**2]
        assert form.shared.total[form.index[height, width]] + counted == found.reserved_bytes.nbytes
        assert form.allocated_bytes(form.index[height, width]) == found.allocated_bytes.nbytes


def test_generated_python_with_expandable_segments_is_the_replay(sd15: Derivation) -> None:
    module, form = {"__name__": "generated"}, sd15.equation.device
    exec(export(sd15.equation, "python"), module)
    for height, width in random.Random(0).sample(SIZES, 8):
        reserved, device, exact = module["device_vram"](height, width)  # type: ignore[operator]
        found = replayed(sd15, Call(height, width)).reserved_bytes.nbytes
        assert (reserved, device) == (found, reserved + form.context_bytes) and exact == form.covers(height, width)


def test_one_polynomial_is_mapped_at_all_sizes(sd15: Derivation) -> None:
    form = sd15.equation.device
    assert sd15.reserved.free_symbols == {H, W, N} and form.per_pixel == 2816
    # small blocks alone are counted: of the large pool's pages none is left out
    small = [form.small.loaded_bytes + sum(n for _, n in form.small.at(i)) for i in range(len(SIZES))]
    assert [UNIT * int(n) for n in form.counted] == small
    for height, width in [(512, 512), (576, 1024), (1088, 1088), (2048, 1600)]:
        at = {H: height, W: width, N: form.counted_at(height, width)}
        assert sd15.reserved.subs(at) == replayed(sd15, Call(height, width)).reserved_bytes.nbytes


def test_the_latex_of_pages_is_what_the_form_says(sd15: Derivation) -> None:
    latex, form = sd15.latex("device"), sd15.equation.device
    found = re.search(r"N = 10 .*\\frac\{([\d{},]+)\\,H W \+ ([\d{},]+)\}\{10 \\cdot 2\^\{21\}\}", latex)
    assert found is not None and "expandable" in latex
    pixel, constant = (int(re.sub(r"\D", "", group)) for group in found.groups())
    for height, width in SIZES[::37]:
        reserved = PAGE * -(-(pixel * height * width + constant) // PAGE) + UNIT * int(
            form.counted[form.index[height, width]]
        )
        assert reserved == form.reserved_bytes[form.index[height, width]]


def test_verdicts_with_expandable_segments_are_quick(sd15: Derivation) -> None:
    call = Call(768, 640)
    assert Quick(sd15).verdict(call) == sd15.verdict(call)
    assert sd15.at(height=768, width=640).reserved == sd15.device_memory(call).reserved
    with pytest.raises(DerivationError, match=r"expandable_segments:True alone"):
        _ = derive(SD15, gpu="t4", alloc_conf=f"{CONF},max_split_size_mb:64").reserved
