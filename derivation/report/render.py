"""The files' texts: the document as each writer writes it, in the shell that its template is."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from derivation.export.templates import environment
from derivation.report import html, latex, markdown
from derivation.report.content import Content
from derivation.report.document import Code
from derivation.report.sections import document
from derivation.report.text import human, tex

ASKED = (
    "How much GPU memory does one call need at its peak, and why? "
    "The tensors behind every term, block by block, are in the [appendix]({}.appendix.md)."
)


def texts(c: Content) -> dict[str, str]:
    """Return the report as HTML, Markdown and LaTeX, by the ending of the file's name."""
    sections = document(c)
    folder = f"figures/{c.slug}"
    form = Markup(_fill("calculator.html", k=c.calculator))
    notes, appendix = ([s for s in sections if s.appendix is more] for more in (False, True))
    name = markdown.inline(Code(c.model))
    shown = [s for s in sections if s.anchor != "walk"]  # a megabyte, which the appendix has
    return {
        "html": _fill("html", c=c, sections=shown, body=html.blocks(shown, form)),
        "md": f"# Peak GPU memory of {name}\n\n{ASKED.format(c.slug)}\n\n{', '.join(c.chips)}\n\n"
        + markdown.blocks(notes, folder),
        "appendix.md": f"# Appendix: peak GPU memory of {name}\n\n" + markdown.blocks(appendix, folder),
        "tex": _fill(
            "tex",
            command=tex(c.command),
            title=latex.inline(Code(c.model)),
            chips=tex(", ".join(c.chips)),
            body=latex.blocks(notes, folder) + "\\appendix\n" + latex.blocks(appendix, folder),
        ),
    }


def index(pages: Sequence[Content]) -> str:
    """Return the page that compares models and links their reports."""
    return _fill("index.html", pages=pages, human=human)


def _fill(ending: str, **values: object) -> str:
    return environment().get_template(f"report.{ending}.j2").render(**values)
