"""The bound of reserved bytes at sizes that the closed form does not cover, held to the numeric replay."""

from __future__ import annotations

import json
import random
from collections import Counter
from itertools import product

import pytest
from conftest import SD15

from derivation import Derivation, derive
from derivation.allocator.allocator import CachingAllocator
from derivation.allocator.config import AllocatorConfig
from derivation.allocator.memory import load_pipeline
from derivation.allocator.simulate import replay
from derivation.equation.device_bound import device_bound
from derivation.errors import DerivationError
from derivation.tape.grid import H, W
from derivation.tape.symbols import Size

PAGES = "expandable_segments:True"


def reserved(d: Derivation, height: int, width: int, conf: str = "") -> int:
    allocator, values = CachingAllocator(AllocatorConfig.parse(conf)), d.sizes(height=height, width=width)
    run = replay(d.program().at(values).tape, values, load_pipeline(allocator, d.resident)).run(allocator)
    return run.reserved_bytes.nbytes


@pytest.fixture(scope="module")
def txt2img() -> Derivation:
    return derive(SD15, attention="sdpa", gpu="t4", num_inference_steps=5)


def test_the_bound_holds_where_sides_are_multiples_of_eight(txt2img: Derivation) -> None:
    said: list[str] = []
    bound = device_bound(txt2img.equation.device, step=8, most=560, progress=said.append)
    sizes = list(product(range(512, 561, 8), repeat=2))
    assert (bound.sizes, bound.factor, len(said)) == (len(sizes), 8, 2) and bound.played < 2 * len(sizes)
    for height, width in random.Random(8).sample(sizes, 15):
        most, found = bound.at(height, width), reserved(txt2img, height, width)
        assert found <= most <= found * 1.08
        assert bound.expression.subs({H: height, W: width}) == most


def test_the_bound_of_the_grid_is_above_the_form_by_a_few_percent() -> None:
    d = derive(SD15, pipeline="img2img", attention="sdpa", gpu="t4", num_inference_steps=10)
    bound, form = d.equation.device_bound(), d.equation.device
    ratios = [bound.at(*size) / form.reserved_bytes[point] for size, point in form.index.items()]
    assert 1 <= min(ratios) < 1.001 and max(ratios) < 1.09 and sum(ratios) < 1.02 * len(ratios)
    for height, width in [(512, 512), (1920, 1920), (1984, 1984)]:
        assert reserved(d, height, width) <= bound.at(height, width)
    document = json.loads(json.dumps(bound.as_dict()))
    assert document["sizes"] == len(ratios) and len(document["segments"]) == len(bound.segments)


def test_the_bound_with_expandable_segments_is_a_few_pages_above() -> None:
    d = derive(SD15, attention="sdpa", gpu="t4", num_inference_steps=5, alloc_conf=PAGES)
    bound = device_bound(d.equation.device, step=8, most=560)
    for height, width in random.Random(9).sample(list(product(range(512, 561, 8), repeat=2)), 12):
        most, found = bound.at(height, width), reserved(d, height, width, PAGES)
        assert found <= most <= found + 4 * bound.unit_bytes
        assert bound.expression.subs({H: height, W: width}) == most


def test_the_bound_of_sdxl_with_expandable_segments_is_half_a_percent_above() -> None:
    d = derive("stabilityai/stable-diffusion-xl-base-1.0", gpu="h100", num_inference_steps=5, alloc_conf=PAGES)
    bound, form = d.equation.device_bound(), d.equation.device
    ratios = [bound.at(*size) / form.reserved_bytes[point] for size, point in form.index.items()]
    assert 1 <= min(ratios) <= max(ratios) < 1.006 and len(bound.segments) == 1
    for height, width in [(512, 1216), (1024, 1024)]:
        assert reserved(d, height, width, PAGES) <= bound.at(height, width)


def test_each_number_of_segments_is_met_at_some_size(txt2img: Derivation) -> None:
    form = txt2img.equation.device
    bound, requests = device_bound(form, step=64, most=704), form.requests
    met = Counter[Size]()
    for point in (form.index[size] for size in product(range(512, 705, 64), repeat=2)):
        own = (t for t, _ in form.large.at(point) if requests.bytes[requests.kinds[t], point] >= 10 << 20)
        met |= Counter(requests.tape.allocations[t].nbytes for t in own)
    assert dict(bound.segments) == met


def test_what_has_no_bound_is_refused(txt2img: Derivation) -> None:
    bound = device_bound(txt2img.equation.device, step=64, most=576)
    for size in [(520, 512), (448, 512), (512, 640)]:
        with pytest.raises(DerivationError, match="multiples of 64 from 512 to 576"):
            bound.at(*size)
    for step, said in [(516, "height = 516"), (0, "step = 0"), (4096, "step = 4096")]:
        with pytest.raises(DerivationError, match=said):
            txt2img.equation.device_bound(step)
    with pytest.raises(DerivationError, match="sides that are not fixed"):
        txt2img.at(height=512, width=512).equation.device_bound()
    with pytest.raises(DerivationError, match="gpu"):
        derive(SD15).equation.device_bound()
