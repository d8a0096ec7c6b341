"""From a tape to its live bytes: symbolically at every local maximum, numerically at every event."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from derivation.tape.symbols import RING, Size, as_poly, ceil512, evaluate, free_names, symbol
from derivation.tape.tape import Allocation, Tape
from derivation.tape.tiles import Tile

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


def maxima(tape: Tape) -> list[tuple[int, str]]:
    """Return (event, stage) where a stage starts, where a storage's death follows a birth, and at a last birth."""
    events = tape.events
    return [
        (index, stage)
        for stage, start, end in stages(tape)
        for index in range(start - 1, end)
        if (index < start or events[index] > 0) and (index + 1 == end or events[index + 1] < 0)
    ]


def local_maxima(tape: Tape) -> list[Point]:
    """Return each distinct live set that a stage starts with, or that a storage's death follows, or the last."""
    places: dict[Size, int] = {}
    kinds = [places.setdefault(a.nbytes, len(places)) for a in tape.allocations]
    sizes = list(places)
    alive: dict[int, Size] = {}
    points: dict[tuple[str, frozenset[tuple[int, Size]]], Point] = {}
    limits = prompt_limits(tape)
    done = 0
    for index, stage in maxima(tape):
        for event in tape.events[done : index + 1]:
            _apply(alive, kinds[abs(event) - 1], tape.allocations[abs(event) - 1].count, 1 if event > 0 else -1)
        done = max(done, index + 1)
        key = (stage, frozenset(alive.items()))
        if alive and key not in points:
            terms = tuple((sizes[kind], count) for kind, count in alive.items())
            points[key] = Point(index, stage, terms, limits.get(stage), tape.tile, cut_at(tape, index))
    return list(points.values())


def cut_at(tape: Tape, event: int) -> frozenset[str]:
    """Return the symbols of VAE tiles without which an event does not occur."""
    return next((symbols for start, end, symbols in tape.cut if start <= event < end), frozenset())


def prompt_limits(tape: Tape) -> dict[str, int]:
    """Return the largest prompt length at which a stage occurs, of those that have one.

    It is the bound of the tape's decision "L > bound", where it took the branch L <= bound.
    """
    bounds = [g.bound for g in tape.guards.values() if free_names(g.size) == {"L"} and g.bound > 1]
    return {"text_encoder": bounds[0]} if bounds and not tape.guards[symbol("L"), bounds[0]].answer else {}


def _apply(alive: dict[int, Size], kind: int, count: Size, sign: int) -> None:
    total = alive.get(kind, 0) + sign * count
    if total == 0:
        del alive[kind]
    else:
        alive[kind] = total


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


def born_and_dead(values: Sequence[int]) -> list[int]:
    """Return a list with values[i] at i and -values[i] at ~i.

    >>> born_and_dead([3, 5])
    [3, 5, -5, -3]
    """
    return [*values, *(-value for value in reversed(values))]


class Evaluator:
    """Evaluates the live bytes of one tape at sizes.

    ``sizes`` holds each (nbytes, count) once; ``steps`` has one entry an event: i where sizes[i] appears, ~i where
    it dies.
    """

    def __init__(self, tape: Tape) -> None:
        places: dict[tuple[Size, Size], int] = {}
        kinds = [places.setdefault((a.nbytes, a.count), len(places)) for a in tape.allocations]
        steps = [kinds[event - 1] if event > 0 else ~kinds[-event - 1] for event in tape.events]
        self.sizes = list(places)
        self.steps = np.array(steps, dtype=np.int64)
        self._tape = tape
        self._stages = stages(tape)

    @cached_property
    def maxima(self) -> list[tuple[int, str]]:
        """The tape's maxima."""
        return maxima(self._tape)

    def live_bytes(self, values: Mapping[str, int]) -> NDArray[Any]:
        """Return the live bytes in 512-byte blocks before the first event and after each one."""
        sizes = [ceil512(evaluate(n, values)) * evaluate(count, values) for n, count in self.sizes]
        exact = np.int64 if max(sizes, default=0) * len(self.steps) < MAX_INT64 else object
        steps = np.array(born_and_dead(sizes), dtype=exact)[self.steps]
        return np.concatenate([np.zeros(1, dtype=exact), np.cumsum(steps)])

    def peaks(self, values: Mapping[str, int]) -> dict[str, tuple[int, int]]:
        """Return, by stage, (peak bytes, the event that first reaches it; -1 before the first event)."""
        live = self.live_bytes(values)
        found: dict[str, tuple[int, int]] = {}
        for stage, start, end in self._stages:
            event = start + int(np.argmax(live[start : end + 1]))
            found[stage] = (int(live[event]), event - 1)
        return found
