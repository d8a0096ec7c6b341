"""From a tape to its live bytes at every event, in numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from itertools import count as count_from
from typing import Any

import numpy as np
from numpy.typing import NDArray

from derivation.tape.symbols import Size, ceil512, evaluate
from derivation.tape.tape import Tape

Integers = NDArray[np.int64]
MAX_INT64 = 2**63 - 1
_NUMBERS = count_from()


def stages(tape: Tape) -> list[tuple[str, int, int]]:
    """Return (stage, first event, end event) of each stage of ``tape``, in order; "" without marks."""
    starts = [(mark.stage, mark.event) for mark in tape.marks] or [("", 0)]
    ends = [event for _, event in starts[1:]] + [len(tape.events)]
    return [(stage, start, end) for (stage, start), end in zip(starts, ends, strict=True)]


def born_and_dead(values: Sequence[int]) -> list[int]:
    """Return a list with values[i] at i and -values[i] at ~i.

    >>> born_and_dead([3, 5])
    [3, 5, -5, -3]
    """
    return [*values, *(-value for value in reversed(values))]


@dataclass(frozen=True, slots=True)
class LiveSets:
    """Distinct live sets at the maxima of a span, but empty ones: ``counts`` [sizes, live sets] of the span's sizes.

    ``places`` holds how many of the span's events precede the first occurrence of each.
    """

    sizes: Sequence[tuple[Size, Size]]
    places: Sequence[int]
    counts: NDArray[np.int32]


@cache
def _number(nbytes: Size, count: Size) -> int:
    """Return a number that no other (nbytes, count) has."""
    return next(_NUMBERS)


class Span:
    """The events of one stage from event ``start`` on; spans are equal where the live sets that they pass are.

    ``sizes`` holds each (nbytes, count) that is alive before it or changes in it, ``total`` how often each is alive
    before it, ``steps`` one entry an event: i where sizes[i] appears, ~i where it dies.
    """

    def __init__(self, stage: str, start: int, end: int, sizes: Sequence[tuple[Size, Size]], steps: Integers) -> None:
        self.stage, self.start = stage, start
        total, kinds = _net(steps[:start], len(sizes)), _kinds(steps[start:end])
        used = np.union1d(np.flatnonzero(total), kinds)
        numbers = np.array([_number(*sizes[i]) for i in used], dtype=np.int64)
        used, numbers = used[np.argsort(numbers)], np.sort(numbers)
        places = np.zeros(len(sizes), dtype=np.int64)
        places[used] = np.arange(len(used))
        self.sizes = [sizes[i] for i in used]
        self.total = total[used]
        self.steps = np.where(steps[start:end] < 0, ~places[kinds], places[kinds])
        self._key = (numbers.tobytes(), self.total.tobytes(), self.steps.tobytes())
        self._hash = hash(self._key)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Span) and self._key == other._key

    @property
    def live_sets(self) -> LiveSets:
        """The distinct live sets at the span's maxima."""
        return _live_sets(self)

    def maxima(self) -> Integers:
        """Return how many events precede the start, each birth that a death follows, and the last one."""
        born = self.steps >= 0
        return np.flatnonzero(np.append(True, born) & np.append(~born, True))


@lru_cache(maxsize=128)
def _live_sets(span: Span) -> LiveSets:
    places = span.maxima()
    changes = np.zeros((len(places), len(span.sizes)), dtype=np.int32)
    changes[0] = span.total
    steps = span.steps[: places[-1]]
    rows = np.searchsorted(places, np.arange(1, len(steps) + 1))
    np.add.at(changes, (rows, _kinds(steps)), np.where(steps < 0, -1, 1))
    counts = np.cumsum(changes, axis=0, dtype=np.int32)
    first: dict[bytes, int] = {}
    for row, counted in enumerate(counts):
        first.setdefault(counted.tobytes(), row)
    kept = [row for row in first.values() if counts[row].any()]
    return LiveSets(span.sizes, places[kept].tolist(), np.ascontiguousarray(counts[kept].T))


def _kinds(steps: Integers) -> Integers:
    return np.where(steps < 0, ~steps, steps)


def _net(steps: Integers, sizes: int) -> Integers:
    """Return how often each size has appeared more often than it has died."""
    births, deaths = steps[steps >= 0], ~steps[steps < 0]
    return np.bincount(births, minlength=sizes) - np.bincount(deaths, minlength=sizes)


class Evaluator:
    """Evaluates the live bytes of one tape at sizes.

    ``sizes`` holds each (nbytes, count) once; ``steps`` has one entry an event: i where sizes[i] appears, ~i where
    it dies.
    """

    def __init__(self, tape: Tape) -> None:
        places: dict[tuple[Size, Size], int] = {}
        distinct = {id(a): a for a in tape.allocations}  # tapes share allocations that were copied
        kinds = {key: places.setdefault((a.nbytes, a.count), len(places)) for key, a in distinct.items()}
        of = np.array([kinds[id(a)] for a in tape.allocations], dtype=np.int64)
        events = np.array(tape.events, dtype=np.int64)
        self.sizes = list(places)
        self.steps = np.where(events > 0, of[np.abs(events) - 1], ~of[np.abs(events) - 1])
        self._stages = stages(tape)

    @cached_property
    def spans(self) -> tuple[Span, ...]:
        """The events of each stage, in order; a stage that is entered again has several."""
        return tuple(Span(stage, start, end, self.sizes, self.steps) for stage, start, end in self._stages)

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
            if stage not in found or live[event] > found[stage][0]:
                found[stage] = (int(live[event]), event - 1)
        return found
