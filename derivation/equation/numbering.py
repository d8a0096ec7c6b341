"""Live sets as rows of integers, so that comparing the thousands of two tapes takes no polynomial arithmetic."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from derivation.peak.liveness import Terms
from derivation.peak.proof import Monomial
from derivation.tape.evaluate import LiveSets
from derivation.tape.symbols import INDEX, RING, Size, free_names

# A size, and a monomial of how many storages have it, None for an integer.
Place = tuple[Size, Monomial | None]


@lru_cache(maxsize=65536)
def at(size: Size, ones: frozenset[str]) -> Size:
    """Return ``size`` with ``ones`` put to 1."""
    if isinstance(size, int) or not free_names(size) & ones:
        return size
    gone = {INDEX[name] for name in ones}
    total: dict[Monomial, int] = {}
    for monomial, coefficient in size.items():
        left = tuple(0 if i in gone else power for i, power in enumerate(monomial))
        total[left] = total.get(left, 0) + coefficient
    moved = RING(total)
    return int(moved.LC) if moved.is_ground else moved


class Numbering:
    """Numbers live sets of some ``sizes`` with ``ones`` put to 1: equal numbers are equal live sets.

    A number is a row of counts, one for each size and monomial of its count.
    """

    def __init__(self, ones: frozenset[str], sizes: Iterable[tuple[Size, Size]]) -> None:
        self.ones = ones
        self._places: dict[Place, int] = {}
        self._parts = {kind: list(self._parted(*kind)) for kind in dict.fromkeys(sizes)}

    def _parted(self, nbytes: Size, count: Size) -> Iterator[tuple[int, int]]:
        size, times = at(nbytes, self.ones), at(count, self.ones)
        for monomial, c in ((None, times),) if isinstance(times, int) else times.items():
            yield self._places.setdefault((size, monomial), len(self._places)), int(c)

    def number(self, terms: Terms) -> bytes:
        """Return the number of a live set."""
        row = np.zeros(len(self._places), dtype=np.int32)
        for nbytes, count in terms:
            for place, c in self._parted(nbytes, count):
                row[place] += c
        return row.tobytes()

    @property
    def places(self) -> list[Place]:
        """The size, and the monomial of a count, that each entry of a row counts."""
        return list(self._places)

    def rows(self, numbers: Iterable[bytes]) -> NDArray[np.int32]:
        """Return the rows [numbers, places] behind some numbers."""
        listed = b"".join(numbers)
        return np.frombuffer(listed, dtype=np.int32).reshape(-1, len(self._places))

    def numbers(self, sets: LiveSets) -> list[bytes]:
        """Return the number of each live set."""
        rows = np.zeros((len(self._places), sets.counts.shape[1]), dtype=np.int32)
        for kind, counts in zip(sets.sizes, sets.counts, strict=True):
            for place, c in self._parts[kind]:
                rows[place] += c * counts
        return [row.tobytes() for row in np.ascontiguousarray(rows.T)]

    def terms(self, number: bytes) -> Terms:
        """Return the live set that has a number."""
        found: dict[Size, Size] = {}
        counts: Sequence[int] = np.frombuffer(number, dtype=np.int32).tolist()
        for (size, monomial), count in zip(self._places, counts, strict=True):
            if count:
                found[size] = found.get(size, 0) + (count if monomial is None else RING({monomial: count}))
        return tuple(found.items())
