"""The files' texts: the document as each writer writes it, in the shell that its template is."""

from __future__ import annotations

from markupsafe import Markup

from derivation.export.templates import environment
from derivation.report import html, latex, markdown
from derivation.report.content import Content
from derivation.report.document import Code
from derivation.report.sections import document
from derivation.report.text import tex


def texts(c: Content) -> dict[str, str]:
    """Return the report as HTML, Markdown and LaTeX, by the ending of the file's name."""
    sections = document(c)
    folder = f"figures/{c.slug}"
    form = Markup(_fill("calculator.html", k=c.calculator))
    title = f"# Peak GPU memory of {markdown.inline(Code(c.model))}\n\n{', '.join(c.chips)}\n\n"
    return {
        "html": _fill("html", c=c, sections=sections, body=html.blocks(sections, form)),
        "md": title + markdown.blocks(sections, folder),
        "tex": _fill(
            "tex",
            command=tex(c.command),
            title=latex.inline(Code(c.model)),
            chips=tex(", ".join(c.chips)),
            body=latex.blocks(sections, folder),
        ),
    }


def _fill(ending: str, **values: object) -> str:
    return environment().get_template(f"report.{ending}.j2").render(**values)
