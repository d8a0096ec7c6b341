"""One JSON file, read whole or refused in one line."""

from __future__ import annotations

import json
import stat
from pathlib import Path

from ..errors import DerivationError

MAX_FILE_BYTES = 4 << 20


def read_json(path: Path) -> object:
    """Return the content of one JSON file; raises ``DerivationError`` naming it."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise DerivationError(f"{path}: not a file")
        with path.open("rb") as stream:
            content = stream.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:
        if isinstance(error, DerivationError):
            raise
        raise DerivationError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if len(content) > MAX_FILE_BYTES:
        raise DerivationError(f"{path}: over {MAX_FILE_BYTES >> 20} MiB, so not a config file")
    try:
        return json.loads(content.decode("utf-8"))
    except UnicodeDecodeError:
        raise DerivationError(f"{path}: not UTF-8 text") from None
    except RecursionError:
        raise DerivationError(f"{path}: nested too deeply") from None
    except ValueError as error:
        raise DerivationError(f"{path}: not valid JSON ({error})") from None
