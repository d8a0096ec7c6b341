"""Equations as MathML Core and as LaTeX, from one list of ordered terms."""

# ruff: noqa: RUF001

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fractions import Fraction

import sympy
from markupsafe import escape

from derivation.export.tex import monomial
from derivation.report.document import Math
from derivation.report.text import VARIABLES, PixelTerms, Powers, tex, value_at
from derivation.text import grouped

# Terms are printed in the order of their value at this image size and at these tiles, largest first.
TILES_AT = {"E": 1, "T": 512, "N": 2, "R": 384, "Q": 128, "C": 384}
ORDER_AT = (1024, 1024, 77, 1, *(TILES_AT[symbol.name[0]] for symbol in VARIABLES[4:]))
# The most terms on a line of a row of a max.
LINE = 6
# A monomial is printed in this order: B, the image's sides, L, counts of tiles, their sides.
ORDER = "BHWLNCTRQE"
PRINTED = sorted(range(len(VARIABLES)), key=lambda i: ORDER.index(VARIABLES[i].name[0]))
THIN = r"\,"
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
    return f'<mrow><mi>max</mi><mspace width=".2em"/>{_brace(listed)}</mrow>'


def _brace(rows: Sequence[tuple[PixelTerms, str]]) -> str:
    return f'<mtable class="brace">{"".join(_row_mathml(terms, label) for terms, label in rows)}</mtable>'


def _row_mathml(terms: PixelTerms, label: str) -> str:
    first, *further = _lines_mathml(terms)
    named = f'<mtd class="left"><mtext>{escape(label)}</mtext></mtd>' if label else ""
    rows = [f'<mtr><mtd class="left">{first}</mtd>{named}</mtr>']
    rows += [f'<mtr><mtd class="left further">{line}</mtd></mtr>' for line in further]
    return "".join(rows)


def polynomial(terms: PixelTerms) -> Math:
    """Return a sum of terms, the largest first."""
    return Math(terms_mathml(terms), terms_latex(terms))


def maximum(polynomials: Iterable[PixelTerms]) -> Math:
    """Return a max over polynomials."""
    return total(0, polynomials)


def total(weights_bytes: int, polynomials: Iterable[PixelTerms]) -> Math:
    """Return weights + max over polynomials."""
    return _total(weights_bytes, [(terms, "") for terms in polynomials])


def equation(weights_bytes: int, rows: Sequence[tuple[PixelTerms, str]]) -> Math:
    """Return M = weights + max over rows, each with its label; the style sheet breaks it on a narrow screen."""
    start = f"<mi>M</mi><mo>=</mo>{_weights_mathml(weights_bytes)}"
    cells = f"<mtd><mrow>{start}<mi>max</mi></mrow></mtd><mtd>{_brace(rows)}</mtd>"
    several = f'<mtable class="head"><mtr>{cells}</mtr></mtable>'
    mathml = several if len(rows) > 1 else f"<mrow>{start}{terms_mathml(rows[0][0])}</mrow>"
    return Math(mathml, f"M = {_total(weights_bytes, rows).latex}")


def _total(weights_bytes: int, rows: Sequence[tuple[PixelTerms, str]]) -> Math:
    latex = f"{grouped(weights_bytes, THIN)} + " if weights_bytes else ""
    mathml = f"<mrow>{_weights_mathml(weights_bytes)}{maximum_mathml(rows)}</mrow>"
    return Math(mathml, f"{latex}{maximum_latex(rows)}")


def _weights_mathml(nbytes: int) -> str:
    return f"{number(nbytes)}<mo>+</mo>" if nbytes else ""


def terms_latex(terms: PixelTerms) -> str:
    """Return a sum of terms in LaTeX, the largest first."""
    return " ".join(_lines_latex(terms))


def _lines_latex(terms: PixelTerms) -> list[str]:
    parts: list[str] = []
    for key, value in _ordered(terms):
        sign = "-" if value < 0 else "+"
        operator = f"{sign} " if parts or value < 0 else ""
        parts.append(operator + monomial(abs(value), [(VARIABLES[i].name, key[i]) for i in PRINTED], THIN))
    return [" ".join(line) for line in _broken(parts or ["0"], LINE)]


def maximum_latex(rows: Sequence[tuple[PixelTerms, str]]) -> str:
    """Return max{...} in LaTeX, labels behind each polynomial."""
    if len(rows) == 1:
        return terms_latex(rows[0][0])
    body = r" \\ ".join(_row_latex(terms, label) for terms, label in rows)
    return rf"\max\left\{{\begin{{array}}{{ll}} {body} \end{{array}}\right."


def _row_latex(terms: PixelTerms, label: str) -> str:
    first, *further = _lines_latex(terms)
    named = rf" & \text{{{tex(label)}}}" if label else ""
    return r" \\ ".join([f"{first}{named}", *(rf"\quad {line}" for line in further)])
