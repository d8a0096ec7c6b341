"""What a command prints: one JSON object, or tables that read well on a terminal and in a pipe."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from derivation.errors import one_line, unsupported
from derivation.text import human
from derivation.verdict import Verdict

if TYPE_CHECKING:
    from rich.console import Console

T = TypeVar("T")

PIPE_WIDTH = 140
# Lines that counted work writes to a pipe, and for how long work of any kind writes none there.
LINES = 10
QUIET_S = 2.0
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


def verdict_lines(before: str, verdict: Verdict) -> None:
    """Print a verdict after some words, and what is left against the margin."""
    line(f"{before}{verdict}", style="bold")
    if verdict.trust:
        line(verdict.trust)


def warned(message: Warning | str, *_: Any, **__: Any) -> None:
    """Say a warning on stderr in one line, as ``warnings.showwarning`` is asked to."""
    print(f"warning: {one_line(str(message))}", file=sys.stderr, flush=True)


def wrote(path: Path) -> None:
    """Say on stderr which file was written, where stdout has the answer."""
    print(f"wrote {one_line(str(path))}", file=sys.stderr, flush=True)


def bytes_table(title: str, name: str, entries: Mapping[str, int], mark: str | None = None) -> None:
    """Print bytes by name, readable and exact; ``mark`` is pointed at."""
    rows = [(key, human(value), value, "<- peak" if key == mark else "") for key, value in entries.items()]
    if rows:
        table(title, (name, ">size", ">bytes", ""), rows)


def emit(result: Mapping[str, Any], as_json: bool, show: Callable[[Mapping[str, Any]], None]) -> None:
    """Print ``result`` as one JSON object, or let ``show`` print it for people."""
    if as_json:
        print(json.dumps(result, indent=2, allow_nan=False), flush=True)
    else:
        show(result)
        sys.stdout.flush()


@contextmanager
def steps(description: str, total: int) -> Iterator[Callable[[], None]]:
    """Yield what counts one of ``total`` steps as done: a bar on a terminal, in a pipe a line each tenth."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    if sys.stderr.isatty():
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console(stderr=True), transient=True) as bar:
            task = bar.add_task(description, total=total)
            yield lambda: bar.advance(task)
        return
    done, log = count(1), logged(description)

    def advance() -> None:
        number = next(done)
        if number * LINES // total > (number - 1) * LINES // total:
            log(f"{number} of {total}")

    yield advance


def track(items: Iterable[T], total: int, description: str) -> Iterator[T]:
    """Yield ``items``, ``total`` in all, each counted as done when the next is asked for."""
    with steps(description, total) as advance:
        for item in items:
            yield item
            advance()


@contextmanager
def telling(work: str) -> Iterator[Callable[[str], None]]:
    """Yield what says which step of ``work`` begins: on a terminal in place of the one before, in a pipe a line."""
    if not sys.stderr.isatty():
        yield logged(work)
        return
    with console(stderr=True).status(work) as status:
        yield lambda step: status.update(f"{work}: {one_line(step)}")


def logged(work: str) -> Callable[[str], None]:
    """Return what writes a line on stderr for a step of ``work``, once that has taken QUIET_S."""
    start = time.monotonic()

    def log(step: str) -> None:
        if time.monotonic() - start >= QUIET_S:
            print(f"{work}: {one_line(step)}", file=sys.stderr, flush=True)

    return log
