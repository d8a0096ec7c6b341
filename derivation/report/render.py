"""Templates filled with a report's content."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache

from jinja2 import Environment
from markupsafe import Markup, escape

from derivation.export import templates
from derivation.report.answer import PolynomialRow
from derivation.report.content import Content
from derivation.report.mathml import inline, maximum_mathml, sum_latex, sum_mathml, terms_latex, terms_mathml
from derivation.report.offload import OffloadRow
from derivation.report.text import SUBSCRIPTS, PixelTerms, human, markdown, tex
from derivation.text import grouped


@cache
def environment() -> Environment:
    """Return the template environment with the report's filters."""
    env = templates.environment()
    env.filters |= {
        "human": human,
        "grouped": grouped,
        "breakable": breakable,
        "subscripted": lambda text: text.translate(SUBSCRIPTS),
        "polynomial": lambda terms: inline(terms_mathml(terms)),
        "maximum": _maximum,
        "placement": lambda row: inline(sum_mathml(row.weights_bytes, _unnamed(row))),
        "placement_latex": lambda row: sum_latex(row.weights_bytes, _unnamed(row)),
        "terms_latex": terms_latex,
        "tex": tex,
        "md": markdown,
    }
    return env


def breakable(text: str) -> Markup:
    """Return escaped text that may break after dots, slashes and underscores."""
    return Markup(re.sub(r"([./_])", r"\1<wbr>", str(escape(text))))


def _maximum(rows: Iterable[PolynomialRow]) -> Markup:
    return inline(maximum_mathml([(row.terms, "") for row in rows]))


def _unnamed(row: OffloadRow) -> list[tuple[PixelTerms, str]]:
    return [(terms, "") for terms in row.polynomials]


def render(template: str, content: Content) -> str:
    """Fill a template."""
    return environment().get_template(template).render(c=content)
