"""Every error that a user can cause, each with a one-line message."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable
from typing import Any, get_args


class DerivationError(ValueError):
    """A request that cannot be derived; its message is one line for the user."""

    def __str__(self) -> str:
        return one_line(self.message())

    def message(self) -> str:
        return " ".join(str(arg) for arg in self.args)


class UnsupportedConfig(DerivationError):
    """A config value that is not supported: ``UnsupportedConfig(file, key, value, supported)``."""

    def __init__(self, file: str, key: str, value: object, supported: str) -> None:
        super().__init__(file, key, value, supported)
        self.file, self.key, self.value, self.supported = file, key, value, supported

    def message(self) -> str:
        return f"{self.file}: {self.key} = {shown(self.value)} is not supported (supported: {self.supported})"


def one_line(text: str) -> str:
    """Return ``text`` with every unprintable character escaped, so that it prints as one line."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class _Repr(reprlib.Repr):
    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if x.bit_length() <= 64 else f"<integer of {x.bit_length()} bits>"


_REPR = _Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxother = 3, 60, 60


def shown(value: object) -> str:
    """Return a short repr of any value, however large or deep.

    >>> shown([1, [2, "x"], 10**5000])
    "[1, [2, 'x'], <integer of 16610 bits>]"
    """
    return _REPR.repr(value)


def unsupported(key: str, value: object, supported: str) -> DerivationError:
    """Return the error that says which value is not supported, and what is.

    >>> print(unsupported("dtype", "int4", "float16, float32"))
    dtype = 'int4' is not supported (supported: float16, float32)
    """
    return DerivationError(f"{key} = {shown(value)} is not supported (supported: {supported})")


def one_of(key: str, value: object, supported: Iterable[str], aliases: Iterable[str] = ()) -> None:
    """Raise DerivationError unless ``value`` is one of ``supported``; ``aliases`` may have been meant, too."""
    listed = tuple(supported)
    if value not in listed:
        raise unsupported(key, value, f"{', '.join(listed)}{meant(value, (*listed, *aliases))}")


def meant(value: object, known: Iterable[str]) -> str:
    """Return "; did you mean X?" where words of ``known`` begin with ``value``, or one is close to it, else "".

    >>> meant("flsh", ("eager", "flash")), meant("zzz", ("eager", "flash"))
    ('; did you mean flash?', '')
    >>> meant("ddi", ("DDIMScheduler", "DDPMScheduler"))
    '; did you mean DDIMScheduler?'
    """
    if not isinstance(value, str) or not value:
        return ""
    words = {word.lower(): word for word in known}
    begun = [word for lower, word in words.items() if lower.startswith(value.lower())]
    found = begun or [words[lower] for lower in difflib.get_close_matches(value.lower(), words, n=1)]
    return f"; did you mean {' or '.join(found)}?" if found else ""


def positive(key: str, value: object, most: int | None = None) -> int:
    """Return ``value``; raises DerivationError unless it is an integer >= 1, and at most ``most``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1 or (most is not None and value > most):
        raise unsupported(key, value, "integers from 1" + ("" if most is None else f" to {most}"))
    return value


def typed(key: str, value: object, hint: Any) -> None:
    """Raise DerivationError unless ``value`` is of a type that ``hint`` names; an integer is a number, too."""
    kinds = get_args(hint) or (hint,)
    if type(value) not in kinds and not (float in kinds and type(value) is int):
        raise unsupported(key, value, " or ".join(_KINDS[kind] for kind in kinds))


_KINDS = {bool: "True or False", int: "an integer", float: "a number", str: "text", type(None): "None"}
