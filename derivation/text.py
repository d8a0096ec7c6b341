"""How numbers of bytes are written for people, and read from them."""

from __future__ import annotations

import re
from decimal import Decimal

from derivation.errors import unsupported

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
UNITS = ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB"))
MULTIPLES = {"": 1, "b": 1, "bytes": 1} | {
    prefix + suffix: base**power
    for power, letter in enumerate("kmgt", 1)
    for prefix, suffix, base in ((letter, "b", 1000), (letter, "ib", 1024))
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


def parse_bytes(text: str, key: str = "vram") -> int:
    """Return the bytes of a quantity such as "8GiB", "8 GB", "8192MiB" or "8589934592".

    >>> parse_bytes("8GiB"), parse_bytes("1.5 GB"), parse_bytes("4096")
    (8589934592, 1500000000, 4096)
    """
    found = re.fullmatch(r"\s*([0-9]{1,18}(?:\.[0-9]{1,9})?)\s*([A-Za-z]*)\s*", text)
    unit = MULTIPLES.get(found[2].lower()) if found else None
    nbytes = int(Decimal(found[1]) * unit) if found and unit else 0
    if not 0 < nbytes < 1 << 62:
        names = "KiB, MiB, GiB, TiB, kB, MB, GB or TB"
        raise unsupported(key, text, f"a positive number of bytes, {names}, such as 8GiB")
    return nbytes
