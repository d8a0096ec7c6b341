"""The loop over latent frames of a traced call, found by comparing the tapes of three numbers of frames."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from derivation.tape.loop import Loop
from derivation.tape.symbols import Size, evaluate
from derivation.tape.tape import Tape
from derivation.trace.interpolate import Parted, Values, check, normalised, parting

# The first passes are of their own: a causal convolution has no earlier frames to hold.
LEAST = (2, 3, 4)


def find(trace: Callable[[int], Tape]) -> tuple[Loop, Tape] | None:
    """Return the loop of a call, traced at some latent frames, and the tape that has one pass of it; None without."""
    for least in LEAST:
        one, *others = (trace(least + passes) for passes in (1, 2, 3))
        loop = _between(one, others[0], least)
        if loop is not None and all(repeats(loop, one, t, least + k) for k, t in enumerate(others, 2)):
            return loop, one
    return None


def repeats(loop: Loop, recorded: Tape, traced: Tape, frames: int) -> bool:
    """Return whether the tape of some latent frames is that of one pass, which is repeated."""
    return parting(normalised(loop.unrolled(recorded, frames, lambda size, _: size)), traced) is None


def folded(loop: Loop, recorded: Tape, traced: Tape, frames: int) -> Tape:
    """Return the tape of one pass with the sizes of a tape of some latent frames; raises Parted for another loop."""
    if not repeats(loop, recorded, traced, frames):
        raise Parted(frozenset("F"), "the loop over frames is another one")
    return loop.folded(traced, recorded, frames)


def verify(loop: Loop, fitted: Tape, trace: Callable[[Values], Tape], held: Iterable[Values]) -> None:
    """Raise Parted unless every pass has the sizes of its frame at all sizes that are ``held`` out."""
    for values in held:

        def at(size: Size, frames: int, values: Values = values) -> Size:
            return evaluate(size, {**values, "F": frames})

        check(normalised(loop.unrolled(fitted, values["F"], at)), trace(values), values, values)


def _between(one: Tape, two: Tape, least: int) -> Loop | None:
    """Return what ``two`` has more than ``one``, as the pass that ends where they part; None where it is no pass."""
    births, events = len(two.allocations) - len(one.allocations), len(two.events) - len(one.events)
    after = _parting_birth(one, two)
    start = after - events
    if births <= 0 or start < 0 or any(start < mark.event < after for mark in one.marks):
        return None
    if sum(event > 0 for event in one.events[start:after]) != births:
        return None
    before = sum(event > 0 for event in one.events[:start])
    dead, later = (_dead(one, after), _dead(two, after + events))
    return Loop(least, before, births, start, events, frozenset(i for i in dead - later if i < before))


def _parting_birth(one: Tape, two: Tape) -> int:
    """Return the last birth up to which the events of two tapes are the same."""
    last = 0
    for i, (a, b) in enumerate(zip(one.events, two.events, strict=False)):
        last = i if a > 0 and b > 0 else last
        own, other = one.allocations[abs(a) - 1], two.allocations[abs(b) - 1]
        if a != b or (own.path, own.op, own.dtype) != (other.path, other.op, other.dtype):
            break
    return last


def _dead(tape: Tape, start: int) -> set[int]:
    return {-event - 1 for event in tape.events[start:] if event < 0}
