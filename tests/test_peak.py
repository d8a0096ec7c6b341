"""The reduction to a closed form: proofs are sound, nothing is lost, headlines hold on their grid."""

from __future__ import annotations

import random

import pytest
from conftest import INPAINTING, REFINER, SD15, SD_2_1, SD_2_1_BASE, SDXL

from derivation import derive
from derivation.peak.dominance import reduce_points
from derivation.peak.headline import rounding
from derivation.peak.liveness import Point
from derivation.peak.proof import proven_nonnegative, slack_bytes
from derivation.tape.symbols import SYMBOLS, ceil512, evaluate, symbol

ATTENTION = ("eager", "math", "efficient", "flash")


def sizes(rng: random.Random) -> dict[str, int]:
    values = {"B": rng.choice((1, 2, 7, 100)), "L": rng.choice((1, 77, 400, 10_000))}
    values |= {"h0": rng.randint(1, 90), "w0": rng.choice((1, 2, 64, rng.randint(1, 300)))}
    for k in range(1, 6):
        for side in "hw":
            values[f"{side}{k}"] = -(-values[f"{side}{k - 1}"] // 2)
    return values


def exact(point: Point, values: dict[str, int]) -> int:
    return sum(ceil512(evaluate(n, values)) * evaluate(count, values) for n, count in point.terms)


def random_polynomial(rng: random.Random):
    names = [s.name for s in SYMBOLS[:8]]
    total = symbol("B") * 0
    for _ in range(rng.randint(1, 4)):
        total += rng.randint(-40, 60) * symbol(rng.choice(names)) * symbol(rng.choice(names))
    return total + rng.randint(-20, 20)


@pytest.mark.parametrize("seed", range(20))
def test_a_proof_is_never_wrong(seed):
    rng = random.Random(seed)
    proven = 0
    for _ in range(60):
        polynomial = random_polynomial(rng)
        if proven_nonnegative(polynomial):
            proven += 1
            assert all(evaluate(polynomial, sizes(rng)) >= 0 for _ in range(60)), f"seed {seed}: {polynomial}"
    assert proven


def test_level_relations_are_used_both_ways():
    h0, w0, h1, w1 = (symbol(name) for name in ("h0", "w0", "h1", "w1"))
    assert proven_nonnegative(h0 * w0 - h1 * w1)
    assert proven_nonnegative(4 * h1 * w1 - h0 * w0)
    assert not proven_nonnegative(h0 * w0 - 4 * h1 * w1)
    assert not proven_nonnegative(3 * h1 * w1 - h0 * w0)


def test_a_length_limit_bounds_only_what_it_should():
    assert proven_nonnegative(77 * symbol("B") - symbol("L") * symbol("B"), Point(0, "", (), 77))
    assert not proven_nonnegative(76 * symbol("B") - symbol("L") * symbol("B"), Point(0, "", (), 77))
    assert not proven_nonnegative(77 * symbol("B") - symbol("L") * symbol("B"))


def test_slack_is_the_largest_rounding():
    for coefficient in (1, 2, 96, 640, 1024, 1536):
        worst = max(-(coefficient * n) % 512 for n in range(1, 513))
        assert slack_bytes(coefficient * symbol("h0")) == worst


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("guidance", [True, False])
def test_the_reduced_max_is_the_replayed_tape(attention, guidance):
    derivation = derive(SD15, attention=attention)
    kept = derivation.record(guidance).pipeline.reduction.kept
    generic = derivation.program(guidance).generic
    rng = random.Random(5)
    cases = [values for values in (sizes(rng) for _ in range(3000)) if generic.holds(values)]
    assert len(cases) > 60
    for values in cases:
        reduced = max(exact(p, values) for p in kept if p.max_length is None or values["L"] <= p.max_length)
        assert reduced == max(peak for peak, _ in generic.evaluator.peaks(values).values()), values


@pytest.mark.parametrize("attention", ATTENTION)
def test_headlines_hold_on_their_grid_within_their_stated_bound(attention):
    derivation = derive(SD15, attention=attention)
    symbols = {s.name: s for s in derivation.peak.free_symbols}
    smallest = 1 if attention in ("efficient", "flash") else 2
    rng = random.Random(7)
    for _ in range(40):
        call = {"height": 64 * rng.randint(1, 40), "width": 64 * rng.randint(1, 40)}
        call["batch_size"] = rng.randint(smallest, 5)
        call["prompt_length"] = rng.choice((40, 77))
        numbers = {"H": call["height"], "W": call["width"], "B": call["batch_size"], "L": call["prompt_length"]}
        point = {symbols[name]: value for name, value in numbers.items() if name in symbols}
        for name, peak in derivation.stage_peaks(**call).items():
            stage = derivation.stages[name]
            headline = max(term.expression.subs(point) for term in stage.terms)
            bound = max(term.rounding_bytes for term in stage.terms) * call["batch_size"]
            assert 0 <= peak - headline <= bound, (name, call)


def test_where_weights_are_replaced_rounding_takes_off_what_it_says():
    derivation = derive(SDXL)
    less, more = rounding(derivation.equation.pipeline_stage().terms)
    for side in (512, 768, 1024, 2048):
        exact = derivation.weights_bytes + max(derivation.stage_peaks(side, side).values())
        printed = derivation.at(height=side, width=side, prompt_length=77, batch_size=1).peak
        assert -less <= exact - int(printed) < 0 < more


@pytest.mark.parametrize("attention", ATTENTION)
def test_headlines_are_human_sized(attention):
    for stage in derive(SD15, attention=attention).stages.values():
        assert len(stage.terms) <= 8


def test_dominated_points_are_dropped_and_winners_kept():
    small, large = Point(0, "s", ((symbol("B") * 512, 1),)), Point(1, "s", ((symbol("B") * 512, 2),))
    reduction = reduce_points([small, large])
    assert reduction.kept == (large,)
    assert (reduction.candidates, reduction.dominated, reduction.unproven) == (2, 1, 0)


def test_the_witness_adds_up_to_its_polynomial():
    derivation = derive(SD15)
    for stage in derivation.stages.values():
        for term, witness in zip(stage.terms, stage.witnesses, strict=True):
            values = {"B": 3, "L": 77, **derivation.grid.sizes(640, 448)}
            total = sum(evaluate(t.nbytes, values) * evaluate(t.count, values) for t in witness.tensors)
            assert total == evaluate(term.polynomial, values)


# resident weights, and the terms of the Max in image pixels H and W, images B and tokens L
HEADLINES = {
    (SD15, "txt2img"): (
        2_740_518_912,
        "12299*B*H*W/8 + 4608*B*L",
        "57*B*H*W/8 + 4608*B*L + 9324544*B",
        "1149*B*H*W/8 + 14848*B*L + 6400*B",
    ),
    (SD15, "img2img"): (
        2_740_518_912,
        "12299*B*H*W/8 + 4608*B*L + 4000",
        "57*B*H*W/8 + 4608*B*L + 9324544*B + 4000",
        "1149*B*H*W/8 + 14848*B*L + 6400*B + 4000",
    ),
    (SD15, "inpaint"): (
        2_740_518_912,
        "24609*B*H*W/16 + 4608*B*L + 4000",
        "125*B*H*W/16 + 4608*B*L + 9324544*B + 4000",
        "2311*B*H*W/16 + 14848*B*L + 6400*B + 4000",
    ),
    (INPAINTING, "inpaint"): (
        2_740_548_096,
        "6153*B*H*W/4 + 4608*B*L",
        "8*B*H*W + 4608*B*L + 9324544*B",
        "289*B*H*W/2 + 14848*B*L + 6400*B",
    ),
    (SD_2_1, "txt2img"): (
        2_579_986_432,
        "1537*B*H*W + 6144*B*L",
        "573*B*H*W/4 + 16384*B*L + 6400*B",
    ),
    (SD_2_1, "img2img"): (
        2_579_986_432,
        "1537*B*H*W + 6144*B*L + 4000",
        "573*B*H*W/4 + 16384*B*L + 6400*B + 4000",
    ),
    (SD_2_1, "inpaint"): (
        2_579_986_432,
        "24603*B*H*W/16 + 6144*B*L + 4000",
        "2305*B*H*W/16 + 16384*B*L + 6400*B + 4000",
    ),
    (SD_2_1_BASE, "txt2img"): (
        2_579_986_432,
        "12299*B*H*W/8 + 6144*B*L",
        "1149*B*H*W/8 + 16384*B*L + 6400*B",
    ),
    (SD_2_1_BASE, "img2img"): (
        2_579_986_432,
        "12299*B*H*W/8 + 6144*B*L + 4000",
        "1149*B*H*W/8 + 16384*B*L + 6400*B + 4000",
    ),
    (SD_2_1_BASE, "inpaint"): (
        2_579_986_432,
        "24609*B*H*W/16 + 6144*B*L + 4000",
        "2311*B*H*W/16 + 16384*B*L + 6400*B + 4000",
    ),
    (SDXL, "txt2img"): (
        6_937_744_896,
        "109064*B*L",
        "573*B*H*W/4 + 22528*B*L + 21784*B",
        "3*B*H*W/4 + 12288*B*L + 10264*B + 172017680",
        "24585*B*H*W/8 + 12288*B*L + 10264*B + 167307726",
    ),
    (SDXL, "img2img"): (
        6_937_744_896,
        "109064*B*L",
        "573*B*H*W/4 + 22528*B*L + 21784*B",
        "3*B*H*W/4 + 12288*B*L + 10264*B + 172017680",
        "12*B*H*W + 8192*B*L + 5120*B + 172017680",
        "24585*B*H*W/8 + 12288*B*L + 10264*B + 167307726",
    ),
    (SDXL, "inpaint"): (
        6_937_744_896,
        "109064*B*L",
        "2305*B*H*W/16 + 22528*B*L + 21784*B",
        "23*B*H*W/16 + 12288*B*L + 10264*B + 172017680",
        "295*B*H*W/16 + 8192*B*L + 5120*B + 172017680",
        "49181*B*H*W/16 + 12288*B*L + 10264*B + 167307726",
    ),
    (REFINER, "img2img"): (
        6_075_705_344,
        "687*B*H*W/4 + 19968*B*L + 24084*B",
        "24585*B*H*W/8 + 7680*B*L + 10260*B + 167307726",
    ),
    (REFINER, "inpaint"): (
        6_075_705_344,
        "2761*B*H*W/16 + 19968*B*L + 24084*B",
        "49181*B*H*W/16 + 7680*B*L + 10260*B + 167307726",
    ),
}


@pytest.mark.parametrize(("name", "pipeline"), HEADLINES)
def test_a_headline_prints_as_recorded(name, pipeline):
    resident, *terms = HEADLINES[name, pipeline]
    assert str(derive(name, pipeline=pipeline).peak) == f"Max({', '.join(terms)}) + {resident}"


def test_every_bundled_checkpoint_has_its_headline():
    from derivation.config.checkpoint import BUNDLED

    pipelines = {path.parent.relative_to(BUNDLED).as_posix() for path in BUNDLED.rglob("model_index.json")}
    assert {name for name, _ in HEADLINES} == pipelines
