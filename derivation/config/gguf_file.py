"""A GGUF file's header: which tensors it holds, of which type and shape (ggml/docs/gguf.md, versions 2 and 3)."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from ..errors import DerivationError

MAGIC, VERSIONS = b"GGUF", (2, 3)
# gguf_metadata_value_type: the bytes of numbers by type; a string has its length before it, an array type and length
NUMBERS: Mapping[int, int] = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
STRING, ARRAY = 8, 9
MAX_COUNT, MAX_DIMENSIONS = 1 << 24, 4

# name -> (the number of ggml_type, the shape with rows first)
Tensors = dict[str, tuple[int, tuple[int, ...]]]


def gguf_tensors(path: Path) -> Tensors:
    """Return the tensors of a file by name; raises DerivationError naming it for anything but a whole header."""
    try:
        with path.open("rb") as stream:
            return _read(path, stream)
    except (OSError, ValueError, RecursionError) as error:  # the last of arrays in arrays
        said = getattr(error, "strerror", None) or error
        raise DerivationError(f"{path}: cannot be read ({said})") from None
    except struct.error:
        raise DerivationError(f"{path}: no GGUF file: its header ends early") from None


def _read(path: Path, stream: BinaryIO) -> Tensors:
    if stream.read(4) != MAGIC:
        raise DerivationError(f"{path}: no GGUF file: it does not begin with {MAGIC.decode()}")
    version, tensors, entries = *_numbers(stream, "I"), *_numbers(stream, "QQ")
    if version not in VERSIONS or tensors > MAX_COUNT or entries > MAX_COUNT:
        raise DerivationError(f"{path}: GGUF version {version} of {tensors} tensors (supported: versions 2 and 3)")
    for _ in range(entries):
        _string(stream)
        _skip(stream, _numbers(stream, "I")[0])
    return dict(_tensor(stream) for _ in range(tensors))


def _tensor(stream: BinaryIO) -> tuple[str, tuple[int, tuple[int, ...]]]:
    name, (rank,) = _string(stream).decode(), _numbers(stream, "I")
    if rank > MAX_DIMENSIONS:
        raise ValueError(f"{name} has {rank} dimensions")
    shape = _numbers(stream, f"{rank}Q")
    kind, _offset = _numbers(stream, "IQ")
    return name, (kind, shape[::-1])  # the fastest comes first in the file


def _numbers(stream: BinaryIO, layout: str) -> tuple[int, ...]:
    size = struct.calcsize(f"<{layout}")
    return struct.unpack(f"<{layout}", stream.read(size))


def _string(stream: BinaryIO) -> bytes:
    (length,) = _numbers(stream, "Q")
    if length > MAX_COUNT:
        raise ValueError(f"a string of {length} bytes")
    return stream.read(length)


def _skip(stream: BinaryIO, kind: int) -> None:
    """Skip a value of the metadata; raises ValueError for a type that is none."""
    if kind == STRING:
        _string(stream)
    elif kind == ARRAY:
        of, count = _numbers(stream, "IQ")
        if of in NUMBERS:
            stream.seek(count * NUMBERS[of], 1)
            return
        for _ in range(min(count, MAX_COUNT)):
            _skip(stream, of)
    elif kind in NUMBERS:
        stream.seek(NUMBERS[kind], 1)
    else:
        raise ValueError(f"metadata of type {kind}")
