"""What a command prints: one JSON object, or tables that read well on a terminal and in a pipe."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from derivation.errors import one_line, unsupported
from derivation.text import human

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

PIPE_WIDTH = 140
MAX_NUMBER = 2**31 - 1


def checked_number(key: str, value: int) -> int:
    """Return ``value``; raises DerivationError beyond 32 bits, so that no answer is astronomically long."""
    if abs(value) > MAX_NUMBER:
        raise unsupported(key, value, f"up to {MAX_NUMBER}")
    return value


def cell(value: object) -> str:
    """Return ``value`` as one line of text."""
    if value is None:
        return "-"
    return f"{value:,}" if type(value) is int else one_line(str(value))


def console(stderr: bool = False) -> Console:
    """Return a console that keeps its hands off the text; in a pipe it has no colour and a fixed width."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else PIPE_WIDTH
    return Console(stderr=stderr, width=width, highlight=False, markup=False, emoji=False)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table; a column whose name starts with ">" is aligned to the right."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    lines = box.SIMPLE_HEAD if sys.stdout.isatty() else None
    made = Table(title=Text(title) if title else None, box=lines, title_justify="left")
    for name in columns:
        right = name.startswith(">")
        made.add_column(name.lstrip(">"), justify="right" if right else "left", overflow="fold", no_wrap=right)
    for row in rows:
        made.add_row(*(Text(cell(value)) for value in row))
    out = console()
    out.print(made)
    out.print()


def line(text: str, style: str | None = None) -> None:
    """Print one line."""
    console().print(one_line(text), style=style, soft_wrap=True)


def bytes_table(title: str, name: str, entries: Mapping[str, int], mark: str | None = None) -> None:
    """Print bytes by name, readable and exact; ``mark`` is pointed at."""
    rows = [(key, human(value), value, "<- peak" if key == mark else "") for key, value in entries.items()]
    table(title, (name, ">size", ">bytes", ""), rows)


def emit(result: Mapping[str, Any], as_json: bool, show: Callable[[Mapping[str, Any]], None]) -> None:
    """Print ``result`` as one JSON object, or let ``show`` print it for people."""
    if as_json:
        print(json.dumps(result, indent=2, allow_nan=False), flush=True)
    else:
        show(result)
        sys.stdout.flush()


def progress() -> Progress:
    """Return a progress bar on stderr that shows on a terminal alone."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console(stderr=True), disable=not sys.stderr.isatty(), transient=True)


@contextmanager
def telling() -> Iterator[Callable[[str], None]]:
    """Yield what shows a line on stderr in place of the one before, on a terminal alone."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    with console(stderr=True).status("") as status:
        yield lambda line: status.update(f"tracing: {one_line(line)}")
