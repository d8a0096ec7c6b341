"""Proofs that one live set takes at least as many bytes as another, at every size.

Exact bytes of a live set are sum(count * ceil512(nbytes)). With g = gcd of a size's coefficients and 512,
nbytes <= ceil512(nbytes) <= nbytes + 512 - g. So a point B dominates A where
raw(B - A) - sum over A's surplus of count * (512 - g) >= 0 for all sizes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import chain, combinations
from math import gcd

from sympy.polys.rings import PolyElement

from derivation.peak.liveness import Point
from derivation.tape.symbols import (
    BLOCK_BYTES,
    INDEX,
    MAX_LEVELS,
    RING,
    SYMBOLS,
    TILE_AXES,
    Size,
    as_poly,
    free_names,
    is_tile,
    product,
    symbol,
)
from derivation.tape.tiles import Tile

Monomial = tuple[int, ...]
Coefficients = dict[Monomial, int]

# Axes of the shifted domain: batch - 1, length - 1, height - 1, width - 1 (at the base level), then a VAE tile's
# height - 1 and width - 1, and the other symbols of tiles less their least value.
BATCH, LENGTH, HEIGHT, WIDTH, TILE_HEIGHT, TILE_WIDTH = range(6)
AXIS = {"B": BATCH, "L": LENGTH, "h": HEIGHT, "w": WIDTH, "Th": TILE_HEIGHT, "Tw": TILE_WIDTH}
AXIS |= {name: 6 + i for i, name in enumerate(("Nh", "Nw", "Ch", "Rh", "Rw", "Qh", "Qw"))}
AXES = len(AXIS)
LENGTH_INDEX = INDEX["L"]
# A VAE tile is no larger than the latents.
TILE_SIDES: dict[int, int | None] = {TILE_HEIGHT: HEIGHT, TILE_WIDTH: WIDTH}
# Denominators of ceil(x / 2^k) bounds are cleared with 2^SCALE a side.
SCALE = MAX_LEVELS - 1


@lru_cache(maxsize=65536)
def slack_bytes(size: Size) -> int:
    """Return the most that rounding up to 512 bytes can add to ``size``.

    >>> slack_bytes(1024), slack_bytes(640), slack_bytes(7)
    (0, 384, 505)
    """
    if isinstance(size, int):
        return -size % BLOCK_BYTES
    return BLOCK_BYTES - gcd(BLOCK_BYTES, *(int(c) for c in size.values()))


def margin(uppers: Sequence[tuple[Point, int]], lower: Point) -> PolyElement:
    """Return a lower bound of sum(weight * bytes(upper)) - sum(weight) * bytes(lower)."""
    difference: dict[Size, Size] = {}
    for upper, weight in uppers:
        for nbytes, count in upper.terms:
            difference[nbytes] = difference.get(nbytes, 0) + weight * count
    total_weight = sum(weight for _, weight in uppers)
    for nbytes, count in lower.terms:
        difference[nbytes] = difference.get(nbytes, 0) - total_weight * count
    total: Coefficients = {}
    for nbytes, count in difference.items():
        if not count:
            continue
        slack = product((_surplus(count), -slack_bytes(nbytes)))
        for monomial, coefficient in chain(as_poly(product((nbytes, count))).items(), as_poly(slack).items()):
            total[monomial] = total.get(monomial, 0) + coefficient
    return RING(total)


def _surplus(count: Size) -> Size:
    """Return the part of ``count`` that is below zero, as a positive size."""
    if isinstance(count, int):
        return max(-count, 0)
    return RING({monomial: -c for monomial, c in count.items() if c < 0})


def proven_nonnegative(size: Size, where: Point | None = None) -> bool:
    """Return True if ``size`` >= 0 is proven for all sizes at which a point occurs, with h_{k+1} = ceil(h_k / 2).

    Theorem: with x the side at one base level, x = 1 + s, every level's side lies between two linear
    functions of s with coefficients >= 0. Bounding positive terms from below and negative ones from above
    leaves a polynomial in the shifts; if all its coefficients are >= 0, so is ``size``.
    """
    polynomial = as_poly(size)
    if all(c >= 0 for c in polynomial.values()):
        return True
    if where is not None and where.max_length is not None:
        polynomial = _longest(polynomial, where.max_length)
    tile, cut = (None, frozenset[str]()) if where is None else (where.tile, where.cut)
    if tile is not None:
        polynomial = _second_cut(polynomial, tile, cut)
    return any(_bounded_below(polynomial, base, tile, cut) for base in sorted(levels(polynomial) or {0}))


def _second_cut(polynomial: PolyElement, tile: Tile, cut: frozenset[str]) -> PolyElement:
    """Where there is a second cut tile of q latents, the first has r = q + S."""
    pairs = [(symbol(f"R{axis}"), symbol(f"Q{axis}") + tile.step) for axis in TILE_AXES if f"Q{axis}" in cut]
    return polynomial.compose(pairs) if pairs else polynomial


def _longest(polynomial: PolyElement, max_length: int) -> PolyElement:
    """Put L = ``max_length`` into the negative terms."""
    result = RING(0)
    for monomial, coefficient in polynomial.items():
        power = monomial[LENGTH_INDEX] if coefficient < 0 else 0
        rest = (*monomial[:LENGTH_INDEX], monomial[LENGTH_INDEX] - power, *monomial[LENGTH_INDEX + 1 :])
        result += RING({rest: coefficient * max_length**power})
    return result


def levels(monomials: Iterable[Monomial]) -> set[int]:
    """Return the levels of the sides in some monomials."""
    return {
        int(SYMBOLS[i].name[1:])
        for monomial in monomials
        for i, power in enumerate(monomial)
        if power and SYMBOLS[i].name[0] in "hw"
    }


def _bounded_below(polynomial: PolyElement, base: int, tile: Tile | None, cut: frozenset[str]) -> bool:
    if tile is None:
        return _no_negative(_shifted(polynomial, base, cut, ""))
    choices: tuple[tuple[int, ...], ...] = ((), (TILE_HEIGHT,), (TILE_WIDTH,), (TILE_HEIGHT, TILE_WIDTH))
    bounds = [*(dict.fromkeys(axes) for axes in choices), *([TILE_SIDES] if base == 0 else [])]
    axes = sorted({name[1] for name in free_names(polynomial) if name[0] in "RQ"})
    bounded = ("".join(chosen) for n in range(len(axes), -1, -1) for chosen in combinations(axes, n))
    totals = (_shifted(polynomial, base, cut, each) for each in bounded)
    return any(
        _no_negative(_at_most(total, each, tile.side - 1)) for total in totals if _may_rise(total) for each in bounds
    )


def _no_negative(polynomial: Coefficients) -> bool:
    return all(c >= 0 for c in polynomial.values())


def _may_rise(polynomial: Coefficients) -> bool:
    """Return False where a negative term has no factor that ``_at_most`` replaces: it would stay negative."""
    return all(c >= 0 or monomial[TILE_HEIGHT] or monomial[TILE_WIDTH] for monomial, c in polynomial.items())


def _shifted(polynomial: PolyElement, base: int, cut: frozenset[str], bounded: str) -> Coefficients:
    """Return a lower bound of ``polynomial`` in the shifts; cut VAE tiles are ``bounded`` along these axes."""
    total: Coefficients = {}
    for monomial, coefficient in polynomial.items():
        for shifted, factor in bound(tuple(monomial), base, coefficient > 0, cut, bounded):
            total[shifted] = total.get(shifted, 0) + int(coefficient) * factor
    return total


def _at_most(polynomial: Coefficients, axes: Mapping[int, int | None], most: int) -> Coefficients:
    """Put upper bounds of some axes into the negative terms: another axis, or ``most`` where that is None."""
    result: Coefficients = {}
    for monomial, coefficient in polynomial.items():
        powers = list(monomial)
        for axis, other in axes.items() if coefficient < 0 else ():
            if other is None:
                coefficient *= most ** powers[axis]
            else:
                powers[other] += powers[axis]
            powers[axis] = 0
        result[tuple(powers)] = result.get(tuple(powers), 0) + coefficient
    return result


@lru_cache(maxsize=65536)
def bound(
    monomial: Monomial, base: int, lower: bool, cut: frozenset[str], bounded: str
) -> tuple[tuple[Monomial, int], ...]:
    """Return the lower or upper bound of a monomial in the shifts, times 2^(SCALE * 4) in all.

    q <= r <= t - 1 for a cut VAE tile of r or q beside whole ones of t latents; r and q are at least 0, or 1 where
    ``cut`` says that there is such a tile. Along ``bounded`` axes these bounds replace them.
    """
    one: Monomial = (0,) * AXES
    result: Coefficients = {one: 1}
    sides = {HEIGHT: 0, WIDTH: 0}
    for index, power in enumerate(monomial):
        name = SYMBOLS[index].name
        for _ in range(power):
            axis = AXIS[name if is_tile(name) else name[0]]
            constant, slope = (1, 1)
            if axis in sides:
                constant, slope = _side_bound(int(name[1:]), base, lower)
            elif name[0] in "RQ":
                constant = int(name in cut)
                if name[1] in bounded and lower:
                    slope = 0
                elif name[1] in bounded:
                    axis, constant = AXIS[f"T{name[1]}"], 0
            result = _times_linear(result, axis, constant, slope)
            if axis in sides:
                sides[axis] += 1
    missing = 4 - sum(sides.values())
    if missing < 0:
        raise ValueError(f"monomial {monomial} has more than 4 side factors")
    scale = 1 << (SCALE * missing)
    return tuple((shifted, factor * scale) for shifted, factor in result.items() if factor)


def _side_bound(level: int, base: int, lower: bool) -> tuple[int, int]:
    """Return (constant, slope) of 2^SCALE * side(level) >= or <= constant + slope * s, side(base) = 1 + s.

    Deeper levels: x / 2^d <= ceil(x / 2^d) <= (x + 2^d - 1) / 2^d. Shallower: 2^d (x - 1) + 1 <= y <= 2^d x.
    """
    depth = level - base
    if depth >= 0:
        unit = 1 << (SCALE - depth)
        return (unit, unit) if lower else (1 << SCALE, unit)
    factor = 1 << (SCALE - depth)
    return (1 << SCALE, factor) if lower else (factor, factor)


def _times_linear(polynomial: Coefficients, axis: int, constant: int, slope: int) -> Coefficients:
    result: Coefficients = {}
    for monomial, coefficient in polynomial.items():
        raised: Monomial = tuple(power + (i == axis) for i, power in enumerate(monomial))
        result[monomial] = result.get(monomial, 0) + coefficient * constant
        result[raised] = result.get(raised, 0) + coefficient * slope
    return result
