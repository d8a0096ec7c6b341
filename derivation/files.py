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
    check_file("output", path)
    return write_files(path.parent, {path.name: data})[0]


def check_file(key: str, path: Path) -> None:
    """Raise DerivationError, which names ``key``, where a file cannot be written, before the work for it is done."""
    if path.is_dir() or not path.parent.is_dir():
        said = f"{path} is a folder" if path.is_dir() else f"{path.parent} is not a folder"
        raise _refused(path, OSError(said), key)
    _try(key, path, path.parent)


def check_folder(folder: Path) -> None:
    """Raise DerivationError where files cannot be written below ``folder``, which need not be there."""
    _try("output", folder, next(path for path in (folder, *folder.absolute().parents) if path.exists()))


def _try(key: str, path: Path, folder: Path) -> None:
    """Write a file without a name into ``folder``: to root, os.access allows even /proc."""
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        raise _refused(path, OSError(f"{folder} is not a folder that can be written"), key) from None


def _refused(path: object, error: OSError | ValueError, key: str = "output") -> DerivationError:
    reason = getattr(error, "strerror", None) or error
    return DerivationError(f"{key} = {shown(str(path))} cannot be written ({reason})")


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
