"""From a tape to its live bytes at every event, in numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from derivation.tape.symbols import Size, ceil512, evaluate
from derivation.tape.tape import Tape

MAX_INT64 = 2**63 - 1


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
    """Distinct live sets of a tape: ``counts`` [sizes, live sets] of ``sizes``, (nbytes, count) each.

    ``places`` holds the first event and the stage of each.
    """

    sizes: list[tuple[Size, Size]]
    places: list[tuple[int, str]]
    counts: NDArray[np.int32]

    @classmethod
    def of(cls, evaluator: Evaluator) -> LiveSets:
        """Return each distinct live set of a stage at the tape's maxima, but empty ones."""
        places = evaluator.maxima
        events = np.array([event for event, _ in places], dtype=np.int64)
        steps = evaluator.steps[: int(events.max(initial=-1)) + 1]
        changes = np.zeros((len(events), len(evaluator.sizes)), dtype=np.int32)
        rows = np.searchsorted(events, np.arange(len(steps)))
        np.add.at(changes, (rows, np.where(steps < 0, ~steps, steps)), np.where(steps < 0, -1, 1))
        counts = np.cumsum(changes, axis=0, dtype=np.int32)
        first: dict[tuple[str, bytes], int] = {}
        for row, (_, stage) in enumerate(places):
            first.setdefault((stage, counts[row].tobytes()), row)
        kept = [row for row in first.values() if counts[row].any()]
        return cls(evaluator.sizes, [places[row] for row in kept], np.ascontiguousarray(counts[kept].T))


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
    def maxima(self) -> list[tuple[int, str]]:
        """(event, stage) where a stage starts, where a storage's death follows a birth, and at a last birth."""
        born = self.steps >= 0
        found: list[tuple[int, str]] = []
        for stage, start, end in self._stages:
            grown, falls = np.append(True, born[start:end]), np.append(~born[start:end], True)
            found += [(start - 1 + int(i), stage) for i in np.flatnonzero(grown & falls)]
        return found

    @cached_property
    def live_sets(self) -> LiveSets:
        """The tape's distinct live sets at its maxima."""
        return LiveSets.of(self)

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
