"""The exact peak as a list of cases: the generic points, and others for sizes at which PyTorch decides otherwise.

A program takes decisions on sizes ("is this dimension larger than 1?"), so that a generic closed form holds
where the generic decisions hold. Every other combination of decisions is visited here. Theorem: a pipeline's
live set is what the pipeline holds plus what the running component allocates, so if every component's exact
peak is the same function under two combinations, so is the pipeline's.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from functools import cached_property, lru_cache

from derivation.equation.derived import Derived
from derivation.equation.moments import Events, Moments
from derivation.equation.numbering import Numbering, at
from derivation.errors import DerivationError
from derivation.peak.dominance import reduce_points
from derivation.peak.liveness import Point, local_maxima
from derivation.tape.evaluate import Span
from derivation.tape.events import Guard
from derivation.tape.program import Recordings, Variant
from derivation.tape.symbols import MAX_LEVELS, Size, evaluate, free_names, nonnegative_from_one, symbol

# A size compared with more thresholds than this counts something without end.
MAX_THRESHOLDS = 3
Threshold = tuple[Size, int]


@dataclass(frozen=True, slots=True)
class Cell:
    """A region of sizes: some symbols are 1, some sizes are above a threshold."""

    ones: frozenset[str] = frozenset()
    above: frozenset[Threshold] = frozenset()

    @property
    def conditions_count(self) -> int:
        """How many symbols and sizes are bounded."""
        return len(self.ones) + len(self.above)

    def contains(self, other: Cell) -> bool:
        """Return whether every size of ``other`` is one of this cell's."""
        return self.ones <= other.ones and all(
            any(_implies((at(size, self.ones), bound), (at(own, self.ones), least)) for size, bound in other.above)
            for own, least in self.above
        )

    def joined(self, other: Cell) -> Cell | None:
        """Return the sizes of both cells, or None where there are none."""
        ones = self.ones | other.ones
        above = {(at(size, ones), bound) for size, bound in self.above | other.above}
        if any(isinstance(size, int) and size <= bound for size, bound in above):
            return None
        above = {threshold for threshold in above if not isinstance(threshold[0], int)}
        implied = {t for t in above for other in above if t != other and _implies(other, t)}
        return Cell(ones, frozenset(above - implied))

    def flipped(self, guard: Guard) -> Cell | None:
        """Return the part of this cell where ``guard`` is answered the other way, or None if there is none."""
        if not guard.answer:
            return self.joined(Cell(above=frozenset([(guard.size, guard.bound)])))
        if guard.bound == 1:
            return self.joined(Cell(ones=_with_deeper(free_names(guard.size))))
        return None

    def values(self, generic: Mapping[str, int]) -> dict[str, int]:
        """Return sizes in this cell: the ``generic`` ones, those that it names as small as its thresholds let them be.

        Of thresholds of one shape the least passed alone is passed, so that each has a region of its own.
        """
        values = {name: 1 if name in self.ones else size for name, size in generic.items()}
        for threshold in self.above:
            values = _just_above(threshold, values)
        return values

    def conditions(self) -> tuple[Guard, ...]:
        """Return the fewest decisions that put a size into this cell."""
        least = [n for n in sorted(self.ones) if n[0] not in "hw" or f"{n[0]}{int(n[1:]) - 1}" not in self.ones]
        ones = [Guard(symbol(name), 1, answer=False) for name in least]
        above = [Guard(size, bound, answer=True) for size, bound in sorted(self.above, key=str)]
        return (*ones, *above)


@dataclass(frozen=True, slots=True)
class Case:
    """The points whose Max is the peak beyond the weights, where all ``conditions`` hold."""

    conditions: tuple[Guard, ...]
    points: tuple[Point, ...]


def _just_above(threshold: Threshold, values: Mapping[str, int]) -> dict[str, int]:
    """Return ``values`` with sides, else whatever the size depends on, raised until it is above its bound."""
    size, bound = threshold
    names = free_names(size)
    raised = {name for name in names if name[0] in "hwT"} or names

    def at_least(n: int) -> dict[str, int]:
        return {**values, **{name: max(values[name], n) for name in raised}}

    return at_least(bisect_left(range(bound + 1), True, key=lambda n: evaluate(size, at_least(n)) > bound))


def _implies(threshold: Threshold, other: Threshold) -> bool:
    """Return whether a size above the one threshold is proven to be above the other."""
    return threshold[1] >= other[1] and nonnegative_from_one(other[0] - threshold[0])


def _with_deeper(names: Iterable[str]) -> frozenset[str]:
    """Add the deeper levels: a side of 1 is 1 at every level below."""
    deeper = {f"{n[0]}{k}" for n in names if n[0] in "hw" for k in range(int(n[1:]), MAX_LEVELS)}
    return frozenset(names) | deeper


def generic_sizes(derived: Derived) -> dict[str, int]:
    """Return the least sizes at which every symbol that is not fixed is above 1."""
    return dict.fromkeys(derived.symbols, 2) | derived.fixed


def regimes(program: Recordings, derived: Derived) -> list[tuple[Cell, Variant]]:
    """Return a recorded variant for every combination of decisions that ``program`` can take.

    Sizes at which a variant does not hold violate one of its guards, so they lie in a cell that is visited.
    Raises DerivationError where the combinations have no end.
    """
    generic = generic_sizes(derived)
    queue, seen, found = [Cell()], {Cell()}, dict[int, tuple[Cell, Variant]]()
    while queue:
        cell = queue.pop(0)
        if derived.subject.sides.bounded and not derived.accepts(cell.values(generic)):
            continue
        variant = program.regime(cell.values(generic))
        found.setdefault(id(variant), (cell, variant))
        flips = {cell.flipped(guard): None for guard in variant.tape.guards.values()}
        fresh = [flip for flip in flips if flip is not None and flip not in seen]
        for flip in fresh:
            _check_finite(flip)
        seen.update(fresh)
        queue += fresh
    return list(found.values())


def _check_finite(cell: Cell) -> None:
    size, count = Counter(size for size, _ in cell.above).most_common(1)[0] if cell.above else (1, 0)
    if count > MAX_THRESHOLDS:
        raise DerivationError(f"no closed form: the pipeline takes ever more decisions on {size}")


@dataclass(frozen=True, eq=False)
class Known:
    """One variant, and its live sets that dominate them all, or those of each stage where stages are ``apart``."""

    variant: Variant
    apart: bool = False

    @cached_property
    def kept(self) -> tuple[Point, ...]:
        """Each stage of the variant reduced, then the survivors unless stages are ``apart``."""
        survivors = _survivors(self.variant)
        return survivors if self.apart else reduce_points(survivors).kept

    def same_peak(self, cell: Cell, variant: Variant) -> bool:
        """Return True if the Max over the points of ``variant`` is proven equal to this Max in ``cell``.

        Stages that pass the same live sets in both are left out at first: mostly the others suffice.
        """
        own, other = _occurring(self.variant, cell), _occurring(variant, cell)
        stages = own.keys() | other.keys()
        touched = {name for name in stages if own.get(name) != other.get(name)}
        if not touched:
            return True
        numbering = Numbering(cell.ones, (*self.variant.evaluator.sizes, *variant.evaluator.sizes))
        if self._same(cell, variant, numbering, touched):
            return True
        return touched != stages and self._same(cell, variant, numbering, stages)

    def _same(self, cell: Cell, variant: Variant, numbering: Numbering, stages: Set[str]) -> bool:
        """Return True if the live sets of some ``stages`` are proven to leave the Max as it is."""
        before, after = (_live_sets(v, cell, numbering, self.apart, stages) for v in (self.variant, variant))
        if before.keys() == after.keys():
            return True
        occurring = [p for p in self.kept if _occurs(p.max_length, cell)]
        kept = {(p.stage if self.apart else "", numbering.number(p.terms)): p for p in occurring}
        new = {key: event for key, event in after.items() if key not in before}
        gone = {key: p.event for key, p in kept.items() if key not in after and p.stage in stages}
        if not new and not gone:
            return True
        place = (numbering, self.variant.tape.tile or variant.tape.tile)
        uppers = Moments.of(self.variant, {key: p.event for key, p in kept.items()}, *place)
        if not uppers.cover(Moments.of(variant, new, *place)):
            return False
        return not gone or Moments.of(variant, after, *place).cover(Moments.of(self.variant, gone, *place))


@lru_cache(maxsize=64)
def _survivors(variant: Variant) -> tuple[Point, ...]:
    points = local_maxima(variant.tape, variant.evaluator)
    stages = {name: [p for p in points if p.stage == name] for name in dict.fromkeys(p.stage for p in points)}
    return tuple(p for stage in stages.values() for p in reduce_points(stage).kept)


def _live_sets(variant: Variant, cell: Cell, numbering: Numbering, apart: bool, stages: Set[str]) -> Events:
    """Return each distinct live set of ``stages`` where bytes stop growing that occurs in a cell.

    Those of each stage where stages are ``apart``.
    """
    found: dict[tuple[str, bytes], int] = {}
    occurring = {name: spans for name, spans in _occurring(variant, cell).items() if name in stages}
    for stage, span in ((name, span) for name, spans in occurring.items() for span in spans):
        sets, name = span.live_sets, stage if apart else ""
        for place, number in zip(sets.places, numbering.numbers(sets), strict=True):
            found.setdefault((name, number), span.start + place - 1)
    return found


def _occurring(variant: Variant, cell: Cell) -> dict[str, tuple[Span, ...]]:
    """Return the events of each stage that occurs in a cell."""
    limits, spans = variant.tape.longest, variant.evaluator.spans
    names = dict.fromkeys(span.stage for span in spans if _occurs(limits.get(span.stage), cell))
    return {name: tuple(span for span in spans if span.stage == name) for name in names}


def _occurs(max_length: int | None, cell: Cell) -> bool:
    length = symbol("L")
    return max_length is None or all(size != length or bound < max_length for size, bound in cell.above)


def deviations(generic: Known, variants: Iterable[tuple[Cell, Variant]]) -> list[tuple[Cell, Known]]:
    """Return the cells, in order, in which the peak is another function than in the nearest cell around them."""
    known = [(Cell(), generic)]
    for cell, variant in variants:
        _, nearest = max((k for k in known if k[0].contains(cell)), key=lambda k: k[0].conditions_count)
        if not nearest.same_peak(cell, variant):
            known.append((cell, Known(variant, generic.apart)))
    return known[1:]


def exact_cases(derived: Derived, guidance: bool, apart: bool = False) -> tuple[Case, ...]:
    """Return the cases of the exact peak, most special first: the first whose conditions hold applies.

    Where stages are ``apart``, a case holds the points of each stage's own Max.
    """
    generic = Known(derived.program(guidance).generic, apart)
    special = deviations(generic, _variants(derived, guidance))
    listed = [(Cell(), generic), *special]
    ordered = sorted(
        listed, key=lambda found: (-found[0].conditions_count, -sum(cell.contains(found[0]) for cell, _ in listed))
    )
    cases = [Case(cell.conditions(), known.kept) for cell, known in ordered]
    found: dict[frozenset[Guard], Case] = {}
    for split in (split for case in cases for split in _by_length(case)):
        found.setdefault(frozenset(split.conditions), split)
    return tuple(found.values())


@lru_cache(maxsize=2)
def _variants(derived: Derived, guidance: bool) -> list[tuple[Cell, Variant]]:
    """Return the pipeline's variants in the cells where its peak may be another function."""
    cells = _component_cells(derived, guidance) + _own_cells(derived, guidance)
    program, sizes = derived.program(guidance), generic_sizes(derived)
    return [(cell, program.regime(cell.values(sizes))) for cell in _intersections(cells)]


def _component_cells(derived: Derived, guidance: bool) -> list[Cell]:
    """Return the cells in which some component's peak is another function."""
    calls = (derived.component(name, guidance) for name in derived.subject.calls)
    return [cell for call in calls for cell in _cells_of(call, derived)]


@lru_cache(maxsize=16)
def _cells_of(call: Recordings, derived: Derived) -> tuple[Cell, ...]:
    (_, generic), *others = regimes(call, derived)
    return tuple(cell for cell, _ in deviations(Known(generic), others))


def _own_cells(derived: Derived, guidance: bool) -> list[Cell]:
    """Return the cells that decisions which no component takes, only the pipeline, lead to."""
    calls = (derived.component(name, guidance) for name in derived.subject.calls)
    inside = {key for call in calls for key in call.generic.tape.guards}
    guards = derived.program(guidance).generic.tape.guards
    flips = (Cell().flipped(guard) for key, guard in guards.items() if key not in inside)
    return [cell for cell in flips if cell is not None]


def _intersections(cells: Iterable[Cell]) -> list[Cell]:
    """Return the cells and all their non-empty intersections, the largest cells first."""
    found: dict[Cell, None] = {}
    for cell in cells:
        joined = [both for other in found if (both := cell.joined(other)) is not None]
        found |= dict.fromkeys([cell, *joined])
    return sorted(found, key=lambda cell: cell.conditions_count)


def _by_length(case: Case) -> tuple[Case, ...]:
    """Split off the prompt lengths at which some points no longer occur."""
    limits = {p.max_length for p in case.points if p.max_length is not None}
    longer = [
        Case(
            (*case.conditions, Guard(symbol("L"), limit, answer=True)),
            tuple(p for p in case.points if p.max_length is None or p.max_length > limit),
        )
        for limit in sorted(limits, reverse=True)
    ]
    return (*longer, case)
