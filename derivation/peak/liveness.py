"""From a tape to its live sets: the bytes alive at every local maximum, as polynomials."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from derivation.tape.evaluate import Evaluator, Span
from derivation.tape.events import Allocation
from derivation.tape.symbols import RING, Size, as_poly
from derivation.tape.tape import Tape
from derivation.tape.tiles import Tile

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


def local_maxima(tape: Tape, evaluator: Evaluator | None = None) -> list[Point]:
    """Return each distinct live set that a stage starts with, or that a storage's death follows, or the last.

    Its sizes stand in the order in which they appeared.
    """
    alive, points = Terms(), dict[tuple[str, frozenset[Any]], Point]()
    for span in (evaluator or Evaluator(tape)).spans:
        found, alive = _grown(span, alive)
        for place, terms in found:
            event, stage = span.start + place - 1, span.stage
            point = Point(event, stage, terms, tape.longest.get(stage), tape.tile, cut_at(tape, event))
            points.setdefault((stage, frozenset(terms)), point)
    return list(points.values())


@lru_cache(maxsize=128)
def _grown(span: Span, before: Terms) -> tuple[Sequence[tuple[int, Terms]], Terms]:
    """Return the place and the terms of each live set of a span that starts with ``before``, and what is alive last."""
    sizes = list(dict.fromkeys(nbytes for nbytes, _ in (*before, *span.sizes)))
    index = {nbytes: i for i, nbytes in enumerate(sizes)}
    kinds = [(index[nbytes], count) for nbytes, count in span.sizes]
    alive: dict[int, Size] = {index[nbytes]: count for nbytes, count in before}
    found: dict[frozenset[tuple[int, Size]], tuple[int, Terms]] = {}
    steps, done = span.steps.tolist(), 0

    def terms(end: int) -> Terms:
        for step in steps[done:end]:
            kind, count = kinds[max(step, ~step)]
            _apply(alive, kind, count if step >= 0 else -count)
        return tuple((sizes[kind], count) for kind, count in alive.items())

    for place in span.live_sets.places:
        here, done = terms(place), place
        found.setdefault(frozenset(alive.items()), (place, here))
    return list(found.values()), terms(len(steps))


def cut_at(tape: Tape, event: int) -> frozenset[str]:
    """Return the symbols of VAE tiles without which an event does not occur."""
    return next((symbols for start, end, symbols in tape.cut if start <= event < end), frozenset())


def _apply(alive: dict[int, Size], kind: int, change: Size) -> None:
    total = alive.get(kind, 0) + change
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
