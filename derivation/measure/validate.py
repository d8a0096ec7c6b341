"""Calls that ``measure`` recorded on a GPU against what the derivation and the allocator replay predict for them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from typing import Any

from derivation.api import derive
from derivation.config.checks import MAX_SIZE
from derivation.errors import DerivationError, positive
from derivation.libraries import LIBRARIES
from derivation.measure.records import Records
from derivation.options import Options

RECORDS = Path(__file__).parent.parent / "evidence" / "gpu-calls.json"
# what ``validate --json`` said of them
RECORDED = RECORDS.with_name("gpu-validation.json")
# why a call is further off than CLOSE, as far as records tell, by call
REASONS = RECORDS.with_name("gpu-reasons.json")
CLOSE = 0.01
COUNTERS = ("requested", "allocated", "reserved", "device")
READ_OFF_THE_GPU = ("gpu", *LIBRARIES)
SIZES = ("height", "width", "batch_size")
# rows that a process takes at a time
CHUNK = 4


@dataclass(frozen=True, slots=True)
class Row:
    """One measured call: its GPU, model, options other than the defaults and sizes, and peaks in bytes by counter.

    ``measured`` has no ``device`` where other processes ran beside or the cache was emptied before it was read.
    """

    call: Mapping[str, Any]
    measured: Mapping[str, int]
    predicted: Mapping[str, int]

    def error(self, counter: str) -> float:
        """predicted / measured - 1."""
        return self.predicted[counter] / self.measured[counter] - 1

    @property
    def further_off(self) -> dict[str, float]:
        """Counters whose error is above CLOSE, and the error."""
        errors = {name: self.error(name) for name in COUNTERS if name in self.measured and name in self.predicted}
        return {name: error for name, error in errors.items() if abs(error) > CLOSE}

    def __str__(self) -> str:
        """Return the call in one line."""
        return " ".join(f"{name}={value}" for name, value in self.call.items())


def recorded() -> tuple[str, list[Row]]:
    """Return what RECORDED says the calls were measured on, and its rows; raises DerivationError for a broken file."""
    try:
        found = json.loads(RECORDED.read_text(encoding="utf-8"))
        return "; ".join(found["measured_on"]), [Row(**row) for row in found["rows"]]
    except (ValueError, KeyError, TypeError) as error:
        raise DerivationError(f"{RECORDED.name} is not a record of validate ({error!r})") from None


def reasons() -> dict[str, str]:
    """Return what is known of each recorded call with a counter that is further off than CLOSE, by the call."""
    found: dict[str, str] = json.loads(REASONS.read_text(encoding="utf-8"))
    return found


def measured_calls(path: Path = RECORDS) -> list[dict[str, Any]]:
    """Return the whole pipeline calls of a file of ``measure`` that ran; raises DerivationError for none."""
    records = Records.open(path, must_exist=True).records.values()
    found = [r for r in records if r.get("kind") == "pipeline" and r.get("status") == "ok"]
    if not found:
        raise DerivationError(f"{path}: no pipeline records (supported: a file that measure wrote)")
    return found


def predict(record: Mapping[str, Any]) -> Row:
    """Predict one measured call from its configs, options and versions; raises DerivationError for a broken record."""
    try:
        given = {field.name: record[field.name] for field in fields(Options) if field.name in record}
        sizes = {name: record[name] for name in SIZES}
        guidance_scale = float(record["guidance_scale"])
        run, versions = record["run"], record["versions"]
        measured = {name: int(run[f"peak_{name}_bytes"]) for name in COUNTERS[:3]}
        if run["driver_used_bytes"] is not None and run["reserved_bytes"] == run["peak_reserved_bytes"]:
            measured["device"] = int(run["driver_used_bytes"])
        model, found = record["model"], {name: versions[name] for name in READ_OFF_THE_GPU}
    except (KeyError, TypeError, ValueError) as error:
        raise DerivationError(f"not a record of measure ({error!r})") from None
    for name, value in sizes.items():
        positive(name, value, MAX_SIZE)
    memory = derive(model, **{**given, **found}).device_memory(**sizes, guidance=guidance_scale > 1)
    unset = Options().as_dict()
    chosen = {name: value for name, value in given.items() if value != unset[name]}
    predicted = {name: getattr(memory, name) for name in COUNTERS if getattr(memory, name) is not None}
    call = {"gpu": found["gpu"], "model": model, **sizes, "guidance_scale": guidance_scale, **chosen}
    return Row(call, measured, predicted)


def predictions(records: Sequence[Mapping[str, Any]]) -> Iterator[Row]:
    """Predict every record, on all processors, and yield the rows in order."""
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as workers:
        yield from workers.map(predict, records, chunksize=CHUNK)


def summary(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Return of each counter how many calls were read, their errors, and the call that is furthest off."""
    found = {}
    for counter in COUNTERS:
        read = [row for row in rows if counter in row.measured and counter in row.predicted]
        if not read:
            continue
        worst = max(read, key=lambda row: abs(row.error(counter)))
        differences = [row.predicted[counter] - row.measured[counter] for row in read]
        found[counter] = {
            "calls": len(read),
            "equal": differences.count(0),
            "within_1_kib": sum(abs(difference) <= 1024 for difference in differences),
            "mean_error": mean(abs(row.error(counter)) for row in read),
            "largest_error": worst.error(counter),
            "largest_error_call": str(worst),
        }
    return found
