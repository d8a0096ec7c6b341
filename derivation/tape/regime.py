"""One tape of a recorded pipeline with the sizes that it covers, as an object and as JSON values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from derivation.options import Options
from derivation.tape.events import Allocation, Category, Guard, Mark
from derivation.tape.grid import Range
from derivation.tape.loop import Body, Loop
from derivation.tape.symbols import INDEX, RING, SYMBOLS, Size, as_terms, free_names, symbol
from derivation.tape.tape import Tape


@dataclass(frozen=True, slots=True)
class Regime:
    """One tape and the sizes that it covers: those at which it was interpolated, and checked, lie at the ranges' ends.

    ``assumed`` are source lines that read values which nobody knows; ``loop`` is the pass of the tape that is repeated
    for a number of frames, and ``changes`` are what is done to the tape where they are known.
    """

    guidance: bool
    ranges: Mapping[str, Range]
    tape: Tape
    fitted: tuple[Mapping[str, int], ...] = ()
    checked: tuple[Mapping[str, int], ...] = ()
    assumed: tuple[str, ...] = ()
    loop: Loop | None = None
    changes: tuple[Callable[[Tape], Tape], ...] = ()

    def covers(self, values: Mapping[str, int]) -> bool:
        """Return whether ``values`` lie in the ranges."""
        return all(values[name] in values_of for name, values_of in self.ranges.items())

    @property
    def fixed(self) -> dict[str, int]:
        """The symbols that have one value, above 1."""
        return {name: r.first for name, r in self.ranges.items() if r.is_one and r.first > 1}

    def changed(self, change: Callable[[Tape], Tape]) -> Regime:
        """Return the regime with its tape changed, where it has a loop once that is unrolled."""
        if self.loop is None:
            return replace(self, tape=change(self.tape))
        return replace(self, changes=(*self.changes, change))

    def decided(self, lengths: Iterable[int] = ()) -> Regime:
        """Return the regime with its tape's decisions: which symbols are 1, have one value, are above 1 or ``lengths``.

        ``lengths`` are the prompt lengths up to which, and above which, there are other regimes.
        """
        ones = frozenset(name for name, r in self.ranges.items() if r.is_one and r.first == 1)
        above = (symbol(name) for name, r in self.ranges.items() if not r.is_one and name == "B")
        guards = {(size, 1): Guard(size, 1, True) for size in above}
        guards |= {(size, n): Guard(size, n, self.ranges["L"].first > n) for size, n in product([symbol("L")], lengths)}
        return replace(self, tape=replace(self.tape, ones=ones, fixed=self.fixed, guards=guards))


def specialised(regime: Regime, fixed: Mapping[str, int], lengths: Iterable[int] = ()) -> Regime:
    """Return a decided regime with some symbols as numbers, its loop unrolled: of those F is one."""
    wanted = {n: v for n, v in fixed.items() if not regime.ranges.get(n, Range(0, 1)).is_one}
    decided = regime.decided(lengths)
    if not wanted:
        return decided
    known: dict[tuple[Size, int], Size] = {}

    def put(size: Size, frames: int) -> Size:
        if isinstance(size, int):
            return size
        if (size, frames) not in known:
            found = size.compose([(symbol(n), frames if n == "F" else value) for n, value in wanted.items()])
            known[size, frames] = found if free_names(found) else int(found.get(RING.zero_monom, 0))
        return known[size, frames]

    frames = wanted.get("F", 0)
    tape = (regime.loop or Loop(frames, 1, ())).unrolled(decided.tape, frames, put)
    tape.guards = {key: guard for key, guard in tape.guards.items() if not free_names(guard.size) & wanted.keys()}
    for change in regime.changes:
        tape = change(tape)
    tape = replace(tape, fixed={**decided.tape.fixed, **wanted})
    return replace(decided, tape=tape, loop=None, changes=())


def regime_document(regime: Regime) -> dict[str, Any]:
    """Return a regime as JSON values: its sizes and its kinds of allocations stand in tables."""
    sizes: dict[Size, int] = {}
    allocations: dict[tuple[Any, ...], int] = {}

    def number(size: Size) -> int:
        return sizes.setdefault(size, len(sizes))

    placed = [
        allocations.setdefault(
            (a.path, a.op, tuple(map(number, a.shape)), a.dtype, number(a.nbytes), a.category.value, a.loaded),
            len(allocations),
        )
        for a in regime.tape.allocations
    ]
    document: dict[str, Any] = {
        "guidance": regime.guidance,
        "ranges": {name: [r.first, r.last, r.step] for name, r in regime.ranges.items()},
        "kinds": list(map(list, allocations)),
        "allocations": placed,
        "events": regime.tape.events,
        "marks": [[mark.event, mark.stage] for mark in regime.tape.marks],
        "iterations": regime.tape.iterations,
        "emptied": regime.tape.emptied,
        "convolutions": [
            [i, [list(map(number, shape)) for shape in shapes]] for i, shapes in regime.tape.convolutions.items()
        ],
        "fitted": [dict(values) for values in regime.fitted],
        "checked": [dict(values) for values in regime.checked],
        "assumed": list(regime.assumed),
    }
    if (loop := regime.loop) is not None:
        bodies = [[b.before, b.births, b.start, b.events, sorted(b.carried), sorted(b.kept)] for b in loop.bodies]
        document["loop"] = [loop.least, loop.period, bodies]
    return {**document, "sizes": [as_terms(size) for size in sizes]}


def regime_of(document: Mapping[str, Any], options: Options) -> Regime:
    """Return the regime of ``regime_document``."""
    sizes = [_size(terms) for terms in document["sizes"]]
    kinds = [
        Allocation(p, op, tuple(sizes[i] for i in shape), dtype, sizes[n], Category(category), loaded=loaded)
        for p, op, shape, dtype, n, category, loaded in document["kinds"]
    ]
    tape = Tape(
        options,
        allocations=[kinds[i] for i in document["allocations"]],
        events=document["events"],
        marks=[Mark(event, stage) for event, stage in document["marks"]],
        iterations=document["iterations"],
        emptied=document.get("emptied", []),
        convolutions={
            index: tuple(tuple(sizes[i] for i in shape) for shape in shapes)
            for index, shapes in document["convolutions"]
        },
    )
    return Regime(
        document["guidance"],
        {name: Range(*values) for name, values in document["ranges"].items()},
        tape,
        tuple(document["fitted"]),
        tuple(document["checked"]),
        tuple(document["assumed"]),
        _loop(document.get("loop")),
    ).decided()


def _loop(numbers: Any) -> Loop | None:
    if numbers is None:
        return None
    least, period, bodies = numbers
    return Loop(least, period, tuple(Body(*body[:4], *map(frozenset, body[4:])) for body in bodies))


def _size(terms: Any) -> Size:
    if isinstance(terms, int):
        return terms
    found: dict[tuple[int, ...], int] = {}
    for coefficient, *names in terms:
        powers = [0] * len(SYMBOLS)
        for name in names:
            powers[INDEX[name]] += 1
        found[tuple(powers)] = coefficient
    return RING(found)
