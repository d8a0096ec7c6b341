"""Templates filled with a report's content, and files written whole or not at all."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from derivation.errors import DerivationError
from derivation.report.answer import PolynomialRow
from derivation.report.content import Content
from derivation.report.mathml import inline, maximum_mathml, sum_latex, sum_mathml, terms_latex, terms_mathml
from derivation.report.offload import OffloadRow
from derivation.report.text import SUBSCRIPTS, PixelTerms, grouped, human, markdown, tex

TEMPLATES = Path(__file__).parent.parent.parent / "templates"


@cache
def environment() -> Environment:
    """Return the template environment: undefined names raise, HTML is escaped."""
    env = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        autoescape=lambda name: name is not None and ".html" in name,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    env.filters |= {
        "human": human,
        "grouped": grouped,
        "breakable": breakable,
        "subscripted": lambda text: text.translate(SUBSCRIPTS),
        "polynomial": lambda terms: inline(terms_mathml(terms)),
        "maximum": _maximum,
        "placement": lambda row: inline(sum_mathml(row.weights_bytes, _unnamed(row))),
        "placement_latex": lambda row: sum_latex(row.weights_bytes, _unnamed(row)),
        "terms_latex": terms_latex,
        "tex": tex,
        "md": markdown,
    }
    return env


def breakable(text: str) -> Markup:
    """Return escaped text that may break after dots, slashes and underscores."""
    return Markup(re.sub(r"([./_])", r"\1<wbr>", str(escape(text))))


def _maximum(rows: Iterable[PolynomialRow]) -> Markup:
    return inline(maximum_mathml([(row.terms, "") for row in rows]))


def _unnamed(row: OffloadRow) -> list[tuple[PixelTerms, str]]:
    return [(terms, "") for terms in row.polynomials]


def render(template: str, content: Content) -> str:
    """Fill a template."""
    return environment().get_template(template).render(c=content)


def check_folder(folder: Path) -> None:
    """Raise DerivationError where files cannot be written below ``folder``, as far as that shows beforehand."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise DerivationError(f"cannot write {folder}: {existing} is not a folder that can be written")


def write_files(folder: Path, files: Mapping[str, str | bytes]) -> None:
    """Write files below ``folder``: all are complete beside their targets before the first one is replaced.

    Raises DerivationError where the folder cannot be written.
    """
    staged: list[tuple[Path, Path]] = []
    try:
        for name, data in files.items():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            staged.append((_stage(target, data), target))
        while staged:
            source, target = staged[0]
            source.replace(target)
            staged.pop(0)
    except OSError as error:
        where = error.filename or folder
        raise DerivationError(f"cannot write {where}: {error.strerror or error}") from None
    finally:
        for source, _ in staged:
            source.unlink(missing_ok=True)


def _stage(target: Path, data: str | bytes) -> Path:
    """Write ``data`` to a temporary file in the target's folder, with an ordinary file's permissions."""
    raw = data.encode() if isinstance(data, str) else data
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(raw)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return Path(name)
