"""Loops over latent frames: found in tapes that a program written here makes, and in real tiny pipelines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

pytest.importorskip("torch")

from derivation.options import Options
from derivation.tape.events import Allocation, Category
from derivation.tape.grid import Range
from derivation.tape.loop import normalised
from derivation.tape.tape import Tape
from derivation.trace.interpolate import Values, fit
from derivation.trace.loops import Span, repeats, spans, verify
from derivation.trace.pipeline import TracedPipeline
from derivation.verify.pipelines import SIDES, arguments, description, read

WHOLE = Range(2, 20)
DOCUMENTS = {document["class"]: document for document in read(Path(__file__).parent / "tiny_pipelines.jsonl")}
OPTIONS = Options(pipeline="txt2img", dtype="float32")


class Program:
    """A tape written by hand: names are born with bytes, and die."""

    def __init__(self) -> None:
        self.tape, self._alive = Tape(Options()), {}

    def birth(self, name: str, op: str, nbytes: int) -> None:
        """Allocate; a name that is taken is rebound, and what it held dies after."""
        before = self._alive.get(name)
        self._alive[name] = len(self.tape.allocations)
        self.tape.allocations.append(Allocation("vae", op, (nbytes,), "uint8", nbytes, Category.ACTIVATION))
        self.tape.events.append(len(self.tape.allocations))
        if before is not None:
            self.tape.events.append(-before - 1)

    def death(self, *names: str) -> None:
        """Free what names hold."""
        self.tape.events += [-self._alive.pop(name) - 1 for name in names]

    def done(self) -> Tape:
        """Free all, and return the tape."""
        self.death(*self._alive)
        return normalised(self.tape)


def appended(frames: int) -> Tape:
    """One frame a pass, appended to those before (autoencoder_kl_wan.py)."""
    program = Program()
    program.birth("z", "conv", 10 * frames)
    for i in range(frames):
        program.birth("x", "decode", 100)
        program.birth("hidden", "silu", 50 if i else 30)
        program.birth("out", "cat" if i else "clone", 100 * (i + 1))
        program.death("hidden")
    return program.done()


def pairs(frames: int) -> Tape:
    """Two frames a pass, an odd one with the first (autoencoder_kl_cogvideox.py)."""
    program = Program()
    program.birth("z", "conv", 10 * frames)
    rest = frames % 2
    for i in range(frames // 2):
        program.birth("cache", "pad", 7)
        program.birth(f"x{i}", "decode", 100 * (2 + (rest if i == 0 else 0)))
    program.birth("out", "cat", 100 * frames)
    return program.done()


def tiles(frames: int) -> Tape:
    """Tiles of five frames, three apart, decoded, then blended (autoencoder_kl_hunyuan_video.py); few at once."""
    program = Program()
    program.birth("z", "conv", 10 * frames)
    if frames <= 4:
        program.birth("out", "decode", 100 * frames)
        return program.done()
    firsts = range(0, frames, 3)
    for i in firsts:
        program.birth("hidden", "conv", 40 * min(5, frames - i))
        if frames - i > 1:
            program.birth("upsampled", "interpolate", 80 * min(5, frames - i))
            program.death("upsampled")
        program.birth(f"tile{i}", "decode", 100 * min(5, frames - i))
        program.death("hidden")
    for i in firsts:
        for _ in range(2 if i else 0):
            program.birth("scaled", "mul", 25)
            program.birth("sum", "add", 25)
            program.death("scaled", "sum")
    program.birth("out", "cat", 100 * frames)
    return program.done()


def chunks(frames: int) -> Tape:
    """Sixteen frames a chunk (pipeline_animatediff.py), which no loop of few frames is."""
    program = Program()
    for i in range(0, frames, 16):
        program.birth(f"x{i}", "decode", 100 * min(16, frames - i))
    program.birth("out", "cat", 100 * frames)
    return program.done()


def run_of(trace: Callable[[int], Tape], span: Span, values: Values) -> Tape:
    return span.folded(trace(values["F"]), values, {"F": span.frames.last})


@pytest.mark.parametrize(
    ("trace", "usual", "ranges"),
    [
        (appended, 13, {"2 to 20"}),
        (pairs, 13, {"2 to 20 in steps of 2", "3 to 19 in steps of 2"}),
        (tiles, 12, {"2 to 4", "6 to 18 in steps of 3", "7 to 19 in steps of 3", "5 to 20 in steps of 3"}),
        (chunks, 16, {"2 to 16", "17 to 20"}),
    ],
)
def test_every_number_of_frames_is_one_pass_repeated(
    trace: Callable[[int], Tape], usual: int, ranges: set[str]
) -> None:
    found = spans(trace, WHOLE, usual)
    assert {str(span.frames) for span in found} == ranges and usual in found[0].frames
    for span in found:
        every = [{"F": frames} for frames in span.frames]
        run = partial(run_of, trace, span)
        tape = fit(run, every[1:5], every[1:])
        if span.loop is not None:
            verify(span.loop, tape, lambda values: trace(values["F"]), every)
            assert span.recorded and not repeats(span.loop, span.recorded, trace(usual), usual + span.loop.period)


def test_frames_for_which_a_table_is_made_are_apart() -> None:
    """embeddings.py: positions of other frames than the config's are computed anew."""

    def trace(frames: int) -> Tape:
        tape = pairs(frames)
        return pairs(frames + 2) if frames == 13 else tape

    found = spans(trace, WHOLE, 13)
    parts = ["13", "2 to 20 in steps of 2", "3 to 11 in steps of 2", "15 to 19 in steps of 2"]
    assert [str(span.frames) for span in found] == parts


def test_what_repeats_nothing_has_no_parts() -> None:
    def trace(frames: int) -> Tape:
        program = Program()
        for i in range(frames):
            program.birth(f"x{i}", f"op{i * frames % 5}", 8)
        return program.done()

    assert spans(trace, WHOLE, 12) == []


@pytest.mark.parametrize(
    ("name", "ranges"),
    [
        (
            "HunyuanVideoPipeline",
            {"2 to 4", "5 to 14 in steps of 3", "6 to 15 in steps of 3", "7 to 16 in steps of 3"},
        ),
        ("CogVideoXPipeline", {"2 to 16 in steps of 2", "5 to 15 in steps of 2", "3"}),
    ],
)
def test_real_video_vaes_decode_some_frames_a_pass(name: str, ranges: set[str]) -> None:
    """At one size: tiles of 16 frames, 12 apart, over 4 latents; two latent frames a pass, an odd one in the first."""
    document = DOCUMENTS[name]
    traced = TracedPipeline(description(document), OPTIONS, {**arguments(document), "num_frames": 21}, SIDES)
    call, video = traced.base(guidance=False), traced.grid.frames

    def trace(frames: int) -> Tape:
        return traced.trace(replace(call, num_frames=video.frames(frames)))

    found = spans(trace, Range(2, 16), video.latent(None))
    assert {str(span.frames) for span in found} == ranges
    for span in (span for span in found if span.loop):
        every = [{"F": frames} for frames in span.frames]
        run = partial(run_of, trace, span)
        verify(span.loop, fit(run, every[1:], ()), lambda values: trace(values["F"]), every)
