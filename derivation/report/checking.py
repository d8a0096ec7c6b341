"""The section on what supports the numbers."""

# ruff: noqa: RUF001

from __future__ import annotations

from derivation.report.document import Code, Column, Details, Mark, Paragraph, Row, Section, Table, prose
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


def validation_section(v: Validation) -> Section:
    """Return the section."""
    runs = [block for run in v.runs for block in _run(run)] or [Paragraph(prose(MISSING))]
    measured = (_measured(v.measured),) if v.measured else ()
    blocks = (Paragraph(prose(COMPARED)), *runs, *map(Paragraph, v.wider), *v.pictures, *measured)
    return Section("Validation", blocks, "validation")


def _run(run: Run) -> tuple[Paragraph, Details]:
    columns = tuple(Column(title, number=i > 1, head=not i) for i, title in enumerate(run.columns))
    table = Table("Verification results", columns, tuple(map(Row, run.rows)))
    summary = f"The compared peaks, {len(run.rows)} of them"
    return Paragraph(Mark("strong", run.title)), Details(summary, (table,), printed=True)


def _measured(rows: tuple[MeasuredRow, ...]) -> Details:
    names, numbers, ends = MEASURED
    columns = (*map(Column, names), *(Column(name, True) for name in numbers), *map(Column, ends))
    cells = ((r.what, r.gpu, Code(r.metric), r.measured, r.predicted, r.difference, r.judged, r.source) for r in rows)
    table = Table("Measured rows", columns, tuple(map(Row, cells)))
    return Details(f"The measured rows, {len(rows)} of them", (table,))
