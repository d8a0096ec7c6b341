"""LaTeX: the headline equation, labelled, in a column of any paper; its definitions; notes where they are asked for."""

from __future__ import annotations

import re
from fractions import Fraction
from functools import partial
from typing import Any

import sympy

from derivation.equation.record import Equation
from derivation.errors import one_of
from derivation.export.latex_device import device
from derivation.export.render import Facts, facts, render
from derivation.export.tex import monomial, readable_bytes, rows, text
from derivation.peak.headline import Term, rounding
from derivation.tape.grid import B, H, L, W
from derivation.tape.tiles import IN_PIXELS
from derivation.text import grouped

GUIDANCE = {True: "with classifier-free guidance", False: "without guidance"}
PEAK, TENSORS, TERMS, DEVICE = "peak", "tensors", "terms", "device"
# Squares of the table, in pixels: multiples of every walked pipeline's unit.
SIDES = (512, 768, 1024)


def latex(equation: Equation, which: str = PEAK, notes: bool = False) -> str:
    """Return the peak, or one stage's bytes, as labelled equations that fit a column of 229 pt, with definitions.

    ``which`` is "peak" or "tensors", the name of a stage, "terms" for a table of the peak's, or "device" for what
    nvidia-smi shows; with ``notes`` follow assumptions, every stage, crossovers and what does not matter. Raises
    DerivationError for an unknown stage, and for "device" without a GPU.
    """
    one_of("which", which, (PEAK, TENSORS, TERMS, DEVICE, *equation.stages(True)))
    if which in (TERMS, DEVICE):
        return _terms(equation) if which == TERMS else device(equation, _label(equation, True, DEVICE))
    chosen = _peak if which in (PEAK, TENSORS) else _stage
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
    return {
        "label": _label(equation, guidance, PEAK),
        "left": left,
        "terms": terms,
        "stages": stages,
        "meaning": "$M$ is the peak GPU memory",
        "weights": equation.weights,
    }


def _stage(equation: Equation, name: str, guidance: bool) -> dict[str, Any]:
    symbol, terms = f"M_{{\\text{{{text(name)}}}}}", equation.stages(guidance)[name].terms
    meaning = f"${symbol}$ is the peak of this stage beyond the weights,"
    label = _label(equation, guidance, name)
    return {"label": label, "left": f"{symbol} =", "terms": terms, "stages": [], "meaning": meaning, "weights": {}}


def _terms(equation: Equation) -> str:
    """Return a ``table`` of weights, terms and peak under guidance, for one prompt of usual length.

    229 pt wide at most, the column of two-column classes.
    """
    stage, length = equation.pipeline_stage(True), equation.defaults["L"]
    rows = [
        {
            "meaning": f"{term.point.stage}: {witness.op} of {witness.module or 'the pipeline'}",
            "lines": lines(term),
            "bytes": [_bytes(equation, term, side) for side in SIDES],
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


def _bytes(equation: Equation, term: Term, side: int) -> int:
    at = {H: side, W: side, L: equation.defaults["L"], B: 1}
    return int(equation.grid.explicit(term.expression).subs(at))


def _notes(equation: Equation, guidance: bool) -> dict[str, Any]:
    return {
        "title": GUIDANCE[guidance],
        "stages": [_stage(equation, name, guidance) for name in equation.stages(guidance)],
        "crossovers": equation.crossovers(guidance),
        "irrelevant": equation.irrelevant(guidance),
        "rounding_bytes": rounding(equation.pipeline_stage(guidance).terms),
    }


def tile_definitions(equation: Equation) -> list[str]:
    """Return ``symbol = ...`` for every symbol of VAE tiles, in pixels; lines may break within them."""
    found = (f"{symbol.name} = {sympy.latex(value)}" for symbol, value in equation.grid.definitions.items())
    return [re.sub(r"\\(?:left|right)([()])", r"\1", definition) for definition in found]


def lines(term: Term) -> list[str]:
    """Return a polynomial in rows."""
    return rows(re.split(r" (?=[+-] )", term_latex(term)))


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


def _comment(header: Facts) -> list[str]:
    return [
        header.title,
        f"Generated by {header.generator}: do not edit.",
        f"Options: {', '.join(header.options)}.",
        f"Follows the allocations of {', '.join(header.versions)}.",
        "Needs amsmath; fits a column of 229 pt at 10 pt.",
    ]
