"""The README's equation and the measured tables are the ones that the records give now; its commands work."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import pytest
from conftest import SD15

from derivation import derive
from derivation.cli import run
from derivation.evidence import public, survey
from derivation.evidence.table import Prediction, measured_vs_predicted
from derivation.measure.validate import Row, reasons, recorded, summary

ROOT = Path(__file__).resolve().parent.parent
README, EVIDENCE = ROOT / "README.md", ROOT / ".github" / "EVIDENCE.md"
START, END = "<!-- measured: start -->\n", "<!-- measured: end -->"
MIB = 1 << 20
HEAD = """| GPU, what (height x width) | metric | measured MiB | predicted MiB | error | within | rules of thumb |
|---|---|--:|--:|--:|---|---|
"""
COUNTERS = """| peak | calls | predicted to the byte | within 1 KiB | mean error | largest |
|---|--:|--:|--:|--:|--:|
"""
SAID = ("gpu", "model", "height", "width", "batch_size", "guidance_scale", "num_inference_steps", "strength")
SHORT = """| H x W | nvidia-smi, MiB | predicted, MiB | error |
|---|--:|--:|--:|
"""
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


def on_the_h200() -> list[Row]:
    """Return the calls of the README's equation that were measured: its defaults, by size."""
    own = {"gpu": "NVIDIA H200", "model": SD15, "batch_size": 1, "guidance_scale": 7.5, "attention": "sdpa"}
    rows = [row for row in recorded()[1] if "device" in row.measured and row.call.items() >= own.items()]
    plain = [row for row in rows if set(row.call) <= {*SAID, "attention"}]
    return sorted(plain, key=lambda row: (row.call["height"] * row.call["width"], row.call["height"]))


def in_short() -> str:
    rows = {(row.call["height"], row.call["width"]): row for row in on_the_h200()}
    return SHORT + "".join(
        f"| {height} x {width} | {row.measured['device'] / MIB:,.1f} | {row.predicted['device'] / MIB:,.1f} "
        f"| {row.predicted['device'] / row.measured['device'] - 1:+.3%} |\n"
        for (height, width), row in rows.items()
    )


def test_the_equation_is_what_was_measured() -> None:
    equation = README.read_text().split("$$")[1].replace(r"\,", "")
    context, weights, pixel, rest = map(int, re.findall(r"(?<![\d^_])\d{4,}", equation))
    rows = on_the_h200()
    assert len(rows) > 4
    for row in rows:
        left = row.measured["device"] - context - weights - pixel * row.call["height"] * row.call["width"]
        assert 0 <= left <= rest, row
    form = derive(SD15, pipeline="img2img", attention="sdpa", gpu="h200").equation.device
    for (height, width), point in form.index.items():
        left = int(form.reserved_bytes[point]) - weights - pixel * height * width
        is_less = height % 128 and width % 128
        assert left < 0 if is_less else 0 <= left <= rest, (height, width)


def test_the_readme_is_short_and_its_lines_too() -> None:
    lines = README.read_text().splitlines()
    assert len(lines) < 250 and max(map(len, lines)) <= 120


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
        ("<!-- nvidia-smi in short: start -->\n", "<!-- nvidia-smi in short: end -->", in_short),
        (START, END, table),
        ("<!-- gpu counters: start -->\n", "<!-- gpu counters: end -->", counters),
        ("<!-- gpu nvidia-smi: start -->\n", "<!-- gpu nvidia-smi: end -->", read_off_nvidia_smi),
        ("<!-- public: start -->\n", "<!-- public: end -->", reported),
        ("<!-- gpu reasons: start -->\n", "<!-- gpu reasons: end -->", further_off),
        ("<!-- survey: start -->\n", "<!-- survey: end -->", surveyed),
    ],
)
def test_the_measured_tables_are_up_to_date(request, start, end, table):
    file = README if table is in_short else EVIDENCE
    before, rest = file.read_text().split(start)
    old, after = rest.split(end)
    new = table()
    if request.config.getoption("--update-formulas"):
        file.write_text(before + start + new + end + after)
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
