"""Where two derivations differ, term by term: options, weights, polynomials, and numbers at three sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import sympy

from derivation.api import Derivation
from derivation.call import size_text
from derivation.equation.derived import Stage
from derivation.tape.grid import B, H, L, W
from derivation.tape.tiles import IN_PIXELS

SIZES = ((512, 512), (768, 768), (1024, 1024))
Values = Mapping[sympy.Symbol, int]


@dataclass(frozen=True, slots=True)
class Pair:
    """One quantity on both sides; None where a side does not have it."""

    name: str
    a: Any
    b: Any

    @property
    def same(self) -> bool:
        """Whether both sides are equal."""
        return bool(self.a == self.b)

    @property
    def difference(self) -> int | None:
        """``b - a``, a missing number being 0; None where they are no numbers."""
        known = [value for value in (self.a, self.b) if value is not None]
        return (self.b or 0) - (self.a or 0) if all(type(value) is int for value in known) else None


@dataclass(frozen=True, slots=True)
class Monomial:
    """One monomial in H, W, L, B of a pair of polynomials, with its coefficient on each side."""

    monomial: str
    a: str
    b: str


@dataclass(frozen=True, slots=True)
class StageDifference:
    """One stage: the polynomials that both Max share, those of one side alone, and their monomials' changes.

    ``changes`` compares, coefficient by coefficient, the polynomials that win at the largest image.
    """

    name: str
    common: tuple[str, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    changes: tuple[Monomial, ...] = ()

    @property
    def same(self) -> bool:
        """Whether both sides have the same closed form."""
        return not (self.only_a or self.only_b)


@dataclass(frozen=True, slots=True)
class Differences:
    """Two derivations side by side; ``numbers_bytes`` maps a size, "HxW", to its stages and peak.

    Of a derivation with a GPU it has what that needs there, too, and ``verdicts`` has its verdict.
    """

    a: str
    b: str
    options: tuple[Pair, ...]
    weights_bytes: tuple[Pair, ...]
    stages: tuple[StageDifference, ...]
    numbers_bytes: Mapping[str, tuple[Pair, ...]] = field(default_factory=dict)
    verdicts: Mapping[str, Pair] = field(default_factory=dict)

    @property
    def same(self) -> bool:
        """Whether no formula and no weight differs."""
        return all(stage.same for stage in self.stages) and all(pair.same for pair in self.weights_bytes)

    def as_dict(self) -> dict[str, Any]:
        """Return the comparison, ready for JSON."""
        return {**asdict(self), "same": self.same}


def compare(
    a: Derivation,
    b: Derivation,
    sizes: tuple[tuple[int, int], ...] = SIZES,
    batch_size: int = 1,
    prompt_length: int | None = None,
    guidance: bool = True,
    num_frames: int | None = None,
) -> Differences:
    """Return where ``a`` and ``b`` differ; for images of ``sizes``, (height, width) in pixels.

    Raises DerivationError for a size that a pipeline rejects.
    """
    call = {"batch_size": batch_size, "prompt_length": prompt_length, "guidance": guidance, "num_frames": num_frames}
    height, width = max(sizes, key=math.prod)
    at = {H: height, W: width, L: prompt_length or a.prompt_length, B: batch_size}
    numbers = {size_text(*size): _numbers(a, b, size, call) for size in sizes}
    on_cards = a.options.gpu is not None or b.options.gpu is not None
    return Differences(
        a.name,
        b.name,
        tuple(p for p in _pairs(a.options.as_dict(), b.options.as_dict()) if not p.same),
        _pairs({**a.weights, "all": a.weights_bytes}, {**b.weights, "all": b.weights_bytes}),
        _stages(a.equation.stages(guidance), b.equation.stages(guidance), at),
        {size: pairs for size, (pairs, _) in numbers.items()},
        {size: verdict for size, (_, verdict) in numbers.items() if on_cards},
    )


def _pairs(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[Pair, ...]:
    return tuple(Pair(name, a.get(name), b.get(name)) for name in dict.fromkeys([*a, *b]))


def _numbers(
    a: Derivation, b: Derivation, size: tuple[int, int], call: Mapping[str, Any]
) -> tuple[tuple[Pair, ...], Pair]:
    """Return bytes and the verdicts of both sides at one size."""
    (left, says), (right, answers) = (_bytes_of(derivation, size, call) for derivation in (a, b))
    return _pairs(left, right), Pair("verdict", says, answers)


def _bytes_of(
    d: Derivation, size: tuple[int, int], call: Mapping[str, Any]
) -> tuple[dict[str, int | None], str | None]:
    peaks = d.stage_peaks(*size, **call)
    tensors: dict[str, int | None] = {**peaks, "peak": d.weights_bytes + max(peaks.values())}
    if d.options.gpu is None:
        return tensors, None
    found = d.verdict(*size, **call)
    return {**tensors, "needs": found.needs_bytes}, found.verdict


def _stages(a: Mapping[str, Stage], b: Mapping[str, Stage], at: Values) -> tuple[StageDifference, ...]:
    return tuple(_stage(name, a.get(name), b.get(name), at) for name in dict.fromkeys([*a, *b]))


def _stage(name: str, a: Stage | None, b: Stage | None, at: Values) -> StageDifference:
    left, right = (_at(stage, at) if stage else {} for stage in (a, b))
    only_a, only_b = ([e for e in own if e not in other] for own, other in ((left, right), (right, left)))
    changes = _changes(*(max(es, key=es.__getitem__) for es in (left, right))) if left and right else ()
    common = [e for e in left if e in right]
    return StageDifference(name, _texts(common), _texts(only_a), _texts(only_b), changes)


def _at(stage: Stage, values: Values) -> dict[sympy.Expr, int]:
    """Return the stage's polynomials and what each is at ``values``."""
    return {term.expression: int(stage.grid.explicit(term.expression).subs(values)) for term in stage.terms}


def _texts(expressions: list[sympy.Expr]) -> tuple[str, ...]:
    return tuple(map(str, expressions))


def _changes(a: sympy.Expr, b: sympy.Expr) -> tuple[Monomial, ...]:
    left, right = _monomials(a), _monomials(b)
    return tuple(
        Monomial(name, left.get(name, "0"), right.get(name, "0"))
        for name in dict.fromkeys([*left, *right])
        if left.get(name) != right.get(name)
    )


def _monomials(expression: sympy.Expr) -> dict[str, str]:
    """Return the coefficients by monomial, for a polynomial; an expression of another form is one entry."""
    symbols = (B, L, H, W, *(symbol for symbol in IN_PIXELS.values() if symbol in expression.free_symbols))
    if not expression.is_polynomial(*symbols):
        return {str(expression): "1"}
    terms = sympy.Poly(expression, *symbols).terms()
    return {str(sympy.prod(s**p for s, p in zip(symbols, powers, strict=True))): str(c) for powers, c in terms}
