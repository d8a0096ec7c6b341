"""Equations as MathML Core and as LaTeX, from one list of ordered terms."""

# ruff: noqa: RUF001

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fractions import Fraction

import sympy
from markupsafe import Markup, escape

from derivation.report.text import NARROW_SPACE, PixelTerms, as_pixel_terms, grouped, value_at

# Terms are printed in the order of their value at this image size, largest first.
ORDER_AT = (1024, 1024, 77, 1)
VARIABLES = ("H", "W", "L", "B")
PRINTED = (3, 0, 1, 2)
THIN_SPACE = '<mspace width=".14em"/>'


def _ordered(terms: PixelTerms) -> list[tuple[tuple[int, int, int, int], Fraction]]:
    return sorted(terms.items(), key=lambda item: -abs(value_at({item[0]: item[1]}, *ORDER_AT)))


def number(value: int) -> str:
    """Return an integer as a MathML number with grouped digits."""
    return f"<mn>{grouped(value)}</mn>"


def _coefficient(value: Fraction) -> str:
    if value.denominator == 1:
        return number(value.numerator)
    return f"<mfrac>{number(value.numerator)}{number(value.denominator)}</mfrac>"


def _power(name: str, power: int) -> str:
    return f"<mi>{name}</mi>" if power == 1 else f"<msup><mi>{name}</mi><mn>{power}</mn></msup>"


def monomial_mathml(key: Sequence[int], value: Fraction) -> str:
    """Return one term, such as 12299/8 B H W."""
    factors = [_power(VARIABLES[i], key[i]) for i in PRINTED if key[i]]
    shown = [] if value == 1 and factors else [_coefficient(value)]
    return f"<mrow>{THIN_SPACE.join([*shown, *factors])}</mrow>"


def terms_mathml(terms: PixelTerms) -> str:
    """Return a sum of terms, the largest first."""
    parts: list[str] = []
    for key, value in _ordered(terms):
        sign = "−" if value < 0 else "+"
        if parts or value < 0:
            parts.append(f"<mo>{sign}</mo>")
        parts.append(monomial_mathml(key, abs(value)))
    return f"<mrow>{''.join(parts) or '<mn>0</mn>'}</mrow>"


def term(key: Sequence[int], value: Fraction) -> Markup:
    """Return one term as inline mathematics."""
    return inline(monomial_mathml(key, value))


def polynomial(expr: sympy.Expr) -> Markup:
    """Return a polynomial, or a Max of polynomials, in H, W, L and B as inline mathematics."""
    if isinstance(expr, sympy.Max):
        return inline(maximum_mathml([(as_pixel_terms(e), "") for e in expr.args]))
    return inline(terms_mathml(as_pixel_terms(expr)))


def maximum_mathml(rows: Iterable[tuple[PixelTerms, str]]) -> str:
    """Return a max over rows, each a polynomial with a label behind it; a single row stands alone.

    The style sheet draws the brace: stretched characters need a mathematical font, which not every reader has.
    """
    listed = list(rows)
    if len(listed) == 1:
        return terms_mathml(listed[0][0])
    cells = "".join(
        f'<mtr><mtd class="left">{terms_mathml(terms)}</mtd>'
        + (f'<mtd class="left"><mtext>{escape(label)}</mtext></mtd>' if label else "")
        + "</mtr>"
        for terms, label in listed
    )
    return f'<mrow><mi>max</mi><mspace width=".2em"/><mtable class="brace">{cells}</mtable></mrow>'


def sum_mathml(weights_bytes: int, rows: Sequence[tuple[PixelTerms, str]]) -> str:
    """Return weights + max over rows."""
    weights = f"{number(weights_bytes)}<mo>+</mo>" if weights_bytes else ""
    return f"<mrow>{weights}{maximum_mathml(rows)}</mrow>"


def sum_latex(weights_bytes: int, rows: Sequence[tuple[PixelTerms, str]]) -> str:
    """Return weights + max over rows in LaTeX."""
    weights = grouped(weights_bytes).replace(NARROW_SPACE, r"\,") + " + " if weights_bytes else ""
    return f"{weights}{maximum_latex(rows)}"


def inline(body: str) -> Markup:
    """Return MathML as inline mathematics."""
    return Markup(f"<math>{body}</math>")


def display(body: str) -> Markup:
    """Return MathML as a displayed equation."""
    return Markup(f'<math display="block">{body}</math>')


def terms_latex(terms: PixelTerms) -> str:
    """Return a sum of terms in LaTeX, the largest first."""
    parts: list[str] = []
    for key, value in _ordered(terms):
        sign = "-" if value < 0 else "+"
        if parts or value < 0:
            parts.append(sign)
        parts.append(monomial_latex(key, abs(value)))
    return " ".join(parts) or "0"


def monomial_latex(key: Sequence[int], value: Fraction) -> str:
    """Return one term in LaTeX."""
    factors = [VARIABLES[i] + (f"^{{{key[i]}}}" if key[i] > 1 else "") for i in PRINTED if key[i]]
    digits = [grouped(n).replace(NARROW_SPACE, r"\,") for n in (value.numerator, value.denominator)]
    coefficient = digits[0] if value.denominator == 1 else rf"\tfrac{{{digits[0]}}}{{{digits[1]}}}"
    shown = [] if value == 1 and factors else [coefficient]
    return r"\,".join([*shown, " ".join(factors)] if factors else shown)


def maximum_latex(rows: Sequence[tuple[PixelTerms, str]]) -> str:
    """Return max{...} in LaTeX, labels (already LaTeX) behind each polynomial."""
    if len(rows) == 1:
        return terms_latex(rows[0][0])
    body = r" \\ ".join(f"{terms_latex(terms)} & {label}".rstrip("& ") for terms, label in rows)
    return rf"\max\left\{{\begin{{array}}{{ll}} {body} \end{{array}}\right."
