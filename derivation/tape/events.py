"""What a tape holds: allocations, the decisions taken on sizes, and where stages begin."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from typing import Protocol

from derivation.tape.symbols import Size, evaluate


class Category(Enum):
    """What an allocation is for."""

    ACTIVATION = "activation"
    ATTENTION = "attention"
    STATISTICS = "statistics"
    PIPELINE = "pipeline"
    SCRATCH = "scratch"
    WEIGHT = "weight"


@dataclass(frozen=True, slots=True)
class Allocation:
    """One storage, or ``count`` alike: its module path, operator, shape and size in bytes.

    ``loaded`` marks a weight that existed before the run: its death alone is an event, and lowers the live
    bytes, so that "weights + live bytes" stays the memory in use.
    """

    path: str
    op: str
    shape: tuple[Size, ...]
    dtype: str
    nbytes: Size
    category: Category
    count: Size = 1
    loaded: bool = False

    def moved(self, path: str) -> Allocation:
        """Return the same allocation at another module path."""
        return _moved(self, path)


@lru_cache(maxsize=65536)
def _moved(a: Allocation, path: str) -> Allocation:
    return Allocation(path, a.op, a.shape, a.dtype, a.nbytes, a.category, a.count, a.loaded)


@dataclass(frozen=True, slots=True)
class Tiled:
    """A call of a VAE in tiles: its events from ``start`` to ``end``, and those of one tile of each kind, row by row.

    Kinds are the tallest, what is left over, and what of that is left over, by widths alike. ``lines`` are what
    blending one line makes: across each kind of width with the tile above, across each kind of height with the one
    before. ``unit`` is what a latent's side is in a result, ``extent`` the most lines that are blended.
    """

    start: int
    end: int
    runs: tuple[tuple[int, int], ...]
    lines: tuple[tuple[Allocation, ...], ...]
    unit: int
    extent: int


class Decider(Protocol):
    """A tape: what takes decisions on sizes."""

    def decides(self, guard: Guard) -> bool:
        """Return True if the decision is taken as ``guard`` says."""


@dataclass(frozen=True, slots=True)
class Guard:
    """A decision the program took on a size: ``size > bound`` was answered with ``answer``."""

    size: Size
    bound: int
    answer: bool

    def holds(self, values: Mapping[str, int]) -> bool:
        """Return True if the same decision would be taken at ``values``."""
        return (evaluate(self.size, values) > self.bound) == self.answer

    def holds_on(self, tape: Decider) -> bool:
        """Return True if ``tape`` answers alike."""
        return tape.decides(self)


@dataclass(slots=True)
class Mark:
    """An event index at which a stage begins."""

    event: int
    stage: str
