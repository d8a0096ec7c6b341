"""LaTeX: the headline equation, labelled, in a column of any paper; its definitions; notes where they are asked for."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fractions import Fraction
from functools import partial
from typing import Any

import sympy

from derivation.equation.record import Equation
from derivation.errors import one_of
from derivation.export.render import Facts, facts, render
from derivation.peak.headline import Term
from derivation.tape.grid import B, H, L, W
from derivation.tape.tiles import IN_PIXELS
from derivation.text import grouped, human

SPECIAL = {"_": r"\_", "%": r"\%", "&": r"\&", "#": r"\#", "$": r"\$", "{": r"\{", "}": r"\}"}
GUIDANCE = {True: "with classifier-free guidance", False: "without guidance"}
# article's twocolumn has columns of 229.5 pt (size10.clo); braces, the continuation's indent and a comma take the rest.
ROW_POINTS = 185
# Points a character of Computer Modern at 10 pt (cmr10.tfm, cmmi10.tfm), fractions and indices at 7 pt.
POINTS = {
    r"\\tfrac\{(.*?)\}\{\d+\}": 4.0,
    r"[_^]\{?(\w)\}?": 4.5,
    r"(?:^| )([+-]) ": 12.2,
    r"\{(,)\}": 2.8,
    r"([0-9])": 5.0,
    r"([A-Z])": 8.8,
}
PEAK, TERMS = "peak", "terms"
# Squares of the table, in pixels: multiples of every walked pipeline's unit.
SIDES = (512, 768, 1024)


def latex(equation: Equation, which: str = PEAK, notes: bool = False) -> str:
    """Return the peak, or one stage's bytes, as labelled equations that fit a column of 229 pt, with definitions.

    ``which`` is "peak", the name of a stage, or "terms" for a table of the peak's; with ``notes`` follow assumptions,
    every stage, crossovers and what does not matter. Raises DerivationError for an unknown stage.
    """
    one_of("which", which, (PEAK, TERMS, *equation.stages(True)))
    if which == TERMS:
        return _terms(equation)
    chosen = _peak if which == PEAK else _stage
    return render(
        "peak_vram.tex.j2",
        equation,
        sections=[{"title": GUIDANCE[g], **chosen(equation, which, g)} for g in (True, False)],
        notes=[_notes(equation, guidance) for guidance in (True, False)] if notes else [],
        lines=lines,
        text=text,
        size=readable_bytes,
        tiles=tile_definitions(equation),
        comment=_comment(facts(equation)),
    )


def _label(equation: Equation, guidance: bool, *parts: str) -> str:
    name = re.sub(r"[^a-z0-9]+", "-", equation.name.lower().rstrip("/").split("/")[-1])
    return ":".join([name, *parts, *["unguided"] * (not guidance)]).replace("_", "-")


def _peak(equation: Equation, which: str, guidance: bool) -> dict[str, Any]:
    terms = equation.pipeline_stage(guidance).terms
    weights = grouped(equation.weights_bytes, "{,}")
    left = f"M = \\underbrace{{{weights}}}_{{\\text{{weights}}}} +"
    stages = [term.point.stage for term in terms]
    return {"label": _label(equation, guidance, PEAK), "left": left, "terms": terms, "stages": stages}


def _stage(equation: Equation, name: str, guidance: bool) -> dict[str, Any]:
    left, terms = f"M_{{\\text{{{text(name)}}}}} =", equation.stages(guidance)[name].terms
    return {"label": _label(equation, guidance, name), "left": left, "terms": terms, "stages": []}


def _terms(equation: Equation) -> str:
    """Return a ``table`` of weights, terms and peak under guidance, for one prompt of usual length.

    345 pt wide at most, the text of article.
    """
    stage, length = equation.pipeline_stage(True), equation.defaults["L"]
    rows = [
        {
            "meaning": f"{term.point.stage}: {witness.op} of {witness.module or 'the pipeline'}",
            "lines": lines(term),
            "bytes": [int(term.expression.subs({H: side, W: side, L: length, B: 1})) for side in SIDES],
        }
        for term, witness in zip(stage.terms, stage.witnesses, strict=True)
    ]
    return render(
        "terms.tex.j2",
        equation,
        label=_label(equation, True, TERMS),
        guidance=GUIDANCE[True],
        length=length,
        sides=SIDES,
        rows=rows,
        peaks=[equation.weights_bytes + max(column) for column in zip(*(row["bytes"] for row in rows), strict=True)],
        text=text,
        grouped=partial(grouped, space="{,}"),
    )


def _notes(equation: Equation, guidance: bool) -> dict[str, Any]:
    return {
        "title": GUIDANCE[guidance],
        "stages": [_stage(equation, name, guidance) for name in equation.stages(guidance)],
        "crossovers": equation.crossovers(guidance),
        "irrelevant": equation.irrelevant(guidance),
        "rounding_bytes": max(term.rounding_bytes for term in equation.pipeline_stage(guidance).terms),
    }


def tile_definitions(equation: Equation) -> list[str]:
    """Return ``symbol = ...`` for every symbol of VAE tiles, in pixels; lines may break within them."""
    found = (f"{symbol.name} = {sympy.latex(value)}" for symbol, value in equation.grid.definitions.items())
    return [re.sub(r"\\(?:left|right)([()])", r"\1", definition) for definition in found]


def text(words: str) -> str:
    r"""Return words with LaTeX's special characters escaped.

    >>> print(text("vae_decode 5%"))
    vae\_decode 5\%
    """
    return "".join(SPECIAL.get(c, c) for c in words)


def lines(term: Term) -> list[str]:
    """Return a polynomial as lines of at most ``ROW_POINTS``, but one monomial at least."""
    found = [""]
    for part in re.split(r" (?=[+-] )", term_latex(term)):
        if found[-1] and points(found[-1]) + points(part) > ROW_POINTS:
            found.append(part)
        else:
            found[-1] = f"{found[-1]} {part}".strip()
    return found


def points(formula: str) -> float:
    r"""Return about how wide a formula is at 10 pt.

    >>> points(r"\tfrac{1{,}149}{8}\,B H W + 6{,}400"), points("B^{2}")
    (77.4, 13.3)
    """
    width = 0.0
    for pattern, each in POINTS.items():
        width += sum(each * len(re.sub(r"\W", "", found) or "+") for found in re.findall(pattern, formula))
        formula = re.sub(pattern, " ", formula)
    return width


def term_latex(term: Term) -> str:
    """Return a polynomial in descending powers of H W, every monomial in the order B, H W, L, symbols of VAE tiles.

    Monomials of tiles with the same coefficient share it and B, before parentheses.
    """
    tiles = [symbol for symbol in IN_PIXELS.values() if symbol in term.expression.free_symbols]
    symbols = (H, W, L, B, *tiles)
    parts: dict[str, list[str]] = {}
    for powers, c in sympy.Poly(term.expression, *symbols).terms():
        of = {s.name: power for s, power in zip(symbols, powers, strict=True)}
        if tiled := any(powers[4:]):
            shared, own = monomial(c, [("B", of.pop("B"))]), monomial(Fraction(1), of.items())
        else:
            shared, own = monomial(c, ((name, of[name]) for name in "BHWL")), ""
        parts.setdefault(shared, []).extend([own] * tiled)
    shown = (f"{shared} {_together(own)}" if own else shared for shared, own in parts.items())
    return " + ".join(shown).replace("+ -", "- ")


def _together(own: list[str]) -> str:
    return f"({' + '.join(own)})" if len(own) > 1 else own[0]


def monomial(value: Fraction | sympy.Rational, powers: Iterable[tuple[str, int]], space: str = "{,}") -> str:
    r"""Return a coefficient and symbols to their powers; ``space`` stands between a number's groups of digits.

    >>> print(monomial(Fraction(-12299, 8), [("B", 1), ("H", 2), ("W", 0)]))
    -\tfrac{12{,}299}{8}\,B H^{2}
    """
    letters = " ".join(name if power == 1 else f"{name}^{{{power}}}" for name, power in powers if power)
    sign, top, bottom = "-" * bool(value < 0), grouped(abs(value.numerator), space), grouped(value.denominator, space)
    number = f"{sign}{top}" if value.denominator == 1 else f"{sign}\\tfrac{{{top}}}{{{bottom}}}"
    return letters if value == 1 and letters else f"{number}\\,{letters}".removesuffix("\\,")


def readable_bytes(value: int) -> str:
    r"""Return a number of bytes in the largest binary unit that it fills.

    >>> print(readable_bytes(3 * 2**29))
    1.50\,\mathrm{GiB}
    """
    number, unit = human(value).split()
    return f"{number}\\,\\mathrm{{{unit}}}"


def _comment(header: Facts) -> list[str]:
    return [
        header.title,
        f"Generated by {header.generator}: do not edit.",
        f"Options: {', '.join(header.options)}.",
        f"Follows the allocations of {', '.join(header.versions)}.",
        "Needs amsmath; fits a column of 229 pt at 10 pt.",
    ]
