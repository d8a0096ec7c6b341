"""The checkers of the config tables: one raw value and its place in, one typed value out."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import warnings
from collections.abc import Callable, Container, Mapping
from typing import Any, NamedTuple, TypeVar

from ..errors import DerivationError, UnsupportedConfig, one_line, shown

T = TypeVar("T")

MAX_SIZE = 1 << 20
MAX_LAYERS = 1000
MAX_BLOCKS = 16
INDEX = "model_index.json"


class At(NamedTuple):
    """Where a value stands: its file, its dotted key, and the number of blocks of its model."""

    file: str
    key: str
    blocks: int = 0

    def unsupported(self, value: object, supported: str) -> UnsupportedConfig:
        return UnsupportedConfig(self.file, self.key, value, supported)


Check = Callable[[object, At], T]


def integer(low: int = 1, high: int = MAX_SIZE) -> Check[int]:
    """Return a check that takes integers in a range."""

    def check(value: object, at: At) -> int:
        if type(value) is int and low <= value <= high:
            return value
        raise at.unsupported(value, f"an integer from {low} to {high}")

    return check


def flag(value: object, at: At) -> bool:
    """Return ``value`` if it is a boolean."""
    if isinstance(value, bool):
        return value
    raise at.unsupported(value, "true or false")


def flag_or_null(value: object, at: At) -> bool:
    """Return ``value`` if it is a boolean; null is False."""
    return value is not None and flag(value, at)


def number(value: object, at: At) -> float:
    """Return ``value`` if it is a finite number."""
    if isinstance(value, float) and math.isfinite(value):
        return value
    if type(value) is int and abs(value) < 1 << 53:
        return value
    raise at.unsupported(value, "a finite number")


def positive(value: object, at: At) -> float:
    """Return ``value`` if it is a number above 0."""
    if number(value, at) > 0:
        return number(value, at)
    raise at.unsupported(value, "a number above 0")


def text(value: object, at: At) -> str:
    """Return ``value`` if it is a string."""
    if isinstance(value, str):
        return value
    raise at.unsupported(value, "a string")


def anything(value: object, at: At) -> object:
    """Return any ``value``."""
    return value


def one_of(*values: T) -> Check[T]:
    """Return a check that takes ``values`` alone, their types included."""

    def check(value: object, at: At) -> T:
        for known in values:
            if type(value) is type(known) and value == known:
                return known
        raise at.unsupported(value, ", ".join(v if isinstance(v, str) else json.dumps(v) for v in values))

    return check


def optional(check: Check[T]) -> Check[T | None]:
    """Return a check that takes null or what ``check`` takes."""
    return lambda value, at: None if value is None else check(value, at)


def listed(check: Check[T], most: int = MAX_BLOCKS) -> Check[tuple[T, ...]]:
    """Take a list of 1 to ``most`` values."""

    def check_list(value: object, at: At) -> tuple[T, ...]:
        if not isinstance(value, list | tuple) or not 1 <= len(value) <= most:
            raise at.unsupported(value, f"a list of 1 to {most} values")
        return tuple(check(item, at._replace(key=f"{at.key}[{i}]")) for i, item in enumerate(value))

    return check_list


def each_block(check: Check[T]) -> Check[tuple[T, ...]]:
    """Take a list with one value a block."""

    def check_list(value: object, at: At) -> tuple[T, ...]:
        if isinstance(value, list | tuple) and len(value) == at.blocks:
            return listed(check)(value, at)
        raise at.unsupported(value, f"a list of {at.blocks} values, one a block")

    return check_list


def per_block(check: Check[T]) -> Check[tuple[T, ...]]:
    """Take one value for all blocks, or a list with one value a block."""

    def check_blocks(value: object, at: At) -> tuple[T, ...]:
        if isinstance(value, list | tuple):
            return each_block(check)(value, at)
        return (check(value, at),) * at.blocks

    return check_blocks


def same_for_all(check: Check[T]) -> Check[tuple[T, ...]]:
    """Take one value for all blocks."""
    return lambda value, at: (check(value, at),) * at.blocks


def pair(check: Check[T]) -> Check[T | tuple[T, T]]:
    """Take one value, or a list of two: height and width."""

    def check_pair(value: object, at: At) -> T | tuple[T, T]:
        if not isinstance(value, list | tuple):
            return check(value, at)
        if len(value) == 2:
            return check(value[0], at), check(value[1], at)
        raise at.unsupported(value, "one value, or a list of two")

    return check_pair


size = integer()
layers = integer(1, MAX_LAYERS)
odd_kernel = one_of(*range(1, 32, 2))
activation = one_of("silu", "swish", "gelu", "relu", "mish")


def key(check: Check[Any], default: object) -> Any:
    """Declare one row of a config table: how a raw value is checked, and its raw default."""
    return dataclasses.field(metadata={"check": check, "default": default})


def read(
    cls: type[Any],
    mapping: object,
    file: str,
    *,
    extra: Mapping[str, Check[Any]],
    prefix: str = "",
    blocks: int = 0,
    unread: Container[str] = (),
) -> dict[str, Any]:
    """Return the checked fields of the table ``cls``, ``unread`` aside, with defaults, and check those of ``extra``."""
    fields = [field for field in dataclasses.fields(cls) if field.metadata and field.name not in unread]
    rows = {field.name: field.metadata for field in fields}
    given = strict(mapping, file, known=[*rows, *extra], owner=cls.__name__, prefix=prefix)
    for name, value in given.items():
        if name in extra:
            extra[name](value, At(file, prefix + name, blocks))
    return {
        name: row["check"](given.get(name, row["default"]), At(file, prefix + name, blocks))
        for name, row in rows.items()
    }


class IgnoredKeys(UserWarning):
    """A config holds keys that diffusers and transformers ignore, too."""


# Keys that from_pretrained reads of any model's config, beside its class's arguments (modeling_utils.py).
LOADED = ("quantization_config",)


def strict(mapping: object, file: str, *, known: list[str], owner: str, prefix: str = "") -> dict[str, object]:
    """Return the ``known`` keys of ``mapping``, without ``_`` metadata.

    Others are ignored, as diffusers (ConfigMixin.extract_init_dict) and transformers do, with one IgnoredKeys warning;
    a key that is read when a model is loaded, or a component that nobody knows, raises.
    """
    if not isinstance(mapping, Mapping):
        raise DerivationError(f"{file}: expected a JSON object of config keys, got {shown(mapping)}")
    given = {name: value for name, value in mapping.items() if not (isinstance(name, str) and name.startswith("_"))}
    odd = [name for name in given if name not in known]
    for name in odd:
        value = given.pop(name)
        if not isinstance(name, str) or name in LOADED or (owner == INDEX and isinstance(value, list)):
            label = prefix + name if isinstance(name, str) else shown(name)
            raise UnsupportedConfig(file, label[:60], value, f"the keys of {owner}")
    if odd:
        told = ", ".join(_told(prefix + name, known) for name in odd[:8]) + (", ..." if odd[8:] else "")
        warnings.warn(one_line(f"{file}: ignored, as by {owner}: {told}"), IgnoredKeys, stacklevel=2)
    return given


def _told(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name[:60], known, 1, cutoff=0.8)
    return name[:60] + (f" (did you mean {close[0]}?)" if close else "")


def expect_class(mapping: object, file: str, *supported: str) -> None:
    """Raise if a diffusers config names another class than the ``supported`` ones."""
    if isinstance(mapping, Mapping) and "_class_name" in mapping:
        one_of(*supported)(mapping["_class_name"], At(file, "_class_name"))
