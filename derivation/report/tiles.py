"""What the symbols of VAE tiles in an equation are, as MathML and as LaTeX."""

# ruff: noqa: RUF001

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import sympy

from derivation.peak.headline import Term
from derivation.report.document import Math
from derivation.report.mathml import number, symbol_mathml
from derivation.report.text import VARIABLES, Powers
from derivation.tape.grid import Grid
from derivation.tape.tiles import MEANINGS_IN_PIXELS

LATEX_NAMES = {sympy.Min: "min", sympy.Max: "max"}


@dataclass(frozen=True, slots=True)
class Definition:
    """A symbol of VAE tiles: ``symbol = value`` and what it means."""

    math: Math
    meaning: str


def definitions(terms: Sequence[Term], grid: Grid) -> tuple[Definition, ...]:
    """Return the definitions of the symbols of VAE tiles in ``terms``, and of those that these are written in."""
    found = grid.defined(term.expression for term in terms)
    return tuple(
        Definition(
            Math(
                f"<mrow>{symbol_mathml(symbol)}<mo>=</mo>{_mathml(value)}</mrow>",
                f"{symbol.name} = {sympy.latex(value)}",
            ),
            MEANINGS_IN_PIXELS[symbol],
        )
        for symbol, value in found.items()
    )


def tile_meaning(key: Powers, coefficient: Fraction) -> str:
    """Return what a monomial with symbols of VAE tiles grows with, in words."""
    letters = {symbol.name[0]: power for symbol, power in zip(VARIABLES, key, strict=True) if power}
    sides = sum(p for symbol, p in zip(VARIABLES, key, strict=True) if symbol.name[0] in "TRQ")
    tile = "a whole VAE tile" if "T" in letters and not letters.keys() & set("RQ") else "a cut VAE tile"
    if coefficient < 0:
        return "less what is counted above but not kept yet: the VAE tile that is being run"
    if sides >= 4:
        return f"attention scores, every pixel of {tile} against every pixel"
    if letters.keys() & set("HWC"):
        return "rows of blended VAE tiles that wait to be joined"
    if "N" in letters:
        return f"kept results, each of {tile}: grows with the number of tiles"
    return f"feature maps and results of {tile}: grows with the tile's area, not with the image's"


def _mathml(value: sympy.Expr) -> str:
    """Return sums, products, quotients, min, max and floor."""
    if isinstance(value, sympy.Symbol):
        return symbol_mathml(value)
    if isinstance(value, sympy.Add):
        return f"<mrow>{_sum(value)}</mrow>"
    if isinstance(value, sympy.floor):
        return f"<mrow><mo>⌊</mo>{_mathml(value.args[0])}<mo>⌋</mo></mrow>"
    if isinstance(value, sympy.Min | sympy.Max):
        args = "<mo>,</mo>".join(_mathml(arg) for arg in value.args)
        return f"<mrow><mi>{LATEX_NAMES[type(value)]}</mi><mo>(</mo>{args}<mo>)</mo></mrow>"
    top, bottom = value.as_numer_denom()
    if bottom != 1:
        return f"<mfrac>{_mathml(top)}{_mathml(bottom)}</mfrac>"
    if isinstance(value, sympy.Mul):
        return f"<mrow>{'<mo>&#x2062;</mo>'.join(_mathml(factor) for factor in value.as_ordered_factors())}</mrow>"
    return number(int(value))


def _sum(value: sympy.Add) -> str:
    """Return the terms of a sum, positive ones first."""
    parts: list[str] = []
    for term in sorted(value.as_ordered_terms(), key=lambda term: term.could_extract_minus_sign()):
        negative = term.could_extract_minus_sign()
        sign = "−" if negative else "+" if parts else ""
        parts.append((f"<mo>{sign}</mo>" if sign else "") + _mathml(-term if negative else term))
    return "".join(parts)
