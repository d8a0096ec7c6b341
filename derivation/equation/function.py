"""The exact function as straight-line code: level sides, then per case named sizes and a Max of few sums.

Theorem: a size whose coefficients are all multiples of 512 needs no rounding, so it joins the others in one
polynomial. Each other size is rounded once, and what all points of a case share is added outside its Max.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from sympy.polys.rings import PolyElement

from derivation.equation.cases import Case
from derivation.equation.derived import Derived
from derivation.equation.expression import (
    Expression,
    Let,
    Monomial,
    Name,
    add,
    ceil_div,
    floor_div,
    maximum,
    mul,
    operations,
    polynomial,
    product,
)
from derivation.equation.tiles import tile_expressions
from derivation.peak.liveness import Point
from derivation.peak.proof import slack_bytes
from derivation.tape.events import Guard
from derivation.tape.symbols import BLOCK_BYTES, MAX_LEVELS, RING, SYMBOLS, Size, as_poly, ceil512, free_names, is_tile

WEIGHTS = "WEIGHTS_BYTES"
# The cases under guidance and without.
Cases = Mapping[bool, tuple[Case, ...]]


@dataclass(frozen=True, slots=True)
class Condition:
    """``left > right``, or ``left == right``."""

    left: Expression
    operator: str
    right: int


@dataclass(frozen=True, slots=True)
class Maximum:
    """``base`` + the largest of ``peaks``."""

    base: Expression
    peaks: tuple[Expression, ...]

    @property
    def result(self) -> Expression:
        """The whole as one expression."""
        return add(self.base, maximum(self.peaks))


@dataclass(frozen=True, slots=True)
class CaseCode(Maximum):
    """The bytes where all ``conditions`` hold; ``lets`` come first."""

    conditions: tuple[Condition, ...]
    lets: tuple[Let, ...]


@dataclass(frozen=True, slots=True)
class StagesCase:
    """Each stage's bytes beyond the weights, where all ``conditions`` hold; ``lets`` come first."""

    conditions: tuple[Condition, ...]
    lets: tuple[Let, ...]
    stages: Mapping[str, Maximum]


@dataclass(frozen=True, slots=True)
class Stages:
    """stage_vram: level sides, then the cases under guidance and without, most special first."""

    sides: tuple[Let, ...]
    cases: Mapping[bool, tuple[StagesCase, ...]]


@dataclass(frozen=True, slots=True)
class Function:
    """peak_vram: level sides, then the cases under guidance and without, most special first."""

    sides: tuple[Let, ...]
    cases: Mapping[bool, tuple[CaseCode, ...]]

    @property
    def cost(self) -> tuple[str, str]:
        """The operations of a call in words."""
        return f"{self.operations[True]} integer operations with guidance", f"{self.operations[False]} without"

    @property
    def operations(self) -> dict[bool, int]:
        """Integer operations of a call under guidance and without, level sides included."""
        shared = sum(operations(side.value) for side in self.sides)
        return {g: shared + max(_operations(case) for case in cases) for g, cases in self.cases.items()}


def _operations(case: CaseCode) -> int:
    return operations(case.result) + sum(operations(let.value) for let in case.lets)


def function(derived: Derived, exact: Cases) -> Function:
    """Return the exact function of ``derived``, from its cases."""
    cases = {
        guidance: tuple(_case(case, _origins(derived, guidance)) for case in listed)
        for guidance, listed in exact.items()
    }
    return Function(_sides(derived, _sizes(exact)), cases)


def stages(derived: Derived, exact: Cases) -> Stages:
    """Return the exact function of every stage of ``derived``, from the cases of stages that are apart."""
    cases = {
        guidance: tuple(_stages_case(case, _origins(derived, guidance)) for case in listed)
        for guidance, listed in exact.items()
    }
    return Stages(_sides(derived, _sizes(exact)), cases)


def _sizes(exact: Cases) -> Iterator[Size]:
    for case in (case for listed in exact.values() for case in listed):
        yield from (guard.size for guard in case.conditions)
        yield from (size for point in case.points for term in point.terms for size in term)


def _origins(derived: Derived, guidance: bool) -> Callable[[Size], str]:
    """Return what names the first storage of a size."""
    found: dict[Size, str] = {}
    for a in derived.program(guidance).generic.tape.allocations:
        found.setdefault(a.nbytes, f"{a.path or 'pipeline'}: {a.op}")
    return lambda size: found.get(size, "")


def _sides(derived: Derived, sizes: Iterable[Size]) -> tuple[Let, ...]:
    """Return the latent sides and every other side that is used: ceil(ceil(x / 2) / 2) = ceil(x / 4)."""
    used = {name for size in sizes for name in free_names(size)} | {"h0", "w0"}
    factor, tile = derived.grid.vae_scale_factor, derived.grid.tile
    known: dict[str, Expression] = {"h0": floor_div(Name("height"), factor), "w0": floor_div(Name("width"), factor)}
    known |= {f"{s}{k}": ceil_div(Name(f"{s}0"), 1 << k) for k in range(1, MAX_LEVELS) for s in "hw"}
    if tile is not None and any(is_tile(name) for name in used):
        known |= tile_expressions(tile)
        used |= {s.name for s in SYMBOLS if is_tile(s.name)}
    return tuple(Let(s.name, known[s.name], s.meaning) for s in SYMBOLS if s.name in used and s.name in known)


@dataclass(slots=True)
class Sum:
    """A live set: an exact polynomial, and sizes that are rounded first, each with its count."""

    exact: PolyElement
    rounded: dict[Size, Size]

    @classmethod
    def of(cls, point: Point) -> Sum:
        """Return a point's live set."""
        total = cls(RING(0), {})
        for nbytes, count in point.terms:
            if isinstance(nbytes, int):
                total.exact += ceil512(nbytes) * as_poly(count)
            elif slack_bytes(nbytes) == 0:
                total.exact += nbytes * as_poly(count)
            else:
                total.rounded[nbytes] = total.rounded.get(nbytes, 0) + count
        return total

    def minus(self, other: Sum) -> Sum:
        """Return what this has beyond ``other``."""
        counts = {n: count - other.rounded.get(n, 0) for n, count in self.rounded.items()}
        return Sum(self.exact - other.exact, {n: count for n, count in counts.items() if count != 0})

    def expression(self, products: Mapping[Monomial, str], atoms: Mapping[Size, str]) -> Expression:
        """Return the sum in named products and named rounded sizes."""
        rounded = (mul(polynomial(count, products), Name(atoms[n])) for n, count in self.rounded.items())
        return add(*rounded, polynomial(self.exact, products))


def _shared(sums: list[Sum]) -> Sum:
    """Return the largest sum that every one of ``sums`` contains."""
    monomials = set[Monomial].intersection(*(set(s.exact) for s in sums))
    exact = {m: min(s.exact[m] for s in sums) for m in monomials}
    rounded: dict[Size, Size] = {}
    for nbytes, count in sums[0].rounded.items():
        counts = [s.rounded.get(nbytes, 0) for s in sums]
        if all(isinstance(c, int) for c in counts):
            rounded[nbytes] = min(counts)
        elif all(c == count for c in counts):
            rounded[nbytes] = count
    return Sum(RING(exact), {n: count for n, count in rounded.items() if count != 0})


def _case(case: Case, origin: Callable[[Size], str]) -> CaseCode:
    lets, [found] = _code([case.points], origin)
    return CaseCode(add(Name(WEIGHTS), found.base), found.peaks, _conditions(case), lets)


def _stages_case(case: Case, origin: Callable[[Size], str]) -> StagesCase:
    names = list(dict.fromkeys(point.stage for point in case.points))
    lets, found = _code([[p for p in case.points if p.stage == name] for name in names], origin)
    return StagesCase(_conditions(case), lets, dict(zip(names, found, strict=True)))


def _code(groups: Iterable[Iterable[Point]], origin: Callable[[Size], str]) -> tuple[tuple[Let, ...], list[Maximum]]:
    """Return the Max over each group of points, and the intermediate values of them all."""
    parts: list[tuple[Sum, list[Sum]]] = []
    for group in groups:
        sums = [Sum.of(point) for point in group]
        shared = _shared(sums)
        parts.append((shared, [s.minus(shared) for s in sums]))
    flat = [s for shared, rest in parts for s in (shared, *rest)]
    sizes = list(dict.fromkeys(n for s in flat for n in s.rounded))
    products = _products([*sizes, *(s.exact for s in flat)])
    atoms = {n: f"r{i}" for i, n in enumerate(sizes)}
    named: dict[Monomial, str] = {}
    lets: list[Let] = []
    for monomial, name in products.items():
        lets.append(Let(name, product(monomial, named)))
        named[monomial] = name
    lets += [Let(atoms[n], _rounded(n, products), origin(n)) for n in sizes]
    return tuple(lets), [
        Maximum(shared.expression(products, atoms), tuple(dict.fromkeys(s.expression(products, atoms) for s in rest)))
        for shared, rest in parts
    ]


def _conditions(case: Case) -> tuple[Condition, ...]:
    return tuple(_condition(guard) for guard in case.conditions)


def _rounded(nbytes: Size, products: Mapping[Monomial, str]) -> Expression:
    return mul(ceil_div(polynomial(nbytes, products), BLOCK_BYTES), BLOCK_BYTES)


def _products(sizes: Iterable[Size]) -> dict[Monomial, str]:
    """Return a name for every monomial that is used more than once, smaller ones first."""
    uses = Counter(monomial for size in sizes for monomial in as_poly(size) if sum(monomial) > 1)
    repeated = [monomial for monomial, count in uses.items() if count > 1]
    return {m: _name(m) for m in sorted(repeated, key=lambda m: (sum(m), [-power for power in m]))}


def _name(monomial: Monomial) -> str:
    parts = [f"{SYMBOLS[i].name}{'' if power == 1 else f'p{power}'}" for i, power in enumerate(monomial) if power]
    return "_".join(parts).lower()


def _condition(guard: Guard) -> Condition:
    left = polynomial(guard.size, {})
    if guard.answer:
        return Condition(left, ">", guard.bound)
    assert guard.bound == 1
    return Condition(left, "==", 1)
