"""What a call reserves at most, at every size that a pipeline takes: proven by playing each of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import product
from typing import Any

import sympy

from derivation.allocator.everywhere import at_all_points
from derivation.allocator.opened import Opened, Requests
from derivation.allocator.report import LARGE_PAGE_BYTES, MIN_LARGE_BYTES, ROUND_LARGE_BYTES, SMALL_BYTES, segment_size
from derivation.allocator.symbolic import Points
from derivation.call import Call
from derivation.equation.device import LEAST_SIDE, MOST_SIDE, STEP, DeviceForm
from derivation.equation.device_pages import PagesForm
from derivation.errors import DerivationError, positive, unsupported
from derivation.tape.grid import H, W
from derivation.tape.symbols import SYMBOLS, Size, as_poly, as_terms, evaluate

# Sizes whose requests are held at once.
BATCH = 1024
SHARED = segment_size(MIN_LARGE_BYTES - 1)
Values = Mapping[str, int]
Progress = Callable[[str], None]
# Of the large pool: bytes that do not vary, a unit, the segments of whole units, how many sizes were played.
Large = tuple[int, int, Counter[Size], int]


@dataclass(frozen=True, slots=True)
class Bound:
    """Reserved bytes are at most ``constant_bytes`` and so many segments for each request, each of whole units.

    Units are of 2 MiB; of expandable segments there is one, up to the address that ``PagesForm`` reaches, in pages.
    It holds where both sides are multiples of ``step`` from ``least`` to ``most``: at all these ``sizes``, of which
    ``played`` are different to a pool of the allocator, no more segments are opened for a request. ``fixed`` are the
    symbols of other arguments than the sides, ``factor`` is how many pixels a latent is wide, ``context_bytes`` what
    nvidia-smi shows beyond reserved bytes.
    """

    step: int
    least: int
    most: int
    sizes: int
    played: int
    factor: int
    fixed: Values
    context_bytes: int | None
    constant_bytes: int
    unit_bytes: int
    segments: tuple[tuple[Size, int], ...]

    def at(self, height: int, width: int) -> int:
        """Return the bytes at a size; raises DerivationError for one that is not covered."""
        if any(side % self.step or not self.least <= side <= self.most for side in (height, width)):
            covered = f"multiples of {self.step} from {self.least} to {self.most}"
            raise unsupported("height x width", f"{height} x {width}", covered)
        sides = {"h": height // self.factor, "w": width // self.factor}
        values = {s.name: -(-sides[s.name[0]] // (1 << int(s.name[1:]))) for s in SYMBOLS if _is_level(s.name)}
        units = sum(n * -(-evaluate(size, {**values, **self.fixed}) // self.unit_bytes) for size, n in self.segments)
        return self.constant_bytes + self.unit_bytes * units

    def as_dict(self) -> dict[str, Any]:
        """Return the fields by name, ready for JSON; a request's bytes as coefficients, symbols and powers."""
        segments = [{"bytes": as_terms(size), "count": n} for size, n in self.segments]
        return {**{f.name: getattr(self, f.name) for f in fields(self)}, "segments": segments}

    @property
    def expression(self) -> sympy.Expr:
        """The bytes in H and W."""
        names = [self._in_pixels(symbol.name) for symbol in SYMBOLS]
        sums = ((n, as_poly(size).as_expr(*names)) for size, n in self.segments)
        parts = (n * self.unit_bytes * sympy.ceiling(nbytes / self.unit_bytes) for n, nbytes in sums)
        return sympy.Add(self.constant_bytes, *parts)

    def _in_pixels(self, name: str) -> sympy.Expr | int:
        if not _is_level(name):
            return self.fixed.get(name, 0)
        pixels = self.factor << int(name[1:])
        side = (H if name[0] == "h" else W) / pixels
        return sympy.ceiling(side) if self.step % pixels else side


def device_bound(
    form: DeviceForm, step: int = STEP, most: int = MOST_SIDE, progress: Progress = lambda _: None
) -> Bound:
    """Return the bound where both sides are multiples of ``step``: a few seconds for 64, minutes for 8.

    Raises DerivationError for a step that the pipeline does not take, fixed sides, and where sizes run their own ways.
    """
    values = _values(form, step, most)
    small = [opened.at(i) for opened, i in _played(form, values, True, progress)]
    large = _played(form, values, False, progress)
    found = _pages(form, large) if isinstance(form, PagesForm) else _segments(form, large)
    constant, unit, own, played = found
    called = max(sum(nbytes for _, nbytes in segments) for segments in small)
    return Bound(
        step=step,
        least=LEAST_SIDE,
        most=most,
        sizes=len(values),
        played=len(small) + played,
        factor=form.derived.factor,
        fixed={name: value for name, value in values[0].items() if not _is_level(name)},
        context_bytes=form.context_bytes,
        constant_bytes=constant + form.small.loaded_bytes + called,
        unit_bytes=unit,
        segments=tuple(own.items()),
    )


def _segments(form: DeviceForm, played: Iterator[tuple[Opened, int]]) -> Large:
    own, shared, points = Counter[Size](), 0, 0
    for opened, i in played:
        found = Counter(_asked(opened.requests, tensor, i) for tensor, _ in opened.at(i))
        shared, points = max(shared, found.pop(0, 0)), points + 1
        own |= found
    return form.large.loaded_bytes + shared * SHARED, ROUND_LARGE_BYTES, own, points


def _pages(form: PagesForm, played: Iterator[tuple[Opened, int]]) -> Large:
    reached, beyond = form.reached_bytes, list[int]()
    for opened, i in played:
        mapped = form.large.loaded_bytes + sum(nbytes for _, nbytes in opened.at(i))
        pages = -(-int(opened.requests.points.plain(reached)[i]) // LARGE_PAGE_BYTES)
        beyond.append(mapped - pages * LARGE_PAGE_BYTES)
    return max(beyond), LARGE_PAGE_BYTES, Counter({reached: 1}), len(beyond)


def _asked(requests: Requests, tensor: int, point: int) -> Size:
    """Return what a segment of its own is opened for, 0 where a tensor shares one."""
    is_own = requests.bytes[requests.kinds[tensor], point] >= MIN_LARGE_BYTES
    return requests.tape.allocations[tensor].nbytes if is_own else 0


def _played(
    form: DeviceForm, values: Sequence[Values], is_small: bool, progress: Progress
) -> Iterator[tuple[Opened, int]]:
    """Yield one pool and a point of it for each size that is different to it."""
    every = Requests(form.requests.tape, form.requests.weights, Points(values))
    columns = every.bytes * ((every.bytes <= SMALL_BYTES) == is_small)
    points = list({columns[:, point].tobytes(): point for point in range(len(values))}.values())
    for begun in range(0, len(points), BATCH):
        progress(f"playing the {'small' if is_small else 'large'} pool: {begun} of {len(points)} sizes")
        some = Points([values[point] for point in points[begun : begun + BATCH]])
        opened = Opened(Requests(form.requests.tape, form.requests.weights, some), is_small, form.kind)
        at_all_points(opened)
        yield from ((opened, i) for i in range(len(some)))


def _values(form: DeviceForm, step: int, most: int) -> Sequence[Values]:
    """Return the symbols at every size; raises DerivationError where one has another run than the form's."""
    if form.replayed is not None:
        raise unsupported("bound", "of reserved bytes", "sides that are not fixed")
    positive("step", step, most)
    length, batch = form.derived.defaults["L"], form.derived.defaults["B"]
    sides = range(-(-LEAST_SIDE // step) * step, most + 1, step)
    calls = (Call(height, width, batch, length, form.guidance) for height, width in product(sides, sides))
    values = [form.derived.sizes(call) for call in calls]
    if not all(form.variant.holds(each) for each in values):
        raise DerivationError(f"no bound of reserved bytes: of multiples of {step} up to {most} some run their own way")
    return values


def _is_level(name: str) -> bool:
    return name[0] in "hw" and name[1:].isdigit()
