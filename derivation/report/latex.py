"""A document as LaTeX; what only a screen can fold is left out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from derivation.report import document as doc
from derivation.report.text import tex

HEADINGS = ("section", "subsection", "subsubsection")
MARKS = {"strong": r"\textbf{%s}", "em": "$%s$", "tag": "(%s)", "dim": "%s", "below": " %s"}
BREAK = r"\allowbreak{}"
# Points of a line (report.tex.j2: A4 with margins of 2.2 cm) and between two columns (article: 2 \tabcolsep).
LINE_POINTS, GAP_POINTS = 470, 12
# Points a character in types of 11, 10, 9 and 8 pt, typewriter's (0.525 em), which are the widest.
SIZES = {"": 5.8, r"\small ": 5.4, r"\footnotesize ": 4.9, r"\scriptsize ": 4.4}
SMALLEST = r"\scriptsize "


def blocks(found: Iterable[doc.Block], folder: str, level: int = 0) -> str:
    """Return blocks; figures are files in ``folder``, sections start at HEADINGS[``level``]."""
    return "".join(f"{text}\n\n" for block in found if (text := _block(block, folder, level)))


def inline(text: doc.Text) -> str:
    """Return text in one line."""
    match text:
        case tuple():
            return "".join(map(inline, text))
        case doc.Code():
            return rf"\code{{{_breakable(text.text)}}}"
        case doc.Math():
            return f"${text.latex}$"
        case doc.Mark():
            return MARKS[text.kind] % inline(text.text)
        case doc.Lines():
            return "; ".join(map(inline, text.lines))
    return tex(text)


def _breakable(text: str) -> str:
    return tex(text).replace(".", "." + BREAK)


def _block(block: doc.Block, folder: str, level: int) -> str:
    match block:
        case doc.Section():
            inside = blocks(block.blocks, folder, level + 1).rstrip()
            return rf"\{HEADINGS[level]}{{{tex(block.title)}}}" + f"\n{inside}" if inside else ""
        case doc.Paragraph():
            return inline(block.text)
        case doc.Formula():
            return f"{{\\small\\begin{{equation*}}\n\\boxed{{ {block.math.latex} }}\n\\end{{equation*}}}}"
        case doc.Table():
            return _table(block)
        case doc.Bullets():
            return _list("itemize", (rf"\item {inline(item)}" for item in block.items))
        case doc.Facts():
            return _list("description", (rf"\item[{tex(name)}] {tex(said)}" for name, said in block.facts))
        case doc.Details():
            inside = blocks(block.blocks, folder, level).rstrip()
            return rf"\subsection*{{{inline(block.summary)}}}" + f"\n{inside}" if block.printed else ""
        case doc.Picture():
            return _figure(block, folder)
        case doc.Form():
            return ""


def _figure(picture: doc.Picture, folder: str) -> str:
    caption = tex(f"{picture.title}. {picture.caption}")
    width = r"0.65\linewidth" if picture.narrow else r"\linewidth"
    body = rf"\includegraphics[width={width}]{{{folder}/{picture.name}.pdf}}"
    return f"\\begin{{figure}}[htbp]\\centering\n{body}\n\\caption{{{caption}}}\n\\end{{figure}}"


def _list(kind: str, items: Iterable[str]) -> str:
    return "\n".join([rf"\begin{{{kind}}}", *items, rf"\end{{{kind}}}"])


def _table(table: doc.Table) -> str:
    """Return a table of the columns that are printed, and below it a list of those too wide for one."""
    shown = [i for i, column in enumerate(table.columns) if column.printed == "column"]
    below = [i for i, column in enumerate(table.columns) if column.printed == "below"]
    whole = [row for row in table.rows if len(row.cells) == len(table.columns)]
    heads = [inline(table.columns[i].title) for i in shown]
    placed = [_placed(row, len(table.columns), shown) for row in table.rows]
    columns = [[cells[i] for cells in placed if i in cells] for i in shown]
    size, widths = _widths([[head, *column] for head, column in zip(heads, columns, strict=True)])
    sides = ("raggedleft" if table.columns[i].number else "raggedright" for i in shown)
    kinds = "".join(_paragraphs(side, width) for side, width in zip(sides, widths, strict=True))
    body = [rf"\begin{{longtable}}{{@{{}}{kinds}@{{}}}}", rf"\toprule {' & '.join(heads)} \\ \midrule \endhead"]
    body += [_row(row, cells, shown, widths) for row, cells in zip(table.rows, placed, strict=True)]
    body += [r"\bottomrule", r"\end{longtable}"]
    items = (rf"\item {inline(row.cells[0])}:\newline {inline(row.cells[i])}" for row in whole for i in below)
    listed = ["}", _list("itemize", items)] if below else ["}"]
    return "\n".join([inline(table.caption), rf"{{{size}", *body, *listed])


def _widths(columns: Sequence[Sequence[str]]) -> tuple[str, list[float]]:
    """Return the largest type in which the longest words of all columns stand side by side, and the columns' points.

    What is left of the line is shared out by how much longer each column's longest cell is.
    """
    words = [max(1 + len(word) for cell in column for word in _words(cell)) for column in columns]
    cells = [2 + max(map(len, map(" ".join, map(_words, column)))) for column in columns]
    room = LINE_POINTS - GAP_POINTS * (len(columns) - 1)
    size, point = next((named for named in SIZES.items() if named[1] * sum(words) <= room), (SMALLEST, SIZES[SMALLEST]))
    spare = max(room - point * sum(words), 0)
    wanted = [point * (cell - word) for cell, word in zip(cells, words, strict=True)]
    share = min(1.0, spare / max(sum(wanted), 1))
    return size, [point * word + share * more for word, more in zip(words, wanted, strict=True)]


def _words(cell: str) -> list[str]:
    """Return the characters of each part of a cell that no line breaks."""
    shown = re.sub(r"\\(?:code|textbf|text|mathrm|tfrac)|\\,|[{}$]", "", cell.replace(BREAK, " ").replace(r"\,", "_"))
    return re.sub(r"\\[a-z]+", "m", shown).replace("\\", "").split() or [""]


def _placed(row: doc.Row, columns: int, shown: Sequence[int]) -> dict[int, str]:
    """Return a row's shown cells by column; its first one spans those that it has too few cells for."""
    span = columns - len(row.cells) + 1
    cells = {**({0: row.cells[0]} if span == 1 else {}), **dict(zip(range(span, columns), row.cells[1:], strict=True))}
    return {i: _cell(cells[i]) for i in shown if i in cells}


def _cell(cell: doc.Text) -> str:
    return re.sub(r"(?<=\w)=(?=\w)", lambda _: "=" + BREAK, inline(cell))


def _paragraphs(side: str, width: float) -> str:
    return rf">{{\{side}\arraybackslash}}p{{{width:.0f}pt}}"


def _row(row: doc.Row, cells: Mapping[int, str], shown: Sequence[int], widths: Sequence[float]) -> str:
    """Return a row's shown cells, those that its first one spans in one."""
    covered = len(shown) - len(cells) + (0 in cells)
    first = cells[0] if 0 in cells else _cell(row.cells[0])
    first = rf"\textbf{{{first}}}" if row.kind in ("group", "sum", "total") else first
    over = _paragraphs("raggedright", sum(widths[:covered]) + GAP_POINTS * (covered - 1))
    lead = [rf"\multicolumn{{{covered}}}{{@{{}}{over}}}{{{first}}}" if covered > 1 else first] if covered else []
    line = " & ".join([*lead, *(cells[i] for i in shown if i and i in cells)])
    return {"group": r"\addlinespace ", "total": r"\midrule "}.get(row.kind, "") + line + r" \\"
