"""Integer expression trees, and how a programming language writes them.

Five operations suffice, all on integers >= 0: add, mul, max, and division rounded down or up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import TypeAlias

from derivation.tape.symbols import SYMBOLS, Size, as_poly

ADD, MUL, MAX, FLOOR_DIV, CEIL_DIV = "add", "mul", "max", "floor_div", "ceil_div"

Expression: TypeAlias = "int | Name | Operation"
Monomial = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Name:
    """A symbol or an intermediate value."""

    name: str


@dataclass(frozen=True, slots=True)
class Operation:
    """An operator and its operands."""

    operator: str
    operands: tuple[Expression, ...]


@dataclass(frozen=True, slots=True)
class Let:
    """An intermediate value, and what it stands for."""

    name: str
    value: Expression
    note: str = ""


def add(*operands: Expression) -> Expression:
    """Return the sum, without zeros."""
    kept = tuple(x for x in operands if x != 0)
    return Operation(ADD, kept) if len(kept) > 1 else (kept[0] if kept else 0)


def mul(*operands: Expression) -> Expression:
    """Return the product, without ones."""
    kept = tuple(x for x in operands if x != 1)
    return Operation(MUL, kept) if len(kept) > 1 else (kept[0] if kept else 1)


def maximum(operands: Iterable[Expression]) -> Expression:
    """Return the largest of the operands."""
    kept = tuple(dict.fromkeys(operands))
    return Operation(MAX, kept) if len(kept) > 1 else kept[0]


def floor_div(dividend: Expression, divisor: int) -> Expression:
    """Return the quotient rounded down."""
    return dividend if divisor == 1 else Operation(FLOOR_DIV, (dividend, divisor))


def ceil_div(dividend: Expression, divisor: int) -> Expression:
    """Return the quotient rounded up."""
    return dividend if divisor == 1 else Operation(CEIL_DIV, (dividend, divisor))


def product(monomial: Monomial, products: Mapping[Monomial, str]) -> Expression:
    """Return a monomial in terms of the largest named one that divides it.

    >>> [show(product(tuple(int(s.name in "BL") for s in SYMBOLS), {}))]
    ['B * L']
    """
    divisors = [m for m in products if all(a <= b for a, b in zip(m, monomial, strict=True))]
    largest = max(divisors, key=sum, default=None)
    rest = monomial if largest is None else tuple(b - a for a, b in zip(largest, monomial, strict=True))
    factors = [Name(SYMBOLS[i].name) for i, power in enumerate(rest) for _ in range(power)]
    return mul(*([] if largest is None else [Name(products[largest])]), *factors)


def polynomial(size: Size, products: Mapping[Monomial, str]) -> Expression:
    """Return an integer polynomial, its constant last."""
    terms = sorted(as_poly(size).items(), key=lambda term: (not any(term[0]), term[0]))
    return add(*(mul(int(c), product(m, products)) if any(m) else int(c) for m, c in terms))


def operations(expression: Expression) -> int:
    """Return how many additions, multiplications, divisions and comparisons an evaluation takes.

    >>> operations(add(Name("x"), mul(2, Name("y"), Name("z"))))
    3
    """
    if not isinstance(expression, Operation):
        return 0
    return len(expression.operands) - 1 + sum(operations(x) for x in expression.operands)


def value(expression: Expression, values: Mapping[str, int]) -> int:
    """Return an expression's value; raises KeyError for a name without one.

    >>> value(ceil_div(add(Name("x"), 1), 4), {"x": 8})
    3
    """
    if isinstance(expression, int):
        return expression
    if isinstance(expression, Name):
        return values[expression.name]
    operands = [value(x, values) for x in expression.operands]
    return _EVALUATE[expression.operator](operands)


_EVALUATE: Mapping[str, Callable[[list[int]], int]] = {
    ADD: sum,
    MUL: prod,
    MAX: max,
    FLOOR_DIV: lambda x: x[0] // x[1],
    CEIL_DIV: lambda x: -(-x[0] // x[1]),
}


class Writer:
    """Writes expressions as Python; a subclass overrides what its language writes differently."""

    def __init__(self, names: Mapping[str, str]) -> None:
        self.names = names

    def __call__(self, expression: Expression) -> str:
        """Return the source of ``expression``."""
        if isinstance(expression, int):
            return self.integer(expression)
        if isinstance(expression, Name):
            return self.names.get(expression.name, expression.name)
        return getattr(self, expression.operator)(*expression.operands)  # type: ignore[no-any-return]

    def atom(self, expression: Expression) -> str:
        """Return the source in parentheses, where it needs them inside any operation."""
        bare = isinstance(expression, (int, Name)) or expression.operator == MAX
        return self(expression) if bare else f"({self(expression)})"

    def factor(self, expression: Expression, first: bool) -> str:
        """Return the source in parentheses, where it needs them inside a product."""
        operator = expression.operator if isinstance(expression, Operation) else MAX
        bare = operator == MUL or (first and operator in (FLOOR_DIV, CEIL_DIV))
        return self(expression) if bare else self.atom(expression)

    def integer(self, value: int) -> str:
        """Return an integer literal."""
        return str(value)

    def add(self, *operands: Expression) -> str:
        """Return a sum."""
        return " + ".join(self(x) for x in operands).replace("+ -", "- ")

    def mul(self, *operands: Expression) -> str:
        """Return a product."""
        if operands[0] == -1:
            return f"-{self.mul(*operands[1:])}"
        return " * ".join(self.factor(x, first=i == 0) for i, x in enumerate(operands))

    def max(self, *operands: Expression) -> str:
        """Return a maximum."""
        return f"max({', '.join(self(x) for x in operands)})"

    def floor_div(self, dividend: Expression, divisor: int) -> str:
        """Return a quotient rounded down."""
        return f"{self.atom(dividend)} // {self(divisor)}"

    def ceil_div(self, dividend: Expression, divisor: int) -> str:
        """Return a quotient rounded up."""
        return f"-(-{self.atom(dividend)} // {self(divisor)})"


show = Writer({})
