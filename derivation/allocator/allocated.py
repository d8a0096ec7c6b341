"""The most that is allocated at each of many sizes, on a card that has room: requests, and what blocks have beyond.

A block of the large pool is at most 1 MiB larger than its request, one of the small pool, or of pages, is as large. So
the peak is at an event where requests, and 1 MiB for each of those alive in the large pool, reach the most that
requests alone do: there the pool's blocks are looked at.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from derivation.allocator.opened import Key, Memory, Opened, Requests
from derivation.allocator.pools import SHIFT, Chunk, Pool
from derivation.allocator.report import SMALL_BYTES
from derivation.allocator.symbolic import Vector


class Allocated(Opened):
    """The large pool of some requests, its blocks looked at after the events ``looked`` at one point at a time."""

    def __init__(self, requests: Requests, kind: type[Pool] = Pool) -> None:
        super().__init__(requests, is_small=False, kind=kind)
        events = np.array(requests.tape.events, dtype=np.int64)
        self._tensors, self._signs = np.abs(events) - 1, np.sign(events)
        self._played: set[tuple[int, Key]] = set()
        self.looked: frozenset[int] = frozenset()
        self.live, self.most = np.zeros(0, dtype=np.int64), 0
        self.loaded_beyond = self._beyond(self.loaded, requests.sizes(0))

    def requested(self, point: int) -> Vector:
        """Return the bytes of requests that are alive after each event, rounded, beyond those of the weights."""
        found: Vector = np.cumsum(self._signs * self.requests.bytes[:, point][self.requests.kinds][self._tensors])
        return found

    def most_at(self, point: int) -> int:
        """Return the most that is allocated beyond the weights' blocks."""
        self.live = self.requested(point)
        is_large = self.requests.bytes[:, point][self.requests.kinds][self._tensors] > SMALL_BYTES
        reach = self.live + self.loaded.most_rest * np.cumsum(self._signs * is_large)
        self.most = int(self.live.max()) - self.loaded_beyond
        self.looked = frozenset(np.flatnonzero((self._signs > 0) & (reach >= self.most)).tolist())
        self._played.clear()
        self._run(point)
        return self.most

    @staticmethod
    def _beyond(pool: Pool, sizes: Sequence[int]) -> int:
        return sum((place >> SHIFT) - sizes[tensor] for tensor, place in pool.places.items())

    def _pass(self, pool: Pool, chunk: Chunk, sizes: Sequence[int], point: int, memory: Memory) -> None:
        """Play a chunk event by event where something is looked at, unless it has been played so."""
        key = self._key(pool, chunk)
        looked = sorted(self.looked.intersection(range(chunk.first, chunk.last)))
        if not looked or (chunk.last, key) in self._played:
            super()._pass(pool, chunk, sizes, point, memory)
            return
        self._played.add((chunk.last, key))
        had, events, begun = len(pool.opened), self.requests.tape.events, chunk.first
        for event in (*looked, chunk.last - 1):
            large = [e for e in events[begun : event + 1] if sizes[abs(e) - 1] > SMALL_BYTES]
            pool.play(large, sizes)
            begun = event + 1
            if event in self.looked:
                beyond = self._beyond(pool, sizes) - self.loaded_beyond
                self.most = max(self.most, int(self.live[event]) + beyond)
        memory[key] = self._after(pool, chunk, had)
