"""Live sets as integers, so that comparing the thousands of two tapes takes no polynomial arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import accumulate

from derivation.peak.liveness import Evaluator, Terms, born_and_dead
from derivation.peak.proof import Monomial
from derivation.tape.symbols import RING, Size, free_names, symbol

# Fewer than 2^(DIGIT - 1) storages of one size are alive.
DIGIT = 32
HALF = 1 << (DIGIT - 1)


@lru_cache(maxsize=65536)
def at(size: Size, ones: frozenset[str]) -> Size:
    """Return ``size`` with ``ones`` put to 1."""
    if isinstance(size, int) or not free_names(size) & ones:
        return size
    moved = size.compose([(symbol(name), size.ring(1)) for name in sorted(ones)])
    return int(moved.LC) if moved.is_ground else moved


class Numbering:
    """Numbers live sets with ``ones`` put to 1: equal numbers are equal live sets.

    Theorem: the sum of count * 2^(DIGIT place), one place for each size and monomial of its count, is injective
    where every |count| < HALF.
    """

    def __init__(self, ones: frozenset[str]) -> None:
        self._ones = ones
        self._places: dict[tuple[Size, Monomial | None], int] = {}

    def number(self, terms: Terms) -> int:
        """Return the number of a live set."""
        return sum(self._number(nbytes, count) for nbytes, count in terms)

    def _number(self, nbytes: Size, count: Size) -> int:
        size, times = at(nbytes, self._ones), at(count, self._ones)
        parts = ((None, times),) if isinstance(times, int) else times.items()
        return sum(int(c) << DIGIT * self._places.setdefault((size, m), len(self._places)) for m, c in parts)

    def terms(self, number: int) -> Terms:
        """Return the live set that has a number."""
        found: dict[Size, Size] = {}
        for (size, monomial), count in zip(self._places, self._digits(number), strict=False):
            if count:
                found[size] = found.get(size, 0) + (count if monomial is None else RING({monomial: count}))
        return tuple(found.items())

    def _digits(self, number: int) -> Iterator[int]:
        places = len(self._places)
        shifted = number + sum(HALF << DIGIT * place for place in range(places))
        data = shifted.to_bytes(places * DIGIT // 8, "little")
        return (value - HALF for value in memoryview(data).cast("I"))

    def along(self, evaluator: Evaluator) -> list[int]:
        """Return the number of the live set before the first event and after each one."""
        steps = born_and_dead([self._number(nbytes, count) for nbytes, count in evaluator.sizes])
        return list(accumulate(map(steps.__getitem__, evaluator.steps.tolist()), initial=0))
