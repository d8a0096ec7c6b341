"""NumPy and PyTorch: int64 arrays that broadcast."""

from __future__ import annotations

from derivation.equation.device_code import DeviceCode
from derivation.equation.expression import Expression, Writer
from derivation.equation.record import Equation
from derivation.export.python import NAMES
from derivation.export.render import render


class ArrayWriter(Writer):
    """Writes expressions for int64 arrays; the template spells out a Max, which is pairwise."""

    def ceil_div(self, dividend: Expression, divisor: int) -> str:
        """Return the quotient of integers >= 0 with one operation less than two negations take."""
        return f"({self(dividend)} + {divisor - 1}) // {divisor}"


def arrays(equation: Equation, library: str, device: DeviceCode | None = None) -> str:
    """Return a module with ``peak_vram`` for arrays of ``library``, "numpy" or "torch"."""
    name = {"numpy": "np", "torch": "torch"}[library]
    return render(
        "peak_vram_arrays.py.j2",
        equation,
        device=device,
        write=ArrayWriter(NAMES),
        library=library,
        name=name,
        limits=equation.limits,
    )
