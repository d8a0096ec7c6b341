"""From a tape to its live bytes: symbolically at every local maximum, numerically at every event."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from derivation.symbols import RING, Size, as_poly, ceil512, evaluate, free_names, symbol
from derivation.tape import Allocation, Tape
from derivation.tiling import Tile

MAX_INT64 = 2**63 - 1

# A live set: how many storages of each size in bytes are alive.
Terms = tuple[tuple[Size, Size], ...]


@dataclass(frozen=True, slots=True)
class Point:
    """A program point: the event that reaches it, its stage, and (nbytes, count) of what is alive.

    ``max_length`` is the largest prompt length at which it occurs, None for any; ``tile`` is the tape's, and
    ``cut`` holds the symbols of VAE tiles without which it does not occur.
    """

    event: int
    stage: str
    terms: Terms
    max_length: int | None = None
    tile: Tile | None = None
    cut: frozenset[str] = frozenset()

    def raw(self) -> Size:
        """Return the sum of the live storages' bytes, without the 512-byte rounding."""
        return sum((as_poly(nbytes) * count for nbytes, count in self.terms), start=RING(0))


def stages(tape: Tape) -> list[tuple[str, int, int]]:
    """Return (stage, first event, end event) of each stage of ``tape``, in order; "" without marks."""
    starts = [(mark.stage, mark.event) for mark in tape.marks] or [("", 0)]
    ends = [event for _, event in starts[1:]] + [len(tape.events)]
    return [(stage, start, end) for (stage, start), end in zip(starts, ends, strict=True)]


def local_maxima(tape: Tape) -> list[Point]:
    """Return each distinct live set that a stage starts with, or that a storage's death follows, or the last."""
    alive: dict[Size, Size] = {}
    points: dict[tuple[str, frozenset[tuple[Size, Size]]], Point] = {}
    encoder_limit = _encoder_limit(tape)
    for stage, start, end in stages(tape):
        limit = encoder_limit if stage == "text_encoder" else None
        for index in range(start - 1, end):
            if index >= start:
                event = tape.events[index]
                _apply(alive, tape.allocations[abs(event) - 1], 1 if event > 0 else -1)
            grows = index + 1 < end and tape.events[index + 1] > 0
            if not grows and (index < start or tape.events[index] > 0) and alive:
                key = (stage, frozenset(alive.items()))
                points.setdefault(key, Point(index, stage, tuple(alive.items()), limit, tape.tile, _cut(tape, index)))
    return list(points.values())


def _cut(tape: Tape, index: int) -> frozenset[str]:
    return next((symbols for start, end, symbols in tape.cut if start <= index < end), frozenset())


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
    """Return the allocations that are alive after event ``event``, oldest first.

    Before them, with count -1, stand the weights that were loaded before the run and have died.
    """
    alive: dict[int, Allocation] = {}
    unloaded: list[Allocation] = []
    for entry in tape.events[: event + 1]:
        if entry > 0:
            alive[entry] = tape.allocations[entry - 1]
        elif alive.pop(-entry, None) is None:
            unloaded.append(replace(tape.allocations[-entry - 1], count=-1))
    return [*unloaded, *alive.values()]


class Evaluator:
    """Evaluates the live bytes of one tape at sizes."""

    def __init__(self, tape: Tape) -> None:
        sizes = {(a.nbytes, a.count): None for a in tape.allocations}
        self._sizes = list(sizes)
        self._stages = stages(tape)
        index = {size: i for i, size in enumerate(self._sizes)}
        kinds = [index[a.nbytes, a.count] for a in tape.allocations]
        self._kind = np.array([kinds[abs(event) - 1] for event in tape.events], dtype=np.int64)
        self._sign = np.where(np.array(tape.events) > 0, 1, -1)

    def live_bytes(self, values: Mapping[str, int]) -> NDArray[Any]:
        """Return the live bytes in 512-byte blocks before the first event and after each one."""
        sizes = [ceil512(evaluate(n, values)) * evaluate(count, values) for n, count in self._sizes]
        exact = np.int64 if max(sizes, default=0) * len(self._kind) < MAX_INT64 else object
        steps = np.array(sizes, dtype=exact)[self._kind] * self._sign
        return np.concatenate([np.zeros(1, dtype=exact), np.cumsum(steps)])

    def peaks(self, values: Mapping[str, int]) -> dict[str, tuple[int, int]]:
        """Return, by stage, (peak bytes, the event that first reaches it; -1 before the first event)."""
        live = self.live_bytes(values)
        found: dict[str, tuple[int, int]] = {}
        for stage, start, end in self._stages:
            event = start + int(np.argmax(live[start : end + 1]))
            found[stage] = (int(live[event]), event - 1)
        return found
