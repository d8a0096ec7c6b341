"""The loop over latent frames of a traced call, found by comparing the tapes of three numbers of frames.

A VAE that decodes n frames a pass gives one structure to every n-th number of frames. The tape with one pass more has
one block of births more for each part of the pass, which repeats the block before it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice

from derivation.tape.grid import Range
from derivation.tape.loop import Body, Loop
from derivation.tape.symbols import Size, evaluate
from derivation.tape.tape import Tape
from derivation.trace.interpolate import Parted, Values, check, differing, parting

# Frames a pass, and parts of a pass, that are looked for; passes that may be of their own before those that repeat.
PERIODS, MOST_BODIES, OWN_PASSES = (1, 2, 3, 4), 3, 3
# Most runs of frames of one structure each, without a loop: of more, what else they depend on is to be found first.
MOST_RUNS = 4
Trace = Callable[[int], Tape]


@dataclass(frozen=True)
class Span:
    """Latent frames of one structure, with the loop and the tape that has one pass of it, where there is one."""

    frames: Range
    loop: Loop | None = None
    recorded: Tape | None = None

    def folded(self, traced: Tape, values: Values, base: Values) -> Tape:
        """Return the tape of one pass with the sizes of one traced at ``values``; raises Parted for another loop."""
        if self.loop is None or self.recorded is None:
            return traced
        if not repeats(self.loop, self.recorded, traced, values["F"]):
            changed = differing(base, values) - {"F"} or {name for name in base if name[0] in "Fhw"}
            raise Parted(frozenset(changed), "another loop over frames", (base, values))
        return self.loop.folded(traced, self.recorded, values["F"])


def spans(trace: Trace, whole: Range, usual: int) -> list[Span]:
    """Return the parts of ``whole``, all latent frames, that have one structure each, that of ``usual`` first.

    Empty where there are too many.
    """
    looped = next((found for period in PERIODS if (found := _looped(trace, whole, period))), [])
    least = min((s.frames.first for s in looped), default=whole.last + 1)
    covered = {f for s in looped for f in s.frames}
    rest = [f for f in whole if f not in covered]
    runs = chain.from_iterable(
        _alike(trace, each) for each in ([f for f in rest if f < least], [f for f in rest if f > least])
    )
    alike = list(islice(runs, MOST_RUNS + 1))
    if len(alike) > MOST_RUNS:
        return []
    return sorted(_apart(trace, [*looped, *alike], usual), key=lambda span: usual not in span.frames)


def repeats(loop: Loop, recorded: Tape, traced: Tape, frames: int) -> bool:
    """Return whether the tape of some latent frames is that of one pass, which is repeated."""
    return parting(loop.unrolled(recorded, frames, lambda size, _: size), traced) is None


def verify(loop: Loop, fitted: Tape, trace: Callable[[Values], Tape], held: Iterable[Values]) -> None:
    """Raise Parted unless every pass has the sizes of its frame at all sizes that are ``held`` out."""
    for values in held:

        def at(size: Size, frames: int, values: Values = values) -> Size:
            return evaluate(size, {**values, "F": frames})

        check(loop.unrolled(fitted, values["F"], at), trace(values), values, values)


def _looped(trace: Trace, whole: Range, period: int) -> list[Span]:
    """Return what covers each of ``period`` classes of latent frames; empty where one has no loop."""
    found = []
    for first in range(whole.first, whole.first + period):
        span = _class(trace, range(first, whole.last + 1, period))
        if span is None:
            return []
        found.append(span)
    return found


def _class(trace: Trace, frames: range) -> Span | None:
    for least in frames[:OWN_PASSES]:
        one, *others = (trace(least + passes * frames.step) for passes in (1, 2, 3))
        loop = _between(one, others[0], least, frames.step)
        if loop is None or not all(repeats(loop, one, t, least + k * frames.step) for k, t in enumerate(others, 2)):
            continue
        without = repeats(loop, one, trace(least), least)
        return Span(Range(least if without else least + frames.step, frames[-1], frames.step), loop, one)
    return None


def _alike(trace: Trace, frames: Sequence[int]) -> Iterator[Span]:
    """Yield runs of latent frames of one structure: that of a run's last is its first's."""
    while frames:
        first = trace(frames[0])
        after = bisect_left(frames, True, key=lambda f: parting(first, trace(f)) is not None)
        yield Span(Range(frames[0], frames[after - 1]))
        frames = frames[after:]


def _apart(trace: Trace, found: Iterable[Span], usual: int) -> Iterator[Span]:
    """Yield spans with the ``usual`` frames apart where they are not as the loop's: a table may be made for them."""
    for span in found:
        frames, loop, recorded = span.frames, span.loop, span.recorded
        if usual not in frames or not loop or not recorded or repeats(loop, recorded, trace(usual), usual):
            yield span
            continue
        yield Span(Range(usual, usual))
        for first, last in ((frames.first, usual - frames.step), (usual + frames.step, frames.last)):
            if first <= last:
                yield Span(Range(first, last, frames.step), loop, recorded)


def _between(one: Tape, two: Tape, least: int, period: int) -> Loop | None:
    """Return what ``two`` has more than ``one`` as the bodies of a pass; None where it is no pass."""
    kinds: dict[tuple[object, ...], int] = {}
    keys = [
        [kinds.setdefault((a.path, a.op, a.dtype, len(a.shape)), len(kinds)) for a in tape.allocations]
        for tape in (one, two)
    ]
    views, more = (_Events(one), _Events(two)), 0
    bodies: list[Body] = []
    for end, births in _inserted(keys[0], keys[1], 0, 0, MOST_BODIES) or ():
        body = _body(*views, end, births, more)
        if body is None or (bodies and body.before < bodies[-1].end):
            return None
        bodies.append(body)
        more += births
    return Loop(least, period, tuple(bodies)) if bodies else None


def _inserted(one: list[int], two: list[int], p: int, q: int, most: int) -> list[tuple[int, int]] | None:
    """Return (place in ``one``, length) of each block that ``two`` has more, which repeats what is before it."""
    start = p
    while p < len(one) and q < len(two) and one[p] == two[q]:
        p, q = p + 1, q + 1
    rest = (len(two) - q) - (len(one) - p)
    if rest == 0:
        return [] if p == len(one) else None
    if most == 0 or (p == start and p > 0):
        return None
    for length in range(1, min(rest, q) + 1):
        if two[q : q + length] == two[q - length : q]:
            later = _inserted(one, two, p, q + length, most - 1)
            if later is not None:
                return [(p, length), *later]
    return None


class _Events:
    """A tape's events: births by their bytes, deaths by how many births ago the one that dies was."""

    def __init__(self, tape: Tape) -> None:
        self.events, self._marks = tape.events, [mark.event for mark in tape.marks]
        self.births = [i for i, event in enumerate(tape.events) if event > 0] + [len(tape.events)]
        born = 0
        self.relative: list[Size] = []
        for event in tape.events:
            born += event > 0
            self.relative.append(tape.allocations[event - 1].nbytes if event > 0 else -1 - (born + event))

    def block(self, first: int, last: int) -> list[Size]:
        """Return the events from one birth to another."""
        return self.relative[self.births[first] : self.births[last]]

    def marked(self, first: int, last: int) -> bool:
        """Return whether a stage begins inside."""
        return any(self.births[first] < event < self.births[last] for event in self._marks)

    def dead(self, birth: int) -> set[int]:
        """Return what dies from a birth on."""
        return {-event - 1 for event in self.events[self.births[birth] :] if event < 0}


def _body(one: _Events, two: _Events, end: int, births: int, more: int) -> Body | None:
    """Return the last block before ``end`` that both tapes have with the same sizes, ``more`` births later in two."""
    for last in range(end, max(end - 2 * births, births) - 1, -1):
        first = last - births
        same = one.block(first, last) == two.block(first + more, last + more)
        if same and not one.marked(first, last):
            break
    else:
        return None
    own = {-event - 1 for event in one.events[one.births[first] : one.births[last]] if event < 0}
    kept = {i for i in range(first, last) if not any(i - m in own for m in range(0, i + 1, births))}
    later = two.dead(last + more + births)
    carried = {i for i in one.dead(last) if i < first and i + more not in later and i not in later}
    start, after = one.births[first], one.births[last]
    return Body(first, births, start, after - start, frozenset(carried), frozenset(kept & one.dead(last)))
