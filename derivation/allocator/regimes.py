"""Which segments of the large pool a tape opens at each of many sizes: a few symbolic replays stand for all.

Lemma 1: free neighbours merge at once, so a pool's state is its segments and where their live blocks are, whatever was
decided in between. Where few tensors are alive, sizes at which decisions differed are in one state again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np

from derivation.allocator.config import AllocatorConfig
from derivation.allocator.opened import Requests
from derivation.allocator.report import SMALL_BYTES
from derivation.allocator.symbolic import Atom, Comparison, GridAllocator, Vector
from derivation.errors import DerivationError
from derivation.tape.symbols import Size, free_names

# What segments were opened for, in order, and where live tensors are: each one's number, a segment's rank, an offset.
State = tuple[tuple[Size, ...], tuple[tuple[int, int, int], ...]]


Content = tuple[tuple[int, Size], ...]


@dataclass(frozen=True, slots=True)
class Chunk:
    """The tape's events [first, last).

    ``events`` are those of the large pool at some size, ``content`` is the same for chunks that ask the same in the
    same order; a chunk runs ``times`` times in all.
    """

    first: int
    last: int
    events: tuple[int, ...]
    content: Content
    times: int

    @property
    def is_closed(self) -> bool:
        """Whether it frees what it allocates, and nothing else."""
        return {e for e in self.events if e > 0} == {-e for e in self.events if e < 0}


@dataclass(eq=False)
class Group:
    """Sizes at which the pool is in one state: ``played`` led to it, ``idle`` keep it.

    ``origins`` holds the tensor that each segment was opened for, -1 for a weight; ``held`` the decisions taken.
    """

    state: State
    where: Vector
    played: tuple[Chunk, ...] = ()
    origins: tuple[int, ...] = ()
    idle: frozenset[Content] = frozenset()
    held: frozenset[Comparison] = frozenset()


class Survey:
    """The large pool of one tape at all sizes of a grid, for a device that has room.

    ``runs`` counts the replays that the large pool took; sizes that those of a chunk do not reach with ``most`` events
    are in no group.
    """

    def __init__(self, requests: Requests, most: int, config: AllocatorConfig | None = None) -> None:
        self.tape, self.points = requests.tape, requests.points
        self.weights, self.dropped = requests.weights, requests.dropped
        self.runs, self.most, self._left, self.config = 0, most, most, config
        self.bytes = [requests.bytes[kind] for kind in requests.kinds]
        self.possible = [bool((b > SMALL_BYTES).any()) for b in self.bytes]

    @cached_property
    def groups(self) -> list[Group]:
        """The groups of sizes after the last event; raises DerivationError where the tape is not covered."""
        groups = [Group(((), ()), np.ones(len(self.points), dtype=bool))]
        for chunk in list(self.chunks()):  # which are known to be covered before any is played
            self._left = self.most
            for _ in range(chunk.times):
                if any(chunk.content not in group.idle for group in groups):
                    groups = self._after(groups, chunk)
        return groups

    def chunks(self) -> Iterator[Chunk]:
        """Yield the events, cut where stages, loops and passes of the denoising loop begin.

        Raises DerivationError where a loop's iterations hand large tensors on.
        """
        tape = self.tape
        inside = {end: times for _, end, times in tape.loops}
        for first, last in pairwise(tape.edges):
            chunk = self._chunk(first, last, inside.get(last, 1))
            if chunk.times > 1 and not chunk.is_closed:
                raise DerivationError("no closed form of reserved bytes: iterations hand large tensors on")
            yield chunk

    def _chunk(self, first: int, last: int, times: int) -> Chunk:
        events = tuple(event for event in self.tape.events[first:last] if self.possible[abs(event) - 1])
        lowest = min((abs(event) for event in events), default=0)
        sizes = (self.tape.allocations[abs(event) - 1].nbytes for event in events)
        moved = (event - lowest if event > 0 else event + lowest for event in events)
        return Chunk(first, last, events, tuple(zip(moved, sizes, strict=True)), times)

    def _after(self, groups: Sequence[Group], chunk: Chunk) -> list[Group]:
        found: dict[State, Group] = {}
        for after in (after for group in groups for after in self._split(group, chunk)):
            same = found.get(after.state)
            if same is not None:
                where, held = same.where | after.where, same.held | after.held
                after = replace(same, where=where, held=held, idle=same.idle & after.idle)
            found[after.state] = after
        return list(found.values())

    def _split(self, group: Group, chunk: Chunk) -> Iterator[Group]:
        """Yield the group after a chunk, taken apart by the states that it ends in."""
        idle = group.idle | {chunk.content}
        proven = group.where if chunk.content in group.idle else self._reuses(group, chunk)
        if proven.any():
            yield replace(group, where=proven, idle=idle)
        todo = group.where & ~proven
        while todo.any() and self._left > 0:
            allocator, state = self._replay(group, chunk, int(np.argmax(todo)))
            agree = todo & allocator.agree
            held = group.held | allocator.held
            if state == group.state:
                yield replace(group, where=agree, idle=idle, held=held)
            else:
                origins = tuple(asking for _, asking in allocator.opened)
                yield Group(state, agree, (*group.played, chunk), origins, frozenset(), held)
            todo &= ~agree

    def _reuses(self, group: Group, chunk: Chunk) -> Vector:
        """Return the sizes of a group at which a chunk is proven to open no segment.

        Of the segments that are free when it begins, the j smallest are S_1 <= ... <= S_j, equal ones by address.
        Lemma 2: if K live blocks of P bytes in all leave no gap of r bytes in n > 0 of them, their sum is below
        P + (K + n) r, as k blocks leave at most k + 1 gaps; so r fits into one of those j where the sum of
        max(S_i - r, 0) is above 0 and at least P + K r. A block is at most 1 MiB larger than its request.
        Lemma 3: best fit takes no block above S_j where one of those j has room; so where each live tensor had room
        in fewer than j, S_j is free, and has room for all that is not larger.
        """
        live = np.zeros(len(self.points), dtype=np.int64)
        if not chunk.is_closed:
            return live > 0
        free, count, proven = self._free_segments(group), live.copy(), group.where.copy()
        beyond = np.zeros((len(free), len(self.points)), dtype=np.int64)  # live tensors that may be in S_j or above
        reach: dict[int, Vector] = {}
        for event in chunk.events:
            index, step = abs(event) - 1, 1 if event > 0 else -1
            size = self.bytes[index]
            is_large = size > SMALL_BYTES
            if event > 0:
                room = np.cumsum(np.maximum(free - size, 0), axis=0)
                fits = ((room > 0) & (room >= live + count * size)) | ((beyond == 0) & (free >= size))
                proven &= ~is_large | fits.any(axis=0)
                if not proven.any():
                    break
                reach[index] = is_large & (np.arange(len(free))[:, None] <= np.argmax(fits, axis=0))
            beyond += step * reach[index]
            count += step * is_large
            live += step * is_large * (size + SMALL_BYTES)
        return proven

    def _free_segments(self, group: Group) -> Vector:
        """Return the bytes of segments opened for sizes that vary, but of those that hold a live tensor, ascending."""
        opened, fixed = group.state
        hosts = {rank for _, rank, _ in fixed}
        free = [n for rank, n in enumerate(opened) if free_names(n) and rank not in hosts]
        found = [self.points.atom(Atom(n, is_segment=True)) for n in free]
        return np.sort(np.array(found, dtype=np.int64).reshape(-1, len(self.points)), axis=0)

    def reach(self, tensor: int, reference: int) -> int:
        """Return the number of the bytes before a tensor and its own, when it is first allocated, at one size."""
        allocator, handles = self._load(reference)
        for event in self.tape.events[: self.tape.events.index(tensor + 1) + 1]:
            self._play(allocator, event, handles)
        [(_, _, before)] = allocator.places({tensor: handles[tensor]})
        return self.points.total(
            before, self.points.number_of(allocator.request(self.tape.allocations[tensor].nbytes)), 1
        )

    def _replay(self, group: Group, chunk: Chunk, reference: int) -> tuple[GridAllocator, State]:
        self.runs += 1
        self._left -= sum(len(played.events) for played in (*group.played, chunk))
        allocator, handles = self._load(reference)
        for event in (event for played in group.played for event in played.events):
            self._play(allocator, event, handles)
        allocator.guarding = True
        for event in chunk.events:
            self._play(allocator, event, handles)
        return allocator, self._state(allocator, handles)

    def _play(self, allocator: GridAllocator, event: int, handles: dict[int, int]) -> None:
        """Play one event, of the large pool at some sizes, if it is at the reference."""
        index = abs(event) - 1
        is_large = self.bytes[index] > SMALL_BYTES
        if allocator.guarding:
            allocator.agree &= is_large == is_large[allocator.reference]
        if not is_large[allocator.reference]:
            return
        if event > 0:
            allocator.asking = index
            handles[index] = allocator.malloc(allocator.request(self.tape.allocations[index].nbytes))
        else:
            allocator.free(handles.pop(index))

    def _load(self, reference: int) -> tuple[GridAllocator, dict[int, int]]:
        """Return an allocator with the weights of the large pool, and the handles of those that the run drops."""
        allocator = GridAllocator(self.points, reference, self.config)
        large = [(path, nbytes) for path, nbytes in self.weights.items() if nbytes > SMALL_BYTES]
        loaded = {path: allocator.malloc(allocator.request(nbytes)) for path, nbytes in large}
        return allocator, {self.dropped[path]: handle for path, handle in loaded.items() if path in self.dropped}

    def _state(self, allocator: GridAllocator, handles: Mapping[int, int]) -> State:
        return tuple(nbytes for nbytes, _ in allocator.opened), allocator.places(handles)
