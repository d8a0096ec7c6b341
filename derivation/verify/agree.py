"""Do two derivations agree as expressions: the same allocations and deaths, in order, as polynomials?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from sympy.polys.rings import PolyElement

from derivation.tape.symbols import as_poly, symbol
from derivation.tape.tape import Tape


@dataclass(frozen=True, slots=True)
class Step:
    """An allocation's bytes, what died since the one before (bytes -> how many storages), and where it is."""

    nbytes: PolyElement
    died: Counter[PolyElement]
    where: str

    def __str__(self) -> str:
        deaths = ", ".join(f"{count} x {nbytes}" for nbytes, count in self.died.items()) or "nothing"
        return f"{self.nbytes} B at {self.where} after the death of {deaths}"


@dataclass(frozen=True, slots=True)
class Agreement:
    """Two event streams compared: allocations and distinct polynomials that agree, and where they part."""

    allocations: int
    polynomials: int
    parting: str | None

    @property
    def match(self) -> bool:
        """Whether no event differs."""
        return self.parting is None


def agree(derived: Tape, traced: Tape, level: int = 0) -> Agreement:
    """Compare every allocation's bytes, and the storages that died before it, as polynomials.

    Storages that die between the same two allocations have no order; outputs may be alive at the end of either.
    With a ``level`` the sides of shallower ones are taken for multiples of its own: h_k = 2^(level - k) h_level.
    """
    ours, theirs = list(_steps(derived, level)), list(_steps(traced, level))
    seen: set[PolyElement] = set()
    for i, (one, other) in enumerate(zip(ours, theirs, strict=False)):
        if (one.nbytes, one.died) != (other.nbytes, other.died):
            return Agreement(i, len(seen), f"allocation {i}: derived {one}, traced {other}")
        seen.add(one.nbytes)
    count = min(len(ours), len(theirs))
    parting = f"derived {len(ours)} allocations, traced {len(theirs)}" if len(ours) != len(theirs) else None
    return Agreement(count, len(seen), parting)


def _steps(tape: Tape, level: int) -> Iterator[Step]:
    multiples = [(symbol(f"{s}{k}"), symbol(f"{s}{level}") * (1 << (level - k))) for k in range(level) for s in "hw"]
    died: Counter[PolyElement] = Counter()
    for event in tape.events:
        allocation = tape.allocations[abs(event) - 1]
        nbytes = as_poly(allocation.nbytes * allocation.count).compose(multiples)
        if event > 0:
            yield Step(nbytes, died, f"{allocation.path} {allocation.op}")
            died = Counter()
        else:
            died[nbytes] += 1
