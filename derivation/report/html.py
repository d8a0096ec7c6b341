"""A document as HTML."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from markupsafe import Markup, escape

from derivation.report import document as doc
from derivation.text import grouped

TAGS = {"strong": "<strong>{}</strong>", "em": "<i>{}</i>", "below": '<br><span class="dim small">{}</span>'}
NO_FORM = Markup()
SPAN = '<span class="{}">{}</span>'


def blocks(found: Iterable[doc.Block], form: Markup = NO_FORM, level: int = 2) -> Markup:
    """Return blocks, ``form`` where the calculator belongs; sections start at heading ``level``."""
    return Markup("\n").join(_block(block, form, level) for block in found)


def inline(text: doc.Text) -> Markup:
    """Return escaped text."""
    match text:
        case tuple():
            return Markup().join(map(inline, text))
        case doc.Code():
            return Markup("<code>{}</code>").format(breakable(text.text))
        case doc.Math():
            return Markup(f"<math>{text.mathml}</math>")
        case doc.Mark():
            return Markup(TAGS[text.kind] if text.kind in TAGS else SPAN.replace("{}", text.kind, 1)).format(
                inline(text.text)
            )
        case doc.Lines():
            items = (Markup("<li>{}</li>").format(inline(line)) for line in text.lines)
            return Markup('<ul class="plain">{}</ul>').format(Markup("\n").join(items))
    return escape(text)


def breakable(text: str) -> Markup:
    """Return escaped text that may break after dots, slashes and underscores."""
    return Markup(re.sub(r"([./_])", r"\1<wbr>", str(escape(text))))


def _block(block: doc.Block, form: Markup, level: int) -> Markup:
    match block:
        case doc.Section():
            return _section(block, form, level)
        case doc.Paragraph():
            return Markup("<p{}>{}</p>").format(Markup(' class="lead"') if block.lead else "", inline(block.text))
        case doc.Formula():
            body = Markup(f'<math display="block">{block.math.mathml}</math>')
            buttons = (
                Markup('<button type="button" data-latex="{}">{}</button>').format(*pair) for pair in block.copies
            )
            return Markup("{}\n<p>{}</p>").format(_scroll(block.label, body, "box scroll"), Markup(" ").join(buttons))
        case doc.Table():
            return _scroll(block.label, _table(block))
        case doc.Bullets():
            items = Markup().join(Markup("<li>{}</li>").format(inline(item)) for item in block.items)
            return Markup("<ul>{}</ul>").format(items)
        case doc.Facts():
            pairs = Markup().join(Markup("<dt>{}</dt><dd>{}</dd>").format(*pair) for pair in block.facts)
            return Markup('<dl class="facts">{}</dl>').format(pairs)
        case doc.Details():
            opened = Markup("<details{}>\n<summary>{}</summary>\n{}\n</details>")
            return opened.format(_class(block.style), inline(block.summary), blocks(block.blocks, form, level))
        case doc.Picture():
            return _figure(block)
    return form


def _section(found: doc.Section, form: Markup, level: int) -> Markup:
    body = blocks(found.blocks, form, level + 1)
    if not found.anchor:
        return Markup("<h{0}>{1}</h{0}>\n{2}").format(level, found.title, body)
    return Markup(
        '<section id="{0}" aria-labelledby="{0}-title">\n<h2 id="{0}-title">{1}</h2>\n{2}\n</section>'
    ).format(found.anchor, found.title, body)


def _figure(picture: doc.Picture) -> Markup:
    art = Markup('<div class="art" role="img" aria-label="{0}. {1}">{2}</div>').format(
        picture.title, picture.caption, picture.inline
    )
    said = Markup("<figcaption><strong>{}.</strong> {}</figcaption>").format(picture.title, picture.caption)
    whole = Markup('<figure id="figure-{}">\n{}\n{}\n{}\n</figure>')
    return whole.format(picture.name, _scroll(picture.title, art), said, _data(picture))


def _data(picture: doc.Picture) -> Markup:
    """Return a figure's data as a table to open."""
    if not picture.data:
        return Markup()
    head, *rows = picture.data
    titles = Markup().join(Markup('<th scope="col">{}</th>').format(title) for title in head)
    lines = Markup("\n").join(Markup("<tr>{}</tr>").format(Markup().join(map(_datum, row))) for row in rows)
    table = Markup("<table>\n<thead><tr>{}</tr></thead>\n<tbody>{}</tbody>\n</table>").format(titles, lines)
    label = f"Data of the figure: {picture.title}"
    return Markup("<details>\n<summary>Data</summary>\n{}\n</details>").format(_scroll(label, table))


def _datum(value: str | int) -> Markup:
    if isinstance(value, str):
        return Markup("<td>{}</td>").format(value)
    return Markup('<td class="num">{}</td>').format(grouped(value))


def _scroll(label: str, body: Markup, style: str = "scroll") -> Markup:
    opened = Markup('<div class="{}" role="region" tabindex="0" aria-label="{}">{}</div>')
    return opened.format(style, label, body)


def _class(*names: str) -> Markup:
    given = " ".join(filter(None, names))
    return Markup(' class="{}"').format(given) if given else Markup()


def _table(table: doc.Table) -> Markup:
    caption = Markup("<caption><span>{}</span></caption>\n").format(inline(table.caption)) if table.caption else ""
    heads = Markup().join(
        Markup('<th scope="col"{}>{}</th>').format(_number(column), inline(column.title))
        for column in table.columns
        if not column.under
    )
    bodies = Markup("\n").join(_body(rows, table.columns) for rows in _groups(table))
    opened = Markup("<table{}>\n{}<thead><tr>{}</tr></thead>\n{}\n</table>")
    return opened.format(_class(table.style), caption, heads, bodies)


def _groups(table: doc.Table) -> list[list[doc.Row]]:
    """Return rows by the part of the table they belong to: a group's heading and a total begin one."""
    apart = any(column.under for column in table.columns)
    groups: list[list[doc.Row]] = []
    for row in table.rows:
        if not groups or apart or row.kind in ("group", "total"):
            groups.append([])
        groups[-1].append(row)
    return groups


def _body(rows: Sequence[doc.Row], columns: Sequence[doc.Column]) -> Markup:
    tag = "tfoot" if rows[0].kind == "total" else "tbody"
    return Markup("<{0}>{1}</{0}>").format(tag, Markup("\n").join(_row(row, columns) for row in rows))


def _row(row: doc.Row, columns: Sequence[doc.Column]) -> Markup:
    span = len(columns) - len(row.cells) + 1
    pairs = list(zip(row.cells[1:], columns[span:], strict=True))
    cells = [_first(row, columns[0], span), *(_cell(cell, column) for cell, column in pairs if not column.under)]
    style = _class("" if row.kind == "total" else row.kind)
    under = (f'\n<tr><td colspan="{len(cells)}">{inline(cell)}</td></tr>' for cell, column in pairs if column.under)
    return Markup("<tr{}>{}</tr>").format(style, Markup().join(cells)) + Markup("".join(under))


def _first(row: doc.Row, column: doc.Column, span: int) -> Markup:
    wide = Markup(f' colspan="{span}"') if span > 1 else Markup()
    if column.head or row.kind in ("group", "sum", "total"):
        scope = "rowgroup" if row.kind == "group" else "row"
        return Markup('<th scope="{}"{}>{}</th>').format(scope, wide, inline(row.cells[0]))
    return _cell(row.cells[0], column)


def _cell(cell: doc.Text, column: doc.Column) -> Markup:
    return Markup("<td{}>{}</td>").format(_number(column), inline(cell))


def _number(column: doc.Column) -> Markup:
    return _class("num") if column.number else Markup()
