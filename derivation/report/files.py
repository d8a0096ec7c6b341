"""The files of a report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from derivation.config import load, traced_folder
from derivation.errors import DerivationError
from derivation.export import CHECKED_IN
from derivation.files import check_folder, write_files
from derivation.options import Options
from derivation.report.content import Content, content
from derivation.report.render import index as index_page
from derivation.report.render import texts

Progress = Callable[[str], None]
# The pipeline of a bundled model, where none is asked for: that of its folder in formulas/.
USUAL = {entry.model: entry.pipeline for entry in CHECKED_IN}


def build(
    models: Sequence[object],
    output: Path = Path("report"),
    command: str = "python build_report.py",
    progress: Progress = lambda step: None,
    verify: bool = False,
    index: bool = False,
    **options: Any,
) -> list[Path]:
    """Write the reports of ``models`` below ``output``, all or none, and return the HTML pages' paths.

    ``options`` are those of derive; ``verify`` traces the real modules (needs the extra); with ``index`` the first
    page is one that compares the models and links their reports. Raises DerivationError for a model that cannot be
    derived or a folder that cannot be written.
    """
    check_folder(output)
    files: dict[str, str | bytes] = {}
    contents: list[Content] = []
    for model in models:
        given = options if traced_folder(model) else {"pipeline": _usual(model), **options}
        contents.append(found := content(model, given, command, progress, verify))
        page = f"{found.slug}.html"
        if page in files:
            raise DerivationError(f"two models would write {page}: build them into separate folders (--output)")
        progress(f"writing {page}")
        files |= report_files(found)
    files |= {"index.html": index_page(contents)} if index else {}
    write_files(output, files)
    return [output / name for name in sorted(files, key="index.html".__ne__) if name.endswith(".html")]


def _usual(model: object) -> str:
    return USUAL.get(load(model).name, Options().pipeline)


def report_files(found: Content) -> dict[str, str | bytes]:
    """Return the files of one report: relative path -> text or bytes."""
    files: dict[str, str | bytes] = {f"{found.slug}.{ending}": text for ending, text in texts(found).items()}
    for drawn in (*found.figures.values(), *found.validation.pictures):
        base = f"figures/{found.slug}/{drawn.name}"
        files |= {f"{base}.svg": drawn.svg, f"{base}.pdf": drawn.pdf}
    return files
