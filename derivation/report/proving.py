"""The section on how program points become polynomials, with the proofs."""

# ruff: noqa: RUF001

from __future__ import annotations

from derivation.report.answer import place
from derivation.report.content import Content
from derivation.report.document import Block, Code, Column, Details, Math, Paragraph, Row, Section, Table, Text, prose
from derivation.report.mathml import polynomial
from derivation.report.reduction import Proof, StageReduction
from derivation.text import grouped

POINTS = (
    "Only a moment before a release can be a peak. Of {} such points, most can never win: another point holds at "
    "least as many bytes at every size. A point is dropped only with a proof, and the proof allows for the 512-byte "
    "rounding of every tensor."
)
THEOREM = (
    "**Theorem.** Let the margin be the bytes of the survivor minus those of the candidate, less the most that "
    "rounding can give back. If, with every symbol written as its lower bound plus a shift ≥ 0 (and {} bounded on "
    "both sides by linear functions of the shift), no coefficient of the margin is negative, then the margin is ≥ 0 "
    "at every size, and the candidate can never be the only peak. A candidate may also lose to a weighted mean of two "
    "survivors, since {}."
)
HALVED = Math(
    "<msub><mi>h</mi><mrow><mi>k</mi><mo>+</mo><mn>1</mn></mrow></msub><mo>=</mo><mo>⌈</mo><msub><mi>h</mi><mi>k</mi>"
    "</msub><mo>/</mo><mn>2</mn><mo>⌉</mo>",
    r"h_{k+1} = \lceil h_k / 2 \rceil",
)
MEAN = Math(
    "<mi>max</mi><mo>(</mo><mi>x</mi><mo>,</mo><mi>y</mi><mo>)</mo><mo>≥</mo><mi>t</mi><mi>x</mi><mo>+</mo><mo>(</mo>"
    "<mn>1</mn><mo>−</mo><mi>t</mi><mo>)</mo><mi>y</mi>",
    r"\max(x, y) \geq t x + (1 - t) y",
)
PRINTED = (
    "On the way to the printed form each level’s side becomes a fraction of the image’s: {}, which is exact for "
    "multiples of {}{}; the same comparison then runs once more and drops what only odd sizes need."
)
TILES = ", and sides of VAE tiles, in latents until then, are in pixels, {} times as many"
SIMPLIFIED = (
    "From the live set to the printed polynomial: the sum over all levels, every level in the sides of the deepest "
    "one, and these as fractions of the image’s"
)


def reduction_section(c: Content) -> Section:
    """Return the section."""
    titles = ("Candidates", "Proven dominated", "Kept, all sizes", "of which kept for want of a proof")
    columns = (
        Column("Stage", head=True),
        *(Column(title, True) for title in (*titles, f"Printed for multiples of {c.unit}")),
    )
    counts = Table("Reduction of each stage", columns, tuple(map(_counts, c.reductions)))
    tiles = TILES.format(c.factor) if c.where else ""
    blocks: tuple[Block, ...] = (
        Paragraph(prose(POINTS, grouped(c.points))),
        Paragraph(prose(THEOREM, HALVED, MEAN)),
        counts,
        Paragraph(prose(PRINTED, _fraction(c.factor), str(c.unit), tiles)),
        *(_stage(r, c.side) for r in c.reductions if r.candidates > 1),
    )
    return Section("From program points to polynomials", blocks, "reduction", appendix=True)


def _counts(r: StageReduction) -> Row:
    return Row((r.title, *map(str, (r.candidates, r.dominated, len(r.kept), r.unproven, r.printed))))


def _fraction(factor: int) -> Math:
    def side(level: str, image: str) -> str:
        below = f"<mrow><mn>{factor}</mn><mo>·</mo><msup><mn>2</mn><mi>k</mi></msup></mrow>"
        return f"<msub><mi>{level}</mi><mi>k</mi></msub><mo>=</mo><mfrac><mi>{image}</mi>{below}</mfrac>"

    latex = ", ".join(rf"{low}_k = {high} / ({factor} \cdot 2^k)" for low, high in ("hH", "wW"))
    return Math(f"{side('h', 'H')}<mo>,</mo>{side('w', 'W')}", latex)


def _stage(r: StageReduction, side: int) -> Details:
    number = Column(f"Bytes at {side} × {side}", True)
    kept = tuple(Row((k.label, Code(k.module), Code(k.op), grouped(k.nbytes))) for k in r.kept)
    steps = tuple(Row((s.label, s.levels, s.deepest, polynomial(s.terms))) for s in r.steps)
    sides = ("In every level’s sides", "In the deepest level’s sides", "In the image’s sides")
    tables = [
        Table(
            f"Survivors of {r.title}",
            (Column("Point"), Column("Module"), Column("Operator"), number),
            kept,
            "Kept at all sizes",
        ),
        Table(f"Simplification of {r.title}", (Column("Point"), *map(Column, sides)), steps, SIMPLIFIED),
    ]
    if r.proofs:
        columns = (Column("Dropped"), number, Column("Dominated by"), Column("Margin (bytes)"), Column("Proof"))
        caption = "The largest points that were dropped, and why"
        tables.append(Table(f"Proofs for {r.title}", columns, tuple(map(_proof, r.proofs)), caption))
    return Details(f"{r.title}: survivors, simplification and proofs", tuple(tables))


def _proof(p: Proof) -> Row:
    weighted = (f"{weight}/{p.weight} {label}" if p.weight > 1 else label for label, weight in p.uppers)
    dropped: Text = place(p.candidate.op, p.candidate.module)
    return Row((dropped, grouped(p.candidate.nbytes), " + ".join(weighted), p.margin, p.theorem))
