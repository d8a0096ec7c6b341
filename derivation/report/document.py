"""What a report is made of, whoever writes it down: sections that hold paragraphs, tables, formulas and figures."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, TypeAlias

from markupsafe import Markup

PROSE = re.compile(r"\*\*(?P<strong>.+?)\*\*|\*(?P<em>.+?)\*|`(?P<code>.+?)`|(?P<slot>\{\})")


@dataclass(frozen=True, slots=True)
class Code:
    """A name taken literally."""

    text: str


@dataclass(frozen=True, slots=True)
class Math:
    """Inline mathematics: the inside of a <math> element, and LaTeX."""

    mathml: str
    latex: str


@dataclass(frozen=True, slots=True)
class Mark:
    """Marked text."""

    kind: Literal["strong", "em", "dim", "tag", "below"]
    text: Text


@dataclass(frozen=True, slots=True)
class Lines:
    """Lines of a table's cell."""

    lines: tuple[Text, ...]


Inline: TypeAlias = str | Code | Math | Mark | Lines
Text: TypeAlias = Inline | tuple["Text", ...]


@dataclass(frozen=True, slots=True)
class Paragraph:
    """A paragraph; ``lead`` is the one that opens the report."""

    text: Text
    lead: bool = False


@dataclass(frozen=True, slots=True)
class Formula:
    """The displayed equation; ``copies`` are what a page lets copy: a name in the calculator's LaTeX, a label."""

    label: str
    math: Math
    copies: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Column:
    """A column: ``printed`` says whether paper has it as a column, lists it below the table, or leaves it out.

    ``head`` names the rows; a page gives what is ``under`` a row a row of its own.
    """

    title: Text
    number: bool = False
    printed: Literal["column", "below", "no"] = "column"
    head: bool = False
    under: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """A row; one with fewer cells than columns spans them with its first cell."""

    cells: tuple[Text, ...]
    kind: Literal["", "group", "sum", "total", "peak"] = ""


@dataclass(frozen=True, slots=True)
class Table:
    """A table: ``label`` names it, ``caption`` stands above it, ``style`` is a class of the style sheet."""

    label: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    caption: Text = ""
    style: str = ""


@dataclass(frozen=True, slots=True)
class Bullets:
    """A list."""

    items: tuple[Text, ...]


@dataclass(frozen=True, slots=True)
class Facts:
    """Names and what is said of each."""

    facts: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Details:
    """A part that a screen folds; paper leaves it out unless ``printed``."""

    summary: Text
    blocks: tuple[Block, ...]
    printed: bool = False
    style: str = ""


@dataclass(frozen=True, slots=True)
class Form:
    """The calculator, which only a page can have."""


@dataclass(frozen=True, slots=True)
class Picture:
    """One figure: its name, what it shows, and the same drawing as SVG file, PDF file and page fragment.

    ``data`` is what a page lists below it: the columns' titles, then the rows; numbers are bytes or pixels. Where it is
    ``narrow`` the PDF file is drawn for a column of an article.
    """

    name: str
    title: str
    caption: str
    svg: str
    pdf: bytes
    inline: Markup
    data: tuple[tuple[str | int, ...], ...] = ()
    narrow: bool = False


@dataclass(frozen=True, slots=True)
class Section:
    """A part with a heading; ``anchor`` is there for the parts of the contents alone.

    Notes have what is no ``appendix``; that is a file of its own beside them.
    """

    title: str
    blocks: tuple[Block, ...]
    anchor: str = ""
    appendix: bool = False


Block: TypeAlias = Paragraph | Formula | Table | Bullets | Facts | Details | Form | Picture | Section


def prose(text: str, *slots: Text) -> Text:
    """Return text with `code`, *variables* and **strong** words; each {} is the next of ``slots``."""
    parts: list[Text] = []
    given, end = iter(slots), 0
    for found in PROSE.finditer(text):
        parts.append(text[end : found.start()])
        match found.lastgroup:
            case "slot":
                parts.append(next(given))
            case "code":
                parts.append(Code(found["code"]))
            case "em" | "strong" as kind:
                parts.append(Mark(kind, found[kind]))
        end = found.end()
    return (*parts, text[end:])
