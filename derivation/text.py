"""How numbers of bytes are written for people, and read from what they type."""

from __future__ import annotations

import re
from decimal import Decimal

from derivation.errors import unsupported

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
UNITS = ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB"))
# A bare number is GiB, as the cards' own sizes are; a letter alone is binary, as CUDA's tools print it.
TYPED = {"": GIB, "b": 1, "bytes": 1} | {
    letter + suffix: base**power
    for power, letter in enumerate("kmgt", 1)
    for suffix, base in (("", 1024), ("ib", 1024), ("b", 1000))
}
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


def parse_bytes(text: str, key: str = "memory") -> int:
    """Return the bytes of a quantity such as "12", "12G", "12GiB", "12 GB" or "8192MiB"; raises DerivationError.

    >>> parse_bytes("12") == parse_bytes("12G") == parse_bytes("12GiB") == 12 * GIB, parse_bytes("1.5 GB")
    (True, 1500000000)
    """
    found = re.fullmatch(r"\s*([0-9]{1,18}(?:\.[0-9]{1,9})?)\s*([A-Za-z]*)\s*", text)
    unit = TYPED.get(found[2].lower()) if found else None
    nbytes = int(Decimal(found[1]) * unit) if found and unit else 0
    if not 0 < nbytes < 1 << 62:
        units = "B, KiB, MiB, GiB, TiB, kB, MB, GB or TB"
        raise unsupported(key, text, f"a positive number of {units}, such as 12GiB; a bare number is GiB")
    return nbytes
