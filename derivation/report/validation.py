"""What supports the numbers: the comparison with traced modules, and published measurements."""

# ruff: noqa: RUF001

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

from derivation.errors import DerivationError
from derivation.evidence.table import Prediction
from derivation.libraries import LIBRARIES
from derivation.measure import validate
from derivation.options import Options
from derivation.report import figures
from derivation.report.document import Picture
from derivation.report.figures import Measured
from derivation.report.pictures import picture
from derivation.text import GIB, MIB, grouped

EVIDENCE = Path(__file__).parent.parent / "evidence"
RECORD = EVIDENCE / "verification.json"
# what verify --all and verify --fuzz print with --json
MATRIX, FUZZ = EVIDENCE / "matrix.json", EVIDENCE / "fuzz.json"
OURS = "this derivation"
MEASURED_COLUMNS = (
    "Call",
    "Size",
    "Requested, predicted − measured (bytes)",
    "Reserved, predicted (bytes)",
    "Reserved, measured (bytes)",
)
COLUMNS = ("Component or stage", "Size", "Derived (bytes)", "Traced (bytes)", "Result")


@dataclass(frozen=True, slots=True)
class Run:
    """A table of derived against traced peaks; ``title`` says whether it is live or recorded, and with what."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class MeasuredRow:
    """A published measurement and its prediction, ready to be printed."""

    what: str
    gpu: str
    metric: str
    measured: str
    predicted: str
    difference: str
    judged: str
    source: str


@dataclass(frozen=True, slots=True)
class Validation:
    """What the validation section shows."""

    runs: tuple[Run, ...]
    wider: tuple[str, ...]
    measured: tuple[MeasuredRow, ...]
    pictures: tuple[Picture, ...]


def validation(model: str, options: Options, comparisons: Sequence[Prediction], verify: bool) -> Validation:
    """Return the verification of ``model``, traced now or as recorded, and the measured rows.

    Raises DerivationError where ``verify`` is asked for without its extra, or the record is not readable.
    """
    run = live(model, options) if verify else recorded(model)
    return Validation(
        runs=tuple(found for found in (run, on_a_gpu(model)) if found is not None),
        wider=wider(model),
        measured=tuple(_row(c) for c in comparisons),
        pictures=(_measured(comparisons), _rules(comparisons)) if comparisons else (),
    )


def live(model: str, options: Options) -> Run:
    """Trace the real modules now; raises DerivationError without the extra."""
    try:
        from derivation.verify.verification import run_verification
    except ImportError as error:
        raise DerivationError(f"--verify needs {error.name}: pip install 'diffusion-vram-derivation[verify]'") from None
    chosen: dict[str, Any] = options.as_dict()
    rows = [row.as_dict() for row in run_verification(model, **chosen)]
    return _run("Traced while this report was written", {name: version(name) for name in LIBRARIES}, rows)


def recorded(model: str) -> Run | None:
    """Return the recorded verification of ``model``, None without one; raises DerivationError for a broken file."""
    if not RECORD.exists():
        return None
    try:
        found = json.loads(RECORD.read_text(encoding="utf-8"))
        rows = [row for row in found["rows"] if row["model"] == model]
        return _run(f"Recorded on {found['date']}, not run for this report", found["versions"], rows) if rows else None
    except (ValueError, KeyError, TypeError) as error:
        raise DerivationError(f"{RECORD.name} is not a verification record ({error!r})") from None


def on_a_gpu(model: str) -> Run | None:
    """Return the calls of ``model`` that were measured, and what was predicted; raises DerivationError."""
    described, measured = validate.recorded()
    rows = [row for row in measured if row.call["model"] == model]
    if not rows:
        return None
    counters = validate.summary(rows)
    errors = ", ".join(f"{name} {100 * counters[name]['mean_error']:.3f} %" for name in validate.COUNTERS[:3])
    return Run(
        title=f"Measured on {described}: {len(rows)} calls of this model, mean error of the peaks: {errors}; reserved "
        f"bytes are equal in {counters['reserved']['equal']}.",
        columns=MEASURED_COLUMNS,
        rows=tuple(_on_a_gpu(row) for row in rows),
    )


def _on_a_gpu(row: validate.Row) -> tuple[str, ...]:
    said = {"model", "height", "width", "batch_size", "num_inference_steps", "strength"}
    chosen = " ".join(f"{name}={value}" for name, value in row.call.items() if name not in said)
    size = f"{row.call['height']} × {row.call['width']}, B={row.call['batch_size']}"
    requested = row.predicted["requested"] - row.measured["requested"]
    return chosen, size, grouped(requested), grouped(row.predicted["reserved"]), grouped(row.measured["reserved"])


def wider(model: str) -> tuple[str, ...]:
    """Return what the recorded runs over options and over random configs found; raises DerivationError."""
    found = []
    for path, what in ((MATRIX, f"whole pipeline calls of {model}, one for each option and size"), (FUZZ, FUZZED)):
        if path.exists():
            try:
                found.append(_sentence(json.loads(path.read_text(encoding="utf-8")), model, what))
            except (ValueError, KeyError, TypeError) as error:
                raise DerivationError(f"{path.name} is not a record of verify ({error!r})") from None
    return tuple(sentence for sentence in found if sentence)


FUZZED = "random configs, options and sizes, components and whole pipelines"


def _sentence(record: Mapping[str, Any], model: str, what: str) -> str:
    calls = record.get("calls")
    mine = None if calls is None else sum(line.split()[0] == model for line in calls)
    count = record["count"] if mine is None else mine
    failed = {case["reproduce"] for case in record["failed"] if mine is None or case["reproduce"].split()[0] == model}
    used = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    equal = f"{grouped(count - len(failed))} of {grouped(count)} {what}"
    return f"Recorded on {record['date']}, with {used}: {equal} equal to the byte." if count else ""


def _run(title: str, versions: Mapping[str, str], rows: Sequence[Mapping[str, Any]]) -> Run:
    used = ", ".join(f"{name} {number}" for name, number in versions.items())
    matches = sum(bool(row["match"]) for row in rows)
    return Run(
        title=f"{title}, with {used}: {matches} of {len(rows)} equal to the byte.",
        columns=COLUMNS,
        rows=tuple(_verified(row) for row in rows),
    )


def _verified(row: Mapping[str, Any]) -> tuple[str, ...]:
    guidance = "guidance" if row["guidance"] else "no guidance"
    run = f"{row['pipeline']} {row['dtype']} {row['attention']}"
    size = f"{row['height']} × {row['width']}, B={row['batch_size']}, L={row['prompt_length']}, {guidance}; {run}"
    result = "equal" if row["match"] else "different"
    numbers = (grouped(row["derived_bytes"]), grouped(row["traced_bytes"]))
    return (f"{row['scope']} {row['name']}", size, *numbers, result)


def _row(c: Prediction) -> MeasuredRow:
    m = c.measurement
    return MeasuredRow(
        what=_what(c),
        gpu=m.gpu,
        metric=m.metric,
        measured=grouped(round(m.value)),
        predicted=grouped(c.predicted),
        difference=f"{100 * c.error:+.3f} %".replace("-", "−"),
        judged="yes" if c.judged else "no: a coefficient was fitted on it",
        source=m.source,
    )


def _what(c: Prediction) -> str:
    m = c.measurement
    size = f"{m.height} × {m.width}, B={m.batch}, " if m.height else ""
    return f"{m.what.replace('_', ' ')}, {size}{m.dtype}"


def _measured(rows: Sequence[Prediction]) -> Picture:
    shown = [Measured(_label(r), r.predicted, r.measurement.value, _uncertainty(r), r.judged) for r in rows]
    return picture(
        "measured",
        "Predicted against measured",
        "Published measurements on real GPUs against the derivation with scratch memory and the allocator replay. "
        "Bars: half of the last printed digit of the measurement; most are narrower than the dots. The scale is linear "
        "within ±0.1 % and logarithmic beyond.",
        figures.measured_ratio(shown),
        [
            ("Call", "measured, bytes", "predicted, bytes"),
            *((s.label, round(s.measured), round(s.derived)) for s in shown),
        ],
    )


def _label(c: Prediction) -> str:
    return f"{_what(c)}, {c.measurement.gpu}, {c.measurement.metric}"


def _uncertainty(row: Prediction) -> float:
    """Return half of the measurement's last printed digit, in bytes: two decimals of MiB or GiB, or exact bytes."""
    value = row.measurement.value
    if value.is_integer():
        return 0.0
    hundredths = value / MIB * 100
    return 0.005 * (MIB if abs(hundredths - round(hundredths)) < 1e-3 else GIB)


def _rules(rows: Sequence[Prediction]) -> Picture:
    """Draw the rules on the same rows: those that every rule of a whole pipeline gives a number for."""
    judged = [row for row in rows if row.rules_of_thumb and row.judged]
    most = max(len(row.rules_of_thumb) for row in judged)
    errors: dict[str, list[float]] = {}
    for row in (row for row in judged if len(row.rules_of_thumb) == most):
        for name, nbytes in {OURS: row.predicted, **row.rules_of_thumb}.items():
            errors.setdefault(name, []).append(100 * abs(nbytes / row.measurement.value - 1))
    names = sorted(errors, key=lambda name: fmean(errors[name]))
    labels = [f"{name} (worst {max(errors[name]):.3g} %)" for name in names]
    return picture(
        "rules",
        "Rules of thumb against the derivation",
        f"Mean relative error on the same {len(errors[OURS])} measured calls of whole pipelines, and the worst. "
        "Rows that a coefficient of the derivation was fitted on are left out.",
        figures.rule_errors(labels, [fmean(errors[n]) for n in names], names.index(OURS)),
        [
            ("Rule", "mean error", "worst"),
            *((name, f"{fmean(errors[name]):.3g} %", f"{max(errors[name]):.3g} %") for name in names),
        ],
    )
