"""How the report writes numbers, sizes and names: plain text, HTML fragments and LaTeX."""

# ruff: noqa: RUF001, RUF002

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from math import prod
from typing import TypeAlias

import sympy

from derivation import text
from derivation.tape.grid import B, Grid, H, L, W
from derivation.tape.symbols import SYMBOLS, Size, as_poly
from derivation.tape.tiles import IN_PIXELS
from derivation.text import NARROW_SPACE

SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")
SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
TEX_SPECIALS = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{c: "\\" + c for c in "&%$#_{}"},
}
# What pdflatex and the mathematics of the notes need beyond ASCII.
TEX_UNICODE = {
    NARROW_SPACE: r"\,",
    "’": "'",
    "“": "``",
    "”": "''",
    "×": r"$\times$",
    "·": r"$\cdot$",
    "≥": r"$\geq$",
    "≤": r"$\leq$",
    "−": "$-$",
    "→": r"$\to$",
    "…": r"\dots{}",
    **{chr(0x2080 + i): f"$_{i}$" for i in range(10)},
    **{c: f"$^{i}$" for i, c in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")},
}
TEX = str.maketrans(TEX_UNICODE | TEX_SPECIALS)

# The symbols of a polynomial in pixels: the image's, the call's and those of VAE tiles.
VARIABLES = (H, W, L, B, *IN_PIXELS.values())
# A polynomial in pixels: powers of VARIABLES -> coefficient in bytes.
Powers: TypeAlias = tuple[int, ...]
PixelTerms: TypeAlias = dict[Powers, Fraction]


def human(nbytes: int) -> str:
    """Return bytes in the largest binary unit that leaves at least 1, with a space that does not break."""
    return text.human(nbytes, NARROW_SPACE)


def slug(model: str) -> str:
    """Return the last part of a model id as a file name.

    >>> slug("stable-diffusion-v1-5/stable-diffusion-v1-5"), slug("<>&")
    ('stable_diffusion_v1_5', 'model')
    """
    return re.sub(r"[^a-z0-9]+", "_", model.rstrip("/").split("/")[-1].lower()).strip("_") or "model"


def tex(text: object) -> str:
    """Return text with LaTeX's special characters escaped, everything else beyond ASCII dropped to '?'.

    >>> tex("a_b & 50%")
    'a\\\\_b \\\\& 50\\\\%'
    """
    return str(text).translate(TEX).encode("ascii", "replace").decode()


def markdown(text: object) -> str:
    """Return text as inline code that Markdown and HTML take literally, also inside a table."""
    plain = "".join(c if c.isprintable() else " " for c in str(text)).replace("`", "'").replace("|", "\\|")
    return f"`{plain}`"


def size_text(size: Size) -> str:
    """Return a polynomial in the level sizes in one line of Unicode.

    >>> from derivation.tape.symbols import symbol
    >>> size_text(1280 * symbol("B") * symbol("h0") * symbol("w0") + 8)
    '1280·B·h₀·w₀ + 8'
    """
    if isinstance(size, int):
        return str(size)
    parts = [_monomial_text(m, int(c)) for m, c in sorted(as_poly(size).items(), reverse=True)]
    return " + ".join(parts).replace("+ -", "− ") or "0"


def _monomial_text(monomial: Sequence[int], coefficient: int) -> str:
    factors = [str(coefficient)] if coefficient != 1 or not any(monomial) else []
    for index, power in enumerate(monomial):
        if power:
            raised = str(power).translate(SUPERSCRIPTS) if power > 1 else ""
            factors.append(SYMBOLS[index].name.translate(SUBSCRIPTS) + raised)
    return "·".join(factors)


def shape_text(shape: Sequence[Size]) -> str:
    """Return a shape such as ``B×320×h₀×w₀``."""
    return "×".join(f"({text})" if " " in text else text for text in map(size_text, shape)) or "scalar"


def pixel_terms(size: Size, grid: Grid) -> PixelTerms:
    """Return a polynomial in level sizes as one in VARIABLES, for sides that are multiples of ``grid.unit``."""
    found: PixelTerms = {}
    for monomial, coefficient in as_poly(size).items():
        powers, value = [0] * len(VARIABLES), Fraction(int(coefficient))
        for name, power in ((SYMBOLS[i].name, power) for i, power in enumerate(monomial) if power):
            powers[VARIABLES.index(_in_pixels(name))] += power
            value /= _pixels(name, grid) ** power
        key = tuple(powers)
        found[key] = found.get(key, Fraction(0)) + value
    return {key: value for key, value in found.items() if value}


def _in_pixels(name: str) -> sympy.Symbol:
    return {"h": H, "w": W, "L": L, "B": B}.get(name[0]) or IN_PIXELS[name]


def _pixels(name: str, grid: Grid) -> int:
    """Return how many of the image's pixels a unit of a symbol stands for; 1 for what is no side."""
    if name[0] in "hw":
        return grid.vae_scale_factor << int(name[1:])
    return 1 if name[0] in "LBNE" else grid.vae_scale_factor


def as_pixel_terms(expr: sympy.Expr) -> PixelTerms:
    """Return a polynomial in VARIABLES as pixel terms."""
    terms = sympy.Poly(expr, *VARIABLES).terms()
    return {tuple(map(int, key)): Fraction(int(c.p), int(c.q)) for key, c in terms if c}


def values_at(grid: Grid, height: int, width: int, prompt_length: int, batch_size: int) -> tuple[int, ...]:
    """Return the value of each of VARIABLES at a size; symbols of VAE tiles are 0 where there are none."""
    tiles = {} if grid.tile is None else grid.sizes(height, width)
    others = (tiles.get(name, 0) * _pixels(name, grid) for name in IN_PIXELS)
    return (height, width, prompt_length, batch_size, *others)


def value_at(terms: PixelTerms, values: Sequence[int]) -> int:
    """Return pixel terms in bytes at ``values`` of VARIABLES."""
    factors = ((c, *(v**p for v, p in zip(values, key, strict=True) if p)) for key, c in terms.items())
    return int(sum((prod(each) for each in factors), Fraction(0)))
