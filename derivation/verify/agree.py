"""Do two derivations agree as expressions: the same allocations and deaths, in order, as polynomials?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from sympy.polys.rings import PolyElement

from derivation.symbols import as_poly
from derivation.tape import Allocation, Tape

# An allocation and what died since the one before: polynomial of bytes -> how many storages.
Step = tuple[Allocation, Counter[PolyElement]]


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


def agree(derived: Tape, traced: Tape) -> Agreement:
    """Compare every allocation's bytes, and the storages that died before it, as polynomials.

    Storages that die between the same two allocations have no order; outputs may be alive at the end of either.
    """
    ours, theirs = list(_steps(derived)), list(_steps(traced))
    seen: set[PolyElement] = set()
    for i, (one, other) in enumerate(zip(ours, theirs, strict=False)):
        if _bytes(one[0]) != _bytes(other[0]) or one[1] != other[1]:
            return Agreement(i, len(seen), f"allocation {i}: derived {_shown(one)}, traced {_shown(other)}")
        seen.add(_bytes(one[0]))
    count = min(len(ours), len(theirs))
    parting = f"derived {len(ours)} allocations, traced {len(theirs)}" if len(ours) != len(theirs) else None
    return Agreement(count, len(seen), parting)


def _steps(tape: Tape) -> Iterator[Step]:
    died: Counter[PolyElement] = Counter()
    for event in tape.events:
        allocation = tape.allocations[abs(event) - 1]
        if event > 0:
            yield allocation, died
            died = Counter()
        else:
            died[_bytes(allocation)] += 1


def _bytes(allocation: Allocation) -> PolyElement:
    return as_poly(allocation.nbytes) * allocation.count


def _shown(step: Step) -> str:
    allocation, died = step
    deaths = ", ".join(f"{count} x {nbytes}" for nbytes, count in died.items()) or "nothing"
    return f"{_bytes(allocation)} B at {allocation.path} {allocation.op} after the death of {deaths}"
