"""A loop over latent frames in a recorded tape: its pass is recorded once, and repeated where frames are known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

from derivation.tape.events import Allocation
from derivation.tape.symbols import Size
from derivation.tape.tape import Shapes, Tape

# (a size, the symbol F's value) -> the size
Put = Callable[[Size, int], Size]


def normalised(tape: Tape) -> Tape:
    """Return a tape whose deaths between two births, of one stage, are in the order of the births.

    Their order is that of a dict or set in Python and says nothing: no live set is larger between them.
    """
    starts = {mark.event for mark in tape.marks}
    events, first = list(tape.events), 0
    for i in range(len(events) + 1):
        if i == len(events) or events[i] > 0 or i in starts:
            events[first:i] = sorted(events[first:i], reverse=True)
            first = i + 1 if i < len(events) and events[i] > 0 else i
    return replace(tape, events=events)


@dataclass(frozen=True, slots=True)
class Body:
    """A part of the pass that runs again: ``births`` allocations after the first ``before``, events alike.

    ``carried`` are allocations before it of which each pass makes another and the last one dies after the loop;
    ``kept`` are those of its own that outlive the next pass, all of which die where the recorded one does.
    """

    before: int
    births: int
    start: int
    events: int
    carried: frozenset[int] = frozenset()
    kept: frozenset[int] = frozenset()

    @property
    def end(self) -> int:
        """The allocation that follows the recorded one."""
        return self.before + self.births

    @property
    def after(self) -> int:
        """The event that follows the recorded one."""
        return self.start + self.events

    def __contains__(self, index: int) -> bool:
        return self.before <= index < self.end


@dataclass(frozen=True, slots=True)
class Loop:
    """The pass of a tape that runs once for every ``period`` latent frames beyond ``least``, F at its own frame.

    ``bodies`` are what it runs, in order and apart: a VAE that decodes its tiles and blends them later has two.
    """

    least: int
    period: int
    bodies: tuple[Body, ...]

    def unrolled(self, tape: Tape, frames: int, put: Put) -> Tape:
        """Return the tape of some latent frames, ``least`` or whole periods more, normalised.

        Sizes are ``put`` at the last frame of their pass.
        """
        plan = _Plan(self.bodies, (frames - self.least) // self.period, tape.events)
        indices = [(i, frames if k is None else self.least + self.period * (k + 1)) for i, k in plan.allocations(tape)]
        whole = replace(
            tape,
            allocations=[_put(tape.allocations[i], at, put) for i, at in indices],
            events=plan.events,
            marks=[replace(m, event=plan.starts[m.event]) for m in tape.marks],
            emptied=[place for i in tape.emptied for place in plan.places(i)],
            iterations=[plan.starts[i] for i in tape.iterations],
            convolutions={
                n: tuple(tuple(put(dim, at) for dim in shape) for shape in tape.convolutions[i])
                for n, (i, at) in enumerate(indices)
                if i in tape.convolutions
            },
        )
        return normalised(whole)

    def folded(self, tape: Tape, recorded: Tape, frames: int) -> Tape:
        """Return ``recorded``, of one pass, with the sizes of a tape of some latent frames, its last pass's."""
        plan = _Plan(self.bodies, (frames - self.least) // self.period, [])
        places = [plan.last(i) for i in range(len(recorded.allocations))]
        shapes: dict[int, Shapes] = {i: tape.convolutions[places[i]] for i in recorded.convolutions}
        return replace(recorded, allocations=[tape.allocations[i] for i in places], convolutions=shapes)


class _Plan:
    """Where the allocations and ``recorded`` events of one pass are with a number of ``passes``."""

    def __init__(self, bodies: tuple[Body, ...], passes: int, recorded: list[int]) -> None:
        self._bodies, self._passes, self._recorded = bodies, passes, recorded

    def allocations(self, tape: Tape) -> list[tuple[int, int | None]]:
        """Return (the recorded index, its pass or None) of each allocation."""
        found: list[tuple[int, int | None]] = []
        first = 0
        for body in self._bodies:
            found += [(i, None) for i in range(first, body.before)]
            found += [(i, k) for k in range(self._passes) for i in range(body.before, body.end)]
            first = body.end
        return found + [(i, None) for i in range(first, len(tape.allocations))]

    def last(self, index: int) -> int:
        """Return where an allocation of the last pass, or of none, is."""
        body = self._of(index)
        return self._outside(index) if body is None else self._inside(body, index, self._passes - 1)

    @property
    def events(self) -> list[int]:
        """The events of all passes."""
        return self._run[0]

    @property
    def starts(self) -> dict[int, int]:
        """Where each recorded event between passes is, a body's first one's first pass among them."""
        return self._run[1]

    @cached_property
    def _run(self) -> tuple[list[int], dict[int, int]]:
        made: list[int] = []
        starts: dict[int, int] = {}
        first = 0
        for body in (*self._bodies, None):
            for i in range(first, len(self._recorded) if body is None else body.start):
                starts[i] = len(made)
                made += self._between(self._recorded[i])
            if body is not None:
                starts[body.start] = len(made)
                for k in range(self._passes):
                    made += [self._named(body, event, k) for event in self._recorded[body.start : body.after]]
                first = body.after
                starts[first] = len(made)
        starts[len(self._recorded)] = len(made)
        return made, starts

    def places(self, event: int) -> list[int]:
        """Return every place of what happens before a recorded event."""
        body = next((b for b in self._bodies if b.start < event <= b.after), None)
        if body is None:
            return [self.starts[event]]
        first = self.starts[body.start] + event - body.start
        return [first + k * body.events for k in range(self._passes)]

    def _between(self, event: int) -> list[int]:
        """Return an event outside the passes: kept allocations die of every pass, others of the last."""
        index, born = abs(event) - 1, event > 0
        body = self._of(index)
        if body is not None and index in body.kept:
            return [_event(self._inside(body, index, k), born) for k in range(self._passes)]
        body = body or next((b for b in self._bodies if index in b.carried), None)
        return [_event(self._outside(index) if body is None else self._inside(body, index, self._passes - 1), born)]

    def _named(self, body: Body, event: int, k: int) -> int:
        """Return an event of one pass: what is born before the body is the pass before's, or none's."""
        index = abs(event) - 1
        own = self._of(index) or body
        earlier = index + k * own.births
        return _event(self._outside(earlier) if earlier < own.before else self._inside(own, index, k), event > 0)

    def _of(self, index: int) -> Body | None:
        return next((body for body in self._bodies if index in body), None)

    def _outside(self, index: int) -> int:
        return index + (self._passes - 1) * sum(b.births for b in self._bodies if b.end <= index)

    def _inside(self, body: Body, index: int, k: int) -> int:
        return self._outside(body.before) + k * body.births + index - body.before


def _event(index: int, born: bool) -> int:
    return index + 1 if born else -index - 1


def _put(a: Allocation, frames: int, put: Put) -> Allocation:
    shape = tuple(put(dim, frames) for dim in a.shape)
    return replace(a, shape=shape, nbytes=put(a.nbytes, frames), count=put(a.count, frames))
