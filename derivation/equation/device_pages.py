"""What the allocator reserves with expandable_segments:True: pages, mapped up to an address that is a sum."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import sympy

from derivation.allocator.config import AllocatorConfig
from derivation.allocator.pools import Pages
from derivation.allocator.report import LARGE_PAGE_BYTES
from derivation.allocator.symbolic import Vector
from derivation.equation.derived import Derived
from derivation.equation.device import DeviceForm
from derivation.equation.device_regime import Part, Regime
from derivation.errors import DerivationError
from derivation.tape.grid import H, W
from derivation.tape.symbols import BLOCK_BYTES, Size, as_poly

# Sizes that are tried for an address that all others reach as well.
MOST_REFERENCES = 8


class PagesForm(DeviceForm):
    """The allocator's peaks where the large pool is one range of addresses, mapped in pages of 20 MiB.

    The range is mapped up to the end of one tensor: what lies before it, in use or not, are other tensors' bytes.
    """

    config, kind = AllocatorConfig(expandable_segments=True), Pages
    rounding = "pages are of 20 MiB, small ones of 2 MiB"

    @cached_property
    def reserved_regimes(self) -> tuple[Regime, ...]:
        """Pages up to that address, small ones and what other sizes map beyond it left out; the figure at one size."""
        if self.replayed is not None:
            reserved = self.replayed.reserved
            return (Regime(reserved, (), (), np.ones(1, dtype=bool), np.array([reserved])),)
        return (self.shared,)

    @cached_property
    def shared(self) -> Regime:
        """The pages up to an address that all sizes reach; raises DerivationError where none was found."""
        everywhere = np.ones(len(self.points), dtype=bool)
        a = self.requests.tape.allocations[self._last(self._reference[0])]
        part = Part(
            LARGE_PAGE_BYTES * sympy.ceiling(self.expression(self.reached, everywhere) / LARGE_PAGE_BYTES),
            (f"up to the end of {a.path or 'pipeline'}: {a.op}",),
        )
        return Regime(0, (part,), (), everywhere, self._mapped(self.reached), ((self.reached, 1),))

    @cached_property
    def reached(self) -> int:
        """The number of the sum that the address is."""
        return self._reference[1]

    @property
    def reached_bytes(self) -> Size:
        """What the address is, or, where sizes are no whole blocks, up to 511 bytes more for each of them."""
        total: Size = 0
        for atom, n in self.points.sums[self.reached]:
            size: Size = 1 if atom is None else atom.nbytes
            rest = 0 if atom is None or is_whole(size) else BLOCK_BYTES - 1
            total = total + n * (size + rest)
        return total

    @cached_property
    def _reference(self) -> tuple[int, int]:
        """The size with most reserved bytes, or, as long as its address is beyond what another has, that one."""
        point = int(np.argmax(self.reserved_bytes))
        for _ in range(MOST_REFERENCES):
            reached = self.decisions.reach(self._last(point), point)
            beyond = self._mapped(reached) - self.reserved_bytes
            if (beyond <= 0).all():
                return point, reached
            point = int(np.argmax(beyond))
        raise DerivationError("no closed form of reserved bytes: the order of addresses depends on the size")

    def _last(self, point: int) -> int:
        return self.large.at(point)[-1][0]

    def _mapped(self, number: int) -> Vector:
        found: Vector = -(-self.points.vector(number) // LARGE_PAGE_BYTES) * LARGE_PAGE_BYTES
        return found

    @property
    def per_pixel(self) -> sympy.Expr:
        """Bytes a pixel up to that address."""
        everywhere = np.ones(len(self.points), dtype=bool)
        return sympy.expand(self.expression(self.reached, everywhere)).coeff(H * W)


def device_form(derived: Derived, guidance: bool = True) -> DeviceForm:
    """Return the form for how the allocator is configured; raises DerivationError as DeviceForm does."""
    is_expandable = AllocatorConfig.parse(derived.options.alloc_conf or "") == PagesForm.config
    return (PagesForm if is_expandable else DeviceForm)(derived, guidance)


def is_whole(size: Size) -> bool:
    """Return whether a request is of whole blocks at every size."""
    return not any(coefficient % BLOCK_BYTES for coefficient in as_poly(size).values())
