"""A safetensors file by its header alone: the shapes of its tensors by key."""

from __future__ import annotations

import json
from pathlib import Path

from ..errors import DerivationError, shown

# safetensors/src/tensor.rs: MAX_HEADER_LEN; the header's length is a little-endian u64 before it
MAX_HEADER_BYTES = 100_000_000
LENGTH_BYTES = 8
DTYPES = ("F64", "F32", "F16", "BF16")


def tensor_shapes(file: str, size: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a file of ``size`` bytes; raises DerivationError naming the file and the key."""
    header = _header(file, size)
    header.pop("__metadata__", None)
    return {key: _shape(file, key, entry) for key, entry in header.items()}


def _header(file: str, size: int) -> dict[str, object]:
    """The header: entries by key."""
    path = Path(file)
    if not path.is_file():
        raise DerivationError(f"{file}: not a file")
    try:
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(LENGTH_BYTES), "little")
            if not 2 <= length <= min(MAX_HEADER_BYTES, size - LENGTH_BYTES):
                raise DerivationError(f"{file}: not a safetensors file (a header of {shown(length)} bytes)")
            header = json.loads(stream.read(length).decode("utf-8"))
    except OSError as error:
        raise DerivationError(f"{file}: cannot be read ({error.strerror or error})") from None
    except (UnicodeDecodeError, RecursionError):
        raise DerivationError(f"{file}: not a safetensors file (its header is not JSON)") from None
    except DerivationError:
        raise
    except ValueError as error:
        raise DerivationError(f"{file}: not a safetensors file (its header is not JSON: {error})") from None
    if not isinstance(header, dict):
        raise DerivationError(f"{file}: not a safetensors file (its header is {shown(header)})")
    return header


def _shape(file: str, key: str, entry: object) -> tuple[int, ...]:
    if isinstance(entry, dict) and isinstance(shape := entry.get("shape"), list):
        if entry.get("dtype") not in DTYPES:
            supported = f"(supported: {', '.join(DTYPES)})"
            raise DerivationError(f"{file}: {shown(key)} has dtype {shown(entry.get('dtype'))} {supported}")
        if all(type(side) is int and 0 <= side < 1 << 40 for side in shape):
            return tuple(shape)
    raise DerivationError(f"{file}: {shown(key)} is no tensor of a safetensors file: {shown(entry)}")
