"""C: a header with one static inline function on int64_t."""

from __future__ import annotations

from derivation.equation.device_code import DeviceCode
from derivation.equation.expression import Expression, Writer
from derivation.equation.record import Equation
from derivation.export.python import NAMES
from derivation.export.render import render

INT_MAX = 2**31 - 1


class CWriter(Writer):
    """Writes expressions for int64_t, whose division truncates: the same as rounding down for integers >= 0."""

    def integer(self, value: int) -> str:
        """Return a literal that is never wider than its type."""
        return str(value) if abs(value) <= INT_MAX else f"INT64_C({value})"

    def floor_div(self, dividend: Expression, divisor: int) -> str:
        """Return a quotient."""
        return f"{self.atom(dividend)} / {divisor}"

    def ceil_div(self, dividend: Expression, divisor: int) -> str:
        """Return a quotient rounded up."""
        return f"({self(dividend)} + {divisor - 1}) / {divisor}"


def c(equation: Equation, device: DeviceCode | None = None) -> str:
    """Return a header that defines ``peak_vram``."""
    return render(
        "peak_vram.h.j2",
        equation,
        device=device,
        write=CWriter(NAMES),
        limits=equation.limits,
    )
