"""How numbers of bytes are written for people."""

from __future__ import annotations

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
UNITS = ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB"))
NARROW_SPACE = "\N{NARROW NO-BREAK SPACE}"


def human(nbytes: int, space: str = " ") -> str:
    """Return bytes in the largest binary unit that leaves at least 1.

    >>> human(3_345_398_272), human(118_272), human(-512)
    ('3.12 GiB', '115.50 KiB', '-512 B')
    """
    for unit, name in UNITS:
        if abs(nbytes) >= unit:
            return f"{nbytes / unit:,.2f}{space}{name}"
    return f"{nbytes}{space}B"


def grouped(number: int, space: str = NARROW_SPACE) -> str:
    """Return an integer with its digits in groups of three.

    >>> grouped(1234567, "'")
    "1'234'567"
    """
    return f"{number:,}".replace(",", space)
