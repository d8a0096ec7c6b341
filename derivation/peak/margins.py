"""The proofs of ``derivation.peak.proof`` for many points at once, in 64-bit integers that cannot overflow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from derivation.peak.liveness import Point
from derivation.peak.proof import Monomial, bound, levels, slack_bytes
from derivation.tape.symbols import SYMBOLS, Size, as_poly

Integers = NDArray[np.int64]
Flags = NDArray[np.bool_]
MAX_EXACT = 2**62
MAX_WEIGHT = 16
ONE: Monomial = (0,) * len(SYMBOLS)


class Margins:
    """Margins between points that occur at any prompt length and count no VAE tiles; of others nothing is proven."""

    def __init__(self, points: Sequence[Point]) -> None:
        sizes: dict[Size, int] = {}
        self._plain = np.array([_is_plain(point) for point in points])
        for point in (p for p, plain in zip(points, self._plain, strict=True) if plain):
            for nbytes, _ in point.terms:
                sizes.setdefault(nbytes, len(sizes))
        monomials: dict[Monomial, int] = {ONE: 0}
        for nbytes in sizes:
            for monomial in as_poly(nbytes):
                monomials.setdefault(monomial, len(monomials))
        self._counts = np.zeros((len(points), len(sizes)), dtype=np.int64)
        for row, point in enumerate(points):
            for nbytes, count in point.terms if self._plain[row] else ():
                self._counts[row, sizes[nbytes]] += count
        self._sizes = _matrix([as_poly(nbytes) for nbytes in sizes], monomials)
        self._slack = np.array([slack_bytes(nbytes) for nbytes in sizes], dtype=np.int64)
        self._bounds = {base: _Bounds(monomials, base) for base in sorted({0, *levels(monomials)})}
        self._exact = self._is_exact()

    def _is_exact(self) -> bool:
        """Return whether no sum of products of a margin, and of its bounds, reaches MAX_EXACT."""
        counts = 2 * MAX_WEIGHT * np.abs(self._counts).max(axis=0, initial=0).astype(np.float64)
        raw = counts @ np.abs(self._sizes.astype(np.float64)) + counts @ self._slack
        return all(bool((raw @ bounds.magnitude < MAX_EXACT).all()) for bounds in self._bounds.values())

    def decide(self, points: Sequence[int]) -> bool:
        """Return whether what is not proven here of ``points`` has no proof in ``derivation.peak.proof`` either."""
        return self._exact and bool(self._plain[list(points)].all())

    def proven(self, uppers: Sequence[tuple[int, int]], lowers: Sequence[int]) -> Flags:
        """Return, for each of ``lowers``, True if ``uppers``, (point, weight) each, are proven to take no fewer bytes.

        Weights are positive and at most MAX_WEIGHT in all.
        """
        result = np.zeros(len(lowers), dtype=np.bool_)
        if not self.decide([point for point, _ in uppers]):
            return result
        weight = sum(weight for _, weight in uppers)
        beyond = sum(w * self._counts[point] for point, w in uppers) - weight * self._counts[lowers]
        margins = beyond @ self._sizes
        margins[:, 0] -= np.maximum(-beyond, 0) @ self._slack
        result |= (margins >= 0).all(axis=1)
        for bounds in self._bounds.values():
            todo = np.flatnonzero(~result & bounds.fits(margins))
            result[todo] = bounds.no_negative(margins[todo])
        found: Flags = result & self._plain[lowers]
        return found


class _Bounds:
    """The bounds of every monomial in the shifts from one base level."""

    def __init__(self, monomials: Mapping[Monomial, int], base: int) -> None:
        lower, upper = ([dict(bound(m, base, side, frozenset(), "")) for m in monomials] for side in (True, False))
        shifted: dict[Monomial, int] = {}
        for entry in (*lower, *upper):
            for monomial in entry:
                shifted.setdefault(monomial, len(shifted))
        self._lower, self._upper = _matrix(lower, shifted), _matrix(upper, shifted)
        self.magnitude = (np.abs(self._lower) + np.abs(self._upper)).astype(np.float64)
        found = [levels([monomial]) for monomial in monomials]
        self._on_level = np.array([base in own for own in found])
        self._on_any = np.array([bool(own) for own in found])
        self._base = base

    def fits(self, margins: Integers) -> Flags:
        """Return where the margin has a side of the base level, or none at all for level 0."""
        fits: Flags = (margins[:, self._on_level] != 0).any(axis=1)
        sideless: Flags = (margins[:, self._on_any] == 0).all(axis=1)
        if self._base == 0:
            fits[sideless] = True
        return fits

    def no_negative(self, margins: Integers) -> Flags:
        """Return where the margin's lower bound has no negative coefficient."""
        total = np.maximum(margins, 0) @ self._lower + np.minimum(margins, 0) @ self._upper
        return np.logical_not((total < 0).any(axis=1))


def _is_plain(point: Point) -> bool:
    whole = point.max_length is None and point.tile is None
    return whole and all(isinstance(count, int) for _, count in point.terms)


def _matrix(rows: Sequence[Mapping[Monomial, int]], columns: Mapping[Monomial, int]) -> Integers:
    result = np.zeros((len(rows), len(columns)), dtype=np.int64)
    for row, polynomial in enumerate(rows):
        for monomial, coefficient in polynomial.items():
            result[row, columns[monomial]] = int(coefficient)
    return result
