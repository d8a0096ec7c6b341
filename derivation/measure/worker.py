"""One measurement in a fresh process: a JSON object on stdin, the record as the last line of stdout."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from derivation.measure import device, pipeline, scratch

KINDS = {"pipeline": pipeline.measure_pipeline, "scratch": scratch.measure_scratch}


def run(payload: dict[str, Any]) -> dict[str, Any]:
    """Return the record of one job: ``status`` is ok, or oom with torch's message."""
    job = dict(payload)
    measured = KINDS[job.pop("kind")]
    try:
        return {"status": "ok", "versions": device.versions(), **measured(job)}
    except torch.OutOfMemoryError as error:
        found = {"message": str(error).splitlines()[0], **device.memory()}
        return {"status": "oom", "versions": device.versions(), **found}


if __name__ == "__main__":
    print(json.dumps(run(json.load(sys.stdin))))
