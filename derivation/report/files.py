"""The files of a report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

from derivation.errors import DerivationError
from derivation.files import check_folder, write_files
from derivation.report.content import Content, content
from derivation.report.render import index as index_page
from derivation.report.render import texts

Progress = Callable[[str], None]


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
    return write(contents(models, command, progress, verify, **options), output, progress, index)


def contents(
    models: Sequence[object],
    command: str,
    progress: Progress,
    verify: bool,
    executor: Executor | None = None,
    **options: Any,
) -> list[Content]:
    """Return what the reports of ``models`` say; ``executor`` shares the work.

    Raises DerivationError for a model that cannot be derived, or two whose pages would be one.
    """
    found: dict[str, Content] = {}
    for model in models:
        made = content(model, options, command, progress, verify, executor)
        if made.slug in found:
            page = f"{made.slug}.html"
            raise DerivationError(f"two models would write {page}: build them into separate folders (--output)")
        found[made.slug] = made
    return list(found.values())


def write(found: Sequence[Content], output: Path, progress: Progress, index: bool) -> list[Path]:
    """Write reports, all or none, and return the HTML pages' paths; raises DerivationError."""
    files: dict[str, str | bytes] = {}
    for each in found:
        progress(f"writing {each.slug}.html")
        files |= report_files(each)
    files |= {"index.html": index_page(found)} if index else {}
    write_files(output, files)
    return [output / name for name in sorted(files, key="index.html".__ne__) if name.endswith(".html")]


def report_files(found: Content) -> dict[str, str | bytes]:
    """Return the files of one report: relative path -> text or bytes."""
    files: dict[str, str | bytes] = {f"{found.slug}.{ending}": text for ending, text in texts(found).items()}
    for drawn in (*found.figures.values(), *found.validation.pictures):
        base = f"figures/{found.slug}/{drawn.name}"
        files |= {f"{base}.svg": drawn.svg, f"{base}.pdf": drawn.pdf}
    return files
