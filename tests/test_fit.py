"""fit, recommend, compare: what is said to fit does, the next step does not, and every claim is exact."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from functools import cache

import pytest
from conftest import SD15

from derivation import Derivation, DerivationError, derive
from derivation.ask.compare import compare
from derivation.ask.fit import (
    ALIGNED,
    Image,
    Request,
    fit,
    grows,
    largest_batch,
    last_that_fits,
    parse_aspect,
    sides,
    surely_fits,
)
from derivation.ask.nearby import cheaper_sizes
from derivation.ask.recommend import REMEDIES, recommend
from derivation.call import Call
from derivation.gpu.cards import lookup
from derivation.text import parse_bytes

GIB = 1 << 30


@cache
def derived(**options: str) -> Derivation:
    return derive(SD15, **options)


def peak(derivation: Derivation, height: int, width: int, batch_size: int = 1, guidance: bool = True) -> int:
    found = derivation.estimate(height, width, batch_size, guidance=guidance)
    return int(found["peak_tensor_bytes"])


def check(derivation: Derivation, budget: int, aspect: tuple[int, int], image: Image | None, step: int) -> None:
    """The image fits, it has the aspect's sides, and one step more does not fit."""
    n = 0
    if image is not None:
        n = max(image.height, image.width) // step
        assert sides(aspect, step, n) == (image.height, image.width)
        assert image.height % step == image.width % step == 0
        exact = peak(derivation, image.height, image.width, image.batch_size)
        assert (image.peak_tensor_bytes, image.verdict.left_bytes) == (exact, budget - exact)
        assert exact <= budget
    height, width = sides(aspect, step, n + 1)
    assert peak(derivation, height, width, image.batch_size if image else 1) > budget


@pytest.mark.parametrize("attention", ["efficient", "eager"])
@pytest.mark.parametrize("aspect", [(1, 1), (16, 9), (2, 3), (7, 1)])
@pytest.mark.parametrize("budget", [3 * GIB, 8 * GIB, 24_000_000_000])
def test_the_answer_fits_and_the_next_step_does_not(attention: str, aspect: tuple[int, int], budget: int) -> None:
    derivation = derived(attention=attention)
    found = fit(derivation, budget, aspect)
    check(derivation, budget, aspect, found.image, 8)
    check(derivation, budget, aspect, found.aligned, ALIGNED)
    assert found.monotone


@pytest.mark.parametrize("seed", range(12))
def test_random_budgets_aspects_and_batches(seed: int) -> None:
    chosen = random.Random(seed)
    derivation = derived(attention=chosen.choice(["efficient", "flash", "eager", "math"]))
    budget = int(derivation.weights_bytes * chosen.uniform(0.9, 1.05) + chosen.randint(0, 6 * GIB))
    aspect = (chosen.randint(1, 20), chosen.randint(1, 20))
    batch = chosen.randint(1, 4)
    found = fit(derivation, budget, aspect, batch)
    for image, step in ((found.image, 8), (found.aligned, ALIGNED)):
        assert image is None or image.batch_size == batch, f"seed {seed}"
        n = max(image.height, image.width) // step if image else 0
        assert peak(derivation, *sides(aspect, step, n + 1), batch) > budget, f"seed {seed}"
        assert image is None or peak(derivation, image.height, image.width, batch) <= budget, f"seed {seed}"


def test_the_closed_form_starts_within_a_step_so_that_few_evaluations_do(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluations = itertools.count()
    exact = Request.image

    def counted(self: Request, call: Call) -> Image:
        next(evaluations)
        return exact(self, call)

    monkeypatch.setattr(Request, "image", counted)
    found = fit(derived(), 8 * GIB)
    assert found.image is not None
    assert found.solved_side is not None
    assert abs(found.solved_side - found.image.width) < 16
    assert next(evaluations) <= 10


def test_without_room_for_the_weights_nothing_fits() -> None:
    found = fit(derived(), GIB)
    assert (found.image, found.aligned, found.solved_side) == (None, None, 0.0)
    assert largest_batch(derived(), GIB, 512, 512) is None


def test_an_astronomical_budget_ends_at_the_largest_side() -> None:
    found = fit(derived(), 1 << 61)
    assert found.image is not None
    assert found.image.width == 1 << 20


@pytest.mark.parametrize("budget", [3 * GIB, 8 * GIB, 80 * GIB])
@pytest.mark.parametrize("attention", ["efficient", "eager"])
def test_the_largest_batch_fits_and_one_more_does_not(attention: str, budget: int) -> None:
    derivation = derived(attention=attention)
    best = largest_batch(derivation, budget, 512, 768)
    batch = best.batch_size if best else 0
    assert best is None or peak(derivation, 512, 768, batch) <= budget
    assert peak(derivation, 512, 768, batch + 1) > budget


def test_what_fits_a_card_is_what_estimate_says_of_it() -> None:
    derivation = derived(gpu="t4")
    image = fit(derivation).image
    assert image is not None
    found = derivation.estimate(image.height, image.width)
    assert (image.verdict.needs_bytes, image.verdict.left_bytes) == (
        found["device_bytes"],
        found["total_bytes"] - found["device_bytes"],
    )
    # a convolution whose workspace does not fit runs without: that is slower, and no out-of-memory error
    assert image.verdict.verdict == found["verdict"] == "fits with slower convolutions"
    card = lookup("t4")
    assert card.total_memory_bytes is not None
    aligned = fit(derivation).aligned
    assert aligned is not None and aligned.height <= image.height
    free = fit(derivation, card.total_memory_bytes - (card.context_bytes or 0)).image
    assert free is not None and (free.height, free.verdict.left_bytes) == (image.height, image.verdict.left_bytes)
    larger = derivation.estimate(image.height + 8, image.width + 8)
    assert (larger["verdict"], larger["left_bytes"]) == ("does not fit", None)
    assert larger["failed"]["module"].startswith("vae.decoder.") and larger["short_bytes"] > 0


def test_what_surely_fits_leaves_the_margin_and_the_next_step_does_not() -> None:
    derivation = derived(gpu="t4")
    found, largest = surely_fits(derivation), fit(derivation).aligned
    assert found is not None and largest is not None and found.width < largest.width
    assert found.verdict.sure and not largest.verdict.sure
    larger = derivation.verdict(Call(found.height + ALIGNED, found.width + ALIGNED))
    assert larger.fits and not larger.sure
    batch = largest_batch(derivation, None, 512, 512, sure=True)
    assert batch is not None and batch.verdict.sure
    assert not derivation.verdict(Call(512, 512, batch.batch_size + 1)).sure
    assert surely_fits(derived(), 8 * GIB) is None


@pytest.mark.parametrize("attention", ["efficient", "eager", "math", "flash"])
def test_growth_is_proven(attention: str) -> None:
    assert grows(derived(attention=attention))


@pytest.mark.parametrize("limit", [1, 2, 7, 1000])
def test_bracketing_finds_every_answer_from_every_guess(limit: int) -> None:
    for answer in {0, 1, limit // 2, limit - 1, limit}:
        for guess in {0, 1, answer - 1, answer, answer + 1, limit, 10 * limit, -5}:
            assert last_that_fits(lambda n, answer=answer: n <= answer, guess, limit) == answer


ARABIC_ONE = "\u0661"
REFUSED = ("", "1e3", "-1GiB", "8X", "0", "nan", "9" * 30, f"{ARABIC_ONE}GiB", "1GiB\0")


@pytest.mark.parametrize("text", REFUSED)
def test_what_is_no_quantity_of_bytes_is_refused(text: str) -> None:
    with pytest.raises(DerivationError, match="memory"):
        parse_bytes(text)


# SI's prefixes and IEC's; a bare number and a letter alone are binary
@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("8", 8 * GIB), ("8G", 8 * GIB), ("8 GiB", 8 * GIB), ("8gb", 8 * 10**9), ("8b", 8), ("0.5TiB", 512 * GIB)],
)
def test_quantities_of_bytes(text: str, nbytes: int) -> None:
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize("text", ["", "1", "0:1", "1:0", "-1:2", "a:b", "1:2:3", "1e9:1", "9999999:1"])
def test_bad_aspects(text: str) -> None:
    with pytest.raises(DerivationError, match="aspect"):
        parse_aspect(text)


@pytest.mark.parametrize("budget", [8 * GIB, 4 * GIB])
def test_recommended_remedies_are_enough_and_each_is_needed(budget: int) -> None:
    derivation = derived(dtype="float32", attention="eager")
    call = Call(768, 768)
    found = recommend(derivation, budget, call)
    fits_as_asked = found.as_asked.verdict.fits
    assert fits_as_asked == (found.as_asked.peak_tensor_bytes <= budget)
    assert fits_as_asked == (not found.needed) or not found.fits
    changed = {**derivation.options.as_dict()}
    for step in found.needed:
        changed.update(step.change)
        assert peak(derive(SD15, **changed), 768, 768) == step.peak_tensor_bytes
    assert found.fits == (peak(derive(SD15, **changed), 768, 768) <= budget)
    for step in found.needed:
        rest = {key: value for other in found.needed if other is not step for key, value in other.change.items()}
        without = derive(SD15, **{**derivation.options.as_dict(), **rest})
        assert peak(without, 768, 768) > max(budget, found.with_needed.peak_tensor_bytes if not found.fits else 0)


def test_remedies_are_in_order_and_savings_are_exact() -> None:
    derivation = derived(dtype="float32", attention="eager")
    found = recommend(derivation, 8 * GIB, Call(512, 512))
    order = [remedy.name for remedy in REMEDIES]
    assert [order.index(step.name) for step in found.steps] == sorted(order.index(step.name) for step in found.steps)
    for step in found.steps:
        changed = derive(SD15, **{**derivation.options.as_dict(), **step.change})
        assert step.saves_bytes == peak(derivation, 512, 512) - peak(changed, 512, 512)


def test_a_derivation_does_not_differ_from_itself() -> None:
    found = compare(derived(), derived())
    assert found.same
    assert not found.options
    assert all(stage.same for stage in found.stages)


def test_comparison_names_what_differs() -> None:
    found = compare(derived(), derived(attention="eager", dtype="float16"))
    assert not found.same
    assert [pair.name for pair in found.options] == ["attention"]
    unet = next(stage for stage in found.stages if stage.name == "unet")
    changes = {change.monomial: (change.a, change.b) for change in unet.changes}
    assert changes["B*H**2*W**2"] == ("0", "1/64")
    numbers = {pair.name: pair for pair in found.numbers_bytes["1024x1024"]}
    assert numbers["peak"].a == peak(derived(), 1024, 1024)
    assert numbers["peak"].difference == peak(derived(attention="eager"), 1024, 1024) - numbers["peak"].a


def test_a_comparison_is_of_the_sizes_given() -> None:
    a, b = derived(), derived(attention="eager")
    found = compare(a, b, ((512, 768), (256, 256)))
    assert list(found.numbers_bytes) == ["512x768", "256x256"]
    peaks = {pair.name: (pair.a, pair.b) for pair in found.numbers_bytes["512x768"]}["peak"]
    assert peaks == (peak(a, 512, 768), peak(b, 512, 768))


def test_what_a_needed_remedy_adds_is_the_step_from_the_peak_before_it() -> None:
    found = recommend(derived(dtype="float32", attention="eager"), 3 * GIB, Call(768, 768))
    changed = dict(derived(dtype="float32", attention="eager").options.as_dict())
    before = found.as_asked.peak_tensor_bytes
    assert len(found.needed) > 1
    for step in found.needed:
        changed.update(step.change)
        after = peak(derive(SD15, **changed), 768, 768)
        assert (step.adds_bytes, step.peak_tensor_bytes) == (before - after, after)
        before = after


@pytest.mark.parametrize(("gpu", "fits"), [("rtx-4090", True), ("rtx-3060", False), ("h100", False)])
def test_a_quantised_checkpoint_is_named_where_it_alone_fits(gpu: str, fits: bool) -> None:
    flux, small, call = "black-forest-labs/FLUX.1-dev", "diffusers/FLUX.1-dev-bnb-4bit", Call(1024, 1024)
    found = recommend(derive(flux, gpu=gpu), None, call)
    # at h100 the model itself fits: nothing is looked for
    assert found.as_asked.verdict.fits == (gpu == "h100")
    assert dict(found.quantized) == ({small: derive(small, gpu=gpu).verdict(call)} if fits else {})


def test_on_a_gpu_a_recommendation_is_served_by_the_allocator() -> None:
    derivation = derived(gpu="rtx-3060", attention="eager")
    found = recommend(derivation, 10 * GIB, Call(2048, 2048))
    assert found.fits
    changed = {**derivation.options.as_dict()}
    for step in found.needed:
        changed.update(step.change)
    assert derive(SD15, **changed).estimate(2048, 2048)["fits"]


@pytest.mark.parametrize("offload", ["model", "sequential"])
def test_an_offload_remedy_saves_what_traced_pipelines_say(offload: str) -> None:
    pytest.importorskip("torch")
    from derivation.config.checkpoint import BUNDLED
    from derivation.trace.runs import trace_pipeline
    from derivation.verify.streams import naive_peak

    steps = {"num_inference_steps": 3, "strength": 1.0}
    derivation = derive(SD15, pipeline="img2img", **steps)
    [step] = [s for s in recommend(derivation, 1, Call(64, 64)).steps if s.change == {"offload": offload}]
    plain, with_it = (
        naive_peak(trace_pipeline(BUNDLED / SD15, replace(derivation.options, **change), Call(64, 64), paths=False))
        for change in ({}, {"offload": offload})
    )
    stay = derive(SD15, pipeline="img2img", offload=offload, **steps).weights
    assert set(stay) >= {"safety_checker"}
    assert step.saves_bytes == derivation.weights_bytes + plain - (sum(stay.values()) + with_it)


def test_no_remedy_takes_the_filter_away_before_weights_are_offloaded() -> None:
    names = [remedy.name for remedy in REMEDIES]
    assert names.index("model offload") < names.index("no safety checker")


def test_a_larger_image_that_needs_less_is_offered() -> None:
    d = derive(SD15, pipeline="img2img", attention="sdpa", gpu="h100")
    [larger] = recommend(d, None, Call(1920, 1920)).cheaper_sizes
    asked, found = (d.device_memory(side, side).reserved for side in (1920, 1984))
    assert (larger.height, larger.width) == (1984, 1984)
    assert (larger.reserved_bytes, larger.saves_bytes) == (found, asked - found) and asked > found
    assert not cheaper_sizes(d, Call(1024, 1024))
    assert not cheaper_sizes(derive(SD15), Call(1920, 1920))  # no GPU is named


def test_expandable_segments_are_offered_where_they_make_a_difference() -> None:
    sdxl = "stabilityai/stable-diffusion-xl-base-1.0"
    given = {"pipeline": "txt2img", "attention": "sdpa", "gpu": "rtx-3060", "num_inference_steps": 4}
    d, pages = derive(sdxl, **given), derive(sdxl, **given, alloc_conf="expandable_segments:True")
    offered = {side: recommend(d, None, Call(side, side)).expandable for side in (768, 1024, 1280, 1536)}
    for side, found in offered.items():
        verdict, asked = pages.verdict(side, side), d.verdict(side, side)
        assert found == (verdict if verdict.beats(asked) else None)
    assert [found is not None and found.fits for found in offered.values()] == [False, True, True, False]
    assert recommend(pages, None, Call(1280, 1280)).expandable is None  # they are already
    assert recommend(derive(SD15), 1 << 30, Call(512, 512)).expandable is None  # no GPU is named
