"""Run jobs one after the other, each in a fresh process, and keep what each of them reports."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from derivation.errors import DerivationError
from derivation.measure.records import Records

WORKER = (sys.executable, "-m", "derivation.measure.worker")
PROBE = (sys.executable, "-c", "import torch; print(torch.cuda.is_available())")
DEFAULT_TIMEOUT_S = 1800.0
MAX_MESSAGE = 1000
MEASURE_EXTRA = "pip install 'diffusion-vram-derivation[measure]'"


@dataclass(frozen=True, slots=True)
class Job:
    """What one process measures: a key for the file, and the worker's input (``kind`` says what it is)."""

    key: str
    payload: dict[str, Any]


def measure(
    jobs: Sequence[Job],
    records: Records,
    worker: Sequence[str] = WORKER,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    report: Callable[[Job, dict[str, Any]], None] = lambda job, record: None,
) -> dict[str, int]:
    """Measure every job that ``records`` does not have, and return how many ended with each status.

    A job that runs out of memory, fails or is killed is recorded as such. Raises DerivationError where the
    file cannot be written.
    """
    records.save()
    counts = {"already measured": 0}
    for job in jobs:
        if records.done(job.key):
            counts["already measured"] += 1
            continue
        found = run_worker(job, worker, timeout_s)
        record = {**job.payload, **found, "date": datetime.now(UTC).isoformat("T", "seconds")}
        records.add(job.key, record)
        counts[record["status"]] = counts.get(record["status"], 0) + 1
        report(job, record)
    return counts


def run_worker(job: Job, worker: Sequence[str], timeout_s: float) -> dict[str, Any]:
    """Return what a fresh worker process reports: its last line of output, a JSON object with a ``status``."""
    try:
        done = subprocess.run(
            worker, input=json.dumps(job.payload), capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired:
        return {"status": "error", "message": f"no answer in {timeout_s:g} s"}
    except OSError as error:
        return {"status": "error", "message": f"{worker[0]}: {error.strerror}"}
    last = _last_line(done.stdout)
    try:
        found = json.loads(last)
    except ValueError:
        found = None
    if done.returncode == 0 and isinstance(found, dict) and "status" in found:
        return found
    message = _last_line(done.stderr)[:MAX_MESSAGE] or "no message"
    return {"status": "error", "message": f"exit code {done.returncode}: {message}"}


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else ""


def require_cuda(probe: Sequence[str] = PROBE) -> None:
    """Raise DerivationError unless torch, diffusers and a CUDA device are there; nothing heavy is imported here."""
    for name in ("torch", "diffusers", "transformers"):
        if importlib.util.find_spec(name) is None:
            raise DerivationError(f"measure needs {name}: {MEASURE_EXTRA}")
    done = subprocess.run(probe, capture_output=True, text=True, check=False)
    if done.stdout.strip() != "True":
        raise DerivationError("measure needs a CUDA device, and torch.cuda.is_available() is False here")
