"""The decisions of the large pool at one size, each with where it is taken alike.

Events that free what they allocate, and nothing else, leave the pool as it was unless a segment is opened: those
between two of a tape's edges are left out where they do.
"""

from __future__ import annotations

from collections.abc import Iterator

from derivation.allocator.config import AllocatorConfig
from derivation.allocator.opened import Opened
from derivation.allocator.report import SMALL_BYTES
from derivation.allocator.symbolic import Comparison, GridAllocator


class Decisions:
    """The large pool of ``opened``, played with polynomials beside the numbers."""

    def __init__(self, opened: Opened, config: AllocatorConfig) -> None:
        self.opened, self.requests, self.config = opened, opened.requests, config

    def at(self, reference: int) -> frozenset[Comparison]:
        """Return the comparisons that are made at a size, but for those that hold at all others, too."""
        allocator, handles = self._load(reference)
        allocator.guarding = True
        for event in self._events(reference):
            self._play(allocator, event, handles)
        return frozenset(allocator.held)

    def reach(self, tensor: int, reference: int) -> int:
        """Return the number of the bytes before a tensor and its own, when it is first allocated, at one size."""
        allocator, handles = self._load(reference)
        events = self.requests.tape.events
        for event in events[: events.index(tensor + 1) + 1]:
            self._play(allocator, event, handles)
        [(_, _, before)] = allocator.places({tensor: handles[tensor]})
        nbytes = allocator.request(self.requests.tape.allocations[tensor].nbytes)
        return self.requests.points.total(before, self.requests.points.number_of(nbytes), 1)

    def _events(self, reference: int) -> Iterator[int]:
        opens = {tensor + 1 for tensor, _ in self.opened.at(reference)}
        for chunk in self.opened.chunks:
            events = self.requests.tape.events[chunk.first : chunk.last]
            if chunk.ins or chunk.outs or not opens.isdisjoint(events):
                yield from events

    def _play(self, allocator: GridAllocator, event: int, handles: dict[int, int]) -> None:
        """Play one event if it is of the large pool at the reference."""
        index = abs(event) - 1
        if self.requests.bytes[self.requests.kinds[index], allocator.reference] <= SMALL_BYTES:
            return
        if event > 0:
            handles[index] = allocator.malloc(allocator.request(self.requests.tape.allocations[index].nbytes))
        else:
            allocator.free(handles.pop(index))

    def _load(self, reference: int) -> tuple[GridAllocator, dict[int, int]]:
        """Return an allocator with the weights of the large pool, and the handles of those that the run drops."""
        allocator, dropped = GridAllocator(self.requests.points, reference, self.config), self.requests.dropped
        large = ((path, nbytes) for path, nbytes in self.requests.weights.items() if nbytes > SMALL_BYTES)
        loaded = {path: allocator.malloc(allocator.request(nbytes)) for path, nbytes in large}
        return allocator, {dropped[path]: handle for path, handle in loaded.items() if path in dropped}
