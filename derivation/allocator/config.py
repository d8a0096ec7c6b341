"""PYTORCH_CUDA_ALLOC_CONF: the options that move device memory.

Facts: c10/core/AllocatorConfig.{h,cpp} of torch 2.13; option checks tried against the installed torch 2.13.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Self

from derivation.errors import DerivationError

ROUNDUP_INTERVALS = 16  # powers of two from 1 MiB to 64 GiB
_Value = bool | int | float | tuple[int, ...]
_HOST_ONLY = re.compile(r"pinned_\w+|release_lock_on_(cuda|hip)malloc|graph_capture_record_stream_reuse")


@dataclass(frozen=True, slots=True)
class AllocatorConfig:
    """The options of PYTORCH_CUDA_ALLOC_CONF that move device memory, with torch's names and defaults."""

    expandable_segments: bool = False
    max_split_size_mb: int | None = None
    max_non_split_rounding_mb: int = 20
    garbage_collection_threshold: float = 0.0
    roundup_power2_divisions: tuple[int, ...] = (0,) * ROUNDUP_INTERVALS
    large_segment_size_mb: int = 20
    per_process_memory_fraction: float = 1.0

    def __post_init__(self) -> None:
        large = self.large_segment_size_mb
        split = self.max_split_size_mb
        _check(large > 10, "large_segment_size_mb", large, "more than 10")
        _check(split is None or split >= large, "max_split_size_mb", split, f"{large} or more")
        rounding = self.max_non_split_rounding_mb
        _check(rounding == 20 or rounding >= large, "max_non_split_rounding_mb", rounding, f"{large} or more")
        threshold = self.garbage_collection_threshold
        _check(0 <= threshold < 1, "garbage_collection_threshold", threshold, "in (0.0, 1.0)")
        fraction = self.per_process_memory_fraction
        _check(0 <= fraction <= 1, "per_process_memory_fraction", fraction, "in [0.0, 1.0]")
        divisions = self.roundup_power2_divisions
        _check(
            len(divisions) == ROUNDUP_INTERVALS and all(d >= 0 and d & (d - 1) == 0 for d in divisions),
            "roundup_power2_divisions",
            divisions,
            f"{ROUNDUP_INTERVALS} powers of two (0: off)",
        )

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a PYTORCH_CUDA_ALLOC_CONF string; options of host memory are accepted without effect.

        >>> AllocatorConfig.parse("expandable_segments:True,max_split_size_mb:128").max_split_size_mb
        128
        """
        values: dict[str, _Value] = {}
        for key, value in _options(text):
            if key == "backend":
                _check(value == "native", key, value, "native (cudaMallocAsync is the driver's allocator)")
            elif key in _READERS:
                values[key] = _READERS[key](key, value)
            elif not _HOST_ONLY.fullmatch(key):
                known = ", ".join(field.name for field in fields(cls))
                raise DerivationError(f"PYTORCH_CUDA_ALLOC_CONF: unsupported option {key!r}; supported: {known}")
        threshold = values.get("garbage_collection_threshold", 0.5)
        _check(threshold != 0, "garbage_collection_threshold", threshold, "in (0.0, 1.0)")
        return cls(**values)  # type: ignore[arg-type]


def _check(valid: bool, key: str, value: object, expected: str) -> None:
    if not valid:
        raise DerivationError(f"PYTORCH_CUDA_ALLOC_CONF: {key} is {value!r}, expected {expected}")


def _options(text: str) -> Iterator[tuple[str, str]]:
    for item in re.split(r",(?![^\[]*\])", "".join(text.split())):
        if item:
            key, colon, value = item.partition(":")
            _check(bool(colon and value), key, value, "a value, as in key:value")
            yield key, value


def _read_bool(key: str, value: str) -> bool:
    _check(value in ("True", "False"), key, value, "'True' or 'False'")
    return value == "True"


def _read_int(key: str, value: str) -> int:
    _check(value.isdecimal(), key, value, "a whole number")
    return int(value)


def _read_float(key: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise DerivationError(f"PYTORCH_CUDA_ALLOC_CONF: {key} is {value!r}, expected a number") from None


def _read_divisions(key: str, value: str) -> tuple[int, ...]:
    """Divisions of the 16 intervals from `4` or `[64:8,256:4,>:1]` (interval starts in MiB)."""
    if not value.startswith("["):
        _check(_read_int(key, value) > 0, key, value, "a power of two")
        return (int(value),) * ROUNDUP_INTERVALS
    _check(value.endswith("]"), key, value, "a closing ]")
    divisions, last = [0] * ROUNDUP_INTERVALS, 0
    for first, item in enumerate(value.strip("[]").split(",")):
        start, _, count = item.partition(":")
        division = _read_int(key, count)
        if start == ">":
            divisions[last + 1 :] = [division] * (ROUNDUP_INTERVALS - last - 1)
            continue
        mib = _read_int(key, start)
        _check(mib > 0 and mib & (mib - 1) == 0, key, start, "an interval that is a power of two")
        last = min(mib.bit_length() - 1, ROUNDUP_INTERVALS - 1)
        if first == 0:
            divisions[:last] = [division] * last
        divisions[last] = division
    return tuple(divisions)


_READERS: dict[str, Callable[[str, str], _Value]] = {
    "expandable_segments": _read_bool,
    "max_split_size_mb": _read_int,
    "max_non_split_rounding_mb": _read_int,
    "garbage_collection_threshold": _read_float,
    "roundup_power2_divisions": _read_divisions,
    "large_segment_size_mb": _read_int,
    "per_process_memory_fraction": _read_float,
}
