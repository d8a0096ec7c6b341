"""Reserved bytes in closed form: a few symbolic replays for all sizes, held to the numeric replay at each."""

import random
from itertools import product

import numpy as np
import pytest

from derivation import Derivation, derive
from derivation.allocator.allocator import CachingAllocator
from derivation.allocator.memory import load_pipeline
from derivation.allocator.report import SMALL_SEGMENT_BYTES
from derivation.allocator.simulate import replay
from derivation.allocator.symbolic import Atom, Carried, Points
from derivation.equation.device import N_SMALL
from derivation.errors import DerivationError
from derivation.tape.grid import H, W
from derivation.tape.symbols import free_names, symbol

SIDES = range(512, 2049, 64)
SIZES = list(product(SIDES, SIDES))


@pytest.fixture(scope="module")
def sd15() -> Derivation:
    return derive("stable-diffusion-v1-5/stable-diffusion-v1-5", pipeline="img2img", attention="sdpa", gpu="t4")


def test_few_replays_stand_for_all_sizes(sd15: Derivation) -> None:
    survey = sd15.equation.device.survey
    assert (sum(group.where for group in survey.groups) == 1).all() and survey.runs <= 80
    [*opened] = ([str(n) for n in group.state[0] if free_names(n)] for group in survey.groups)
    always = ["16384*h0*w0"] * 3 + ["32768*h0*w0 + 294912"] * 2 + ["32768*h0*w0 + 4718592", "65536*h0*w0 + 1179648"]
    at_times = {"384*h0*w0", "20480*h0*w0 + 2048*h0 + 2048*w0 + 295168"}
    assert len(opened) == 4
    for names in opened:
        assert sorted(n for n in names if n not in at_times) == sorted(always)


def test_a_carried_number_adds_up_at_every_point() -> None:
    points = Points([{"h0": h, "w0": 3} for h in range(1, 6)])
    atoms = [Atom(100 * symbol("h0") * symbol("w0"), False), Atom(2 * symbol("h0"), False)]
    first, second = (Carried.of(int(points.atom(a)[2]), points, points.number(((a, 1),))) for a in atoms)
    total = first + second - 512 + 7
    assert int(total) == 1024 + 512 - 512 + 7
    assert (points.vector(points.number_of(total)) == np.array([512, 1024, 1024, 1536, 1536]) + 7).all()
    assert points.number_of(first + second - second) == points.number_of(first)
    assert points.number_of(7 + first) == points.number_of(1031)


@pytest.mark.parametrize("seed", range(4))
def test_two_hundred_sizes_are_what_the_replay_says(sd15: Derivation, seed: int) -> None:
    form, met = sd15.equation.device, 0
    [alive] = form.allocated_regimes
    parameters = sd15.resident
    for height, width in random.Random(10).sample(SIZES, 200)[seed::4]:
        values = sd15.sizes(height=height, width=width)
        allocator = CachingAllocator()
        weights = load_pipeline(allocator, parameters)
        replayed = replay(form.variant.tape, values, weights).run(allocator)
        small = sum(segment.segment_type == "small" for segment in allocator.snapshot())
        [regime] = (regime for regime in form.reserved_regimes if regime.where[form.index[height, width]])
        large = int(regime.total[form.index[height, width]])
        assert large + SMALL_SEGMENT_BYTES * small == replayed.reserved_bytes.nbytes
        assert int(alive.total[form.index[height, width]]) == replayed.allocated_bytes.nbytes
        met += 1
    assert met == 50


def test_the_sympy_forms_are_the_replay(sd15: Derivation) -> None:
    form = sd15.equation.device
    assert len(sd15.device.args) == 4 and sd15.device.free_symbols == {H, W, N_SMALL}
    for height, width in [(512, 512), (512, 768), (576, 576), (1024, 1024), (1088, 1088), (1600, 1600)]:
        replayed = sd15.device_memory(height=height, width=width)
        at = {H: height, W: width, N_SMALL: form.small_segments(height, width)}
        assert sd15.allocated.subs(at) == replayed.allocated
        assert sd15.reserved.subs(at) == form.reserved_at(height, width) == replayed.reserved
        assert sd15.device.subs(at) == replayed.device


def test_regimes_are_told_apart_by_decisions_of_the_allocator(sd15: Derivation) -> None:
    *special, general = sd15.equation.device.reserved_regimes
    assert not general.conditions and all(regime.conditions for regime in special)
    for i, regime in enumerate(special):
        for height, width in SIZES[::7]:
            holds = all(c.subs({H: height, W: width}) for c in regime.conditions)
            point = sd15.equation.device.index[height, width]
            earlier = any(other.where[point] for other in special[:i])
            assert earlier or holds == regime.where[point]
    parts = {str(part.bytes): part.tensors for part in general.parts}
    assert parts["2097152*ceiling(H*W/8192)"] == (
        "vae.encoder.conv_in: convolution",
        "vae.encoder.down_blocks.0.resnets.0.norm1: native_group_norm",
        "vae.encoder.down_blocks.0.resnets.0: silu",
    )


FIXED = [
    {"height": 520, "width": 392, "batch_size": 2},
    {"height": 1024, "width": 1024, "batch_size": 3, "prompt_length": 154},
    {"height": 2520, "width": 2520},  # does not fit: the replay's own figures
]


@pytest.mark.parametrize("call", FIXED, ids=str)
def test_one_size_is_the_replay_whatever_it_is(sd15: Derivation, call: dict[str, int]) -> None:
    at, replayed = sd15.at(**call), sd15.device_memory(**call)
    assert (at.allocated, at.reserved, at.device) == (replayed.allocated, replayed.reserved, replayed.device)


OTHERS = [
    ("stabilityai/stable-diffusion-2-1", "img2img"),
    ("stabilityai/stable-diffusion-xl-base-1.0", "txt2img"),
    ("stabilityai/stable-diffusion-xl-refiner-1.0", "img2img"),
    ("runwayml/stable-diffusion-inpainting", "inpaint"),
]


@pytest.mark.parametrize(("model", "pipeline"), OTHERS)
def test_other_checkpoints_at_one_size(model: str, pipeline: str) -> None:
    d = derive(model, pipeline=pipeline, attention="sdpa", gpu="h100")
    at, replayed = d.at(height=832, width=1216), d.device_memory(height=832, width=1216)
    assert (at.allocated, at.reserved, at.device) == (replayed.allocated, replayed.reserved, replayed.device)
    assert "inpaint" in model or at.equation.device.reserved_regimes[0].parts


def test_what_the_forms_do_not_say_is_refused(sd15: Derivation) -> None:
    with pytest.raises(DerivationError, match="gpu"):
        _ = derive("stable-diffusion-v1-5/stable-diffusion-v1-5").device
    for size in [(520, 512), (2048, 2048)]:  # no multiple of 64; a T4 is full
        assert not sd15.equation.device.covers(*size)
        with pytest.raises(DerivationError, match="a regime met, or what at"):
            sd15.equation.device.reserved_at(*size)
