"""Live sets of two variants side by side: which of one are proven to take no more bytes than one of the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from derivation.equation.numbering import Numbering, Place
from derivation.peak.dominance import sample_sizes
from derivation.peak.liveness import Point, cut_at
from derivation.peak.proof import margin, proven_nonnegative
from derivation.tape.evaluate import MAX_INT64
from derivation.tape.program import Variant
from derivation.tape.symbols import MAX_LEVELS, RING, ceil512, evaluate
from derivation.tape.tiles import Tile

# Sizes at which a proof is refused before it is tried.
SAMPLES = 6

# Live sets: (the stage where stages are told apart, the number) -> the first event.
Events = Mapping[tuple[str, bytes], int]


@dataclass(frozen=True, slots=True)
class Moments:
    """Live sets of a variant with some symbols put to 1, and their bytes [sets, samples] at sizes where they are 1."""

    variant: Variant
    sets: Sequence[tuple[tuple[str, bytes], int]]
    numbering: Numbering
    samples: NDArray[Any]

    @classmethod
    def of(cls, variant: Variant, events: Events, numbering: Numbering, tile: Tile | None) -> Moments:
        """Return live sets of a variant as moments."""
        counts = numbering.rows(number for _, number in events)
        used, places = np.flatnonzero(counts.any(axis=0)), numbering.places
        table = [_sampled(places[i], numbering.ones, tile) for i in used.tolist()]
        largest = max((nbytes for row in table for nbytes in row), default=0)
        exact = np.int64 if int(np.abs(counts).sum(axis=1).max(initial=0)) * largest < MAX_INT64 else object
        shape = len(used), len(_samples(numbering.ones, tile))
        samples = counts[:, used].astype(exact) @ np.array(table, dtype=exact).reshape(shape)
        return cls(variant, list(events.items()), numbering, samples)

    def cover(self, others: Moments) -> bool:
        """Return True if each of ``others`` is proven to take no more bytes than one of these of its stage.

        A sample that denies it comes before the proof.
        """
        for lower, ((stage, _), _) in enumerate(others.sets):
            fits = np.flatnonzero((self.samples >= others.samples[lower]).all(axis=1))
            point = others.point(lower)
            if not any(self.sets[i][0][0] == stage and _no_smaller(self.point(i), point) for i in fits.tolist()):
                return False
        return True

    def point(self, index: int) -> Point:
        """Return the live set as a point of any prompt length, wherever it occurs."""
        (_, number), event = self.sets[index]
        tape = self.variant.tape
        return Point(0, "", self.numbering.terms(number), None, tape.tile, cut_at(tape, event))


@lru_cache(maxsize=4096)
def _no_smaller(upper: Point, lower: Point) -> bool:
    return proven_nonnegative(margin([(upper, 1)], lower), lower)


@lru_cache(maxsize=65536)
def _sampled(place: Place, ones: frozenset[str], tile: Tile | None) -> list[int]:
    """Return the bytes of the storages of one size at some sizes at which ``ones`` are 1."""
    nbytes, count = place
    times = 1 if count is None else RING({count: 1})
    return [ceil512(evaluate(nbytes, values)) * evaluate(times, values) for values in _samples(ones, tile)]


@lru_cache(maxsize=1024)
def _samples(ones: frozenset[str], tile: Tile | None) -> tuple[dict[str, int], ...]:
    """Return some sizes at which ``ones`` are 1 and all kinds of VAE tiles occur."""
    table = sample_sizes(MAX_LEVELS, tile)
    rows = [dict(zip(table, map(int, row), strict=True)) for row in zip(*table.values(), strict=True)]
    fitting = [row for row in rows if all(row.values()) and all(row.get(name, 1) == 1 for name in ones)]
    return tuple(fitting[:: len(fitting) // SAMPLES + 1])
