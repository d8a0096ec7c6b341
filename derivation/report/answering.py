"""The first section: the equation, its terms, its stages, and what it assumes."""

# ruff: noqa: RUF001

from __future__ import annotations

from derivation.report.answer import Origin, PolynomialRow, StageRow, TermRow, WeightRow, place
from derivation.report.content import Content
from derivation.report.document import (
    Block,
    Bullets,
    Code,
    Column,
    Details,
    Facts,
    Formula,
    Lines,
    Mark,
    Paragraph,
    Row,
    Section,
    Table,
    Text,
    prose,
)
from derivation.report.mathml import maximum, polynomial, total
from derivation.report.offload import OffloadRow
from derivation.report.text import human
from derivation.text import NARROW_SPACE, grouped

SYMBOLS = (
    "Bytes of {} at the peak of {} with classifier-free guidance. *H* and *W* are the image’s height and width in "
    "pixels (multiples of {}), *B* the batch size, *L* the prompt length in tokens. {} bytes are weights{}; each row "
    "of the max is one moment of the run, named by its stage: moments that others exceed at every size have none.{} "
    "Operators below carry the names of PyTorch’s ATen library."
)
ROUNDING = (
    " Rounding every tensor up to 512 bytes adds at most {} bytes at *B* = 1{}{}; the numbers of bytes called exact "
    "include it."
)
REPLACED = ", or takes off at most {} where weights are replaced, whose own rounding ends with them"
TILES = ", and at most 511 for every further VAE tile"
TERMS = "Bytes at *B* = 1, *L* = {}, square images. 1 MiB = 2²⁰ bytes, 1 GiB = 2³⁰ bytes."
STAGES = (
    "Exact bytes beyond the weights while each stage runs, with what the pipeline keeps from earlier stages (*B* = 1, "
    "*L* = {}). The largest of a column is set in bold."
)
PLACEMENTS = (
    "Exact peaks (*B* = 1, *L* = {}), the stage that peaks, and the closed form in bytes. Offload moves weights from "
    "the constant into the stages that use them. The closed forms leave out the rounding of each tensor to 512 bytes."
)
COPIES = {"peak": "Copy LaTeX", "device": "Copy LaTeX of nvidia-smi"}
DEVICE = (
    "Bytes that nvidia-smi shows on a {}, at sides that are multiples of 64 up to 2048 and *B* = 1: the CUDA context, "
    "weights and small blocks, segments that grow with the image, and *r*, which these leave out, from 0 to {} at {} "
    "of {} such sizes. At the others tensors share segments otherwise: the LaTeX has every segment of each; "
    "`derivation estimate` and the page’s form replay any other call."
)
SEGMENTS = "The sum that nvidia-smi shows, segment by segment"
WHERE = "where the VAE works in overlapping tiles, their sides in pixels:"


def answer_section(c: Content) -> Section:
    """Return the section."""
    blocks: list[Block] = [
        Paragraph(c.summary, lead=True),
        *((Paragraph(c.beside),) if c.beside else ()),
        Formula("The equation", c.headline, _copies(c, "peak")),
    ]
    if c.device:
        blocks.append(Formula(f"What nvidia-smi shows on {c.device.card}", c.device.equation, _copies(c, "device")))
        found = c.device.beside
        numbers = grouped(found.most - found.least), str(found.sizes), str(found.all_sizes)
        blocks.append(Paragraph(prose(DEVICE, c.device.card, *numbers)))
    blocks += [Details(SEGMENTS, (c.segments,), printed=True)] if c.segments else []
    if c.where:
        rows = tuple(Row((x.math, x.meaning)) for x in c.where)
        columns = (Column("Symbol"), Column("Meaning"))
        blocks.append(Table("Symbols of VAE tiles", columns, rows, WHERE, "where"))
    blocks += [
        Paragraph(_symbols(c)),
        Section("Why: term by term", _terms(c)),
        Section("Which stage peaks where", (_stages(c),)),
    ]
    if c.placements:
        blocks.append(Section("With and without CPU offload", (_placements(c),)))
    if c.crossings:
        blocks.append(Section("When it changes", (Bullets(c.crossings),)))
    if c.indifferent:
        blocks.append(Section("What does not matter", (Facts(c.indifferent),)))
    blocks.append(Section("What is assumed, what is left out", (Facts(tuple(c.assumptions)),)))
    return Section("The answer", tuple(blocks), "answer")


def _copies(c: Content, name: str) -> tuple[tuple[str, str], ...]:
    return ((name, COPIES[name]),) if name in c.latex else ()


def _symbols(c: Content) -> Text:
    run = prose("one {} call", Code(c.options.pipeline)) if c.whole else "the component’s call"
    stay = " that stay on the GPU" if c.options.offload else ""
    less, more = c.rounding_bytes
    replaced = REPLACED.format(grouped(less)) if less else ""
    rounding = prose(ROUNDING, grouped(more), TILES if c.where else "", replaced) if less or more else ""
    return prose(SYMBOLS, c.counted, run, str(c.unit), grouped(c.answer.weights_bytes), stay, rounding)


def _sizes(c: Content) -> tuple[Column, ...]:
    return tuple(Column(f"{side}{NARROW_SPACE}×{NARROW_SPACE}{side}", True) for side in c.sizes)


def _terms(c: Content) -> tuple[Block, ...]:
    columns = (Column("Term"), Column("Meaning"), *_sizes(c), Column("Where it comes from", printed="no"))
    found = c.answer
    shown = [p for p in found.polynomials if c.peak_sides(p)]
    others = [p for p in found.polynomials if p.terms not in c.peak_terms]
    rows = [Row(("Weights, always there",), "group"), *(_weight(w, c) for w in found.weights)]
    rows += [row for p in shown for row in _polynomial(p, c)]
    exact = tuple((Mark("strong", human(v)), Mark("below", f"{grouped(v)} B")) for v in found.totals)
    rows.append(Row(("Peak: weights + largest stage (exact)", *exact, ""), "total"))
    table = Table("Terms of the equation", columns, tuple(rows), prose(TERMS, str(c.length)), "terms")
    if not others:
        return (table,)
    more = Table(
        "Other terms of the equation", columns, tuple(r for p in others for r in _polynomial(p, c)), style="terms"
    )
    summary = f"The other rows of the max, term by term: {len(others)} not the peak at these sizes"
    return table, Details(summary, (more,), printed=True)


def _weight(w: WeightRow, c: Content) -> Row:
    held = (
        f"{grouped(w.parameters)} parameters, {c.options.dtype_of(w.model)}, and buffers"
        if w.parameters
        else "buffers only"
    )
    return Row((grouped(w.nbytes), ("weights of ", Code(w.model)), *[human(w.nbytes)] * len(c.sizes), held))


def _polynomial(p: PolynomialRow, c: Content) -> list[Row]:
    sides = ", ".join(map(str, c.peak_sides(p)))
    title: Text = (p.title, " ", Mark("tag", f"the peak at {sides} px")) if sides else p.title
    rows = (Row((polynomial(r.terms), r.meaning, *map(human, r.bytes_at), _origins(r))) for r in p.rows)
    return [Row((title,), "group"), *rows, Row(("Sum, this row of the max", *map(human, p.bytes_at), ""), "sum")]


def _origins(row: TermRow) -> Lines:
    more = f"and {row.others} smaller tensor{'s' * (row.others > 1)}"
    return Lines((*map(_origin, row.origins), *([Mark("dim", more)] if row.others else [])))


def _origin(o: Origin) -> Text:
    return (f"{o.count} × " if o.count > 1 else "", place(o.op, o.where), " ", Mark("dim", f"[{o.shape}]"))


def _stages(c: Content) -> Table:
    columns = (Column("Stage", head=True), Column("Closed form (bytes)", printed="below"), *_sizes(c))
    rows = tuple(_stage(stage, c.answer.peak_stages) for stage in c.answer.stages)
    return Table("Peak of each stage", columns, rows, prose(STAGES, str(c.length)))


def _stage(s: StageRow, peaks: tuple[str, ...]) -> Row:
    numbers = (
        Mark("strong", grouped(v)) if peak == s.name else grouped(v) for v, peak in zip(s.bytes_at, peaks, strict=True)
    )
    return Row((s.title, maximum([p.terms for p in s.polynomials]), *numbers))


def _placements(c: Content) -> Table:
    columns = (Column("Models", head=True), *_sizes(c), Column("Closed form (bytes)", printed="below", under=True))
    return Table(
        "Peak with and without CPU offload",
        columns,
        tuple(map(_placement, c.placements)),
        prose(PLACEMENTS, str(c.length)),
        "placements",
    )


def _placement(p: OffloadRow) -> Row:
    own: Text = (" ", Mark("tag", "this report")) if p.own else ""
    cells = ((human(v), Mark("below", f"{grouped(v)} B, {stage}")) for v, stage in zip(p.totals, p.stages, strict=True))
    return Row(((p.title, own), *cells, total(p.weights_bytes, p.polynomials)))
