"""The section on what supports the numbers."""

# ruff: noqa: RUF001

from __future__ import annotations

from derivation.report.document import Block, Code, Column, Details, Mark, Paragraph, Row, Section, Table, Text, prose
from derivation.report.validation import MeasuredRow, Run, Validation

COMPARED = (
    "The derivation is compared with the real diffusers and transformers modules, run on PyTorch’s `meta` device while "
    "every storage that appears and dies is counted. The target is zero bytes of difference."
)
MISSING = (
    "**Not recorded.** No verification run is stored beside this report; `python -m derivation verify` makes one "
    "(it needs the extra `verify`)."
)
MEASURED = ("What", "GPU", "Metric"), ("Measured (bytes)", "Predicted (bytes)", "Difference"), ("Judged", "Source")


def checked_section(v: Validation) -> Section:
    """Return what was compared with what, and how it came out."""
    runs: list[Text] = [Mark("strong", run.title) for run in v.runs] or [prose(MISSING)]
    said = [Paragraph(text) for text in (prose(COMPARED), *runs, *v.wider)]
    blocks: tuple[Block, ...] = (*said, *v.pictures)
    return Section("How it was checked", blocks, "validation")


def comparisons_section(v: Validation) -> Section:
    """Return the tables of what was compared."""
    measured = (_measured(v.measured),) if v.measured else ()
    return Section("Every comparison", (*map(_run, v.runs), *measured), "comparisons", appendix=True)


def _run(run: Run) -> Details:
    columns = tuple(Column(title, number=i > 1, head=not i) for i, title in enumerate(run.columns))
    table = Table("Verification results", columns, tuple(map(Row, run.rows)), Mark("strong", run.title))
    return Details(f"The compared peaks, {len(run.rows)} of them", (table,), printed=True)


def _measured(rows: tuple[MeasuredRow, ...]) -> Details:
    names, numbers, ends = MEASURED
    columns = (*map(Column, names), *(Column(name, True) for name in numbers), *map(Column, ends))
    cells = ((r.what, r.gpu, Code(r.metric), r.measured, r.predicted, r.difference, r.judged, r.source) for r in rows)
    table = Table("Measured rows", columns, tuple(map(Row, cells)))
    return Details(f"The measured rows, {len(rows)} of them", (table,))
