"""How the report writes numbers, sizes and names: plain text, HTML fragments and LaTeX."""

# ruff: noqa: RUF001, RUF002

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import TypeAlias

import sympy

from derivation.simplify import B, Grid, H, L, W
from derivation.symbols import SYMBOLS, Size, as_poly

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
NARROW_SPACE = "\N{NARROW NO-BREAK SPACE}"
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

# A polynomial in pixels: (powers of H, W, L, B) -> coefficient in bytes.
PixelTerms: TypeAlias = dict[tuple[int, int, int, int], Fraction]


def grouped(number: int) -> str:
    """Return an integer with its digits in groups of three.

    >>> grouped(1234567).split(NARROW_SPACE)
    ['1', '234', '567']
    """
    return f"{number:,}".replace(",", NARROW_SPACE)


def human(nbytes: int) -> str:
    """Return bytes in the binary unit that gives one to four digits before the point.

    >>> human(402685952).split(NARROW_SPACE)
    ['384.0', 'MiB']
    """
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if abs(nbytes) >= unit:
            digits = 2 if unit == GIB else 1
            return f"{nbytes / unit:.{digits}f}{NARROW_SPACE}{name}"
    return f"{nbytes}{NARROW_SPACE}B"


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
    escaped = (TEX_SPECIALS.get(c) or TEX_UNICODE.get(c) or (c if c.isascii() else "?") for c in str(text))
    return "".join(escaped)


def markdown(text: object) -> str:
    """Return text as inline code that Markdown and HTML take literally, also inside a table."""
    plain = "".join(c if c.isprintable() else " " for c in str(text)).replace("`", "'").replace("|", "\\|")
    return f"`{plain}`"


def size_text(size: Size) -> str:
    """Return a polynomial in the level sizes in one line of Unicode.

    >>> from derivation.symbols import symbol
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
    """Return a polynomial in level sizes as one in H, W, L and B, for sides that are multiples of ``grid.unit``."""
    found: PixelTerms = {}
    for monomial, coefficient in as_poly(size).items():
        powers, value = {"h": 0, "w": 0, "L": 0, "B": 0}, Fraction(int(coefficient))
        for index, power in enumerate(monomial):
            name = SYMBOLS[index].name
            powers[name[0]] += power
            if name[0] in "hw":
                value /= (grid.vae_scale_factor << int(name[1:])) ** power
        key = (powers["h"], powers["w"], powers["L"], powers["B"])
        found[key] = found.get(key, Fraction(0)) + value
    return {key: value for key, value in found.items() if value}


def expression(terms: Mapping[tuple[int, int, int, int], Fraction]) -> sympy.Expr:
    """Return pixel terms as a sympy expression."""
    return sympy.Add(
        *(
            sympy.Rational(c.numerator, c.denominator) * H**h * W**w * L**length * B**b
            for (h, w, length, b), c in terms.items()
        )
    )


def as_pixel_terms(expr: sympy.Expr) -> PixelTerms:
    """Return a polynomial in H, W, L and B as pixel terms."""
    return {
        (int(h), int(w), int(length), int(b)): Fraction(int(c.p), int(c.q))
        for (h, w, length, b), c in sympy.Poly(expr, H, W, L, B).terms()
        if c
    }


def value_at(terms: PixelTerms, height: int, width: int, prompt_length: int, batch_size: int) -> int:
    """Return pixel terms in bytes at a size on the grid."""
    total = sum(
        (c * height**h * width**w * prompt_length**n * batch_size**b for (h, w, n, b), c in terms.items()),
        Fraction(0),
    )
    return int(total)
