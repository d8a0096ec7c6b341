"""What torch.cuda allocates and reserves and what nvidia-smi shows, in closed form, and the decisions behind it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from contextlib import suppress
from functools import cached_property, reduce
from itertools import product
from math import lcm
from operator import and_, or_

import numpy as np
import sympy

from derivation.allocator.allocated import Allocated
from derivation.allocator.allocator import CachingAllocator
from derivation.allocator.config import AllocatorConfig
from derivation.allocator.everywhere import at_all_points, reserved_bytes
from derivation.allocator.memory import DeviceMemory, context_of, device_memory, load_pipeline, weight_bytes
from derivation.allocator.opened import Opened, Requests, Segments
from derivation.allocator.pools import Pool
from derivation.allocator.regimes import Decisions
from derivation.allocator.report import MIN_LARGE_BYTES, ROUND_LARGE_BYTES, segment_size
from derivation.allocator.symbolic import Atom, Comparison, Points, Vector
from derivation.call import Call
from derivation.equation.derived import Derived
from derivation.equation.device_regime import Beside, Part, Regime, piecewise, spread, telling
from derivation.errors import DerivationError, unsupported
from derivation.gpu.cards import lookup
from derivation.tape.grid import H, W
from derivation.tape.symbols import BLOCK_BYTES, SYMBOLS, Size, as_poly, free_names

# The image sides at which the allocator's decisions are compared.
LEAST_SIDE, MOST_SIDE, STEP = 512, 2048, 64
# Regimes that are told apart by decisions of the allocator; where there are more, what they do not share is counted.
MOST_REGIMES = 8
# Sizes whose decisions are looked at for those that tell a regime from the others.
MOST_REFERENCES = 12
# 2 MiB each: the small pool's segments, and those of the large pool that a form does not spell out, by replay.
N = sympy.Symbol("n", integer=True, nonnegative=True)
# 512 bytes each: what blocks have beyond their requests when most is allocated, against what most is asked for.
BEYOND = sympy.Symbol("b", integer=True)


class DeviceForm:
    """The allocator's peaks of one call in closed form, for sides that are multiples of 64 from 512 to 2048, or fixed.

    Batch size and prompt length are those that are fixed, else 1 and the default. On a full card, where cached blocks
    are given back, the forms claim nothing, but for one size, at which they are the numeric replay's. Raises
    DerivationError where no GPU is named, or where each size has a run of its own (VAE tiles) and none is fixed.
    """

    config, kind = AllocatorConfig(), Pool
    rounding = "segments are multiples of 2 MiB"

    def __init__(self, derived: Derived, guidance: bool = True) -> None:
        if derived.options.gpu is None:
            raise unsupported("gpu", None, "a GPU's name, for what its allocator does")
        self.derived, self.guidance, self.card = derived, guidance, lookup(derived.options.gpu)
        self.context_bytes, self.context_source = context_of(self.card)
        calls = list(self._calls(guidance))
        # sides stay symbols where they are fixed, so that terms can be traced
        free = Derived(derived.subject, {name: size for name, size in derived.fixed.items() if name in ("B", "L")})
        self.variant = free.program(guidance).at(derived.sizes(calls[0]))
        held = [call for call in calls if self.variant.holds(derived.sizes(call))]
        if len(held) == 1 < len(calls):
            raise DerivationError("no closed form of what the GPU shows: each size has its own; fix the sides: at()")
        self.index = {(call.height, call.width): i for i, call in enumerate(held)}
        self.points = Points([derived.sizes(call) for call in held])
        if AllocatorConfig.parse(derived.options.alloc_conf or "") != self.config and len(held) > 1:
            supported = "none, expandable_segments:True alone, or sides that are fixed: at()"
            raise unsupported("alloc_conf", derived.options.alloc_conf, supported)

    def _calls(self, guidance: bool) -> Iterator[Call]:
        fixed, factor, unit = self.derived.given, self.derived.factor, lcm(STEP, self.derived.grid.unit)
        every = range(-(-LEAST_SIDE // unit) * unit, min(MOST_SIDE, self.derived.sides.most) + 1, unit)
        heights, widths = ([fixed[s] * factor] if s in fixed else every for s in ("h0", "w0"))
        length, batch = self.derived.defaults["L"], self.derived.defaults["B"]
        sizes = sorted(product(heights, widths), key=lambda size: size[0] != size[1])
        return (Call(height, width, batch, length, guidance) for height, width in sizes)

    @cached_property
    def requests(self) -> Requests:
        """What the run asks for at each size; raises DerivationError for what ``Requests`` does not take."""
        return Requests(self.variant.tape, weight_bytes(self.derived.resident), self.points)

    @cached_property
    def small(self) -> Opened:
        """The small pool's segments at each size."""
        return Opened(self.requests, is_small=True, kind=self.kind)

    @cached_property
    def large(self) -> Opened:
        """The large pool's segments at each size."""
        return Opened(self.requests, is_small=False, kind=self.kind)

    @cached_property
    def decisions(self) -> Decisions:
        """The decisions of the large pool."""
        return Decisions(self.large, self.config)

    @cached_property
    def reserved_bytes(self) -> Vector:
        """torch.cuda.max_memory_reserved() at each size, on a card that has room where there are several."""
        return reserved_bytes(self.small, self.large) if self.replayed is None else np.array([self.replayed.reserved])

    @cached_property
    def replayed(self) -> DeviceMemory | None:
        """The numeric replay of the one size there is, None where there are several."""
        if len(self.points) > 1:
            return None
        options, values = self.derived.options, self.points.values[0]
        assert options.gpu is not None
        return device_memory(options.gpu, self.derived.resident, self.variant.tape, values, options.alloc_conf)

    @cached_property
    def reserved_regimes(self) -> tuple[Regime, ...]:
        """Segments by what they were opened for, those that are counted left out; the most special regime first."""
        if self.replayed is not None:
            return self._as_replayed(self.replayed.reserved)
        if len(groups := self._groups()) <= MOST_REGIMES:
            found = self._regimes(groups)
            if all(regime.conditions for regime in found[:-1]):
                return found
        return (self.shared,)

    def _asked(self, opened: Segments) -> Counter[Size]:
        """Return the requests that segments of their own are opened for at a size, and vary."""
        sizes = (self.requests.tape.allocations[tensor].nbytes for tensor, _ in opened)
        return Counter(n for n in sizes if free_names(n))

    @cached_property
    def shared(self) -> Regime:
        """The segments that are the same at all sizes, each for a request of 10 MiB or more."""
        everywhere = np.ones(len(self.points), dtype=bool)
        left = reduce(and_, (self._asked(own) for own in at_all_points(self.large)))
        sums = list[tuple[int, int]]()
        for tensor, _ in self.large.at(len(self.points) - 1):
            nbytes = self.requests.tape.allocations[tensor].nbytes
            if left[nbytes] and (self.points.plain(nbytes) >= MIN_LARGE_BYTES).all():
                left[nbytes] -= 1
                sums.append((self.points.number_of_atom(Atom(nbytes, is_segment=True)), tensor))
        return self._regime(self.large.loaded_bytes, sums, (), everywhere, everywhere)

    def _as_replayed(self, nbytes: int) -> tuple[Regime, ...]:
        """Return the form at one size if it is what the replay says, else the figure alone: on a card that is full."""
        with suppress(DerivationError):
            if int(reserved_bytes(self.small, self.large)[0]) == nbytes:
                return self._regimes(self._groups())
        return (Regime(nbytes, (), (), np.ones(1, dtype=bool), np.array([nbytes])),)

    def _groups(self) -> list[tuple[Vector, list[tuple[int, int]]]]:
        """Return sizes with the same segments of their own, numbered, each with its tensor; the largest group last."""
        found: dict[Hashable, tuple[Vector, list[tuple[int, int]]]] = {}
        for point, opened in enumerate(at_all_points(self.large)):
            own = [tensor for tensor, _ in opened if self._is_own(tensor, point)]
            nbytes = (self.requests.tape.allocations[tensor].nbytes for tensor in own)
            numbers = [self.points.number_of_atom(Atom(n, is_segment=True)) for n in nbytes]
            group = np.zeros(len(self.points), dtype=bool), list(zip(numbers, own, strict=True))
            where, _ = found.setdefault(frozenset(Counter(numbers).items()), group)
            where[point] = True
        return sorted(found.values(), key=lambda group: int(group[0].sum()))

    def _is_own(self, tensor: int, point: int) -> bool:
        return bool(self.requests.bytes[self.requests.kinds[tensor], point] >= MIN_LARGE_BYTES)

    def _regimes(self, groups: Sequence[tuple[Vector, list[tuple[int, int]]]]) -> tuple[Regime, ...]:
        constant, regimes = self.large.loaded_bytes, list[Regime]()
        for i, (where, sums) in enumerate(groups):
            others = reduce(or_, (w for w, _ in groups[i + 1 :]), np.zeros_like(where))
            regimes.append(self._regime(constant, sums, self._telling(where, others), where, where | others))
        return tuple(regimes)

    def _regime(
        self,
        constant: int,
        sums: Sequence[tuple[int, int]],
        comparisons: Sequence[Comparison],
        where: Vector,
        among: Vector,
    ) -> Regime:
        total = np.zeros(len(self.points), dtype=np.int64) + constant
        names: dict[int, list[str]] = {}
        for number, origin in sums:
            total += self.points.vector(number)
            if self.points.varies(number):
                a = self.requests.tape.allocations[origin]
                names.setdefault(number, []).append(f"{a.path or 'pipeline'}: {a.op}")
            else:
                constant += int(self.points.vector(number)[0])
        parts = tuple(Part(self.expression(number, where), tuple(tensors)) for number, tensors in names.items())
        conditions = tuple(self._relation(c, among) for c in comparisons)
        counts = tuple((number, len(tensors)) for number, tensors in names.items())
        return Regime(constant, parts, conditions, where, total, counts)

    def _telling(self, own: Vector, others: Vector) -> list[Comparison]:
        """Return decisions at some sizes, or their opposites, that tell ``own`` from ``others``; none if none do."""
        taken = set[Comparison]()
        few = MOST_REFERENCES // 2
        for point in (*spread(own, few), *spread(others, few)) if others.any() else ():
            taken |= {
                c for left, right, lt in self.decisions.at(point) for c in ((left, right, lt), (right, left, not lt))
            }
            if found := telling(self.points, taken, own, others):
                return found
        return []

    def _relation(self, comparison: Comparison, where: Vector) -> sympy.Basic:
        left, right, is_less = comparison
        sides = self.expression(left, where), self.expression(right, where)
        return sympy.Lt(*sides) if is_less else sympy.Le(*sides)

    def expression(self, number: int, where: Vector) -> sympy.Expr:
        """Return a sum in H and W."""
        terms = self.points.sums[number]
        return sympy.Add(*(c if atom is None else c * self._atom(atom, where) for atom, c in terms))

    def _atom(self, atom: Atom, where: Vector) -> sympy.Expr:
        plain = self._plain(atom)
        if not atom.is_segment:
            fits = (self.points.plain(atom.nbytes)[where] % BLOCK_BYTES == 0).all()
            return plain if fits else BLOCK_BYTES * sympy.ceiling(plain / BLOCK_BYTES)
        own = ROUND_LARGE_BYTES * sympy.ceiling(plain / ROUND_LARGE_BYTES)
        is_own = self.points.plain(atom.nbytes)[where] >= MIN_LARGE_BYTES
        shared = sympy.Integer(segment_size(MIN_LARGE_BYTES - BLOCK_BYTES))
        if is_own.all() or not is_own.any():
            return own if is_own.all() else shared
        return sympy.Piecewise((shared, plain < MIN_LARGE_BYTES), (own, True))

    def _plain(self, atom: Atom) -> sympy.Expr:
        """Return a request's bytes, before any rounding."""
        return sympy.expand(as_poly(atom.nbytes).as_expr(*(self._in_pixels(symbol.name) for symbol in SYMBOLS)))

    def _in_pixels(self, name: str) -> sympy.Expr | int:
        """Return what a symbol of a size is: a number where it is fixed, a side at a level where it is not."""
        values = self.points.arrays.get(name)
        if values is None or (values == values[0]).all():
            return 0 if values is None else int(values[0])
        return (H if name[0] == "h" else W) / (self.derived.factor << int(name[1:]))

    @cached_property
    def allocated(self) -> sympy.Expr:
        """torch.cuda.max_memory_allocated() in H, W and ``BEYOND``, a number at one size."""
        if self.replayed is not None:
            return sympy.Integer(self.replayed.allocated)
        events = {int(np.argmax(self.blocks.requested(point))) for point in self.index.values()}
        sums = dict.fromkeys(self._alive_after(event) for event in sorted(events))
        return sympy.Max(*sums, evaluate=False) + BLOCK_BYTES * BEYOND

    def _alive_after(self, event: int) -> sympy.Expr:
        """Return the bytes of the weights' blocks and of what is alive after an event, rounded."""
        alive: Counter[Size] = Counter()
        for e in self.requests.tape.events[: event + 1]:
            alive[self.requests.tape.allocations[abs(e) - 1].nbytes] += 1 if e > 0 else -1
        atoms = ((count, Atom(nbytes, is_segment=False)) for nbytes, count in alive.items() if count)
        everywhere = np.ones(len(self.points), dtype=bool)
        return sympy.Add(self.loaded_bytes, *(count * self._atom(atom, everywhere) for count, atom in atoms))

    @cached_property
    def blocks(self) -> Allocated:
        """The large pool's blocks when most is allocated."""
        return Allocated(self.requests, self.kind)

    @cached_property
    def loaded_bytes(self) -> int:
        """Bytes of the weights' blocks."""
        loaded = CachingAllocator(self.config)
        load_pipeline(loaded, self.derived.resident)
        return loaded.allocated_bytes.current

    def allocated_bytes(self, point: int) -> int:
        """Return torch.cuda.max_memory_allocated() at one size, on a card that has room where there are several."""
        return self.loaded_bytes + self.blocks.most_at(point) if self.replayed is None else self.replayed.allocated

    def beyond_at(self, height: int, width: int) -> int:
        """Return what ``BEYOND`` is; raises DerivationError for a size that is not covered."""
        point = self.index[self._covered(height, width)]
        requested = self.loaded_bytes + int(self.blocks.requested(point).max())
        return (self.allocated_bytes(point) - requested) // BLOCK_BYTES

    @cached_property
    def reserved(self) -> sympy.Expr:
        """torch.cuda.max_memory_reserved() in H, W and ``N``, which is put in at one size."""
        return piecewise(self.reserved_regimes, self._more)

    @cached_property
    def device(self) -> sympy.Expr:
        """What nvidia-smi shows: reserved bytes and the context's; raises DerivationError where that is not known."""
        if self.context_bytes is None:
            raise unsupported("gpu", self.card.name, "a card whose CUDA context is documented")
        return piecewise(self.reserved_regimes, self.context_bytes + self._more)

    @property
    def _more(self) -> sympy.Expr:
        return ROUND_LARGE_BYTES * (N if self.replayed is None else sympy.Integer(int(self.counted[0])))

    @cached_property
    def counted(self) -> Vector:
        """What ``N`` is at each size."""
        total = np.zeros(len(self.points), dtype=np.int64)
        for regime in self.reserved_regimes:
            total[regime.where] = regime.total[regime.where]
        found: Vector = (self.reserved_bytes - total) // ROUND_LARGE_BYTES
        return found

    def counted_at(self, height: int, width: int) -> int:
        """Return what ``N`` is; raises DerivationError for a size that is not covered."""
        return int(self.counted[self.index[self._covered(height, width)]])

    def reserved_at(self, height: int, width: int) -> int:
        """Return the reserved bytes of a size; raises DerivationError for one that is not covered."""
        return int(self.reserved_bytes[self.index[self._covered(height, width)]])

    @property
    def headline(self) -> str:
        """Context, weights and small blocks, bytes a pixel, and what that leaves out, for the regime of most sizes."""
        beside, context = self.beside_pixels, "" if self.context_bytes is None else f"{self.context_bytes:,} "
        usual = f"{context}context + {beside.least:,} weights and small blocks + {self.per_pixel} H W"
        where = f"at {beside.sizes} of {beside.all_sizes} sizes"
        return f"{usual}, and at most {beside.most - beside.least:,} more: {self.rounding}; {where}"

    @property
    def beside_pixels(self) -> Beside:
        """Bytes beside the context and ``per_pixel``'s, in the regime of most sizes."""
        growing = float(self.per_pixel) * np.prod([*self.index], axis=1)
        held = np.array([self.covers(*size) for size in self.index])
        return Beside.of(self.reserved_bytes - growing, self.reserved_regimes[-1].where, held)

    @property
    def per_pixel(self) -> sympy.Expr:
        """Bytes a pixel of segments of their own in the regime of most sizes."""
        regime = self.reserved_regimes[-1]
        atoms = [(a, count) for number, count in regime.sums for a, _ in self.points.sums[number] if a is not None]
        own = [(a, n) for a, n in atoms if (self.points.plain(a.nbytes)[regime.where] >= MIN_LARGE_BYTES).all()]
        return sum(count * self._plain(atom).coeff(H * W) for atom, count in own)

    def covers(self, height: int, width: int) -> bool:
        """Return whether the forms hold for a size: it is one of theirs, and the card has room for it."""
        point, total = self.index.get((height, width)), self.card.total_memory_bytes
        if point is None or total is None or self.replayed is not None:
            return point is not None
        return bool(self.reserved_bytes[point] <= total - (self.context_bytes or 0))

    def _covered(self, height: int, width: int) -> tuple[int, int]:
        if not self.covers(height, width):
            covered = "multiples of 64 from 512 to 2048 that the card has room for, or what at() fixes"
            raise unsupported("height x width", f"{height} x {width}", covered)
        return height, width
