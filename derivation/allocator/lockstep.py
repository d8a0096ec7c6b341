"""One pool of the caching allocator at many sizes at once: an event is played at all of them by a few array operations.

It is ``pools.Pool`` and ``pools.Pages`` with a row for each size, in units of 512 bytes. A request of 0 stands for
none: it takes an empty slot, of which each row has one, and gives it back.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Self

import numpy as np

from derivation.allocator.pools import ADDRESS, SHIFT, Pool
from derivation.allocator.report import LARGE_PAGE_BYTES, MIN_BLOCK_BYTES, SMALL_BYTES, SMALL_SEGMENT_BYTES
from derivation.allocator.symbolic import Vector, segment_bytes

# A free block is one integer: its units, then its address; an empty slot is 0. Addresses are below 1 TiB.
BITS = 31
SLOTS = 4
NOWHERE = -1


class Pools:
    """The small or the large pool: free blocks by size and slot, a tensor's place by size.

    ``places`` holds each tensor's addresses and units, ``opened`` each tensor that segments are opened for with their
    bytes, 0 where none is, ``top`` the address of the next one. Raises OverflowError beyond the last address.
    """

    def __init__(self, is_small: bool, width: int) -> None:
        self.is_small, self.most_rest = is_small, 0 if is_small else SMALL_BYTES // MIN_BLOCK_BYTES
        self._first = np.zeros(width, dtype=np.int64)  # the first slot of each row, of all in a line
        self.blocks = np.zeros((width, 0), dtype=np.int64)
        self.starts = self.ends = np.zeros((width, 0), dtype=np.int64)
        self.top = np.zeros(width, dtype=np.int64)
        self.places: dict[int, tuple[Vector, Vector]] = {}
        self.opened: list[tuple[int, Vector]] = []
        self._spare = 0  # empty slots, at least so many in each row
        self._grow(SLOTS)

    @classmethod
    def of(cls, pool: Pool, width: int) -> Self:
        """Return what one pool is, at each of some sizes."""
        made = cls(pool.is_small, width)
        made.top += pool.top // MIN_BLOCK_BYTES
        for block in pool.free:
            start, size = _units(block)
            made._put(made._empty(), np.full(width, start), np.full(width, size))
            made._use_slot()
        for tensor, place in pool.places.items():
            start, size = _units(place)
            made.places[tensor] = np.full(width, start), np.full(width, size)
        return made

    def at(self, rows: Vector) -> Self:
        """Return the pool at some of the sizes, as it is but for what is opened."""
        other = self._like(rows)
        other.places = {tensor: (start[rows], size[rows]) for tensor, (start, size) in self.places.items()}
        return other

    def copy(self) -> Self:
        """Return the pool as it is but for its tensors and what is opened."""
        return self._like(np.arange(len(self.top)))

    def _like(self, rows: Vector) -> Self:
        other = type(self)(self.is_small, len(rows))
        other.blocks, other.starts, other.ends = self.blocks[rows], self.starts[rows], self.ends[rows]
        other.top, other._spare = self.top[rows], self._spare
        other._first = self._first[: len(rows)]
        return other

    def put(self, rows: Vector, other: Self) -> None:
        """Take what the pool has become at some of the sizes, and what is opened there."""
        self._grow(max(other.blocks.shape[1] - self.blocks.shape[1], 0))
        slots = other.blocks.shape[1]
        self.blocks[rows, :slots], self.starts[rows, :slots] = other.blocks, other.starts
        self.ends[rows, :slots] = other.ends
        self.top[rows], self._spare = other.top, min(self._spare, other._spare)
        none = np.full(len(rows), NOWHERE), np.zeros(len(rows), dtype=np.int64)
        for tensor in self.places | other.places:
            self.place(tensor, rows, other.places.get(tensor, none))
        for tensor, nbytes in other.opened:
            everywhere = np.zeros(len(self.top), dtype=np.int64)
            everywhere[rows] = nbytes
            self.opened.append((tensor, everywhere))

    def place(self, tensor: int, rows: Vector, place: tuple[Vector, Vector]) -> None:
        """Put a tensor to its place at some of the sizes."""
        if tensor not in self.places:
            self.places[tensor] = np.full(len(self.top), NOWHERE), np.zeros(len(self.top), dtype=np.int64)
        for known, new in zip(self.places[tensor], place, strict=True):
            known[rows] = new

    def play(self, events: Iterable[int], kinds: Sequence[int], asked: Vector) -> None:
        """Allocate tensor i at event i + 1, free it at -(i + 1); ``asked`` are units by its kind and by size."""
        for event in events:
            if event > 0:
                self.places[event - 1] = self._take(event - 1, asked[kinds[event - 1]])
            else:
                self._give(*self.places.pop(-event - 1))

    def has_room(self, needed: Vector, largest: Vector) -> Vector:
        """Return where requests with these needs, in units, open no segment: lemma 2 of pools.py."""
        beyond = (self.blocks >> BITS) - largest[:, None]
        found: Vector = (np.maximum(beyond, 0).sum(axis=1) >= needed) & (beyond.max(axis=1) >= 0)
        return found

    def states(self, tensors: Iterable[int]) -> Vector:
        """Return all that later events depend on, by size; ``tensors`` are those that they free."""
        places = (row for tensor in tensors if tensor in self.places for row in self.places[tensor])
        return np.column_stack([np.sort(self.blocks, axis=1), *places, self.top])

    def _take(self, tensor: int, wanted: Vector) -> tuple[Vector, Vector]:
        """Best fit: the smallest block that is large enough, of those the one at the lowest address."""
        at, found = self._best(wanted)
        if (short := found < 0).any():
            self._open(tensor, wanted, short)
            at, found = self._best(wanted)
        start, rest = self.starts.ravel()[at], found >> BITS
        splits = rest > self.most_rest
        self._put(at, np.where(splits, start + wanted, NOWHERE), rest * splits)
        return start, wanted + rest * ~splits

    def _best(self, wanted: Vector) -> tuple[Vector, Vector]:
        """Return where the best fit is, and the block beyond the request, less than 0 where none is large enough."""
        beyond = self.blocks - (wanted << BITS)[:, None]
        ranked = self._ranked(beyond).view(np.uint64)  # what is less than 0 is largest
        at = self._first + ranked.argmin(axis=1)
        return at, beyond.ravel()[at]

    def _ranked(self, beyond: Vector) -> Vector:
        return beyond

    def _give(self, start: Vector, size: Vector) -> None:
        """Merge a block with free neighbours."""
        follows, precedes = self.starts == (start + size)[:, None], self.ends == start[:, None]
        behind, before = self._first + follows.argmax(axis=1), self._first + precedes.argmax(axis=1)
        merges, grows, blocks = follows.ravel()[behind], precedes.ravel()[before], self.blocks.ravel()
        more, less = (blocks[behind] >> BITS) * merges, (blocks[before] >> BITS) * grows
        at = np.where(grows, before, np.where(merges, behind, self._empty()))
        gone = behind[merges]
        blocks[gone], self.starts.ravel()[gone], self.ends.ravel()[gone] = 0, NOWHERE, NOWHERE
        self._put(at, start - less, size + more + less)
        self._use_slot()

    def _put(self, at: Vector, start: Vector, size: Vector) -> None:
        """Put free blocks into slots; one of no units is an empty slot."""
        self.blocks.ravel()[at] = (size << BITS | start) * (size > 0)
        self.starts.ravel()[at], self.ends.ravel()[at] = start, start + size

    def _empty(self) -> Vector:
        found: Vector = self._first + self.blocks.argmin(axis=1)
        return found

    def _use_slot(self) -> None:
        self._spare -= 1
        if self._spare < 2:
            self._spare = int((self.blocks == 0).sum(axis=1).min())
            self._grow(SLOTS if self._spare < 2 else 0)

    def _grow(self, slots: int) -> None:
        if slots:
            none = np.full((len(self.top), slots), NOWHERE)
            self.blocks = np.hstack([self.blocks, none * 0])
            self.starts, self.ends = np.hstack([self.starts, none]), np.hstack([self.ends, none])
            self._spare += slots
            self._first = np.arange(len(self.top)) * self.blocks.shape[1]

    def _open(self, tensor: int, wanted: Vector, short: Vector) -> None:
        nbytes = segment_bytes(wanted * MIN_BLOCK_BYTES) * short
        self._opened(tensor, short, self._empty(), np.zeros(len(short), dtype=np.int64), nbytes)
        self.top += short  # segments do not touch

    def _opened(self, tensor: int, short: Vector, at: Vector, tail: Vector, nbytes: Vector) -> None:
        """Put new segments into slots, behind the units of what is there."""
        units = nbytes // MIN_BLOCK_BYTES
        self._put(at[short], (self.top - tail)[short], (tail + units)[short])
        self.top = self.top + units
        if self.top.max() >> BITS:
            raise OverflowError
        self.opened.append((tensor, nbytes))
        self._use_slot()


class PoolsOfPages(Pools):
    """Pools with expandable_segments:True, as ``pools.Pages``."""

    def __init__(self, is_small: bool, width: int) -> None:
        super().__init__(is_small, width)
        self.most_rest, self.page = 0, SMALL_SEGMENT_BYTES if is_small else LARGE_PAGE_BYTES

    def _tails(self) -> Vector:
        found: Vector = (self.ends == self.top[:, None]) & (self.blocks > 0)
        return found

    def _ranked(self, beyond: Vector) -> Vector:
        return np.where(self._tails() & (beyond >= 0), np.iinfo(np.int64).max, beyond)

    def _open(self, tensor: int, wanted: Vector, short: Vector) -> None:
        tails = self._tails()
        at = np.where(tails.any(axis=1), self._first + tails.argmax(axis=1), self._empty())
        tail = self.blocks.ravel()[at] >> BITS
        mapped = -(-(wanted - tail) * MIN_BLOCK_BYTES // self.page) * self.page * short
        self._opened(tensor, short, at, tail, mapped)


def _units(block: int) -> tuple[int, int]:
    return (block & ADDRESS) // MIN_BLOCK_BYTES, (block >> SHIFT) // MIN_BLOCK_BYTES
