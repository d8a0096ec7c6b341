"""Trace and interpolate: tapes of integers at a few sizes, aligned, become one tape of polynomials.

Two tapes have one structure where their operators, module paths, dtypes, ranks and deaths are the same, in order.
Each dimension is then the integer polynomial, of fewest terms, through its values; bytes are the product of dimensions
wherever they are at every size. Other sizes than those it went through decide whether it holds.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from itertools import combinations, product
from math import prod
from operator import mul

import numpy as np

from derivation.errors import DerivationError
from derivation.tape.events import Allocation
from derivation.tape.grid import Range
from derivation.tape.symbols import DTYPE_BYTES, RING, Size, evaluate, free_names, symbol
from derivation.tape.tape import Shapes, Tape

Values = Mapping[str, int]
Run = Callable[[Values], Tape]
# Points beside the base and one a symbol.
EXTRA = 3
# Most terms of a dimension's polynomial, and most candidates that are solved at a time.
MOST_TERMS, CHUNK = 4, 20_000


class Parted(DerivationError):
    """Two sizes, differing in ``symbols``, whose tapes differ in structure, or a size that no polynomial gives.

    ``between`` are two sizes at which the structures differ.
    """

    def __init__(self, symbols: frozenset[str], where: str, between: tuple[Values, Values] | None = None) -> None:
        super().__init__(f"{', '.join(sorted(symbols))}: {where}")
        self.symbols, self.between = symbols, between


def parting(one: Tape, other: Tape) -> str | None:
    """Return where the structures of two normalised tapes differ, None where they do not."""
    for i, (a, b) in enumerate(zip(one.allocations, other.allocations, strict=False)):
        if _kind(a) != _kind(b):
            return f"allocation {i}: {a.path} {a.op} or {b.path} {b.op}"
    if len(one.allocations) != len(other.allocations):
        return f"{len(one.allocations)} or {len(other.allocations)} allocations"
    if one.events != other.events:
        i = next((i for i, (a, b) in enumerate(zip(one.events, other.events, strict=False)) if a != b), 0)
        a = one.allocations[abs(one.events[i]) - 1]
        return f"event {i}, near {a.path} {a.op}"
    if [(m.event, m.stage) for m in one.marks] != [(m.event, m.stage) for m in other.marks]:
        return "stages begin elsewhere"
    if one.emptied != other.emptied:
        return "the cache is emptied elsewhere"
    return None


def _kind(a: Allocation) -> tuple[str, str, str, int]:
    return a.path, a.op, a.dtype, len(a.shape)


def points(ranges: Mapping[str, Range], seed: int) -> tuple[list[Values], list[Values]]:
    """Return (the points to go through, those that are held out).

    Held out are both ends of every range, odd multiples of every step, which no larger step would cover, and one more.
    """
    rng = random.Random(seed)
    # sides last: what another symbol decides shows first
    order = sorted(ranges, key=lambda name: (name[0] in "hw", name))
    free = {name: list(ranges[name]) for name in order if not ranges[name].is_one}
    only = {name: values.first for name, values in ranges.items() if values.is_one}
    inner = {name: values[len(values) // 5 : 1 + 3 * len(values) // 5] for name, values in free.items()}
    base = {name: rng.choice(values) for name, values in inner.items()}
    through = [base]
    for name, values in free.items():
        through.append({**base, name: rng.choice([v for v in values if v != base[name]])})
    through += [{name: rng.choice(values) for name, values in free.items()} for _ in range(EXTRA if free else 0)]
    ends = [{name: values[i] for name, values in free.items()} for i in (0, -1)]
    odd = {n: [v for v in values if v // ranges[n].step % 2] for n, values in free.items()}
    held = [*ends, *({n: rng.choice(v or free[n]) for n, v in each.items()} for each in (free, odd))]
    return [only | p for p in through], [only | p for p in held if free]


def fit(run: Run, through: Sequence[Values], held: Iterable[Values]) -> Tape:
    """Return one tape for all sizes; raises Parted where the tapes at two sizes have no polynomial in common."""
    tapes = [run(through[0])]
    for values in through[1:]:
        tapes.append(run(values))
        _compare(tapes[0], tapes[-1], through[0], values)
    solver = _Solver(through)
    allocations = solver.allocations([t.allocations for t in tapes])
    tape = replace(tapes[0], allocations=allocations, convolutions=solver.shapes([t.convolutions for t in tapes]))
    for values in held:
        check(tape, run(values), through[0], values)
    return tape


def check(tape: Tape, traced: Tape, base: Values, values: Values) -> None:
    """Raise Parted unless a tape of polynomials, known to hold at ``base``, is the one traced at ``values``."""
    _compare(tape, traced, base, values)
    for ours, theirs in zip(tape.allocations, traced.allocations, strict=True):
        if evaluate(ours.nbytes, values) != theirs.nbytes:
            raise Parted(free_names(ours.nbytes), f"{ours.path} {ours.op} is no polynomial")


def _compare(one: Tape, other: Tape, at: Values, values: Values) -> None:
    if (where := parting(one, other)) is not None:
        raise Parted(differing(at, values), where, (at, values))


def differing(one: Values, other: Values) -> frozenset[str]:
    """Return the symbols of which two sizes have other values."""
    return frozenset(name for name in one if one[name] != other[name])


class _Solver:
    """Polynomials through the values at some points."""

    def __init__(self, through: Sequence[Values]) -> None:
        self._points = through
        base = through[0]
        changed = [differing(base, values) for values in through]
        # symbol -> a point at which it alone differs from the base
        self._alone = {next(iter(names)): i for i, names in enumerate(changed) if len(names) == 1}
        self._free = [name for name in base if len({values[name] for values in through}) > 1]
        self._known: dict[tuple[int, ...], Size | None] = {}

    def allocations(self, columns: Sequence[Sequence[Allocation]]) -> list[Allocation]:
        """Return each allocation, one a point, with polynomials for its sizes."""
        rows = zip(*columns, strict=True)
        made: dict[tuple[object, ...], tuple[tuple[Size, ...], Size]] = {}
        found = []
        for row in rows:
            shapes, nbytes = tuple(a.shape for a in row), tuple(a.nbytes for a in row)
            key = (shapes, nbytes, row[0].dtype)
            if key not in made:
                made[key] = self._sizes(row)
            shape, size = made[key]
            found.append(replace(row[0], shape=shape, nbytes=size))
        return found

    def shapes(self, columns: Sequence[Mapping[int, Shapes]]) -> dict[int, Shapes]:
        """Return the shapes of convolutions, one a point, as polynomials; those that are none are left out."""
        found: dict[int, Shapes] = {}
        for index in columns[0]:
            each = [
                [self._solve(tuple(map(int, dims))) for dims in zip(*several, strict=True)]
                for several in zip(*(column[index] for column in columns), strict=True)
            ]
            if all(dim is not None for shape in each for dim in shape):
                found[index] = tuple(tuple(shape) for shape in each)
        return found

    def _sizes(self, row: Sequence[Allocation]) -> tuple[tuple[Size, ...], Size]:
        dims = [self._solve(tuple(map(int, column))) for column in zip(*(a.shape for a in row), strict=True)]
        shape = tuple(row[0].shape[i] if dim is None else dim for i, dim in enumerate(dims))
        item = DTYPE_BYTES[row[0].dtype]
        if all(dim is not None for dim in dims) and all(a.nbytes == item * prod(map(int, a.shape)) for a in row):
            return shape, reduce(mul, shape, item)
        nbytes = self._solve(tuple(int(a.nbytes) for a in row))
        if nbytes is None:
            active = self._active(tuple(int(a.nbytes) for a in row))
            raise Parted(frozenset(active), f"{row[0].path} {row[0].op} is no polynomial")
        return shape, nbytes

    def _solve(self, values: tuple[int, ...]) -> Size | None:
        if values not in self._known:
            self._known[values] = values[0] if len(set(values)) == 1 else self._through(values)
        return self._known[values]

    def _active(self, values: tuple[int, ...]) -> list[str]:
        return [n for n in self._free if n not in self._alone or values[self._alone[n]] != values[0]]

    def _through(self, values: tuple[int, ...]) -> Size | None:
        """Return the polynomial of fewest terms, symbols at most squared, through ``values``; None if there is none."""
        active = self._active(values)
        for degree in (1, 2):
            monomials = sorted(product(range(degree + 1), repeat=len(active)), key=sum)
            table = np.array(
                [[prod(p[n] ** e for n, e in zip(active, m, strict=True)) for m in monomials] for p in self._points],
                dtype=float,
            )
            for count in range(1, min(MOST_TERMS, len(self._points) - 1) + 1):
                for chosen, coefficients in _solutions(table, np.array(values, dtype=float), count):
                    terms = [(coefficients[i], monomials[j]) for i, j in enumerate(chosen)]
                    size = sum((c * _monomial(active, m) for c, m in terms), start=RING(0))
                    if all(evaluate(size, p) == value for p, value in zip(self._points, values, strict=True)):
                        return size
        return None


def _monomial(names: Sequence[str], powers: Sequence[int]) -> Size:
    return reduce(mul, (symbol(name) ** power for name, power in zip(names, powers, strict=True)), RING(1))


def _solutions(table: np.ndarray, values: np.ndarray, count: int) -> Iterable[tuple[tuple[int, ...], list[int]]]:
    """Yield (columns, integer coefficients) of every choice of ``count`` columns that gives ``values`` nearly."""
    every = np.array(list(combinations(range(table.shape[1]), count)))
    scale = np.abs(table).max(axis=0)
    scaled, largest = table / scale, max(1.0, np.abs(values).max())
    for start in range(0, len(every), CHUNK):
        chosen = every[start : start + CHUNK]
        columns = np.moveaxis(scaled[:, chosen], 1, 0)  # [choices, points, count]
        found = np.linalg.pinv(columns, rcond=1e-11) @ values
        misses = np.abs((columns @ found[:, :, None])[:, :, 0] - values).max(axis=1)
        for i in np.nonzero(misses < 1e-6 * largest)[0]:
            yield tuple(chosen[i]), [round(c) for c in found[i] / scale[chosen[i]]]
