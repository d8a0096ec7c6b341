"""The main job: reports, generated formulas, and the typeset notes where a TeX engine is installed."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from derivation.config import bundled
from derivation.errors import DerivationError
from derivation.export import generate, write_formulas
from derivation.files import check_folder
from derivation.options.row import flag
from derivation.report.files import contents, write
from derivation.report.kernels import SHARES

ROOT = Path(__file__).parent.parent.parent
# Engines by preference, with the arguments that make them run once, offline and without questions.
ENGINES = {
    "pdflatex": ["-interaction=nonstopmode", "-halt-on-error", "-no-shell-escape"],
    "lualatex": ["-interaction=nonstopmode", "-halt-on-error", "--no-shell-escape"],
    "tectonic": ["--only-cached"],
}
PASSES = 2
TIMEOUT_S = 120


def build_all(
    models: Sequence[str],
    output: Path,
    pdf: bool,
    verify: bool,
    progress: Callable[[str], None],
    index: bool = False,
    executor: Executor | None = None,
    **options: Any,
) -> list[Path]:
    """Write the reports and refresh the models' folders in formulas/; returns the pages' paths, PDFs included.

    With ``index`` the first page compares the models; an executor, where there is one, takes a part of the work.

    Raises DerivationError where a report cannot be derived or written, or LaTeX stops at an error.
    """
    check_folder(output)
    found = contents(models, _command(models, options), progress, verify, executor, **options)
    progress("refreshing formulas/")
    formulas = generate([model for model in map(str, models) if model in bundled()], [each.equation for each in found])
    pages = write(found, output, progress, index)
    write_formulas(ROOT, formulas)
    return [*pages, *(_typeset(pages, progress) if pdf else [])]


@contextmanager
def workers() -> Iterator[Executor]:
    """Yield processes that take a part of the work; on Linux, where no thread is yet, copies with all that is imported.

    Elsewhere, or beside a thread that could hold a lock, they import it themselves.
    """
    copies = sys.platform == "linux" and threading.active_count() == 1
    with ProcessPoolExecutor(SHARES, mp_context=get_context("fork" if copies else "spawn")) as executor:
        if copies:
            executor.submit(int)  # they begin here, before the caller starts a thread
        yield executor


def _command(models: Sequence[str], options: dict[str, Any]) -> str:
    chosen = [flag(name, value) for name, value in options.items() if value is not None]
    return " ".join(["python build_report.py", *models, *chosen])


def _typeset(pages: Sequence[Path], progress: Callable[[str], None]) -> list[Path]:
    engine = next((name for name in ENGINES if shutil.which(name)), None)
    if engine is None:
        print(f"no PDF: no TeX engine found ({', '.join(ENGINES)}); the LaTeX source is written", file=sys.stderr)
        return []
    progress(f"typesetting with {engine}")
    sources = [page.with_suffix(".tex") for page in pages if page.name != "index.html"]
    return [_pdf(engine, source) for source in sources]


def _pdf(engine: str, source: Path) -> Path:
    command = [engine, *ENGINES[engine], source.name]
    for _ in range(PASSES):
        try:
            done = subprocess.run(command, cwd=source.parent, capture_output=True, text=True, timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise DerivationError(f"{engine} took more than {TIMEOUT_S} s on {source}") from None
        if done.returncode:
            reason = next((line for line in done.stdout.splitlines() if line.startswith("!")), "see its log")
            raise DerivationError(f"{engine} stopped at {source}: {reason}")
    for ending in (".aux", ".log", ".out"):
        source.with_suffix(ending).unlink(missing_ok=True)
    return source.with_suffix(".pdf")
