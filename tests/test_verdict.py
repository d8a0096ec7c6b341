"""One verdict: its words, its margin against the evidence, and the same answer from everything that gives one."""

from __future__ import annotations

import json

import pytest
from conftest import SD15

from derivation import derive
from derivation.errors import DerivationError
from derivation.gpu.cards import known, lookup
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
    assert confidence(lookup("rtx-5090")) == confidence(lookup("v100")) == confidence(lookup("p100")) == NEAREST
    # another capacity of a measured card was not measured, what is free on it was
    assert (confidence(lookup("h100 40GiB")), confidence(lookup("h100 40GiB free"))) == (DOCUMENTED, MEASURED)


def test_the_words_of_a_verdict() -> None:
    d = derive(SD15, gpu="rtx-3060", attention="sdpa")
    fits, none = d.verdict(1024, 1024, 2), d.verdict(2520, 2520)
    assert (fits.verdict, fits.sure, fits.short_bytes) == (FITS, True, 0)
    assert str(fits) == "needs 9.53 GiB of 11.66 GiB: fits"
    assert fits.trust == "left: 2.13 GiB, at least the margin of 2.00 GiB (documented profile)"
    assert (none.verdict, none.fits, none.left_bytes, none.trust) == (NO_FIT, False, None, "")
    assert none.failed is not None and none.short_bytes == none.failed["short_bytes"] > 0
    assert "does not fit, out of memory at vae.decoder." in str(none) and str(none).endswith(" short")
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
