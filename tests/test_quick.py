"""Verdicts from the closed form, held to the replay's."""

from __future__ import annotations

import random
import sys

import pytest
import test_verdict as live
from conftest import SD15

from derivation import Derivation, derive
from derivation.ask.quick import Quick
from derivation.call import Call
from derivation.guard import will_fit
from derivation.verdict import FITS, Verdict, in_room

GIB = 1 << 30
KINDS = [
    (SD15, "img2img", "t4"),
    ("stabilityai/stable-diffusion-2-1", "txt2img", "h100"),
    (SD15, "txt2img", "rtx-3060"),
]
SIDES = range(512, 1537, 64)


def drawn(seed: int) -> list[tuple[Call, int | None]]:
    """A hundred calls of a batch, every fifth of no multiple of 64, on a whole card or in so many free bytes."""
    draw = random.Random(seed)
    found: list[tuple[Call, int | None]] = []
    for k in range(100):
        height, width = draw.choice(SIDES) + 8 * (k % 5 == 0), draw.choice(SIDES)
        call = Call(height, width, 1 + seed % 2, 77, seed > 0)
        found.append((call, draw.choice((None, draw.randint(3 * GIB, 16 * GIB)))))
    return found


@pytest.mark.parametrize("seed", range(len(KINDS)))
def test_what_is_quick_is_the_replay(seed: int) -> None:
    model, pipeline, gpu = KINDS[seed]
    d = derive(model, pipeline=pipeline, attention="sdpa", gpu=gpu, num_inference_steps=2)
    quick, told = Quick(d), 0
    for call, free in drawn(seed):
        found, replayed = quick.verdict(call, free), d.verdict(call, free_bytes=free)
        covered = call.height % 64 == 0 and replayed.verdict == FITS
        assert found == (replayed if covered else None), (call, free)
        told += covered
    assert 40 <= told <= 80


def test_the_last_byte_that_is_free() -> None:
    d = derive(SD15, gpu="h100", num_inference_steps=2)
    reserved = d.device_memory(512, 512).reserved
    assert in_room(f"h100 {reserved}B free", reserved) == d.verdict(512, 512, free_bytes=reserved)
    assert in_room(f"h100 {reserved - 1}B free", reserved) is None
    assert in_room("sm90", reserved) is None  # no card, no verdict that it fits


@pytest.mark.parametrize("options", [{"vae_tiling": True}, {"alloc_conf": "max_split_size_mb:64"}, {"gpu": None}])
def test_without_a_closed_form_nothing_is_quick(options: dict[str, object]) -> None:
    d = derive(SD15, **{"gpu": "t4", **options})
    assert Quick(d).verdict(Call(512, 512)) is None


def test_will_fit_is_quick_where_it_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    switched = {"pipeline": "txt2img", "dtype": "float16", "attention": "efficient", "vae_tiling": False}
    pipe = live.live_pipeline(SD15, {**switched, "vae_slicing": False})
    given = {"gpu": "t4", "num_inference_steps": 2}
    plain = [will_fit(pipe, side, 512, **given).verdict for side in (512, 520, 1024)]
    asked: list[Call] = []

    def replayed(derivation: Derivation, call: Call, free_bytes: int | None = None) -> Verdict:
        asked.append(call)
        return verdict(derivation, call, free_bytes=free_bytes)

    verdict = Derivation.verdict
    monkeypatch.setattr(Derivation, "verdict", replayed)
    assert [will_fit(pipe, side, 512, compiled=True, **given).verdict for side in (512, 520, 1024)] == plain
    assert [call.height for call in asked] == [520]
