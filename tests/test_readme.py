"""The README's measured tables are the ones that the evidence files give now."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import pytest

from derivation.cli import run
from derivation.evidence import public, survey
from derivation.evidence.table import Prediction, measured_vs_predicted
from derivation.measure.validate import Row, reasons, recorded, summary

README = Path(__file__).resolve().parent.parent / "README.md"
START, END = "<!-- measured: start -->\n", "<!-- measured: end -->"
MIB = 1 << 20
HEAD = """| GPU, what (height x width) | metric | measured MiB | predicted MiB | error | within | rules of thumb |
|---|---|--:|--:|--:|---|---|
"""
COUNTERS = """| peak | calls | predicted to the byte | within 1 KiB | mean error | largest |
|---|--:|--:|--:|--:|--:|
"""
SAID = ("gpu", "model", "height", "width", "batch_size", "guidance_scale", "num_inference_steps", "strength")
SMI = """| GPU, call (img2img, float16, efficient unless said) | H x W | nvidia-smi MiB | predicted MiB | error |
|---|---|--:|--:|--:|
"""


def cells(comparison: Prediction) -> list[str]:
    m = comparison.measurement
    size = f" {m.height}x{m.width}" if m.width else ""
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


def counters() -> str:
    return COUNTERS + "".join(
        f"| {counter} | {c['calls']} | {c['equal']} | {c['within_1_kib']} | {c['mean_error']:.3%} "
        f"| {c['largest_error']:+.2%} |\n"
        for counter, c in summary(recorded()[1]).items()
    )


def read_off_nvidia_smi() -> str:
    rows = [row for row in recorded()[1] if "device" in row.measured]
    shown = dict.fromkeys(map(smi, rows))
    return SMI + "".join(shown)


def reported() -> str:
    return public.markdown(public.rows())


def further_off() -> str:
    lines = {}
    for row in recorded()[1]:
        errors = ", ".join(f"{name} {error:+.2%}" for name, error in row.further_off.items())
        lines |= {str(row): f"| `{row}` | {errors} | {reasons()[str(row)]} |\n"} if errors else {}
    return "| call | peak, error | why |\n|---|---|---|\n" + "".join(lines.values())


def surveyed() -> str:
    return survey.markdown(survey.recorded()["pipelines"])


def smi(row: Row) -> str:
    c = row.call
    chosen = " ".join(name if value is True else str(value) for name, value in c.items() if name not in SAID)
    chosen += " no guidance" * (c["guidance_scale"] <= 1)
    measured, predicted = row.measured["device"], row.predicted["device"]
    size = f"{c['width']}x{c['height']}, batch {c['batch_size']}"
    error = f"{predicted / measured - 1:+.3%}"
    what = f"{c['gpu'].removeprefix('NVIDIA ')}, {c['model']} {chosen}"
    return f"| {what} | {size} | {measured / MIB:,.1f} | {predicted / MIB:,.1f} | {error} |\n"


@pytest.mark.parametrize(
    ("start", "end", "table"),
    [
        (START, END, table),
        ("<!-- gpu counters: start -->\n", "<!-- gpu counters: end -->", counters),
        ("<!-- gpu nvidia-smi: start -->\n", "<!-- gpu nvidia-smi: end -->", read_off_nvidia_smi),
        ("<!-- public: start -->\n", "<!-- public: end -->", reported),
        ("<!-- gpu reasons: start -->\n", "<!-- gpu reasons: end -->", further_off),
        ("<!-- survey: start -->\n", "<!-- survey: end -->", surveyed),
    ],
)
def test_the_measured_tables_are_up_to_date(request, start, end, table):
    before, rest = README.read_text().split(start)
    old, after = rest.split(end)
    new = table()
    if request.config.getoption("--update-formulas"):
        README.write_text(before + start + new + end + after)
        old = new
    assert old == new, "rewrite with: python -m pytest tests/test_readme.py --update-formulas"


COMMANDS = re.findall(r"(?m)^python -m derivation (.*)$", README.read_text())
ELSEWHERE = ("verify", "measure", "validate")  # minutes, a GPU and its file: the command line's own tests run these


def test_the_commands_are_found():
    assert len(COMMANDS) > 5 and {line.split()[0] for line in COMMANDS} > set(ELSEWHERE)


@pytest.mark.parametrize("line", [line for line in COMMANDS if not line.startswith(ELSEWHERE)])
def test_a_command_works_as_printed(line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(shlex.split(line, comments=True)) == 0
    said = capsys.readouterr().err.splitlines()
    assert said == [f"wrote {path}" for path in os.listdir(tmp_path) if "--snapshot" in line]
