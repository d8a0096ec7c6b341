"""Sympy expressions of PyTorch's symbolic sizes as polynomials in the ring, exactly or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from operator import add, mul
from typing import Any

import sympy
from sympy.polys.polyerrors import ExactQuotientFailed
from torch.utils._sympy.functions import FloorDiv, Mod, PythonMod

from derivation.errors import DerivationError
from derivation.tape.events import Guard
from derivation.tape.symbols import GENERATORS, INDEX, RING, SYMBOLS, Size, as_poly, symbol


class Translation:
    """Translates expressions in the ``symbols`` of one ShapeEnv; ``fixed`` names are integers in the result."""

    def __init__(self, fixed: Mapping[str, int]) -> None:
        self.symbols: dict[sympy.Symbol, str] = {}
        self._fixed = [(symbol(name), value) for name, value in fixed.items() if name in INDEX]
        self._known: dict[sympy.Expr, Size] = {}

    def polynomial(self, expression: Any) -> Size:
        """Return ``expression`` as a polynomial; raises DerivationError where it is none.

        >>> h0, translation = sympy.Symbol("s7", integer=True, positive=True), Translation({})
        >>> translation.symbols[h0] = "h0"
        >>> translation.polynomial(FloorDiv(h0 - 1, 4) + 1)
        h2
        """
        if expression not in self._known:
            size = self._translate(expression)
            self._known[expression] = size if isinstance(size, int) else size.compose(self._fixed)
        return self._known[expression]

    def _translate(self, expression: Any) -> Size:
        if expression.is_Integer:
            return int(expression)
        if expression in self.symbols:
            return symbol(self.symbols[expression])
        if (rule := _RULES.get(expression.func)) is not None:
            size = rule(*(self.polynomial(part) for part in expression.args))
            if size is not None:
                return size
        raise DerivationError(f"symbolic trace: {self.named(expression)} is no polynomial in {', '.join(INDEX)}")

    def named(self, expression: Any) -> Any:
        """Return an expression in the ring's names."""
        return expression.xreplace({s: sympy.Symbol(name, integer=True) for s, name in self.symbols.items()})


def floor_div(dividend: Size, divisor: Size) -> Size | None:
    """Return floor(dividend / divisor) as a polynomial, None where it is none.

    >>> h0 = symbol("h0")
    >>> floor_div(8 * h0 - 2, 2), floor_div(h0 - 1, 2), floor_div(h0, 2)
    (4*h0 - 1, h1 - 1, None)
    """
    if isinstance(dividend, int) and isinstance(divisor, int):
        return dividend // divisor
    if not isinstance(divisor, int):
        try:
            return as_poly(dividend).exquo(divisor)
        except ExactQuotientFailed:
            return None
    constant = int(as_poly(dividend).get(RING.zero_monom, 0))
    rest, whole = divmod_terms(as_poly(dividend) - constant, divisor)
    if not rest:
        return whole + constant // divisor
    level = _level_floor(rest, constant, divisor)
    return None if level is None else whole + level


def divmod_terms(polynomial: Any, divisor: int) -> tuple[Any, Any]:
    """Return (the terms that ``divisor`` does not divide, the others divided by it)."""
    rest = RING({monomial: c for monomial, c in polynomial.items() if c % divisor})
    return rest, RING({monomial: c // divisor for monomial, c in (polynomial - rest).items()})


def _level_floor(rest: Any, constant: int, divisor: int) -> Size | None:
    """Return floor((m x + c) / d) of a level's side x, None where it is no polynomial.

    Theorem: floor((m x + c) / d) = floor((x + floor(c / m)) / (d / m)) where m divides d, and
    floor((x - 1) / 2^j) = ceil(x / 2^j) - 1: the side j levels deeper, less one.
    """
    [(monomial, m), *others] = rest.items()
    name = next(SYMBOLS[i].name for i, power in enumerate(monomial) if power)
    if others or sum(monomial) != 1 or name[0] not in "hw" or m < 0 or divisor % m:
        return None
    ratio, offset = divisor // int(m), constant // int(m) + 1
    deeper = f"{name[0]}{int(name[1:]) + ratio.bit_length() - 1}"
    if ratio & (ratio - 1) or offset % ratio or deeper not in INDEX:
        return None
    return symbol(deeper) + (offset // ratio - 1)


def _modulo(dividend: Size, divisor: Size) -> Size | None:
    """Return the remainder, None where it is no polynomial: it is the dividend where that is the smaller."""
    quotient = floor_div(dividend, divisor)
    if quotient is not None:
        return dividend - quotient * divisor
    return dividend if above_zero(as_poly(dividend)) and above_zero(divisor - dividend) else None


def _power(base: Size, exponent: Size) -> Size | None:
    return base**exponent if isinstance(exponent, int) and exponent >= 0 else None


_RULES: Mapping[Any, Any] = {
    sympy.Add: lambda *parts: reduce(add, parts),
    sympy.Mul: lambda *parts: reduce(mul, parts),
    sympy.Pow: _power,
    FloorDiv: floor_div,
    Mod: _modulo,
    PythonMod: _modulo,
}


def above_zero(size: Size) -> bool:
    """Return True if ``size`` > 0 is proven where every symbol is above 1.

    Theorem: a polynomial that has no negative coefficient and a positive constant after x -> x + 2 is > 0.
    """
    if isinstance(size, int):
        return size > 0
    shifted = size.compose([(generator, generator + 2) for generator in GENERATORS])
    return shifted.get(RING.zero_monom, 0) > 0 and all(c >= 0 for c in shifted.values())


def compared(relation: Any, difference: Size, positive: bool) -> list[Guard]:
    """Return the guards that say "left ``relation`` right" of difference = left - right.

    ``positive`` is its sign in the run that asked; what always holds where every symbol is above 1 is left out.
    """
    said = [_guard(difference, bound, answer) for bound, answer in _SAYS[relation]]
    if relation is sympy.Ne:
        said = [_guard(difference, 0, True) if positive else _guard(difference, -1, False)]
    return [guard for guard in said if guard is not None]


# relation of the difference to zero -> (bound, answer) of "difference > bound"; Ne depends on the sign
_SAYS: Mapping[Any, tuple[tuple[int, bool], ...]] = {
    sympy.Gt: ((0, True),),
    sympy.Ge: ((-1, True),),
    sympy.Le: ((0, False),),
    sympy.Lt: ((-1, False),),
    sympy.Eq: ((-1, True), (0, False)),
    sympy.Ne: (),
}
RELATIONS = tuple(_SAYS)


@dataclass(frozen=True, slots=True)
class Decision(Guard):
    """A decision that no bound of a polynomial states: a relation between sizes, in the ring's names."""

    relation: Any

    def holds(self, values: Mapping[str, int]) -> bool:
        """Return True if the relation holds at ``values``."""
        return bool(self.relation.subs({s: values[s.name] for s in self.relation.free_symbols}))


def _guard(difference: Size, bound: int, answer: bool) -> Guard | None:
    """Return the guard "size > bound is answer", its size without constant and with a positive term."""
    if above_zero(difference - bound) if answer else above_zero(bound + 1 - difference):
        return None
    constant = int(as_poly(difference).get(RING.zero_monom, 0))
    size = as_poly(difference) - constant
    if all(coefficient < 0 for coefficient in size.values()):
        return Guard(-size, constant - bound - 1, not answer)
    return Guard(size, bound - constant, answer)
