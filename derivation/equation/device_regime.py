"""A sum of segments or blocks, and the sizes at which it holds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import sympy

from derivation.allocator.symbolic import Comparison, Points, Vector


@dataclass(frozen=True, slots=True)
class Part:
    """Terms of a sum that are equal: their bytes, and the tensors behind them."""

    bytes: sympy.Expr
    tensors: tuple[str, ...]

    def __str__(self) -> str:
        return f"{len(self.tensors)} x {self.bytes}: {', '.join(self.tensors)}"


@dataclass(frozen=True, eq=False, slots=True)
class Regime:
    """Sizes at which the allocator decides the same of what counts: bytes that do not vary, and parts that do.

    ``conditions`` tell these sizes from those of the regimes behind it in a list; each is a comparison that the
    allocator makes. ``where`` are the sizes, ``total`` the bytes at each, what is counted left out; ``sums`` are the
    numbers of the parts, each with its count.
    """

    constant_bytes: int
    parts: tuple[Part, ...]
    conditions: tuple[sympy.Basic, ...]
    where: Vector
    total: Vector
    sums: tuple[tuple[int, int], ...] = ()

    @property
    def bytes(self) -> sympy.Expr:
        """The sum."""
        return sympy.Add(self.constant_bytes, *(len(part.tensors) * part.bytes for part in self.parts))


@dataclass(frozen=True, slots=True)
class Beside:
    """Bytes beside those that grow with the pixels, ``least`` to ``most``.

    They are those of a regime, at ``sizes`` of the ``all_sizes`` that a card has room for.
    """

    least: int
    most: int
    sizes: int
    all_sizes: int

    @classmethod
    def of(cls, nbytes: Vector, where: Vector, held: Vector) -> Beside:
        """Return those of ``nbytes`` where a regime holds and the card has room, where it holds if that is nowhere."""
        found = nbytes[where & held] if (where & held).any() else nbytes[where]
        return cls(int(found.min()), int(found.max()), len(found), int(held.sum()) or len(held))


def piecewise(regimes: Sequence[Regime], more: sympy.Expr | int = 0) -> sympy.Expr:
    """Return the bytes of the first regime whose conditions hold, and ``more``."""
    if len(regimes) == 1:
        return regimes[0].bytes + more
    return sympy.Piecewise(*((regime.bytes + more, sympy.And(*regime.conditions)) for regime in regimes))


def telling(points: Points, taken: Iterable[Comparison], own: Vector, others: Vector) -> list[Comparison]:
    """Return decisions ``taken`` by the allocator at all sizes of ``own``, but not together at any of ``others``.

    Of those that rule out most of what is left the shortest is the next; none where decisions do not suffice.
    """
    answers = {c: points.compare(c) for c in taken}
    answers = {c: answer for c, answer in answers.items() if answer[own].all()}
    left, found = others, list[Comparison]()
    while left.any() and answers:
        best = min(answers, key=lambda c: (int((left & answers[c]).sum()), points.length(c), c))
        if not (left & ~answers[best]).any():
            return []
        found.append(best)
        left = left & answers[best]
    return found


def spread(where: Vector, most: int) -> list[int]:
    """Return at most so many of some sizes, the first and the last among them."""
    points = np.flatnonzero(where)
    return [int(points[i]) for i in np.linspace(0, len(points) - 1, min(most, len(points)), dtype=int)]
