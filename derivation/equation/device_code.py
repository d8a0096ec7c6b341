"""The device form as straight-line code: the segments that are shared by all sizes, and the others from a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from derivation.allocator.report import LARGE_PAGE_BYTES, ROUND_LARGE_BYTES
from derivation.allocator.symbolic import Atom
from derivation.equation.device import DeviceForm
from derivation.equation.device_pages import PagesForm, is_whole
from derivation.equation.expression import Expression, Let, Name, add, ceil_div, floor_div, mul, polynomial
from derivation.tape.symbols import BLOCK_BYTES, MAX_LEVELS, as_poly


@dataclass(frozen=True, slots=True)
class DeviceCode:
    """What generated code holds: reserved bytes are ``value`` + ``unit`` times what is counted.

    ``counted`` is by height x width / step^2, for those products at all of whose sizes it is the same; others have at
    most ``most_counted``. Sides are multiples of ``step`` from ``least`` to ``most``. ``room`` is what the card has for
    segments, None for no limit.
    """

    step: int
    least: int
    most: int
    sides: tuple[Let, ...]
    value: Expression
    unit: int
    counted: Mapping[int, int]
    most_counted: int
    context: int
    room: int | None


def device_code(form: DeviceForm) -> DeviceCode | None:
    """Return the code of a form, None where it has one size alone, or no square grid of them."""
    heights = sorted({height for height, _ in form.index})
    if form.replayed is not None or form.context_bytes is None or len(form.index) != len(heights) ** 2:
        return None
    step, shared = heights[1] - heights[0], form.shared
    value = _pages(form) if isinstance(form, PagesForm) else _segments(form)
    counted = (form.reserved_bytes - shared.total) // ROUND_LARGE_BYTES
    by_pixels: dict[int, set[int]] = {}
    for (height, width), point in form.index.items():
        by_pixels.setdefault(height * width // step**2, set()).add(int(counted[point]))
    total, factor = form.card.total_memory_bytes, form.derived.factor
    sides = {"h0": floor_div(Name("height"), factor), "w0": floor_div(Name("width"), factor)}
    sides |= {f"{s}{k}": ceil_div(Name(f"{s}0"), 1 << k) for k in range(1, MAX_LEVELS) for s in "hw"}
    used = {"h0", "w0", *_names(value)}
    return DeviceCode(
        step=step,
        least=heights[0],
        most=heights[-1],
        sides=tuple(Let(name, side) for name, side in sides.items() if name in used),
        value=value,
        unit=ROUND_LARGE_BYTES,
        counted={pixels: most for pixels, [most, *others] in sorted(by_pixels.items()) if not others},
        most_counted=int(counted.max()),
        context=form.context_bytes,
        room=None if total is None else total - form.context_bytes,
    )


def _segments(form: DeviceForm) -> Expression:
    sums = ((atom, n) for number, n in form.shared.sums for atom, _ in form.points.sums[number] if atom is not None)
    return add(form.shared.constant_bytes, *(_rounded(atom, ROUND_LARGE_BYTES, n) for atom, n in sums))


def _pages(form: PagesForm) -> Expression:
    """Return the pages up to the address reached; sizes of whole blocks are added up without rounding."""
    whole, others = as_poly(0), list[Expression]()
    for atom, n in form.points.sums[form.reached]:
        size = as_poly(1 if atom is None else atom.nbytes)
        if atom is None or is_whole(size):
            whole += n * size
        else:
            others.append(_rounded(atom, BLOCK_BYTES, n))
    return mul(LARGE_PAGE_BYTES, ceil_div(add(*others, polynomial(whole, {})), LARGE_PAGE_BYTES))


def _rounded(atom: Atom, step: int, times: int) -> Expression:
    return mul(times * step, ceil_div(polynomial(atom.nbytes, {}), step))


def _names(expression: Expression) -> Iterator[str]:
    if isinstance(expression, Name):
        yield expression.name
    elif not isinstance(expression, int):
        for operand in expression.operands:
            yield from _names(operand)
