"""Words, numbers and rows in LaTeX."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fractions import Fraction

import sympy

from derivation.text import grouped, human

SPECIAL = {"_": r"\_", "%": r"\%", "&": r"\&", "#": r"\#", "$": r"\$", "{": r"\{", "}": r"\}"}
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
    r"([a-z])": 5.0,
    r"([()])": 3.9,
}


def text(words: str) -> str:
    r"""Return words with LaTeX's special characters escaped.

    >>> print(text("vae_decode 5%"))
    vae\_decode 5\%
    """
    return "".join(SPECIAL.get(c, c) for c in words)


def rows(parts: Iterable[str]) -> list[str]:
    """Return terms, each with the sign before it, as rows of at most ``ROW_POINTS``, but of one term at least."""
    found = [""]
    for part in parts:
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
