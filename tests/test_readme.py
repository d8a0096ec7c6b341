"""The README's measured table is the one that the evidence files give now."""

from __future__ import annotations

from pathlib import Path

from derivation.hardware.evidence import Comparison, measured_vs_predicted

README = Path(__file__).resolve().parent.parent / "README.md"
START, END = "<!-- measured: start -->\n", "<!-- measured: end -->"
MIB = 1 << 20
HEAD = """| GPU, what | metric | measured MiB | predicted MiB | error | within | rules of thumb |
|---|---|--:|--:|--:|---|---|
"""


def cells(comparison: Comparison) -> list[str]:
    m = comparison.measurement
    size = f" {m.width}x{m.height}" if m.width else ""
    thumb = [value / m.value - 1 for value in comparison.rules_of_thumb.values()]
    bound = f"{m.tolerance or 0:.1%}"
    verdict = {True: bound, False: f"no ({bound})", None: "-"}[comparison.within]
    return [
        f"{m.gpu}, {m.what}{size}, batch {m.batch}, {m.dtype}",
        m.metric,
        f"{m.value / MIB:,.2f}",
        f"{comparison.predicted / MIB:,.2f}",
        f"{comparison.error:+.3%}",
        "fitted on this row" if not comparison.judged else verdict,
        f"{min(thumb):+.0%} to {max(thumb):+.0%}" if thumb else "-",
    ]


def table() -> str:
    return HEAD + "".join(f"| {' | '.join(cells(c))} |\n" for c in measured_vs_predicted())


def test_the_measured_table_is_up_to_date(request):
    before, rest = README.read_text().split(START)
    old, after = rest.split(END)
    new = table()
    if request.config.getoption("--update-formulas"):
        README.write_text(before + START + new + END + after)
        old = new
    assert old == new, "rewrite with: python -m pytest tests/test_readme.py --update-formulas"
