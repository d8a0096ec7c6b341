"""A tape at integer sizes as the allocator sees it: requests in bytes, one an allocation, loops with roles."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate

from derivation.allocator.replay import Loop, Replay
from derivation.errors import DerivationError
from derivation.tape.events import Allocation, Mark
from derivation.tape.symbols import Size, evaluate
from derivation.tape.tape import Tape

# A convolution whose workspace does not fit runs cuDNN's next plan, at last one without (Conv_v8.cpp: try_plans).
WORKSPACE = "convolution workspace"


def replay(tape: Tape, values: Mapping[str, int], weights: Mapping[str, int] | None = None) -> Replay:
    """Return ``tape`` at ``values`` with ``count`` alike storages written out one by one.

    ``weights`` maps parameters that existed before the run to their handles; one that the run drops is replayed
    as staying where it has none.
    """
    weights = weights or {}
    known: dict[Size, int] = {}

    def at(size: Size) -> int:
        if size not in known:
            known[size] = evaluate(size, values)
        return known[size]

    counts = [at(a.count) for a in tape.allocations]
    first = [0, *accumulate(counts)]
    nbytes = [at(a.nbytes) for a in tape.allocations]
    sizes = [n for n, count in zip(nbytes, counts, strict=True) for n in [n] * count]
    loaded = {first[i]: weights[a.path] for i, a in enumerate(tape.allocations) if a.loaded and a.path in weights}
    staying = {i for i, a in enumerate(tape.allocations) if a.loaded and a.path not in weights}
    is_plain = not staying and not tape.emptied and set(counts) <= {1}
    events, position = (tape.events, range(len(tape.events) + 1)) if is_plain else _written_out(tape, first, staying)
    alive = alive_at(events, {position[at] for start, end, _ in tape.loops for at in (start, end)})
    loops = []
    for begins, ends, times in tape.loops:
        start, end = position[begins], position[ends]
        loops.append(Loop(start, end, times, pair_roles(sizes.__getitem__, alive[start], alive[end])))
    optional = {t for i, a in enumerate(tape.allocations) if a.op == WORKSPACE for t in range(first[i], first[i + 1])}
    return Replay(events, sizes, loops, loaded, frozenset(optional))


def one_by_one(tape: Tape, values: Mapping[str, int]) -> Iterator[Allocation]:
    """Yield the allocation of each tensor of ``replay``."""
    return (a for a in tape.allocations for _ in range(evaluate(a.count, values)))


def single(tape: Tape, sizes: Sequence[Mapping[str, int]]) -> Tape:
    """Return ``tape`` with alike storages one by one; raises DerivationError where their counts differ by size."""
    counts = {count: {evaluate(count, values) for values in sizes} for count in {a.count for a in tape.allocations}}
    if any(len(found) > 1 for found in counts.values()):
        raise DerivationError("no closed form of reserved bytes: how many storages there are depends on the size")
    if counts.keys() == {1}:
        return tape
    numbers = [min(counts[a.count]) for a in tape.allocations]
    events, position = _written_out(tape, [0, *accumulate(numbers)], ())
    return replace(
        tape,
        allocations=[replace(a, count=1) for a, n in zip(tape.allocations, numbers, strict=True) for _ in range(n)],
        events=events,
        loops=[(position[start], position[end], times) for start, end, times in tape.loops],
        iterations=[position[event] for event in tape.iterations],
        marks=[Mark(position[mark.event], mark.stage) for mark in tape.marks],
    )


def _written_out(tape: Tape, first: Sequence[int], staying: Container[int]) -> tuple[list[int], list[int]]:
    """Return the events of storages one by one, and how many precede each event of the tape."""
    emptied = Counter(tape.emptied)
    events = [0] * emptied[0]
    position = [len(events)]
    for done, event in enumerate(tape.events, 1):
        index = abs(event) - 1
        sign = 1 if event > 0 else -1
        if index not in staying:
            events += [sign * (tensor + 1) for tensor in range(first[index], first[index + 1])]
        events += [0] * emptied[done]
        position.append(len(events))
    return events, position


def pair_roles(size_of: Callable[[int], int], before: Collection[int], after: Collection[int]) -> dict[int, int]:
    """Pair tensors alive after an iteration with those before it: same size, same order of birth; none for the same."""
    if before == after:
        return {}

    def by_size(alive: Iterable[int]) -> list[int]:
        return sorted(alive, key=lambda tensor: (size_of(tensor), tensor))

    return dict(zip(by_size(after), by_size(before), strict=True))


def alive_at(events: Sequence[int], places: Container[int]) -> dict[int, frozenset[int]]:
    """Return the tensors that are alive before the events at ``places``, in one pass."""
    alive: set[int] = set()
    found = {0: frozenset[int]()}
    for place, event in enumerate(events, 1):
        (alive.add if event > 0 else alive.discard)(abs(event) - 1)
        if place in places:
            found[place] = frozenset(alive)
    return found
