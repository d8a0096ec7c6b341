"""Public rows that another tool or pipeline reported: what is predicted for each, or why nothing is."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from derivation.api import derive
from derivation.config.checkpoint import BUNDLED
from derivation.text import MIB

PUBLIC = Path(__file__).with_name("public.json")
# What a row that names its versions is held to.
CLOSE = 0.01


@dataclass(frozen=True, slots=True)
class Row:
    """One reported figure; ``prediction`` says how it is predicted, None where it is not: then ``reason`` says why.

    A ``reason`` is there, too, where the prediction is further off than ``CLOSE``.
    """

    source: str
    what: str
    gpu: str
    versions: str
    metric: str
    measured_mib: float
    prediction: Mapping[str, Any] | None
    reason: str

    @property
    def error(self) -> float | None:
        """predicted / measured - 1, None where nothing is predicted."""
        return None if self.prediction is None else self.prediction["predicted"] / (self.measured_mib * MIB) - 1

    @property
    def bundled(self) -> bool:
        """Whether it is predicted from a bundled checkpoint: without a trace, in a second."""
        return self.prediction is not None and (BUNDLED / self.prediction["model"]).is_dir()


def rows() -> tuple[Row, ...]:
    """Return every row of PUBLIC."""
    return tuple(Row(**row) for row in json.loads(PUBLIC.read_text(encoding="utf-8"))["rows"])


def predict(prediction: Mapping[str, Any]) -> int:
    """Return the bytes that ``prediction`` asks for, made now; raises DerivationError as ``derive`` does."""
    derivation, counter = derive(prediction["model"], **prediction["options"]), prediction["counter"]
    if counter in derivation.weights:
        return derivation.weights[counter] + derivation.stage_peaks(**prediction["call"])[counter]
    return int(getattr(derivation.device_memory(**prediction["call"]), counter))


def markdown(found: Iterable[Row]) -> str:
    """Return the rows as a table."""
    lines = [
        "| What, GPU, versions | metric | measured MiB | predicted MiB | error | why |",
        "|---|---|--:|--:|--:|---|",
    ]
    for row in found:
        predicted, error = "-", "-"
        if row.prediction is not None and row.error is not None:
            predicted, error = f"{row.prediction['predicted'] / MIB:,.2f}", f"{row.error:+.2%}"
        what = f"{row.what}; {row.gpu}; {row.versions}"
        lines.append(f"| {what} | {row.metric} | {row.measured_mib:,.2f} | {predicted} | {error} | {row.reason} |")
    return "\n".join(lines) + "\n"
