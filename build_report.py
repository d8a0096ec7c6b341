"""Derive models' peak GPU memory, write the derivation notes to report/ and refresh formulas/."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

# Read when NumPy is loaded: the processes share the cores already, threads beside them only wait.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from derivation import DerivationError
from derivation.cli.arguments import add_options, given_options
from derivation.cli.parameters import USUAL_MODEL, USUAL_PIPELINE, reported
from derivation.cli.process import alone
from derivation.config import bundled
from derivation.errors import one_line


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Exit with code 2; where the usage is to be found is part of the line."""
        self.exit(2, f"{self.prog}: {one_line(message)} (see {self.prog} --help)\n")


def parser() -> argparse.ArgumentParser:
    """Return the command line of the main job."""
    result = Parser(
        prog="build_report.py",
        description=__doc__,
        epilog="example: python build_report.py stabilityai/stable-diffusion-2-1 --pipeline txt2img --output report/",
    )
    models = "bundled ids, folders or Hugging Face Hub ids (org/name, org/name@revision)"
    result.add_argument(
        "models", metavar="MODEL", nargs="*", help=f"{models} (default: {USUAL_MODEL}, {USUAL_PIPELINE})"
    )
    result.add_argument("--all", action="store_true", help="every bundled model, and an index page that compares them")
    result.add_argument("--output", type=Path, default=Path("report"), help="folder to write (default: report/)")
    result.add_argument("--pdf", action="store_true", help="also typeset the notes, where a TeX engine is installed")
    result.add_argument("--verify", action="store_true", help="trace the real modules now (needs the extra verify)")
    result.add_argument("--json", action="store_true", help="print one JSON object: the files and the time taken")
    add_options(result)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the job and return its exit code: 0, or 2 with one line on stderr."""
    from derivation.cli import output
    from derivation.report.job import build_all, workers

    args = parser().parse_args(arguments)
    warnings.showwarning = output.warned
    start = time.monotonic()
    try:
        models, options = reported(bundled() if args.all else args.models, given_options(args))
        with workers() as executor, output.telling("report") as progress:
            paths = build_all(models, args.output, args.pdf, args.verify, progress, args.all, executor, **options)
    except DerivationError as error:
        print(f"build_report.py: {error}", file=sys.stderr)
        return 2
    seconds = round(time.monotonic() - start, 1)
    if args.json:
        print(json.dumps({"files": [str(path) for path in paths], "seconds": seconds}))
    else:
        print(f"wrote {', '.join(str(path) for path in paths)} in {seconds} s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    alone(main)
