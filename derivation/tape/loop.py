"""A loop over latent frames in a recorded tape: its pass is recorded once, and repeated where frames are known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from derivation.tape.events import Allocation
from derivation.tape.symbols import Size
from derivation.tape.tape import Shapes, Tape

# (a size, the symbol F's value) -> the size
Put = Callable[[Size, int], Size]


@dataclass(frozen=True, slots=True)
class Loop:
    """The pass of a tape that runs once for each latent frame beyond ``least``, each with F at its own frame.

    Its ``births`` allocations follow the first ``before``, its ``events`` the first ``start``; ``carried`` are
    allocations before it of which each pass makes another and the last one dies after the loop.
    """

    least: int
    before: int
    births: int
    start: int
    events: int
    carried: frozenset[int] = frozenset()

    @property
    def after(self) -> int:
        """The event that follows the recorded pass."""
        return self.start + self.events

    def unrolled(self, tape: Tape, frames: int, put: Put) -> Tape:
        """Return the tape of ``frames`` latent frames, at least ``least``, every size ``put`` at its pass's frame."""
        passes = frames - self.least
        end, more = self.before + self.births, (passes - 1) * self.births
        indices = [(i, frames) for i in range(self.before)]
        indices += [(i, self.least + 1 + k) for k in range(passes) for i in range(self.before, end)]
        indices += [(i, frames) for i in range(end, len(tape.allocations))]
        events = tape.events[: self.start]
        for k in range(passes):
            body = tape.events[self.start : self.after]
            events += [_shifted(event, k * self.births) for event in body]
        events += [_shifted(e, more if self._moves(e) else 0) for e in tape.events[self.after :]]
        moved = (passes - 1) * self.events
        emptied = [i for i in tape.emptied if i <= self.start]
        emptied += [i + k * self.events for k in range(passes) for i in tape.emptied if self.start < i <= self.after]
        return replace(
            tape,
            allocations=[_put(tape.allocations[i], at, put) for i, at in indices],
            events=events,
            marks=[replace(m, event=m.event + moved) if m.event >= self.after else m for m in tape.marks],
            emptied=[*emptied, *(i + moved for i in tape.emptied if i > self.after)],
            iterations=[i + moved if i >= self.after else i for i in tape.iterations],
            convolutions={
                n: tuple(tuple(put(dim, at) for dim in shape) for shape in tape.convolutions[i])
                for n, (i, at) in enumerate(indices)
                if i in tape.convolutions
            },
        )

    def folded(self, tape: Tape, recorded: Tape, frames: int) -> Tape:
        """Return ``recorded``, of one pass, with the sizes of a tape of ``frames`` latent frames, its last pass's."""
        more = (frames - self.least - 1) * self.births
        places = [i if i < self.before else i + more for i in range(len(recorded.allocations))]
        shapes: dict[int, Shapes] = {i: tape.convolutions[places[i]] for i in recorded.convolutions}
        return replace(recorded, allocations=[tape.allocations[i] for i in places], convolutions=shapes)

    def _moves(self, event: int) -> bool:
        index = abs(event) - 1
        return index >= self.before or index in self.carried


def _shifted(event: int, by: int) -> int:
    return event + by if event > 0 else event - by


def _put(a: Allocation, frames: int, put: Put) -> Allocation:
    shape = tuple(put(dim, frames) for dim in a.shape)
    return replace(a, shape=shape, nbytes=put(a.nbytes, frames), count=put(a.count, frames))
