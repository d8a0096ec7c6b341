"""A document as LaTeX; what only a screen can fold is left out."""

from __future__ import annotations

from collections.abc import Iterable

from derivation.report.document import (
    Block,
    Bullets,
    Code,
    Details,
    Facts,
    Form,
    Formula,
    Lines,
    Mark,
    Math,
    Paragraph,
    Picture,
    Row,
    Section,
    Table,
    Text,
)
from derivation.report.text import tex

HEADINGS = ("section", "subsection", "subsubsection")
MARKS = {"strong": r"\textbf{%s}", "em": "$%s$", "tag": "(%s)", "dim": "%s", "below": " %s"}
# A table with more columns than this is set in small type.
WIDE = 4


def blocks(found: Iterable[Block], folder: str, level: int = 0) -> str:
    """Return blocks; figures are files in ``folder``, sections start at HEADINGS[``level``]."""
    return "".join(f"{text}\n\n" for block in found if (text := _block(block, folder, level)))


def inline(text: Text) -> str:
    """Return text in one line."""
    match text:
        case tuple():
            return "".join(map(inline, text))
        case Code():
            return rf"\code{{{_breakable(text.text)}}}"
        case Math():
            return f"${text.latex}$"
        case Mark():
            return MARKS[text.kind] % inline(text.text)
        case Lines():
            return "; ".join(map(inline, text.lines))
    return tex(text)


def _breakable(text: str) -> str:
    return tex(text).replace(".", r".\allowbreak{}")


def _block(block: Block, folder: str, level: int) -> str:
    match block:
        case Section():
            inside = blocks(block.blocks, folder, level + 1).rstrip()
            return rf"\{HEADINGS[level]}{{{tex(block.title)}}}" + f"\n{inside}" if inside else ""
        case Paragraph():
            return inline(block.text)
        case Formula():
            return f"\\begin{{equation*}}\n\\boxed{{ {block.math.latex} }}\n\\end{{equation*}}"
        case Table():
            return _table(block)
        case Bullets():
            return _list("itemize", (rf"\item {inline(item)}" for item in block.items))
        case Facts():
            return _list("description", (rf"\item[{tex(name)}] {tex(said)}" for name, said in block.facts))
        case Details():
            inside = blocks(block.blocks, folder, level).rstrip()
            return rf"\subsection*{{{inline(block.summary)}}}" + f"\n{inside}" if block.printed else ""
        case Picture():
            return _figure(block, folder)
        case Form():
            return ""


def _figure(picture: Picture, folder: str) -> str:
    caption = tex(f"{picture.title}. {picture.caption}")
    body = rf"\includegraphics[width=\linewidth]{{{folder}/{picture.name}.pdf}}"
    return f"\\begin{{figure}}[htbp]\\centering\n{body}\n\\caption{{{caption}}}\n\\end{{figure}}"


def _list(kind: str, items: Iterable[str]) -> str:
    return "\n".join([rf"\begin{{{kind}}}", *items, rf"\end{{{kind}}}"])


def _table(table: Table) -> str:
    """Return a table of the columns that are printed, and below it a list of those too wide for one."""
    shown = [i for i, column in enumerate(table.columns) if column.printed == "column"]
    below = [i for i, column in enumerate(table.columns) if column.printed == "below"]
    texts = sum(not table.columns[i].number for i in shown)
    kinds = "".join("r" if table.columns[i].number else _paragraph(texts) for i in shown)
    heads = " & ".join(inline(table.columns[i].title) for i in shown)
    rows = [_row(row, shown, len(table.columns)) for row in table.rows]
    small = r"\small " if len(shown) > WIDE else ""
    body = [rf"\begin{{longtable}}{{@{{}}{kinds}@{{}}}}", rf"\toprule {heads} \\ \midrule \endhead", *rows]
    body += [r"\bottomrule", r"\end{longtable}"]
    whole = [row for row in table.rows if len(row.cells) == len(table.columns)]
    items = (rf"\item {inline(row.cells[0])}: {inline(row.cells[i])}" for row in whole for i in below)
    listed = ["}", _list("itemize", items)] if below else ["}"]
    return "\n".join([inline(table.caption), f"{{{small}", *body, *listed])


def _paragraph(columns: int) -> str:
    """Return a ragged column as wide as ``columns`` of them may be beside numbers."""
    return rf">{{\raggedright\arraybackslash}}p{{{0.56 / max(columns, 1):.2f}\linewidth}}"


def _row(row: Row, shown: list[int], columns: int) -> str:
    span = columns - len(row.cells) + 1
    cells = {0: row.cells[0], **dict(zip(range(span, columns), row.cells[1:], strict=True))}
    first = inline(cells[0])
    first = rf"\textbf{{{first}}}" if row.kind in ("group", "sum", "total") else first
    covered = sum(i < span for i in shown)
    lead = [rf"\multicolumn{{{covered}}}{{@{{}}l}}{{{first}}}" if covered > 1 else first] if covered else []
    line = " & ".join([*lead, *(inline(cells[i]) for i in shown if i >= span)])
    return {"group": r"\addlinespace ", "total": r"\midrule "}.get(row.kind, "") + line + r" \\"
