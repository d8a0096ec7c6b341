"""The few program points that nothing else dominates, each drop proven (``derivation.peak.proof``)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from derivation.peak.liveness import Point
from derivation.peak.margins import Margins
from derivation.peak.proof import margin, proven_nonnegative
from derivation.tape.symbols import BLOCK_BYTES, MAX_LEVELS, SYMBOLS, Size, as_poly
from derivation.tape.tiles import Tile

Samples = NDArray[np.float64]
# Points by index, each with its weight; mixtures with their bytes at the samples.
Uppers = tuple[tuple[int, int], ...]
Mixtures = tuple[Sequence[Uppers], Samples]

# Convex combinations tried: weights in sixteenths, among the points that win most often.
MIX, MIX_AMONG = 16, 5


@dataclass(frozen=True, slots=True)
class Reduction:
    """The outcome: points kept, points proven dominated, and points kept only for want of a proof."""

    kept: tuple[Point, ...]
    candidates: int
    dominated: int
    unproven: int


@lru_cache(maxsize=8)
def sample_sizes(levels: int, tile: Tile | None = None) -> dict[str, Samples]:
    """Return a grid of sizes from tiny to huge, square and narrow, as one array a symbol, with VAE tiles as given."""
    sides: tuple[int, ...] = (1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 33, 64, 127, 256, 1024)
    if tile is not None:  # cut tiles from short to long, many tiles along a side
        sides += tuple(n * tile.step + tile.side + rest for n in (0, 3, 99) for rest in (1, tile.step // 2, -1))
    grid = [
        (b, length, h, w) for b in (1, 2, 64) for length in (1, 77, 1001, 100_001) for h in sides for w in (h, 1, 8, 65)
    ]
    columns = np.array(grid, dtype=np.float64).T
    values = {"B": columns[0], "L": columns[1], "h0": columns[2], "w0": columns[3]}
    for k in range(1, levels):
        for side in "hw":
            values[f"{side}{k}"] = np.ceil(values[f"{side}{k - 1}"] / 2)
    if tile is not None:
        tiles = [tile.sizes(h, w) for _, _, h, w in grid]
        values |= {name: np.array([each[name] for each in tiles], dtype=np.float64) for name in tiles[0]}
    return values


def _bytes_at(points: Sequence[Point]) -> Samples:
    """Return bytes [points, samples] in floating point; 0 where a point does not occur."""
    tile = points[0].tile
    values = sample_sizes(MAX_LEVELS, tile)
    atoms: dict[tuple[Size, Size], int] = {}
    columns = [[atoms.setdefault(term, len(atoms)) for term in p.terms] for p in points]
    table = np.array([_atom(nbytes, tile) * _poly(count, tile) for nbytes, count in atoms])
    incidence = np.zeros((len(points), len(atoms)))
    for row, alive in enumerate(columns):
        incidence[row, alive] = 1
    result: Samples = incidence @ table
    for row, point in enumerate(points):
        if point.max_length is not None:
            result[row, values["L"] > point.max_length] = 0
        for name in point.cut:
            result[row, values[name] == 0] = 0
    return result


@lru_cache(maxsize=2048)
def _atom(nbytes: Size, tile: Tile | None) -> Samples:
    """Return a size in 512-byte blocks at the samples."""
    blocks: Samples = np.ceil(_poly(nbytes, tile) / BLOCK_BYTES)
    return blocks * BLOCK_BYTES


@lru_cache(maxsize=2048)
def _poly(size: Size, tile: Tile | None) -> Samples:
    values = sample_sizes(MAX_LEVELS, tile)
    total = np.zeros_like(values["B"])
    for monomial, coefficient in as_poly(size).items():
        term = np.full_like(total, int(coefficient))
        for index, power in enumerate(monomial):
            if power:
                term = term * values[SYMBOLS[index].name] ** power
        total = total + term
    return total


def reduce_points(points: Sequence[Point]) -> Reduction:
    """Drop every point that others provably dominate at all sizes.

    Points that win at some sample stay. Any other goes where one kept point, or a convex combination of
    two, is proven to be at least as large: max(x, y) >= t x + (1 - t) y for 0 <= t <= 1.
    """
    _, kept, winners = _remembered(_Points(tuple(points)))
    survivors = tuple(points[i] for i in kept)
    return Reduction(survivors, len(points), len(points) - len(kept), len(kept) - winners)


class _Points:
    """Points by what their bytes follow from: their sizes, each one object, and where they occur."""

    def __init__(self, points: tuple[Point, ...]) -> None:
        self.points = points
        self._key = tuple(
            (p.max_length, p.tile, p.cut, *(x for nbytes, count in p.terms for x in (id(nbytes), count)))
            for p in points
        )
        self._hash = hash(self._key)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Points) and self._key == other._key


@lru_cache(maxsize=128)
def _remembered(given: _Points) -> tuple[_Points, tuple[int, ...], int]:
    """Return the points, whose sizes' identities are the key, those that are kept, and how many of them win."""
    points = given.points
    table = _bytes_at(points)
    occurring = table.max(axis=0) > 0
    wins = np.bincount(np.argmax(table[:, occurring], axis=0), minlength=len(points))
    winners = [int(i) for i in np.argsort(-wins, kind="stable") if wins[i]]
    kept = list(winners)
    mixed = _mixtures(table, kept[:MIX_AMONG])
    # a point that dominates another is no smaller at any sample, so it comes first
    shares = (table / np.maximum(table.max(axis=0), 1)).sum(axis=1)
    others = [int(i) for i in np.argsort(-shares, kind="stable") if not wins[i]]
    margins = Margins(points)
    for i in _unproven(margins, table, winners, others):
        if not _dominated(points, margins, table, kept, mixed, i):
            kept.append(i)
            if len(kept) <= MIX_AMONG:
                mixed = _mixtures(table, kept)
    return given, tuple(kept), len(winners)


def _unproven(margins: Margins, table: Samples, uppers: Sequence[int], lowers: Sequence[int]) -> list[int]:
    """Return those of ``lowers`` that none of ``uppers`` is proven to dominate by margins alone."""
    for upper in uppers:
        fits = [i for i, fit in zip(lowers, (table[upper] >= table[lowers]).all(axis=1), strict=True) if fit]
        proven = {i for i, proof in zip(fits, margins.proven([(upper, 1)], fits), strict=True) if proof}
        lowers = [i for i in lowers if i not in proven]
    return list(lowers)


def _dominated(
    points: Sequence[Point], margins: Margins, table: Samples, kept: Sequence[int], mixed: Mixtures, lower: int
) -> bool:
    """Check at the samples first, then prove."""
    length = points[lower].max_length

    def proven(uppers: Uppers) -> bool:
        if margins.decide([lower, *(k for k, _ in uppers)]):
            return bool(margins.proven(uppers, [lower])[0])
        if any(points[k].max_length not in (None, length) for k, _ in uppers):
            return False
        return proven_nonnegative(margin([(points[k], w) for k, w in uppers], points[lower]), points[lower])

    return any(proven(uppers) for uppers in _no_smaller(table, kept, mixed, lower))


def _no_smaller(table: Samples, kept: Sequence[int], mixed: Mixtures, lower: int) -> Iterator[Uppers]:
    """Yield each kept point, then each mixture, that is nowhere below ``lower`` at the samples."""
    fits = (table[kept] >= table[lower]).all(axis=1)
    yield from (((k, 1),) for k, fit in zip(kept, fits, strict=True) if fit)
    fits = (mixed[1] >= MIX * table[lower]).all(axis=1)
    yield from (uppers for uppers, fit in zip(mixed[0], fits, strict=True) if fit)


def _mixtures(table: Samples, among: Sequence[int]) -> Mixtures:
    """Return the convex combinations of two of some points, and MIX times their bytes [combinations, samples]."""
    found = [((a, t), (b, MIX - t)) for a, b in combinations(among, 2) for t in range(1, MIX)]
    rows = [t * table[a] + s * table[b] for (a, t), (b, s) in found]
    return found, np.array(rows).reshape(len(rows), table.shape[1])
