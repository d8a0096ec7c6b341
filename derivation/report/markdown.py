"""A document as Markdown, for readers of GitHub's kind: mathematics in dollars, folded parts as HTML."""

from __future__ import annotations

from collections.abc import Iterable

from derivation.report import document as doc
from derivation.report import html
from derivation.report.text import markdown

MARKS = {"strong": "**{}**", "em": "*{}*", "tag": "({})", "dim": "{}", "below": " {}"}


def blocks(found: Iterable[doc.Block], folder: str, level: int = 2) -> str:
    """Return blocks; figures are files in ``folder``, sections start at heading ``level``."""
    return "".join(f"{text}\n\n" for block in found if (text := _block(block, folder, level)))


def inline(text: doc.Text) -> str:
    """Return text in one line."""
    match text:
        case tuple():
            return "".join(map(inline, text))
        case doc.Code():
            return markdown(text.text)
        case doc.Math():
            return f"${text.latex}$"
        case doc.Mark():
            return MARKS[text.kind].format(inline(text.text))
        case doc.Lines():
            return "; ".join(map(inline, text.lines))
    return text.replace("<", "&lt;").replace("|", "\\|")


def _block(block: doc.Block, folder: str, level: int) -> str:
    match block:
        case doc.Section():
            inside = blocks(block.blocks, folder, level + 1).rstrip()
            return f"{'#' * level} {block.title}\n\n{inside}" if inside else ""
        case doc.Paragraph():
            return inline(block.text)
        case doc.Formula():
            return f"```math\n\\boxed{{ {block.math.latex} }}\n```"
        case doc.Table():
            return _table(block)
        case doc.Bullets():
            return "\n".join(f"- {inline(item)}" for item in block.items)
        case doc.Facts():
            return "\n".join(f"- **{name}.** {inline(said)}" for name, said in block.facts)
        case doc.Details():
            inside = blocks(block.blocks, folder, level).rstrip()
            return f"<details>\n<summary>{html.inline(block.summary)}</summary>\n\n{inside}\n\n</details>"
        case doc.Form():
            return ""
    return f"![{block.title}]({folder}/{block.name}.svg)\n\n**{block.title}.** {block.caption}"


def _table(table: doc.Table) -> str:
    heads = " | ".join(inline(column.title) for column in table.columns)
    rule = "|".join("---:" if column.number else "---" for column in table.columns)
    rows = (_row(row, len(table.columns)) for row in table.rows)
    caption = f"{inline(table.caption)}\n\n" if table.caption else ""
    return "\n".join([f"{caption}| {heads} |", f"|{rule}|", *rows])


def _row(row: doc.Row, columns: int) -> str:
    first, *others = map(inline, row.cells)
    first = f"**{first}**" if row.kind in ("group", "sum", "total") else first
    return f"| {' | '.join([first, *[''] * (columns - len(row.cells)), *others])} |"
