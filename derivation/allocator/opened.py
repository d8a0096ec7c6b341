"""The segments that a tape opens at each of many sizes, on a card that has room for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache, cached_property
from typing import TypeAlias

import numpy as np

from derivation.allocator.pools import Chunk, Pool, Run, chunks
from derivation.allocator.report import SMALL_BYTES, round_size
from derivation.allocator.simulate import alive_at, pair_roles, single
from derivation.allocator.symbolic import Atom, Points, Vector
from derivation.errors import DerivationError
from derivation.tape.tape import Tape

# The free blocks after a chunk, the places of what it leaves, the segments that it opens, the next address.
After = tuple[tuple[int, ...], tuple[int | None, ...], tuple[tuple[int, int], ...], int]
# A chunk's content, the next address, the free blocks, the places of what it frees.
Key = tuple[int, int, tuple[int, ...], tuple[int | None, ...]]
Memory = dict[Key, After]
# The tensor that each segment is opened for, and its bytes, in order.
Segments: TypeAlias = tuple[tuple[int, int], ...]


class Requests:
    """What a tape asks for at each point, in rounded bytes, and what is loaded before.

    ``weights`` are the bytes of each parameter in the order of loading. Raises DerivationError for a tape that empties
    the cache, counts storages by size, or loads what has no bytes among the weights.
    """

    def __init__(self, tape: Tape, weights: Mapping[str, int], points: Points) -> None:
        if tape.emptied:
            raise DerivationError("no closed form of reserved bytes: the cache is emptied")
        tape = single(tape, points.values)
        if any(a.loaded and a.path not in weights for a in tape.allocations):
            raise DerivationError("no closed form of reserved bytes: weights are loaded during the run")
        self.tape, self.weights, self.points = tape, weights, points
        numbers = {nbytes: i for i, nbytes in enumerate(dict.fromkeys(a.nbytes for a in tape.allocations))}
        self.kinds = [numbers[a.nbytes] for a in tape.allocations]
        self.bytes = np.array([points.atom(Atom(nbytes, is_segment=False)) for nbytes in numbers])
        self.plain = np.array([points.plain(nbytes) for nbytes in numbers])
        self.dropped = {a.path: i for i, a in enumerate(tape.allocations) if a.loaded}

    def sizes(self, point: int) -> list[int]:
        """Return each tensor's bytes."""
        found: list[int] = self.bytes[:, point][self.kinds].tolist()
        return found

    @cached_property
    def around(self) -> dict[int, tuple[frozenset[int], frozenset[int]]]:
        """The tensors alive before and after an iteration, by the end of the loop."""
        loops = self.tape.loops
        alive = alive_at(self.tape.events, {edge for start, end, _ in loops for edge in (start, end)})
        return {end: (alive[start], alive[end]) for start, end, _ in loops}

    def roles(self, end: int, point: int) -> dict[int, int]:
        """Return which tensors take another's place in the next iteration of a loop."""
        plain = self.plain[:, point].tolist()
        found = pair_roles(lambda tensor: plain[self.kinds[tensor]], *self.around[end])
        return {tensor: role for tensor, role in found.items() if tensor != role}


class Opened:
    """What one pool opens for some requests at each point, beyond the segments of the weights."""

    def __init__(self, requests: Requests, is_small: bool, kind: type[Pool] = Pool) -> None:
        self.requests, self.is_small, self.kind = requests, is_small, kind
        self.mine = (requests.bytes <= SMALL_BYTES) == is_small
        held, always = self.mine.any(axis=1), self.mine.all(axis=1)
        self.mixed = frozenset(np.flatnonzero(held & ~always).tolist())
        fixed = (requests.bytes == requests.bytes[:, :1]).all(axis=1)
        self.fixed = frozenset(np.flatnonzero(fixed).tolist())
        times = {end: times for _, end, times in requests.tape.loops}
        self.chunks = list(chunks(requests.tape.events, requests.tape.edges, times, requests.kinds, held.tolist()))
        self.columns = requests.bytes * self.mine
        self._needs_by_kinds = cache(self._needs_of)
        self._needs = cache(lambda run: [need.tolist() for need in self.needs(run)])
        self._is_mixed = cache(lambda run: any(requests.kinds[abs(e) - 1] in self.mixed for e in run.events))
        self._known: dict[bytes, Segments] = {}
        self._fixed_memory: Memory = {}

    @cached_property
    def loaded(self) -> Pool:
        """The pool before the run; weights that the run drops are at their places."""
        pool, dropped = self.kind(self.is_small), self.requests.dropped
        sizes = {path: round_size(nbytes) for path, nbytes in self.requests.weights.items()}
        mine = [(path, size) for path, size in sizes.items() if (size <= SMALL_BYTES) == self.is_small]
        pool.play(range(1, len(mine) + 1), [size for _, size in mine])
        pool.places = {dropped[path]: pool.places[i] for i, (path, _) in enumerate(mine) if path in dropped}
        return pool

    @property
    def loaded_bytes(self) -> int:
        """Bytes of the segments that hold the weights."""
        return sum(nbytes for _, nbytes in self.loaded.opened)

    def at(self, point: int) -> Segments:
        """Return the tensor that each segment is opened for, and its bytes, in order."""
        if (asked := self.asked(point)) not in self._known:
            self._known[asked] = self._run(point)
        return self._known[asked]

    def asked(self, point: int) -> bytes:
        """Return what the run asks for at a point, the same where ``at`` is."""
        found: bytes = self.columns[:, point].tobytes()
        return found

    def knows(self, point: int) -> bool:
        """Return whether ``at`` has been told."""
        return self.asked(point) in self._known

    def learn(self, points: Iterable[int], opened: Iterable[Segments]) -> None:
        """Keep what ``at`` is at some points."""
        self._known |= {self.asked(point): own for point, own in zip(points, opened, strict=True)}

    def _run(self, point: int) -> Segments:
        sizes, pool, memory = self.requests.sizes(point), self.loaded.copy(), Memory()
        pool.opened.clear()
        for chunk in (chunk for chunk in self.chunks if chunk.runs):
            roles = self.requests.roles(chunk.last, point) if chunk.times > 1 else {}
            known = self._fixed_memory if chunk.kinds <= self.fixed else memory
            carried = {*roles, *roles.values()}
            state: tuple[Key, list[int | None]] | None = None
            for played in range(chunk.times):
                if played:
                    moved = {roles[tensor]: pool.places.pop(tensor) for tensor in roles if tensor in pool.places}
                    pool.places.update(moved)
                begun, state = state, (self._key(pool, chunk), [pool.places.get(tensor) for tensor in carried])
                self._pass(pool, chunk, sizes, point, known)
                if begun == state:  # and so it goes on: lemma 1
                    break
        return tuple(pool.opened)

    def _pass(self, pool: Pool, chunk: Chunk, sizes: Sequence[int], point: int, memory: Memory) -> None:
        """Play a chunk, or what is known of it."""
        key = self._key(pool, chunk)
        if key not in memory:
            had = len(pool.opened)
            self._play(pool, chunk.runs, sizes, point)
            memory[key] = self._after(pool, chunk, had)
            return
        free, left, opened, pool.top = memory[key]
        pool.become(free)
        for tensor in chunk.ins:
            pool.places.pop(tensor, None)
        pool.places.update({t: place for t, place in zip(chunk.outs, left, strict=True) if place is not None})
        pool.opened += opened

    @staticmethod
    def _key(pool: Pool, chunk: Chunk) -> Key:
        return chunk.content, pool.top, tuple(pool.free), tuple(pool.places.get(tensor) for tensor in chunk.ins)

    @staticmethod
    def _after(pool: Pool, chunk: Chunk, had: int) -> After:
        left = tuple(pool.places.get(tensor) for tensor in chunk.outs)
        return tuple(pool.free), left, tuple(pool.opened[had:]), pool.top

    def _play(self, pool: Pool, runs: Iterable[Run], sizes: Sequence[int], point: int) -> None:
        for run in runs:
            if run.is_closed:
                needed, largest = self._needs(run)
                if pool.has_room(needed[point], largest[point]):
                    continue
            if run.parts:
                self._play(pool, run.parts, sizes, point)
                continue
            events = run.events
            if self._is_mixed(run):
                events = [event for event in events if (sizes[abs(event) - 1] <= SMALL_BYTES) == self.is_small]
            pool.play(events, sizes)

    def needs(self, run: Run) -> tuple[Vector, Vector]:
        """Return P + K r of lemma 2 and the largest request at each point."""
        asked = (self.requests.kinds[abs(event) - 1] * 2 + (event > 0) for event in run.events)
        return self._needs_by_kinds(tuple(asked))

    def _needs_of(self, asked: Sequence[int]) -> tuple[Vector, Vector]:
        live, count, needed, largest = (np.zeros(len(self.requests.points), dtype=np.int64) for _ in range(4))
        for kind, is_born in (divmod(each, 2) for each in asked):
            size, is_mine = self.columns[kind], self.mine[kind]
            if is_born:
                needed = np.maximum(needed, is_mine * live + count * size)
                largest = np.maximum(largest, size)
            sign = 1 if is_born else -1
            live = live + sign * (size + is_mine * self.loaded.most_rest)
            count = count + sign * is_mine
        return needed, largest
