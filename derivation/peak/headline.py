"""From surviving program points to what a paper prints: polynomials in H, W, L and B.

For L > 1 and sides that are multiples of ``unit`` = f 2^n (f the VAE's scale factor, n the UNet's downsamplings) every
level's side is exact: h_k = 2^(n - k) h_n, H = f 2^n h_n.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import sympy
from sympy.polys.rings import PolyElement

from derivation.peak.dominance import reduce_points
from derivation.peak.liveness import Point
from derivation.peak.proof import slack_bytes
from derivation.tape.grid import B, Grid, H, L, W
from derivation.tape.symbols import SYMBOLS, Size, as_poly, evaluate, symbol
from derivation.tape.tiles import IN_PIXELS


@dataclass(frozen=True, slots=True)
class Term:
    """One polynomial of a headline Max: bytes as a sympy expression, and the program point behind it."""

    expression: sympy.Expr
    polynomial: PolyElement
    point: Point

    @property
    def rounding_bytes(self) -> int:
        """The most that 512-byte rounding adds to the expression at B = 1."""
        return sum(slack_bytes(n) * count for n, count in self._counts)

    @property
    def least_rounding_bytes(self) -> int:
        """The least that it adds: below 0 where weights are replaced, whose own rounding ends with them."""
        return sum(slack_bytes(n) * count for n, count in self._counts if isinstance(n, int) or count < 0)

    @property
    def _counts(self) -> list[tuple[Size, int]]:
        at_one = {s.name: 1 for s in SYMBOLS}
        return [(n, evaluate(count, at_one)) for n, count in self.point.terms]


def rounding(terms: Sequence[Term]) -> tuple[int, int]:
    """Return the most bytes that 512-byte rounding takes off the largest of some polynomials, and adds, at B = 1."""
    least, most = (term.least_rounding_bytes for term in terms), (term.rounding_bytes for term in terms)
    return max(0, -min(least)), max(0, *most)


def headline(points: Sequence[Point], grid: Grid) -> tuple[Term, ...]:
    """Return the undominated polynomials for sides that are multiples of ``grid.unit``."""
    exact = [_on_grid(point, grid) for point in points]
    kept = reduce_points(exact).kept
    origin = {id(moved): point for moved, point in zip(exact, points, strict=True)}
    return tuple(
        Term(in_pixels(moved.raw(), grid), as_poly(moved.raw()), replace(moved, event=origin[id(moved)].event))
        for moved in kept
    )


def _on_grid(point: Point, grid: Grid) -> Point:
    """Express every level's sides in those of the deepest level, merging sizes that become equal."""
    terms: dict[Size, Size] = {}
    for nbytes, count in point.terms:
        moved = _deepest(nbytes, grid)
        terms[moved] = terms.get(moved, 0) + count
    return replace(point, terms=tuple(terms.items()))


def _deepest(size: Size, grid: Grid) -> Size:
    if isinstance(size, int):
        return size
    last = grid.levels - 1
    pairs = [(symbol(f"{side}{k}"), symbol(f"{side}{last}") * (1 << (last - k))) for k in range(last) for side in "hw"]
    return size.compose(pairs)


def in_pixels(size: Size, grid: Grid) -> sympy.Expr:
    """Return a polynomial in the deepest level's sides as an expression in H, W, L, B and the symbols of VAE tiles.

    >>> from derivation.tape.symbols import symbol
    >>> in_pixels(1536 * symbol("B") * symbol("h0") * symbol("w0"), Grid(8, 1))
    24*B*H*W
    """
    last = grid.levels - 1
    meaning = {"B": B, "L": L, f"h{last}": H / grid.unit, f"w{last}": W / grid.unit}
    meaning |= {n: symbol if n[0] in "NE" else symbol / grid.vae_scale_factor for n, symbol in IN_PIXELS.items()}
    return sympy.Add(
        *(
            sympy.Mul(int(c), *(meaning[SYMBOLS[i].name] ** p for i, p in enumerate(monomial) if p))
            for monomial, c in as_poly(size).items()
        )
    )


def maximum(expressions: Iterable[sympy.Expr]) -> sympy.Expr:
    """Return the Max of the expressions, unevaluated; one expression is returned as it is."""
    distinct = list(dict.fromkeys(expressions))
    return distinct[0] if len(distinct) == 1 else sympy.Max(*distinct, evaluate=False)
