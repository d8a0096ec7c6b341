"""Files that an option names: a list separated by commas, and what tells that one was written anew."""

from __future__ import annotations

from pathlib import Path

from ..errors import DerivationError, shown

MAX_FILES = 8


def names(option: str, text: str, what: str = "files") -> tuple[str, ...]:
    """Return the names in an option's text; raises DerivationError for none, or for more than MAX_FILES."""
    found = tuple(name.strip() for name in text.split(","))
    if not all(found) or len(found) > MAX_FILES:
        raise DerivationError(f"{option} = {shown(text)}: expected 1 to {MAX_FILES} {what}, separated by commas")
    return found


def stamp(file: str) -> tuple[int, int]:
    """Return when a file was written, in ns, and its bytes; raises DerivationError naming it."""
    try:
        state = Path(file).stat()
    except (OSError, ValueError) as error:
        said = getattr(error, "strerror", None) or error
        raise DerivationError(f"{file}: cannot be read ({said})") from None
    return state.st_mtime_ns, state.st_size
