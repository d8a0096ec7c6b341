"""Do two derivations agree as expressions: the same allocations and deaths, in order, as polynomials?"""

from __future__ import annotations

from dataclasses import dataclass

from sympy.polys.rings import PolyElement

from derivation.tape.events import Allocation
from derivation.tape.symbols import as_poly, symbol
from derivation.tape.tape import Tape
from derivation.verify.streams import births, parting


@dataclass(frozen=True, slots=True)
class Agreement:
    """Two event streams compared: allocations, distinct polynomials among them, and where the streams part."""

    allocations: int
    polynomials: int
    parting: str | None

    @property
    def match(self) -> bool:
        """Whether no event differs."""
        return self.parting is None


def agree(derived: Tape, traced: Tape, level: int = 0) -> Agreement:
    """Compare every allocation's bytes, and the storages that died before it, as polynomials.

    Outputs may be alive at the end of either. With a ``level`` the sides of shallower ones are taken for multiples
    of its own: h_k = 2^(level - k) h_level.
    """
    multiples = [(symbol(f"{s}{k}"), symbol(f"{s}{level}") * (1 << (level - k))) for k in range(level) for s in "hw"]

    def size(allocation: Allocation) -> tuple[PolyElement, int]:
        return as_poly(allocation.nbytes * allocation.count).compose(multiples), 1

    ours, theirs = births(derived, size), births(traced, size)
    return Agreement(min(len(ours), len(theirs)), len({birth.nbytes for birth in ours}), parting(ours, theirs))
