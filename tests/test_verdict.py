"""One verdict: its words, its margin against the evidence, and the same answer from everything that gives one."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import pytest
import test_guard as fakes
from conftest import SD15

from derivation import derive
from derivation.allocator.memory import DeviceMemory
from derivation.ask.compare import compare
from derivation.ask.fit import Request
from derivation.ask.recommend import recommend
from derivation.call import Call
from derivation.config import bundled, load
from derivation.config.checkpoint import BUNDLED
from derivation.errors import DerivationError
from derivation.gpu.cards import known, lookup
from derivation.guard import will_fit
from derivation.measure.validate import recorded
from derivation.verdict import (
    DOCUMENTED,
    FITS,
    MARGINS,
    MEASURED,
    NEAREST,
    NO_CARD,
    NO_FIT,
    RELEASED,
    SLOWER,
    TENSORS_FIT,
    Verdict,
    confidence,
    margin_bytes,
    room_bytes,
)

MIB, GIB = 1 << 20, 1 << 30
WORST = json.loads(MARGINS.read_text())


def test_the_margin_of_a_measured_card_is_the_worst_recorded_call() -> None:
    _, rows = recorded()
    worst = max(
        (
            (row.measured[counter], row.predicted[counter])
            for row in rows
            for counter in ("reserved", "device")
            if counter in row.measured and counter in row.predicted
        ),
        key=lambda pair: pair[0] / pair[1],
    )
    assert worst == (WORST[MEASURED]["measured_bytes"], WORST[MEASURED]["predicted_bytes"])
    assert {row.call["gpu"] for row in rows} == {f"NVIDIA {lookup(key).name}" for key in WORST[MEASURED]["cards"]}


def test_a_margin_is_rounded_up_and_in_proportion() -> None:
    # 9728100925 / 8036784640 = 1.2104...: an eighth of the prediction has an eighth of the difference
    assert margin_bytes(8036784640, DOCUMENTED) == 9728100925 - 8036784640
    assert margin_bytes(8036784640 // 8, DOCUMENTED) == -(-(9728100925 - 8036784640) // 8)


def test_how_well_a_card_is_known() -> None:
    assert {key for key in known() if confidence(lookup(key)) == MEASURED} == {"h100", "h200"}
    assert confidence(lookup("t4")) == confidence(lookup("rtx-4060")) == DOCUMENTED
    assert confidence(lookup("p100")) == NEAREST
    assert confidence(lookup("rtx-5090")) == "asked of cuDNN 9.19.0 without the card"
    assert confidence(lookup("v100")) == "asked of cuDNN 9.10.2 without the card"
    # another capacity of a measured card was not measured, what is free on it was
    assert (confidence(lookup("h100 40GiB")), confidence(lookup("h100 40GiB free"))) == (DOCUMENTED, MEASURED)


def test_the_words_of_a_verdict() -> None:
    d = derive(SD15, pipeline="img2img", gpu="rtx-3060", attention="sdpa")
    fits, none = d.verdict(1024, 1024, 2), d.verdict(2520, 2520)
    assert (fits.verdict, fits.sure, fits.short_bytes) == (FITS, True, 0)
    assert str(fits) == "needs 9.53 GiB of 11.66 GiB: fits"
    # 9728100925 / 8036784640 = 1.2104
    worst = "the worst measured call needed 21.0 % more than predicted; cuDNN as published for its architecture"
    assert fits.trust == f"left: 2.13 GiB, at least the margin of 2.00 GiB ({worst})"
    assert (none.verdict, none.fits, none.left_bytes, none.trust) == (NO_FIT, False, None, "")
    assert none.failed is not None and none.short_bytes == none.failed["short_bytes"] > 0
    assert "does not fit, out of memory at vae.decoder." in str(none) and str(none).endswith(" short")
    # what it had reached is less than the card has
    assert none.needs_bytes < none.of_bytes and none.needs_more and none.as_dict()["needs_more"] is True
    assert str(none).startswith("needs more than ") and not fits.needs_more
    unknown = derive(SD15, gpu="sm89").verdict(512, 512)
    assert (unknown.verdict, unknown.fits, str(unknown)) == (NO_CARD, False, NO_CARD)


def test_the_memory_that_is_free_is_what_the_allocator_may_reserve() -> None:
    d = derive(SD15, gpu="t4")
    room = room_bytes("t4")
    whole, free = d.verdict(1024, 1024), d.verdict(1024, 1024, free_bytes=room)
    # nvidia-smi counts the context on both sides
    assert (whole.left_bytes, whole.verdict) == (free.left_bytes, free.verdict)
    assert free.needs_bytes == d.device_memory(1024, 1024).reserved
    assert free.needs_bytes is not None
    assert d.verdict(1024, 1024, free_bytes=free.needs_bytes).fits
    # less than that: first cached blocks go back to the driver, then convolutions do without their workspace
    assert d.verdict(1024, 1024, free_bytes=free.needs_bytes - 2 * MIB).verdict == RELEASED
    assert d.verdict(1024, 1024, free_bytes=5 * GIB).verdict == SLOWER
    assert d.verdict(1024, 1024, free_bytes=0).verdict == NO_FIT


def test_without_a_gpu_only_tensors_are_spoken_of() -> None:
    d = derive(SD15)
    peak = d.estimate(512, 512)["peak_tensor_bytes"]
    assert (d.verdict(512, 512, free_bytes=peak).verdict, d.verdict(512, 512, free_bytes=peak - 1).verdict) == (
        TENSORS_FIT,
        NO_FIT,
    )
    with pytest.raises(DerivationError, match="gpu = None"):
        d.verdict(512, 512)


# The same verdict from everything that gives one.

CARDS = ("t4", "rtx 3060 12gb", "4060", "rtx-3050-laptop", "rtx-2060", "a100 40gb", "rtx-5070", "h100 10GiB")
# What a live pipeline can be switched to, besides the arguments of its call.
SWITCHES = {
    "dtype": ("float16", "bfloat16", "float32"),
    "attention": ("efficient", "eager"),
    "vae_slicing": (False, True),
}
GROUPS, CALLS = 10, 10
# Every size has tiles of its own to walk: one group has some, of smaller images.
TILED, TILED_SIDE, LARGEST_SIDE = 1, 768, 2048


def live_pipeline(model: str, options: Mapping[str, Any]) -> Any:
    """What will_fit reads of a bundled checkpoint's pipeline, switched as ``options`` say."""
    folder = BUNDLED / model
    index = json.loads((folder / "model_index.json").read_text())
    base = index["_class_name"].removesuffix("Pipeline").removesuffix("Img2Img").removesuffix("Inpaint")
    middle = {"txt2img": "", "img2img": "Img2Img", "inpaint": "Inpaint"}[options["pipeline"]]
    pipe = type(f"{base}{middle}Pipeline", (), {})()
    pipe.config = {key: value for key, value in index.items() if not isinstance(value, list)}
    processor = {"eager": fakes.AttnProcessor, "efficient": fakes.AttnProcessor2_0}[options["attention"]]
    for name, (_, kind) in ((name, value) for name, value in index.items() if isinstance(value, list)):
        if (path := folder / name / "config.json").exists():
            attends = processor() if name in ("unet", "vae") else None
            made = type(kind, (fakes.FakeModel,), {})(name, options["dtype"], "cpu", attends, path.parent.parent)
            setattr(pipe, name, made)
    scheduler = type(index["scheduler"][1], (), {})()
    scheduler.config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    pipe.scheduler = scheduler
    pipe.vae.use_tiling, pipe.vae.use_slicing = options["vae_tiling"], options["vae_slicing"]
    return pipe


def drawn(seed: int) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """A bundled checkpoint, options with a card, and what its calls share."""
    draw = random.Random(seed)
    model = sorted(bundled())[seed % len(bundled())]
    kind = load(model).pipeline_class
    tasks = ("img2img",) if "Img2Img" in kind else ("inpaint",) if "Inpaint" in kind else ("txt2img", "img2img")
    options = {name: draw.choice(values) for name, values in SWITCHES.items()}
    options |= {"pipeline": draw.choice(tasks), "gpu": draw.choice(CARDS), "vae_tiling": seed == TILED}
    own = {"num_inference_steps": draw.randint(1, 50), "num_images_per_prompt": draw.choice((1, 1, 2))}
    shared = {"batch_size": draw.choice((1, 1, 2, 4)), "guidance": draw.random() < 0.8}
    return model, {**options, **own, "safety_checker": "safety_checker" in weights_of(model)}, shared


def weights_of(model: str) -> set[str]:
    return {path.name for path in (BUNDLED / model).iterdir()}


SEEN: list[str] = []


@pytest.mark.filterwarnings("ignore::derivation.gpu.profile.NearestProfile")
@pytest.mark.parametrize("seed", range(GROUPS))
def test_everything_gives_one_verdict(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    # the baseline alone: what recommend says of the call as it was asked
    monkeypatch.setattr("derivation.ask.recommend.REMEDIES", ())
    model, options, shared = drawn(seed)
    d, pipe = derive(model, **options), live_pipeline(model, options)
    live = {name: options[name] for name in ("gpu", "num_inference_steps", "num_images_per_prompt")}
    draw = random.Random(1000 + seed)
    largest = TILED_SIDE if options["vae_tiling"] else LARGEST_SIDE
    sides = [8 * draw.randint(16, largest // 8) for _ in range(CALLS)]
    compared = compare(d, d, tuple((side, side) for side in sides), **shared)
    for side in sides:
        call = Call(side, side, **shared)
        found = Verdict.read(d.estimate(call))
        assert found is not None
        said = f"seed {seed}: {model} {options} {call}"
        assert Request(d, None).verdict(call) == found, said
        assert Request(d, None).image(call).verdict == found, said
        assert recommend(d, None, call).as_asked.verdict == found, said
        numbers = {pair.name: pair for pair in compared.numbers_bytes[f"{side}x{side}"]}
        verdict = compared.verdicts[f"{side}x{side}"]
        assert verdict.a == verdict.b == found.verdict, said
        assert numbers["needs"].a == found.needs_bytes, said
        assert will_fit(pipe, side, side, **shared, **live).verdict == found, said
        SEEN.append(found.verdict)


def test_the_draws_had_every_kind_of_verdict() -> None:
    if len(SEEN) == GROUPS * CALLS:
        assert {FITS, NO_FIT} < set(SEEN), SEEN


def test_the_allocator_says_no_verdict_of_its_own() -> None:
    estimate = derive(SD15, gpu="rtx-3060").estimate(2520, 2520)
    assert estimate["verdict"] == NO_FIT and estimate["left_bytes"] is None
    assert not [key for key in estimate if "headroom" in key]
    assert {"verdict", "fits", "headroom"}.isdisjoint(field.name for field in fields(DeviceMemory))
