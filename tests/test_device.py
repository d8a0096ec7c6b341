"""Reserved bytes in closed form: a few symbolic replays for all sizes, held to the numeric replay at each."""

import random
from itertools import product

import numpy as np
import pytest

from derivation import Derivation, derive
from derivation.allocator.regimes import Survey
from derivation.allocator.report import SMALL_SEGMENT_BYTES
from derivation.allocator.symbolic import Atom, Carried, Points
from derivation.tape.symbols import free_names, symbol

SIDES = range(512, 2049, 64)
SIZES = list(product(SIDES, SIDES))


def surveyed(d: Derivation, most: int) -> Survey:
    points = Points([d.sizes(height=height, width=width) for height, width in SIZES])
    return Survey(d.program(True).at(points.values[0]).tape, d.resident, points, most)


@pytest.fixture(scope="module")
def sd15() -> Derivation:
    return derive("stable-diffusion-v1-5/stable-diffusion-v1-5", pipeline="img2img", attention="sdpa", gpu="t4")


@pytest.fixture(scope="module")
def survey(sd15: Derivation) -> Survey:
    return surveyed(sd15, 120)


def reserved(survey: Survey, point: int) -> int:
    [group] = [group for group in survey.groups if group.where[point]]
    large = sum(int(survey.points.atom(Atom(n, is_segment=True))[point]) for n in group.state[0])
    return large + survey.small_segments(point) * SMALL_SEGMENT_BYTES


def test_few_replays_stand_for_all_sizes(survey: Survey) -> None:
    assert (sum(group.where for group in survey.groups) == 1).all() and survey.runs <= 80
    [*opened] = ([str(n) for n in group.state[0] if free_names(n)] for group in survey.groups)
    always = ["16384*h0*w0"] * 3 + ["32768*h0*w0 + 294912"] * 2 + ["32768*h0*w0 + 4718592", "65536*h0*w0 + 1179648"]
    at_times = {"384*h0*w0", "20480*h0*w0 + 2048*h0 + 2048*w0 + 295168"}
    assert len(opened) == 4
    for names in opened:
        assert sorted(n for n in names if n not in at_times) == sorted(always)


@pytest.mark.parametrize("seed", range(12))
def test_reserved_bytes_are_those_of_the_numeric_replay(sd15: Derivation, survey: Survey, seed: int) -> None:
    point = random.Random(seed).randrange(len(SIZES))
    height, width = SIZES[point]
    replayed = sd15.device_memory(height=height, width=width)
    if not replayed.num_alloc_retries:
        assert reserved(survey, point) == replayed.reserved


def test_a_carried_number_adds_up_at_every_point() -> None:
    points = Points([{"h0": h, "w0": 3} for h in range(1, 6)])
    atoms = [Atom(100 * symbol("h0") * symbol("w0"), False), Atom(2 * symbol("h0"), False)]
    first, second = (Carried.of(int(points.atom(a)[2]), points, points.number(((a, 1),))) for a in atoms)
    total = first + second - 512 + 7
    assert int(total) == 1024 + 512 - 512 + 7
    assert (points.vector(points.number_of(total)) == np.array([512, 1024, 1024, 1536, 1536]) + 7).all()
    assert points.number_of(first + second - second) == points.number_of(first)
    assert points.number_of(7 + first) == points.number_of(1031)
