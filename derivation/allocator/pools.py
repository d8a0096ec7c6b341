"""One pool of the caching allocator on a card that has room, with segments or expandable ones, fast for many sizes.

Lemma 1: free neighbours merge at once, so what a pool does follows from its free blocks. Where two chunks of events
ask the same of the same free blocks, and free tensors at the same places, they end alike and open the same segments.
Lemma 2: events that free what they allocate, and nothing else, leave the free blocks as they were unless a segment is
opened. If K of their blocks, of P bytes in all, leave no gap of r bytes in the n free blocks of f_1, ..., f_n >= r
bytes, the sum of f_i is below P + (K + n) r; so none is opened for r where the sum of f_i - r is at least P + K r,
and n > 0. A block is at most ``Pool.most_rest`` larger than its request.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from operator import xor

from derivation.allocator.report import (
    LARGE_PAGE_BYTES,
    MIN_BLOCK_BYTES,
    SMALL_BYTES,
    SMALL_SEGMENT_BYTES,
    segment_size,
)

# A free block, or the place of a tensor, is one integer: its bytes, then its address.
SHIFT = 48
ADDRESS = (1 << SHIFT) - 1
# Events that lemma 2 is tried for at once, then those of parts where it does not hold.
MOST_CLOSED = (4096, 256, 32)


class Pool:
    """The small or the large pool: ``free`` blocks in order, the ``places`` of tensors, segments ``opened``.

    ``opened`` holds (tensor, bytes) in order, ``top`` is the address of the next segment.
    """

    keeps_tail = False

    def __init__(self, is_small: bool) -> None:
        self.is_small, self.most_rest = is_small, 0 if is_small else SMALL_BYTES
        self.free: list[int] = []
        self.places: dict[int, int] = {}
        self.opened: list[tuple[int, int]] = []
        self.top = 0
        self._starts: dict[int, int] = {}  # bytes of the free block that starts at an address
        self._ends: dict[int, int] = {}  # bytes of the free block that ends at an address

    def copy(self) -> Pool:
        """Return a pool in the same state."""
        other = type(self)(self.is_small)
        other.places, other.opened, other.top = dict(self.places), list(self.opened), self.top
        other.become(self.free)
        return other

    def become(self, free: Sequence[int]) -> None:
        """Take the free blocks given."""
        self.free = list(free)
        self._starts = {block & ADDRESS: block >> SHIFT for block in free}
        self._ends = {(block & ADDRESS) + (block >> SHIFT): block >> SHIFT for block in free}

    def has_room(self, needed: int, largest: int) -> bool:
        """Return whether requests with these needs open no segment."""
        return has_room((block >> SHIFT for block in reversed(self.free)), needed, largest)

    def play(self, events: Sequence[int], sizes: Sequence[int]) -> None:
        """Allocate tensor i at event i + 1, free it at -(i + 1); ``sizes`` are their bytes, rounded."""
        free, places, starts, ends, most_rest = self.free, self.places, self._starts, self._ends, self.most_rest
        keeps_tail = self.keeps_tail
        for event in events:
            if event > 0:
                size = sizes[event - 1]
                at = bisect_left(free, size << SHIFT)
                if at == len(free):
                    self._open(event - 1, size)
                    at = -1
                elif keeps_tail and at + 1 < len(free) and (free[at] & ADDRESS) + (free[at] >> SHIFT) == self.top:
                    at += 1
                block = free.pop(at)
                found, address = block >> SHIFT, block & ADDRESS
                del starts[address]
                if (rest := found - size) > most_rest:
                    insort(free, rest << SHIFT | address + size)
                    starts[address + size] = ends[address + found] = rest
                    block = size << SHIFT | address
                else:
                    del ends[address + found]
                places[event - 1] = block
                continue
            block = places.pop(-event - 1)
            found, address = block >> SHIFT, block & ADDRESS
            if behind := starts.pop(address + found, 0):
                del free[bisect_left(free, behind << SHIFT | address + found)]
                found += behind
            if before := ends.pop(address, 0):
                address -= before
                del free[bisect_left(free, before << SHIFT | address)]
                found += before
            starts[address] = ends[address + found] = found
            insort(free, found << SHIFT | address)

    def _open(self, tensor: int, size: int) -> None:
        nbytes = segment_size(size)
        self.opened.append((tensor, nbytes))
        self._starts[self.top] = self._ends[self.top + nbytes] = nbytes
        self.free.append(nbytes << SHIFT | self.top)  # no other was large enough
        self.top += nbytes + MIN_BLOCK_BYTES  # segments do not touch


class Pages(Pool):
    """A pool with expandable_segments:True: one range of addresses, mapped from its beginning up to ``top``.

    ``opened`` holds the bytes that are mapped. Of the blocks that a request fits into the last one is taken where
    there is no other: it can grow (get_free_block of CUDACachingAllocator.cpp).
    """

    keeps_tail = True

    def __init__(self, is_small: bool) -> None:
        super().__init__(is_small)
        self.most_rest, self.page = 0, SMALL_SEGMENT_BYTES if is_small else LARGE_PAGE_BYTES

    def _open(self, tensor: int, size: int) -> None:
        tail = self._ends.pop(self.top, 0)
        if tail:
            del self._starts[self.top - tail]
            del self.free[bisect_left(self.free, tail << SHIFT | self.top - tail)]
        mapped = -(-(size - tail) // self.page) * self.page
        self.opened.append((tensor, mapped))
        address, self.top = self.top - tail, self.top + mapped
        self._starts[address] = self._ends[self.top] = tail + mapped
        self.free.append(tail + mapped << SHIFT | address)  # no other was large enough


def has_room(free: Iterable[int], needed: int, largest: int) -> bool:
    """Return whether free blocks, the largest first, have ``needed`` bytes beyond ``largest`` in each: lemma 2."""
    room = 0
    for nbytes in free:
        if nbytes < largest:
            return False
        room += nbytes - largest
        if room >= needed:
            return True
    return False


def needs(events: Iterable[int], sizes: Mapping[int, int]) -> tuple[int, int]:
    """Return the most of P + K r over a run's requests, and the largest of them: lemma 2, blocks as large as asked."""
    live = count = needed = largest = 0
    for event in events:
        size = sizes[abs(event) - 1]
        if event > 0:
            needed, largest = max(needed, live + count * size), max(largest, size)
        live += size if event > 0 else -size
        count += 1 if event > 0 else -1
    return needed, largest


class Run:
    """Events in order; a closed run frees what it allocates, and nothing else, and is its ``parts`` in order."""

    def __init__(self, events: Sequence[int], is_closed: bool, limits: Sequence[int]) -> None:
        self.events, self.is_closed = events, is_closed
        self.parts = parts(events, limits) if is_closed and limits else []


def parts(events: Sequence[int], limits: Sequence[int]) -> list[Run]:
    """Take events apart: closed runs of at most limits[0] events, taken apart by the other limits, and the rest."""
    bits: dict[int, int] = {}
    for event in events:
        bits.setdefault(abs(event), 1 << len(bits))
    alive = [0, *accumulate((bits[abs(event)] for event in events), xor)]
    times: dict[int, list[int]] = {}
    for k, tensors in enumerate(alive):
        times.setdefault(tensors, []).append(k)
    found, begun, k = list[Run](), 0, 0
    while k < len(events):
        alike = times[alive[k]]
        end = alike[bisect_right(alike, k + limits[0]) - 1]
        if end == k:
            k += 1
            continue
        if begun < k:
            found.append(Run(events[begun:k], False, ()))
        found.append(Run(events[k:end], True, limits[1:]))
        begun = k = end
    return found if begun == k else [*found, Run(events[begun:], False, ())]


@dataclass(frozen=True, slots=True)
class Chunk:
    """A tape's events [first, last), run ``times`` times in all, as one pool sees them.

    ``content`` is the same for chunks that ask the same in the same order; tensors of ``kinds`` are asked for or
    freed, ``ins`` of those that are older, ``outs`` are left.
    """

    first: int
    last: int
    times: int
    runs: tuple[Run, ...]
    content: int
    kinds: frozenset[int]
    ins: tuple[int, ...]
    outs: tuple[int, ...]


def chunks(
    events: Sequence[int], edges: Sequence[int], times: Mapping[int, int], kinds: Sequence[int], held: Sequence[bool]
) -> Iterator[Chunk]:
    """Yield a tape's ``events`` between ``edges``, of tensors whose kind a pool has ``held``.

    ``times`` maps the end of a loop to how often it runs, ``kinds`` are the same for tensors of the same size.
    """
    contents: dict[tuple[tuple[bool, int, int], ...], int] = {}
    for first, last in pairwise(edges):
        mine = [event for event in events[first:last] if held[kinds[abs(event) - 1]]]
        local: dict[int, int] = {}
        for event in mine:
            local.setdefault(abs(event) - 1, len(local))
        asked = tuple((event > 0, local[abs(event) - 1], kinds[abs(event) - 1]) for event in mine)
        born, dead = ({abs(event) - 1 for event in mine if (event > 0) == is_born} for is_born in (True, False))
        content = contents.setdefault(asked, len(contents))
        ins, outs = (tuple(t for t in local if t in some) for some in (dead - born, born - dead))
        used = frozenset(kind for _, _, kind in asked)
        yield Chunk(first, last, times.get(last, 1), tuple(parts(mine, MOST_CLOSED)), content, used, ins, outs)
