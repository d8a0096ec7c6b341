"""Every symbol of an equation with its meaning and bounds, and the size of every dtype in bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

from sympy import ZZ
from sympy.polys.rings import PolyElement, ring

MAX_LEVELS = 6
# The axes of a VAE tile's symbols.
TILE_AXES = ("h", "w")

# c10/cuda/CUDACachingAllocator.cpp: kMinBlockSize
BLOCK_BYTES = 512

# c10/core/ScalarType.h
DTYPE_BYTES: Mapping[str, int] = {
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "float64": 8,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "complex64": 8,
    "complex128": 16,
    "int64": 8,
    "int32": 4,
    "uint64": 8,
    "uint32": 4,
    "uint16": 2,
    "int16": 2,
    "int8": 1,
    "bool": 1,
    "uint8": 1,
}


@dataclass(frozen=True, slots=True)
class Symbol:
    """One symbol of the equations: a positive integer with a meaning."""

    name: str
    latex: str
    meaning: str


def _level_symbols() -> tuple[Symbol, ...]:
    sides = (("h", "height"), ("w", "width"))
    return tuple(
        Symbol(f"{side}{k}", f"{side}_{{{k}}}", _level_meaning(word, side, k))
        for k in range(MAX_LEVELS)
        for side, word in sides
    )


def _level_meaning(word: str, side: str, level: int) -> str:
    if level == 0:
        return f"latent {word}: image {word} / VAE scale factor"
    return f"{word} at UNet level {level}: ceil({side}{level - 1} / 2)"


def _tile_symbols() -> tuple[Symbol, ...]:
    words = {
        "T": "{} of a VAE tile in latents: min(tile, side)",
        "N": "how many VAE tiles of that {} there are",
        "R": "{} of the first cut VAE tile in latents, 0 where there is none",
        "Q": "{} of the second cut VAE tile in latents, 0 where there is none",
    }
    sides = (("h", "height"), ("w", "width"))
    found = [Symbol(f"{k}{s}", f"{k}_{{{s}}}", text.format(word)) for k, text in words.items() for s, word in sides]
    beyond = Symbol("E", "E", "1 + latents by which the longer side exceeds a VAE tile")
    return (beyond, *found, Symbol("Ch", "C_{h}", "height in latents that a whole VAE tile keeps: min(step, height)"))


SYMBOLS: tuple[Symbol, ...] = (
    Symbol("B", "B", "batch size: prompts (and images) in one call"),
    Symbol("L", "L", "prompt length in tokens, as the UNet's cross-attention sees it"),
    *_level_symbols(),
    *_tile_symbols(),
    Symbol("F", "F", "latent frames: 1 + (frames - 1) / the VAE's temporal factor"),
)

RING, *GENERATORS = ring([symbol.name for symbol in SYMBOLS], ZZ)
INDEX: Mapping[str, int] = {symbol.name: i for i, symbol in enumerate(SYMBOLS)}

# A tensor dimension, a stride or a number of bytes: an integer polynomial in the symbols.
Size: TypeAlias = "int | PolyElement"


def symbol(name: str) -> PolyElement:
    """Return the ring generator called ``name``; raises KeyError for an unknown name."""
    return GENERATORS[INDEX[name]]


def ceil512(nbytes: int) -> int:
    """Round ``nbytes`` up to the allocator's 512-byte block.

    >>> ceil512(0), ceil512(1), ceil512(512), ceil512(513)
    (0, 512, 512, 1024)
    """
    return -(-nbytes // BLOCK_BYTES) * BLOCK_BYTES


@lru_cache(maxsize=65536)
def product(factors: tuple[Size, ...]) -> Size:
    """Return the product of some sizes.

    >>> product((2, symbol("B"), 3))
    6*B
    """
    result: Size = 1
    for factor in factors:
        result = result * factor
    return _one_object(result)


@lru_cache(maxsize=65536)
def _one_object(size: Size) -> Size:
    """Return the same object for equal sizes, which are equal at once then."""
    return size


def as_poly(size: Size) -> PolyElement:
    """Return ``size`` as a ring element."""
    return _constant(size) if isinstance(size, int) else size


def as_terms(size: Size) -> int | list[list[int | str]]:
    """Return an integer, or [coefficient, symbol ...] of each term, with a symbol as often as its power.

    >>> as_terms(3 * symbol("h0") ** 2 + 1)
    [[3, 'h0', 'h0'], [1]]
    """
    if isinstance(size, int):
        return size
    return [
        [int(c), *(SYMBOLS[i].name for i, power in enumerate(monomial) for _ in range(power))]
        for monomial, c in as_poly(size).items()
    ]


@lru_cache(maxsize=65536)
def _constant(value: int) -> PolyElement:
    return RING(value)


def evaluate(size: Size, values: Mapping[str, int]) -> int:
    """Return ``size`` at integer ``values`` of its symbols; raises KeyError for a missing symbol.

    >>> evaluate(2 * symbol("h0") * symbol("w0") + 1, {"h0": 3, "w0": 5})
    31
    """
    if isinstance(size, int):
        return size
    total = 0
    for coefficient, names in _factors(size):
        for name in names:
            coefficient *= values[name]
        total += coefficient
    return total


@lru_cache(maxsize=65536)
def _factors(size: PolyElement) -> tuple[tuple[int, tuple[str, ...]], ...]:
    """Return each coefficient with the symbols that it is multiplied by."""
    return tuple(
        (int(coefficient), tuple(SYMBOLS[i].name for i, power in enumerate(monomial) for _ in range(power)))
        for monomial, coefficient in size.items()
    )


def free_names(size: Size) -> frozenset[str]:
    """Return the names of the symbols in ``size``."""
    if isinstance(size, int):
        return frozenset()
    return frozenset(SYMBOLS[i].name for monomial in size for i, power in enumerate(monomial) if power)


def floor_div(numerator: Size, divisor: int) -> Size:
    """Return floor(numerator / divisor); raises ValueError where that is not a polynomial."""
    if isinstance(numerator, int) or divisor == 1:
        return numerator // divisor
    zero = numerator.ring.zero_monom
    constant = int(numerator.get(zero, 0))
    rest = numerator - constant
    if any(coefficient % divisor for coefficient in rest.values()):
        raise ValueError(f"floor({numerator} / {divisor}) is not a polynomial")
    return rest.quo_ground(divisor) + constant // divisor


def is_tile(name: str) -> bool:
    """Return whether a symbol's name is one of a VAE tile."""
    return name[0] in "TNRQCE"


def as_whole_tile(size: Size) -> Size:
    """Return ``size`` with the sides of a whole VAE tile in place of those of cut ones."""
    if isinstance(size, int) or not any(name[0] in "RQ" for name in free_names(size)):
        return size
    return size.compose([(symbol(f"{k}{axis}"), symbol(f"T{axis}")) for k in "RQ" for axis in TILE_AXES])


@lru_cache(maxsize=65536)
def nonnegative_from_one(size: Size) -> bool:
    """Return True if ``size`` >= 0 is proven for all symbols >= 1.

    Theorem: a polynomial whose coefficients are all >= 0 after the shift x -> x + 1 is >= 0 for x >= 1.
    """
    if isinstance(size, int):
        return size >= 0
    if all(coefficient >= 0 for coefficient in size.values()):
        return True
    shifted = size.compose([(symbol(name), symbol(name) + 1) for name in sorted(free_names(size))])
    return all(coefficient >= 0 for coefficient in shifted.values())
