"""``python -m derivation.trace.bundle ID...``: trace bundled pipelines and write their records beside their configs."""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path

from derivation.config.traced import bundled_traced, traced_folder
from derivation.errors import unsupported
from derivation.options import Options
from derivation.trace.build import Description
from derivation.trace.regimes import record
from derivation.trace.store import DEFAULTS, RECORDED, store


def bundle(model: str) -> Path:
    """Record one bundled pipeline in its published dtype; raises DerivationError for another or one that fails."""
    folder = traced_folder(model)
    if folder is None or folder.source != "bundled":
        raise unsupported("model", model, ", ".join(bundled_traced()))
    options = Options(**DEFAULTS, pipeline=folder.task)
    found = record(Description.of(folder.path), options, folder.source, folder.name, progress=_said)
    store(found, folder.path / RECORDED)
    return folder.path / RECORDED


def _said(line: str) -> None:
    print(f"  {line}", file=sys.stderr, flush=True)


def main() -> None:
    """Record each id of the command line; say the processor's seconds and the largest memory so far."""
    for model in sys.argv[1:]:
        start = time.process_time()
        path = bundle(model)
        used, most = time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"{path}: {path.stat().st_size:,} bytes, {used:.0f} s of the processor, {most:.2f} GiB", flush=True)


if __name__ == "__main__":
    main()
