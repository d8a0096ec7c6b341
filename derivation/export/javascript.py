"""JavaScript: an ES module on numbers, exact or a RangeError."""

from __future__ import annotations

from derivation.equation.device_code import DeviceCode
from derivation.equation.expression import Expression, Writer
from derivation.equation.record import Equation
from derivation.export.python import NAMES
from derivation.export.render import render


class JavaScriptWriter(Writer):
    """Writes expressions for doubles that hold integers: a division by 2^k is exact before it is rounded."""

    def max(self, *operands: Expression) -> str:
        """Return ``Math.max``."""
        return f"Math.{super().max(*operands)}"

    def floor_div(self, dividend: Expression, divisor: int) -> str:
        """Return ``Math.floor`` of a quotient."""
        return f"Math.floor({self.atom(dividend)} / {divisor})"

    def ceil_div(self, dividend: Expression, divisor: int) -> str:
        """Return ``Math.ceil`` of a quotient."""
        return f"Math.ceil({self.atom(dividend)} / {divisor})"


def javascript(equation: Equation, device: DeviceCode | None = None) -> str:
    """Return an ES module that exports ``peak_vram``, ``stage_vram`` and ``WEIGHTS_BYTES``."""
    return render(
        "peak_vram.js.j2",
        equation,
        device=device,
        stages=equation.stage_functions,
        write=JavaScriptWriter(NAMES),
    )
