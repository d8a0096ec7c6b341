"""Equations as MathML Core and as LaTeX, from one list of ordered terms."""

# ruff: noqa: RUF001

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fractions import Fraction

import sympy
from markupsafe import Markup, escape

from derivation.report.text import VARIABLES, PixelTerms, Powers, value_at
from derivation.text import NARROW_SPACE, grouped

# Terms are printed in the order of their value at this image size and at these tiles, largest first.
TILES_AT = {"E": 1, "T": 512, "N": 2, "R": 384, "Q": 128, "C": 384}
ORDER_AT = (1024, 1024, 77, 1, *(TILES_AT[symbol.name[0]] for symbol in VARIABLES[4:]))
# The most terms on a line of a row of a max.
LINE = 6
# A monomial is printed in this order: B, the image's sides, L, counts of tiles, their sides.
ORDER = "BHWLNCTRQE"
PRINTED = sorted(range(len(VARIABLES)), key=lambda i: ORDER.index(VARIABLES[i].name[0]))
THIN_SPACE = '<mspace width=".14em"/>'


def _ordered(terms: PixelTerms) -> list[tuple[Powers, Fraction]]:
    return sorted(terms.items(), key=lambda item: -abs(value_at({item[0]: item[1]}, ORDER_AT)))


def number(value: int) -> str:
    """Return an integer as a MathML number with grouped digits."""
    return f"<mn>{grouped(value)}</mn>"


def _coefficient(value: Fraction) -> str:
    if value.denominator == 1:
        return number(value.numerator)
    return f"<mfrac>{number(value.numerator)}{number(value.denominator)}</mfrac>"


def symbol_mathml(symbol: sympy.Symbol, power: int = 1) -> str:
    """Return a symbol, such as T_{h}, to a power."""
    letter, _, below = symbol.name.partition("_")
    name = f"<mi>{letter}</mi>"
    if below:
        name = f"<msub>{name}<mi>{below.strip('{}')}</mi></msub>"
    return name if power == 1 else f"<msup>{name}<mn>{power}</mn></msup>"


def monomial_mathml(key: Sequence[int], value: Fraction) -> str:
    """Return one term, such as 12299/8 B H W."""
    factors = [symbol_mathml(VARIABLES[i], key[i]) for i in PRINTED if key[i]]
    shown = [] if value == 1 and factors else [_coefficient(value)]
    return f"<mrow>{THIN_SPACE.join([*shown, *factors])}</mrow>"


def terms_mathml(terms: PixelTerms) -> str:
    """Return a sum of terms, the largest first."""
    return "".join(_lines_mathml(terms, len(terms) or 1))


def _lines_mathml(terms: PixelTerms, length: int = LINE) -> list[str]:
    """Return a sum of terms in lines of at most so many; a further line begins with an operator."""
    parts: list[str] = []
    for key, value in _ordered(terms):
        sign = "−" if value < 0 else "+"
        operator = f"<mo>{sign}</mo>" if parts or value < 0 else ""
        parts.append(operator + monomial_mathml(key, abs(value)))
    return [f"<mrow>{''.join(line)}</mrow>" for line in _broken(parts or ["<mn>0</mn>"], length)]


def _broken(parts: Sequence[str], length: int) -> list[Sequence[str]]:
    """Return the fewest lines of at most ``length`` parts, about as many on each."""
    each = -(-len(parts) // -(-len(parts) // length))
    return [parts[i : i + each] for i in range(0, len(parts), each)]


def maximum_mathml(rows: Iterable[tuple[PixelTerms, str]]) -> str:
    """Return a max over rows, each a polynomial with a label behind it; a single row stands alone.

    The style sheet draws the brace: stretched characters need a mathematical font, which not every reader has.
    """
    listed = list(rows)
    if len(listed) == 1:
        return terms_mathml(listed[0][0])
    cells = "".join(_row_mathml(terms, label) for terms, label in listed)
    return f'<mrow><mi>max</mi><mspace width=".2em"/><mtable class="brace">{cells}</mtable></mrow>'


def _row_mathml(terms: PixelTerms, label: str) -> str:
    first, *further = _lines_mathml(terms)
    named = f'<mtd class="left"><mtext>{escape(label)}</mtext></mtd>' if label else ""
    rows = [f'<mtr><mtd class="left">{first}</mtd>{named}</mtr>']
    rows += [f'<mtr><mtd class="left further">{line}</mtd></mtr>' for line in further]
    return "".join(rows)


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
    return " ".join(_lines_latex(terms))


def _lines_latex(terms: PixelTerms) -> list[str]:
    parts: list[str] = []
    for key, value in _ordered(terms):
        sign = "-" if value < 0 else "+"
        operator = f"{sign} " if parts or value < 0 else ""
        parts.append(operator + monomial_latex(key, abs(value)))
    return [" ".join(line) for line in _broken(parts or ["0"], LINE)]


def monomial_latex(key: Sequence[int], value: Fraction) -> str:
    """Return one term in LaTeX."""
    factors = [VARIABLES[i].name + (f"^{{{key[i]}}}" if key[i] > 1 else "") for i in PRINTED if key[i]]
    digits = [grouped(n).replace(NARROW_SPACE, r"\,") for n in (value.numerator, value.denominator)]
    coefficient = digits[0] if value.denominator == 1 else rf"\tfrac{{{digits[0]}}}{{{digits[1]}}}"
    shown = [] if value == 1 and factors else [coefficient]
    return r"\,".join([*shown, " ".join(factors)] if factors else shown)


def maximum_latex(rows: Sequence[tuple[PixelTerms, str]]) -> str:
    """Return max{...} in LaTeX, labels (already LaTeX) behind each polynomial."""
    if len(rows) == 1:
        return terms_latex(rows[0][0])
    body = r" \\ ".join(_row_latex(terms, label) for terms, label in rows)
    return rf"\max\left\{{\begin{{array}}{{ll}} {body} \end{{array}}\right."


def _row_latex(terms: PixelTerms, label: str) -> str:
    first, *further = _lines_latex(terms)
    return r" \\ ".join([f"{first} & {label}".rstrip("& "), *(rf"\quad {line}" for line in further)])
