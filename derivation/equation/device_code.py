"""The device form as straight-line code: a case for each regime, and the small pool's segments from a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

import numpy as np

from derivation.allocator.report import MIN_LARGE_BYTES, ROUND_LARGE_BYTES, SMALL_SEGMENT_BYTES, segment_size
from derivation.allocator.symbolic import Atom, Comparison, Points, Vector
from derivation.equation.device import DeviceForm, Regime
from derivation.equation.expression import Expression, Let, Name, add, ceil_div, floor_div, mul, polynomial
from derivation.equation.function import Condition
from derivation.tape.symbols import BLOCK_BYTES, MAX_LEVELS, Size

# Sides up to which the small pool is replayed for every product of them; beyond, its bound is what is told.
MOST_COUNTED_SIDE = 1024


@dataclass(frozen=True, slots=True)
class DeviceCase:
    """Reserved bytes but for the small pool, where all ``conditions`` hold."""

    conditions: tuple[Condition, ...]
    value: Expression


@dataclass(frozen=True, slots=True)
class DeviceCode:
    """What generated code holds: the first case whose conditions hold applies.

    ``small`` maps height x width / step^2 to the small pool's segments; others have at most ``most_small``. Sides are
    multiples of ``step`` from ``least`` to ``most``. ``room`` is what the card has for segments, None for no limit.
    """

    step: int
    least: int
    most: int
    sides: tuple[Let, ...]
    cases: tuple[DeviceCase, ...]
    small: Mapping[int, int]
    most_small: int
    context: int
    room: int | None
    small_bytes: int = field(default=SMALL_SEGMENT_BYTES)


def device_code(form: DeviceForm) -> DeviceCode | None:
    """Return the code of a form, None where it leaves out sizes on its grid or has one size alone."""
    heights = sorted({height for height, _ in form.index})
    covered = np.any([regime.where for regime in form.reserved_regimes], axis=0)
    if form.replayed is not None or form.context_bytes is None or not covered.all():
        return None
    if len(form.index) != len(heights) ** 2:
        return None
    step, counted = heights[1] - heights[0], [side for side in heights if side <= MOST_COUNTED_SIDE]
    small = {h * w // step**2: form.survey.small_segments(form.index[h, w]) for h, w in product(counted, counted)}
    total, factor = form.card.total_memory_bytes, form.derived.factor
    sides = {"h0": floor_div(Name("height"), factor), "w0": floor_div(Name("width"), factor)}
    sides |= {f"{s}{k}": ceil_div(Name(f"{s}0"), 1 << k) for k in range(1, MAX_LEVELS) for s in "hw"}
    cases = tuple(case for regime in form.reserved_regimes for case in _cases(regime, form.points))
    used = {name for case in cases for x in (case.value, *(c.left for c in case.conditions)) for name in _names(x)}
    return DeviceCode(
        step=step,
        least=heights[0],
        most=heights[-1],
        sides=tuple(Let(name, side) for name, side in sides.items() if name in used | {"h0", "w0"}),
        cases=cases,
        small=dict(sorted(small.items())),
        most_small=form.most_small_segments,
        context=form.context_bytes,
        room=None if total is None else total - form.context_bytes,
    )


def _names(expression: Expression) -> Iterator[str]:
    if isinstance(expression, Name):
        yield expression.name
    elif not isinstance(expression, int):
        for operand in expression.operands:
            yield from _names(operand)


def _cases(regime: Regime, points: Points) -> Iterator[DeviceCase]:
    """Yield a regime's case, or several: a request below 10 MiB shares a segment, from there on it has its own."""
    atoms = [(atom, count) for number, count in regime.sums for atom, _ in points.sums[number] if atom is not None]
    mixed = [a.nbytes for a, _ in atoms if len(set(_is_own(a.nbytes, points, regime.where))) > 1]
    for answers in product((True, False), repeat=len(mixed)):
        own = dict(zip(mixed, answers, strict=True))
        limits = (Condition(polynomial(n, {}), ">", MIN_LARGE_BYTES - 1) for n, is_own in own.items() if is_own)
        told = (_condition(c, points, own) for c in regime.comparisons)
        segments = (_atom(count, atom, points, regime.where, own) for atom, count in atoms)
        yield DeviceCase((*told, *limits), add(regime.constant_bytes, *segments))


def _is_own(nbytes: Size, points: Points, where: Vector) -> Sequence[bool]:
    found: Sequence[bool] = (points.plain(nbytes)[where] >= MIN_LARGE_BYTES).tolist()
    return found


def _condition(comparison: Comparison, points: Points, own: Mapping[Size, bool]) -> Condition:
    left, right, is_less = comparison
    everywhere = np.ones(len(points), dtype=bool)
    terms = [(a, c) for a, c in points.sums[right]] + [(a, -c) for a, c in points.sums[left]]
    parts = (c if a is None else _atom(c, a, points, everywhere, own) for a, c in terms)
    return Condition(add(*parts), ">", 0 if is_less else -1)


def _atom(count: int, atom: Atom, points: Points, where: Vector, own: Mapping[Size, bool]) -> Expression:
    """Return ``count`` atoms."""
    nbytes = polynomial(atom.nbytes, {})
    if not atom.is_segment:
        fits = (points.plain(atom.nbytes)[where] % BLOCK_BYTES == 0).all()
        return mul(count, nbytes) if fits else mul(count * BLOCK_BYTES, ceil_div(nbytes, BLOCK_BYTES))
    if own.get(atom.nbytes, all(_is_own(atom.nbytes, points, where))):
        return mul(count * ROUND_LARGE_BYTES, ceil_div(nbytes, ROUND_LARGE_BYTES))
    return count * segment_size(MIN_LARGE_BYTES - BLOCK_BYTES)
