"""Every error that a user can cause, each with a one-line message."""

from __future__ import annotations

import reprlib


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
