"""Files written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from derivation.errors import DerivationError, shown


def write_files(folder: Path, files: Mapping[str, str | bytes]) -> list[Path]:
    """Write files below ``folder`` and return their paths: all are complete before the first one replaces another.

    Raises DerivationError where a folder or a file cannot be written.
    """
    staged: dict[Path, Path] = {}
    try:
        for name, data in files.items():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            staged[target] = _stage(target, data)
        for target, source in staged.items():
            source.replace(target)
    except (OSError, ValueError) as error:
        raise _refused(getattr(error, "filename", None) or folder, error) from None
    finally:
        for source in staged.values():
            with suppress(OSError):
                source.unlink(missing_ok=True)
    return list(staged)


def write_file(path: Path, data: str | bytes) -> Path:
    """Write one file in a folder that is there, and return its path; raises DerivationError."""
    if not path.parent.is_dir():
        raise _refused(path, FileNotFoundError(2, f"{path.parent} is not a folder"))
    return write_files(path.parent, {path.name: data})[0]


def check_folder(folder: Path) -> None:
    """Raise DerivationError where files cannot be written below ``folder``, as far as that shows beforehand."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise _refused(folder, OSError(13, f"{existing} is not a folder that can be written"))


def _refused(path: object, error: OSError | ValueError) -> DerivationError:
    reason = getattr(error, "strerror", None) or error
    return DerivationError(f"output = {shown(str(path))} cannot be written ({reason})")


def _stage(target: Path, data: str | bytes) -> Path:
    """Write ``data`` to a temporary file in the target's folder, with an ordinary file's permissions."""
    handle, name = tempfile.mkstemp(prefix=f".{target.name[:64]}.", suffix=".tmp", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return Path(name)
