"""The sections of a report, in the order of its contents: what was found, as a document."""

# ruff: noqa: RUF001

from __future__ import annotations

from derivation.report.answer import PolynomialRow, place
from derivation.report.answering import answer_section
from derivation.report.checking import checked_section, comparisons_section
from derivation.report.content import Content
from derivation.report.document import (
    Block,
    Code,
    Column,
    Details,
    Form,
    Mark,
    Math,
    Paragraph,
    Row,
    Section,
    Table,
    Text,
    prose,
)
from derivation.report.mathml import polynomial
from derivation.report.proving import reduction_section
from derivation.report.text import SUBSCRIPTS, human
from derivation.report.walk import Block as WalkBlock
from derivation.report.walk import Walk
from derivation.text import grouped

PROGRAM = "{} was executed symbolically; {} times a tensor was allocated or released.{}"
WITNESSES = (
    "A peak is a moment in the run, and its polynomial is nothing but the sum of the tensors alive then. Every list "
    "below adds up to the polynomial of its stage. Bytes are at *B* = 1, *L* = {}."
)
WALK = (
    "Each component’s `forward()`, followed line by line: every tensor in the order of its allocation, with the "
    "numbers of the tensors alive right after it. Inputs and weights are not listed; a tensor that is a view of "
    "another takes no memory and has no line. Bytes are at {} × {}, *B* = 1, *L* = {}."
)
CUT = (
    " Cut VAE tiles run through the same layers as whole ones, on fewer pixels: of their tensors only the results "
    "are listed."
)


def document(c: Content) -> tuple[Section, ...]:
    """Return a report's sections."""
    sizes = tuple(c.figures[name] for name in ("curves", "map", "attention") if name in c.figures)
    witnesses = (Paragraph(prose(WITNESSES, str(c.length))), *_witnesses(c))
    return (
        Section("What a call needs", (Form(),), "calculator"),
        answer_section(c),
        Section("Image size and cards", sizes, "sizes"),
        checked_section(c.validation),
        _architecture(c),
        _program(c),
        Section("What is alive at each peak", witnesses, "witnesses", appendix=True),
        reduction_section(c),
        _walks(c),
        comparisons_section(c.validation),
    )


def _architecture(c: Content) -> Section:
    rows = (Row((Math(f"<mtext>{s.name.translate(SUBSCRIPTS)}</mtext>", s.latex), s.meaning)) for s in c.symbols)
    symbols = Table("Symbols", (Column("Symbol"), Column("Meaning")), tuple(rows), "Symbols in shapes and bytes")
    figures = (c.figures[name] for name in ("stages", "unet") if name in c.figures)
    return Section("Architecture at a glance", (*figures, symbols), "architecture", appendix=True)


def _program(c: Content) -> Section:
    what = prose("The pipeline’s `__call__`" if c.whole else "Each component’s `forward()`")
    once = " Iterations of the denoising loop that repeat exactly are recorded once." if c.whole else ""
    blocks = (Paragraph(prose(PROGRAM, what, grouped(c.events), once)), c.figures["live"], c.figures["composition"])
    return Section("Memory over the program", blocks, "program", appendix=True)


def _witnesses(c: Content) -> tuple[Block, ...]:
    return tuple(_witness(row, c) for stage in c.answer.stages for row in stage.polynomials)


def _witness(found: PolynomialRow, c: Content) -> Details:
    side, i = c.sizes[c.shown], c.shown
    columns = (
        Column("#", True, "no"),
        Column("Module"),
        Column("Operator"),
        Column("Shape", printed="no"),
        Column("Type", printed="no"),
        Column("Bytes", True),
        Column(f"at {side} × {side}", True),
    )
    tensors = found.witness.tensors
    rows = [
        Row(
            (
                str(number),
                Code(t.module),
                Code(t.op),
                t.shape + ("" if t.count == "1" else f" ({t.count} of them)"),
                t.dtype,
                polynomial(t.terms),
                grouped(t.bytes_at[i]),
            )
        )
        for number, t in enumerate(tensors, 1)
    ]
    rows.append(Row(("Sum", polynomial(found.witness.total), grouped(found.witness.bytes_at[i])), "total"))
    where = place(found.witness.op, found.witness.module)
    summary = (f"{found.title}: ", where, f", {len(tensors)} tensors, {human(found.bytes_at[i])} at {side} × {side}")
    table = Table(f"Tensors alive at the peak of {found.title}", columns, tuple(rows))
    return Details(summary, (table,), printed=True)


def _walks(c: Content) -> Section:
    said = Paragraph((prose(WALK, str(c.side), str(c.side), str(c.length)), CUT if c.where else ""))
    return Section("Block by block", (said, *(_walk(walk, c) for walk in c.walks)), "walk", appendix=True)


def _walk(walk: Walk, c: Content) -> Details:
    columns = (Column("Block"), Column("Output"), Column("Tensors", True), Column("Most bytes alive", True))
    rows = tuple(
        Row(
            (Code(b.path), b.output, str(len(b.lines)), _bold(grouped(b.peak_bytes), b.has_peak)),
            "peak" if b.has_peak else "",
        )
        for b in walk.blocks
    )
    peak = (human(walk.peak_bytes), grouped(walk.peak_bytes))
    summary = prose("{}: {} tensors, peak {} ({} bytes)", Code(walk.name), grouped(walk.tensors), *peak)
    table = Table(f"Blocks of {walk.name}", columns, rows)
    return Details(summary, (table, *(_block(b, c) for b in walk.blocks)), printed=True, style="component")


def _bold(text: str, strong: bool) -> Text:
    return Mark("strong", text) if strong else text


def _block(block: WalkBlock, c: Content) -> Details:
    columns = (
        *(Column("#", True), Column("Module"), Column("Op"), Column("Shape"), Column("Bytes")),
        *(Column(f"at {c.side} × {c.side}", True), Column("Alive after it"), Column("Sum alive", True)),
    )
    rows = tuple(
        Row(
            (
                str(x.number),
                Code(x.module),
                x.op,
                x.shape,
                x.formula,
                grouped(x.nbytes),
                x.alive,
                grouped(x.live_bytes),
            ),
            "peak" if x.is_peak else "",
        )
        for x in block.lines
    )
    plural = "" if len(rows) == 1 else "s"
    said = f" → [{block.output}], {len(rows)} tensor{plural}, up to {human(block.peak_bytes)} alive"
    tag: Text = (" ", Mark("tag", "the component’s peak")) if block.has_peak else ""
    return Details((Code(block.path), said, tag), (Table(f"Tensors of {block.path}", columns, rows, style="walk"),))
