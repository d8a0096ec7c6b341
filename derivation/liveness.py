"""From a tape to its live bytes: symbolically at every local maximum, numerically at every event."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from derivation.symbols import RING, Size, as_poly, ceil512, evaluate, free_names, symbol
from derivation.tape import Allocation, Tape

# A live set: how many storages of each size in bytes are alive.
Terms = tuple[tuple[Size, Size], ...]


@dataclass(frozen=True, slots=True)
class Point:
    """A program point: the event that reaches it, its stage, and (nbytes, count) of what is alive.

    ``max_length`` is the largest prompt length at which it occurs, None for any.
    """

    event: int
    stage: str
    terms: Terms
    max_length: int | None = None

    def raw(self) -> Size:
        """Return the sum of the live storages' bytes, without the 512-byte rounding."""
        return sum((as_poly(nbytes) * count for nbytes, count in self.terms), start=RING(0))


def stage_of(tape: Tape) -> Iterator[tuple[int, str]]:
    """Yield (event index, stage) for every event of ``tape``; before the first mark the stage is ""."""
    marks = {mark.event: mark.stage for mark in tape.marks}
    stage = ""
    for index in range(len(tape.events)):
        stage = marks.get(index, stage)
        yield index, stage


def local_maxima(tape: Tape) -> list[Point]:
    """Return each distinct live set that an allocation reaches just before a storage dies, or at the end."""
    alive: dict[Size, Size] = {}
    points: dict[tuple[str, frozenset[tuple[Size, Size]]], Point] = {}
    last = len(tape.events) - 1
    encoder_limit = _encoder_limit(tape)
    for index, stage in stage_of(tape):
        event = tape.events[index]
        _apply(alive, tape.allocations[abs(event) - 1], 1 if event > 0 else -1)
        if event > 0 and (index == last or tape.events[index + 1] < 0):
            key = (stage, frozenset(alive.items()))
            if key not in points:
                limit = encoder_limit if stage == "text_encoder" else None
                points[key] = Point(index, stage, tuple(alive.items()), limit)
    return list(points.values())


def _encoder_limit(tape: Tape) -> int | None:
    """Return the bound of the tape's decision "L > bound", where it took the branch L <= bound."""
    bounds = [g.bound for g in tape.guards.values() if free_names(g.size) == {"L"} and g.bound > 1]
    return bounds[0] if bounds and not tape.guards[symbol("L"), bounds[0]].answer else None


def _apply(alive: dict[Size, Size], allocation: Allocation, sign: int) -> None:
    count = alive.get(allocation.nbytes, 0) + sign * allocation.count
    if count == 0:
        del alive[allocation.nbytes]
    else:
        alive[allocation.nbytes] = count


def alive_at(tape: Tape, event: int) -> list[Allocation]:
    """Return the allocations that are alive after event ``event``, oldest first."""
    alive: dict[int, Allocation] = {}
    for entry in tape.events[: event + 1]:
        if entry > 0:
            alive[entry] = tape.allocations[entry - 1]
        else:
            del alive[-entry]
    return list(alive.values())


class Evaluator:
    """Evaluates the live bytes of one tape at sizes."""

    def __init__(self, tape: Tape) -> None:
        sizes = {(a.nbytes, a.count): None for a in tape.allocations}
        self._sizes = list(sizes)
        index = {size: i for i, size in enumerate(self._sizes)}
        kinds = [index[a.nbytes, a.count] for a in tape.allocations]
        self._kind = np.array([kinds[abs(event) - 1] for event in tape.events], dtype=np.int64)
        self._sign = np.where(np.array(tape.events) > 0, 1, -1)

    def live_bytes(self, values: Mapping[str, int]) -> NDArray[np.int64]:
        """Return the live bytes, 512-byte blocks, after each event; exact below 2^63 bytes."""
        sizes = [ceil512(evaluate(n, values)) * evaluate(count, values) for n, count in self._sizes]
        return np.cumsum(np.array(sizes, dtype=np.int64)[self._kind] * self._sign)

    def peak(self, values: Mapping[str, int]) -> tuple[int, int]:
        """Return (peak bytes, the event that first reaches it)."""
        live = self.live_bytes(values)
        event = int(np.argmax(live))
        return int(live[event]), event
