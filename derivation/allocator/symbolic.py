"""The replay with polynomials beside the numbers: one run decides for every size at which it would decide alike.

Sizes of blocks are integers at a reference size that know the sum they stand for, so that the allocator's own code
computes both; each decision is a comparison of two such sums, evaluated at all sizes of a grid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from derivation.allocator.allocator import CachingAllocator, _Block, _Pool
from derivation.allocator.config import AllocatorConfig
from derivation.allocator.report import MIN_LARGE_BYTES, ROUND_LARGE_BYTES, SMALL_BYTES, segment_size
from derivation.tape.symbols import BLOCK_BYTES, Size, evaluate, free_names

Vector: TypeAlias = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Atom:
    """A request's bytes in 512-byte blocks, or the bytes of the segment that is opened for it."""

    nbytes: Size
    is_segment: bool


# A sum of atoms, its constant under None.
Terms = tuple[tuple[Atom | None, int], ...]
# Two numbered sums, and whether the first is less than the second (True) or at most as much.
Comparison = tuple[int, int, bool]


class Points:
    """Sizes at which sums are evaluated; each sum has a number."""

    def __init__(self, values: Sequence[Mapping[str, int]]) -> None:
        self.values = list(values)
        self.arrays = {name: np.array([v[name] for v in values], dtype=np.int64) for name in values[0]}
        self.sums: list[Terms] = []
        self._numbers: dict[Terms, int] = {}
        self._totals: dict[tuple[int, int, int], int] = {}
        self._atoms: dict[Atom, Vector] = {}
        self._vectors: dict[int, Vector] = {}
        self._answers: dict[Comparison, bool] = {}

    def __len__(self) -> int:
        return len(self.values)

    def number(self, terms: Terms) -> int:
        """Return the number of a sum."""
        found = self._numbers.setdefault(terms, len(self.sums))
        if found == len(self.sums):
            self.sums.append(terms)
        return found

    def number_of(self, value: int) -> int:
        """Return the number of the sum that an integer stands for."""
        return value.number if isinstance(value, Carried) else self.number(((None, value),) if value else ())

    def number_of_atom(self, atom: Atom) -> int:
        """Return the number of an atom, of a constant where it is one."""
        varies = bool(free_names(atom.nbytes))
        return self.number(((atom, 1),)) if varies else self.number_of(int(self.atom(atom)[0]))

    def varies(self, number: int) -> bool:
        """Return whether a sum is no constant."""
        return any(atom is not None for atom, _ in self.sums[number])

    def total(self, left: int, right: int, sign: int) -> int:
        """Return the number of one sum plus or minus another."""
        key = (left, right, sign)
        if key not in self._totals:
            total = dict(self.sums[left])
            for atom, count in self.sums[right]:
                total[atom] = total.get(atom, 0) + sign * count
            self._totals[key] = self.number(tuple(sorted(((a, c) for a, c in total.items() if c), key=repr)))
        return self._totals[key]

    def atom(self, atom: Atom) -> Vector:
        """Return an atom at each size."""
        if atom not in self._atoms:
            blocks = np.maximum(-(-self.plain(atom.nbytes) // BLOCK_BYTES) * BLOCK_BYTES, BLOCK_BYTES)
            self._atoms[atom] = segment_bytes(blocks) if atom.is_segment else blocks
        return self._atoms[atom]

    def plain(self, nbytes: Size) -> Vector:
        """Return a request's bytes at each size, before any rounding."""
        found: Vector = np.zeros(len(self), dtype=np.int64) + evaluate(nbytes, self.arrays)  # type: ignore[arg-type]
        return found

    def vector(self, number: int) -> Vector:
        """Return a sum at each size."""
        if number not in self._vectors:
            total = np.zeros(len(self), dtype=np.int64)
            for atom, count in self.sums[number]:
                total += count if atom is None else count * self.atom(atom)
            self._vectors[number] = total
        return self._vectors[number]

    def holds_everywhere(self, comparison: Comparison) -> bool:
        """Return whether a comparison holds at all sizes."""
        if comparison not in self._answers:
            self._answers[comparison] = bool(self.compare(comparison).all())
        return self._answers[comparison]

    def compare(self, comparison: Comparison) -> Vector:
        """Return where a comparison holds."""
        left, right, strict = comparison
        found: Vector = self.vector(left) < self.vector(right) if strict else self.vector(left) <= self.vector(right)
        return found

    def length(self, comparison: Comparison) -> int:
        """Return how many atoms and constants a comparison takes."""
        return len(self.sums[comparison[0]]) + len(self.sums[comparison[1]])


class Carried(int):
    """An integer that knows the sum it stands for; plain integers are constants on its right, and win on its left."""

    points: Points
    number: int

    @classmethod
    def of(cls, value: int, points: Points, number: int) -> Carried:
        """Return ``value`` with what it stands for."""
        made = cls(value)
        made.points, made.number = points, number
        return made

    def __add__(self, other: int) -> Carried:
        total = self.points.total(self.number, self.points.number_of(other), 1)
        return Carried.of(int(self) + int(other), self.points, total)

    def __sub__(self, other: int) -> Carried:
        total = self.points.total(self.number, self.points.number_of(other), -1)
        return Carried.of(int(self) - int(other), self.points, total)


def segment_bytes(blocks: Vector) -> Vector:
    """Return what ``report.segment_size`` is for an array of rounded bytes."""
    own = -(-blocks // ROUND_LARGE_BYTES) * ROUND_LARGE_BYTES
    small, mid = segment_size(SMALL_BYTES), segment_size(SMALL_BYTES + 1)
    found: Vector = np.where(blocks <= SMALL_BYTES, small, np.where(blocks < MIN_LARGE_BYTES, mid, own))
    return found


class GridAllocator(CachingAllocator):
    """The allocator at one of some sizes, with its decisions compared with those at all others.

    ``held`` are the comparisons since ``guarding`` was set that do not hold everywhere.
    """

    def __init__(self, points: Points, reference: int, config: AllocatorConfig | None = None) -> None:
        super().__init__(config)
        self.points, self.reference, self.guarding = points, reference, False
        self.held: set[Comparison] = set()

    def request(self, nbytes: Size) -> Carried:
        """Return a tensor's bytes, rounded, as a number that knows its polynomial."""
        return self._carried(Atom(nbytes, is_segment=False))

    def _carried(self, atom: Atom) -> Carried:
        value = int(self.points.atom(atom)[self.reference])
        return Carried.of(value, self.points, self.points.number_of_atom(atom))

    def places(self, handles: Mapping[int, int]) -> tuple[tuple[int, int, int], ...]:
        """Return where each tensor is: its own number, its segment's rank, the number of the bytes before it."""
        rank = {base: i for i, base in enumerate(self._heads)}
        blocks = [(index, self._live[handle]) for index, handle in sorted(handles.items())]
        return tuple((index, rank[block.base], self._before(block)) for index, block in blocks)

    def _before(self, block: _Block) -> int:
        number = self.points.number(())
        while block.prev is not None:
            block = block.prev
            number = self.points.total(number, self.points.number_of(block.size), 1)
        return number

    def rounded(self, nbytes: int) -> int:
        """Return the request: it is rounded."""
        return nbytes

    def segment_bytes(self, size: int) -> int:
        """Return the bytes of the segment for a request, which know what it is opened for; of pages, the request's."""
        if self.config.expandable_segments:
            return size
        [(atom, count)] = self.points.sums[self.points.number_of(size)]
        return self._carried(Atom(count if atom is None else atom.nbytes, is_segment=True))

    def _find_free(self, pool: _Pool, size: int) -> _Block | None:
        if self.guarding:
            self._guard_choice(pool, size)
        return super()._find_free(pool, size)

    def _guard_choice(self, pool: _Pool, size: int) -> None:
        """Best fit: blocks before the chosen one are too small, it is not, those behind it are no better fit."""
        index = pool.lower_bound(size)
        for free, _, _ in pool.free[:index]:
            self._hold(free, size, strict=True)
        if index < len(pool.free):
            chosen, address, _ = pool.free[index]
            self._hold(size, chosen, strict=False)
            for free, other, _ in pool.free[index + 1 :]:
                self._hold(chosen, free, strict=other < address)

    def _occupy(self, pool: _Pool, block: _Block, size: int) -> None:
        if self.guarding:
            rest = block.size - size
            left, right = (SMALL_BYTES, rest) if rest > SMALL_BYTES else (rest, SMALL_BYTES)
            self._hold(left, right, strict=rest > SMALL_BYTES)
        super()._occupy(pool, block, size)

    def _hold(self, left: int, right: int, strict: bool) -> None:
        comparison = self.points.number_of(left), self.points.number_of(right), strict
        if not self.points.holds_everywhere(comparison):
            self.held.add(comparison)
