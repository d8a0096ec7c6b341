"""What a pool opens at every size of a grid: sizes are played together, but for those whose run repeats or has room."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress

import numpy as np

from derivation.allocator.lockstep import Pools, PoolsOfPages
from derivation.allocator.opened import Opened, Segments
from derivation.allocator.pools import Chunk, Pages, Run
from derivation.allocator.report import MIN_BLOCK_BYTES
from derivation.allocator.symbolic import Vector

# Sizes from which on playing them together is quicker than one by one.
FEW = 16
# The pool after a chunk, and what it opens.
After = tuple[Pools, list[tuple[int, Vector]]]


def at_all_points(opened: Opened) -> list[Segments]:
    """Return ``opened.at(point)`` for each point."""
    points = range(len(opened.requests.points))
    distinct = list({opened.asked(point): point for point in points}.values())
    if len(unknown := [point for point in distinct if not opened.knows(point)]) >= FEW:
        with suppress(OverflowError):
            opened.learn(unknown, _Together(opened, unknown).play())
    return [opened.at(point) for point in points]


def reserved_bytes(small: Opened, large: Opened) -> Vector:
    """Return torch.cuda.max_memory_reserved() at each point."""
    loaded = small.loaded_bytes + large.loaded_bytes
    pools = zip(at_all_points(small), at_all_points(large), strict=True)
    return np.array([loaded + sum(n for pool in both for _, n in pool) for both in pools])


class _Together:
    """One play of a pool at some points; a row of the pools is one of them."""

    def __init__(self, opened: Opened, points: Sequence[int]) -> None:
        self.opened, self.points = opened, np.array(points)
        self.kinds = opened.requests.kinds
        self.asked = opened.columns[:, self.points] // MIN_BLOCK_BYTES
        self.pools = (PoolsOfPages if opened.kind is Pages else Pools).of(opened.loaded, len(points))
        self.known: dict[tuple[int, bytes], After] = {}

    def play(self) -> list[Segments]:
        """Return the segments at each point, in order."""
        for chunk in (chunk for chunk in self.opened.chunks if chunk.runs):
            if chunk.times > 1:
                self._repeat(chunk)
            else:
                self._once(chunk)
        tensors = [tensor for tensor, _ in self.pools.opened]
        opened = np.array([nbytes for _, nbytes in self.pools.opened]).reshape(-1, len(self.points)).T.tolist()
        return [tuple((t, n) for t, n in zip(tensors, row, strict=True) if n) for row in opened]

    def _once(self, chunk: Chunk) -> None:
        """Play a chunk unless one that asks the same of the same blocks was: lemma 1."""
        pools, key = self.pools, (chunk.content, self.pools.states(chunk.ins).tobytes())
        if key not in self.known:
            had = len(pools.opened)
            self._runs(pools, chunk.runs, np.arange(len(self.points)))
            if not chunk.ins and not chunk.outs:
                self.known[key] = pools.copy(), pools.opened[had:]
            return
        after, opened = self.known[key]
        self.pools = after.copy()
        self.pools.places, self.pools.opened = pools.places, pools.opened + opened

    def _repeat(self, chunk: Chunk) -> None:
        """Play a loop's iterations, at each point but for whole periods of those that repeat: lemma 1."""
        left = np.full(len(self.points), chunk.times)
        seen = [dict[bytes, int]() for _ in self.points]
        roles = [self.opened.requests.roles(chunk.last, point) for point in self.points.tolist()]
        carried = sorted({*chunk.ins, *(tensor for own in roles for pair in own.items() for tensor in pair)})
        while (rows := np.flatnonzero(left)).size:
            some = self.pools if rows.size == left.size else self.pools.at(rows)
            if left[rows[0]] < chunk.times:
                self._rename(some, [roles[row] for row in rows])
            for row, state in zip(rows.tolist(), some.states(carried), strict=True):
                if period := seen[row].setdefault(state.tobytes(), left[row]) - left[row]:
                    left[row] = (left[row] - 1) % period + 1
            self._runs(some, chunk.runs, rows)
            left[rows] -= 1
            if some is not self.pools:
                self.pools.put(rows, some)

    @staticmethod
    def _rename(pools: Pools, roles: Sequence[Mapping[int, int]]) -> None:
        """Put each survivor of an iteration to the place of the tensor whose role it takes in the next."""
        alike: dict[tuple[tuple[int, int], ...], list[int]] = {}
        for row, roles_there in enumerate(roles):
            alike.setdefault(tuple(roles_there.items()), []).append(row)
        moving = {tensor for own in alike for tensor, _ in own if tensor in pools.places}
        places = {tensor: pools.places.pop(tensor) for tensor in moving}
        for own, alike_rows in alike.items():
            role_of, at = dict(own), np.array(alike_rows)
            for tensor, (start, size) in places.items():
                pools.place(role_of.get(tensor, tensor), at, (start[at], size[at]))

    def _runs(self, pools: Pools, runs: Iterable[Run], rows: Vector) -> None:
        """Play runs at some rows, but for closed ones where they have room: lemma 2."""
        for run in runs:
            some, rest = pools, rows
            if run.is_closed:
                needs = self.opened.needs(run)
                needed, largest = (need[self.points[rows]] // MIN_BLOCK_BYTES for need in needs)
                lacking = np.flatnonzero(~pools.has_room(needed, largest))
                if not lacking.size:
                    continue
                if lacking.size < rows.size:
                    some, rest = pools.at(lacking), rows[lacking]
            if run.parts:
                self._runs(some, run.parts, rest)
            else:
                some.play(run.events, self.kinds, self.asked[:, rest])
            if some is not pools:
                pools.put(lacking, some)
