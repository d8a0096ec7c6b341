"""Replay alloc/free events through the caching allocator: what torch.cuda.memory_stats would say.

Event `+(i + 1)` allocates tensor i, `-(i + 1)` frees it, `0` is torch.cuda.empty_cache(); `sizes[i]` is its
requested bytes.
"""

from __future__ import annotations

from collections.abc import Container, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from itertools import accumulate

from derivation.allocator.allocator import CachingAllocator
from derivation.allocator.pools import MOST_CLOSED, Run, needs, parts
from derivation.allocator.report import SMALL_BYTES, Fragmentation, OutOfMemory, OutOfMemoryError
from derivation.errors import DerivationError


@dataclass(frozen=True, slots=True)
class Loop:
    """Events [start, end) run `repeat` times in all.

    `roles` maps a tensor alive at the end of an iteration to the tensor whose place it takes in the
    next one; every other tensor keeps its own.
    """

    start: int
    end: int
    repeat: int
    roles: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Peak:
    """Highest bytes of a counter and the event that reached it (None: reached before the first event)."""

    nbytes: int
    event_index: int | None


@dataclass(frozen=True, slots=True)
class OutOfMemoryEvent:
    """The allocation that failed: its event, tensor, requested bytes and torch's message."""

    event_index: int
    tensor: int
    report: OutOfMemory

    @property
    def requested_bytes(self) -> int:
        """Bytes of the tensor, before any rounding."""
        return self.report.requested_bytes

    @property
    def message(self) -> str:
        """Torch's message in one line."""
        return self.report.message


@dataclass(frozen=True, slots=True)
class ReplayResult:
    """Peaks in bytes since the replay began, with what was on the allocator already included.

    `live` maps tensors still alive to handles; `first_retry_index` is the event at which the allocator
    first had to give cached memory back; after `out_of_memory` no event was run; `left_out` counts optional tensors
    that did not fit.
    """

    requested_bytes: Peak
    allocated_bytes: Peak
    reserved_bytes: Peak
    fragmentation: Fragmentation
    num_alloc_retries: int
    first_retry_index: int | None
    out_of_memory: OutOfMemoryEvent | None
    left_out: int
    live: Mapping[int, int]
    allocator: CachingAllocator


@dataclass(frozen=True)
class Replay:
    """Events, sizes and loops of one run; raises DerivationError where they do not fit together.

    ``loaded`` maps tensors that are alive before the run to handles of the allocator it runs on; ``optional`` holds
    tensors that the run does without where they do not fit.
    """

    events: Sequence[int]
    sizes: Sequence[int]
    loops: Sequence[Loop | tuple[int, int, int]] = ()
    loaded: Mapping[int, int] = field(default_factory=dict)
    optional: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        end = 0
        for loop in self._loops():
            if not end <= loop.start < loop.end <= len(self.events) or loop.repeat < 1:
                raise DerivationError(f"{loop}: expected loops in order, apart, inside the events, repeat >= 1")
            end = loop.end

    def run(self, allocator: CachingAllocator | None = None) -> ReplayResult:
        """Run the events on `allocator` (default: a fresh unlimited one), whose peaks are reset first."""
        return _Run(self, allocator or CachingAllocator()).result()

    def holding(self, handles: Mapping[int, int]) -> Replay:
        """Return the replay in which some tensors are there before, as a library keeps its workspace for the next run.

        ``handles`` are those of the allocator it runs on; raises DerivationError where the run frees such a tensor.
        """
        if any(-event - 1 in handles for event in self.events):
            raise DerivationError(f"tensors {sorted(handles)} are held, and one is freed")
        wanted = [event - 1 not in handles for event in self.events]
        place = [0, *accumulate(wanted)]
        events = [event for event, is_wanted in zip(self.events, wanted, strict=True) if is_wanted]
        loops = [replace(loop, start=place[loop.start], end=place[loop.end]) for loop in self._loops()]
        loaded = {**self.loaded, **handles}
        return replace(self, events=events, loops=[loop for loop in loops if loop.start < loop.end], loaded=loaded)

    def _loops(self) -> list[Loop]:
        return sorted(
            (loop if isinstance(loop, Loop) else Loop(*loop) for loop in self.loops), key=lambda loop: loop.start
        )


def load_weights(allocator: CachingAllocator, sizes: Iterable[int]) -> list[int]:
    """Allocate `sizes` bytes in order and return the handles; raises OutOfMemoryError."""
    return [allocator.malloc(nbytes) for nbytes in sizes]


class _Run:
    """One pass of a Replay over an allocator."""

    def __init__(self, replay: Replay, allocator: CachingAllocator) -> None:
        allocator.reset_peak_memory_stats()
        self.replay, self.allocator, self.index = replay, allocator, 0
        self.live = dict(replay.loaded)
        self.peaks: list[int | None] = [None, None, None]
        self.fragmentation = allocator.fragmentation()
        self.retries_before = allocator.num_alloc_retries
        self.first_retry: int | None = None
        self.failed: OutOfMemoryEvent | None = None
        self.left_out, self.missing = 0, set[int]()
        self._needs = cache(self._needs_of)

    def result(self) -> ReplayResult:
        try:
            self._run_all()
        except OutOfMemoryError as error:
            event = self.replay.events[self.index]
            self._note_retry(self.index)
            self.failed = OutOfMemoryEvent(self.index, event - 1, error.report)
        stats = self.allocator
        requested, allocated, reserved = self.peaks
        return ReplayResult(
            Peak(stats.requested_bytes.peak, requested),
            Peak(stats.allocated_bytes.peak, allocated),
            Peak(stats.reserved_bytes.peak, reserved),
            self.fragmentation,
            stats.num_alloc_retries - self.retries_before,
            self.first_retry,
            self.failed,
            self.left_out,
            self.live,
            stats,
        )

    def _run_all(self) -> None:
        position = 0
        for loop in self.replay._loops():
            self._run_events(position, loop.start)
            self._run_loop(loop)
            position = loop.end
        self._run_events(position, len(self.replay.events))

    def _run_loop(self, loop: Loop) -> None:
        """Run a loop's iterations, but for those that repeat earlier ones.

        Theorem 1: an iteration begins where the last one ended, and all that it does follows from which tensor is in
        which block and what else is free, up to a renaming of addresses that keeps their order, and from what is
        missing. Where these are after an iteration what they were p iterations earlier, so are they p iterations on,
        and no counter takes a value that it has not had: whole periods can be left out, their retries counted.

        Theorem 2: until the driver refuses, a pool's blocks follow from its own events. Where those of the large pool
        are after an iteration what they were before it, and nothing was given back, so are they after the next one:
        the small pool's events alone can be played until that pool asks the driver, but for those that lemma 2 of
        pools.py leaves out. Its blocks are as large as their requests, so no peak of requested or allocated bytes
        moves; that of inactive splits is not followed.
        """
        alive, small = set(self.live), self._small(loop)
        runs = parts([self.replay.events[index] for index in small], MOST_CLOSED)
        seen, counts, large = dict[Hashable, tuple[int, tuple[int, ...]]](), self._counts(), self._state(small=False)
        remaining, steady = loop.repeat, False
        while remaining > 1:
            only_small = steady and self._run_small(loop, small, runs)
            if not steady:
                self._run_events(loop.start, loop.end)
            remaining -= 1
            self._relabel(loop, alive, self.small_tensors if only_small else loop.roles.keys())
            counts, before = self._counts(), counts
            large, last = large if only_small else self._state(small=False), large
            steady = only_small or (bool(small) and large == last and counts == before and not self.missing)
            state = large, self._state(small=True), frozenset(self.missing)
            then, at = seen.setdefault(state, (remaining, counts))
            if then > remaining:
                periods = (remaining - 1) // (then - remaining)
                remaining -= periods * (then - remaining)
                self._count(periods * (now - earlier) for now, earlier in zip(counts, at, strict=True))
                seen.clear()
        self._run_events(loop.start, loop.end)

    def _small(self, loop: Loop) -> list[int]:
        """Return the events of the small pool where theorem 2 can hold, else none."""
        events, small = self.replay.events, self.small_tensors
        mixed = any((tensor in small) != (role in small) for tensor, role in loop.roles.items())
        if mixed or not self.allocator.pools_are_apart or 0 in events[loop.start : loop.end]:
            return []
        return [index for index in range(loop.start, loop.end) if abs(events[index]) - 1 in small]

    @cached_property
    def small_tensors(self) -> set[int]:
        """Tensors whose blocks are in the small pool."""
        rounded = self.allocator.rounded
        return {tensor for tensor, nbytes in enumerate(self.replay.sizes) if rounded(nbytes) <= SMALL_BYTES}

    def _due(self, runs: Sequence[Run], at: int = 0) -> Iterator[tuple[int, int]]:
        """Yield the small pool's events, each with its place, but for closed runs that it has room for."""
        for run in runs:
            if not (run.is_closed and self.allocator.small_pool_has_room(*self._needs(run))):
                yield from self._due(run.parts, at) if run.parts else enumerate(run.events, at)
            at += len(run.events)

    def _needs_of(self, run: Run) -> tuple[int, int]:
        rounded = {abs(event) - 1: self.allocator.rounded(self.replay.sizes[abs(event) - 1]) for event in run.events}
        return needs(run.events, rounded)

    def _run_small(self, loop: Loop, indices: Sequence[int], runs: Sequence[Run]) -> bool:
        """Play the small pool's events; where it asks the driver play all the others, too, and return False."""
        sizes, live, allocator = self.replay.sizes, self.live, self.allocator
        for at, event in self._due(runs):
            index = indices[at]
            if event < 0:
                allocator.free(live.pop(-event - 1))
                continue
            handle = allocator.reuse(sizes[event - 1])
            if handle is None:
                self._catch_up(loop.start, index)
                self._run_events(index, loop.end)
                return False
            live[event - 1] = handle
        return True

    def _catch_up(self, start: int, end: int) -> None:
        """Play the large pool's events behind the small pool's, at which no peak is reached."""
        stats = (self.allocator.requested_bytes, self.allocator.allocated_bytes)
        peaks = [stat.peak for stat in stats]
        for event in self.replay.events[start:end]:
            if abs(event) - 1 in self.small_tensors:
                continue
            if event < 0:
                self.allocator.free(self.live.pop(-event - 1))
            else:
                self.live[event - 1] = self.allocator.malloc(self.replay.sizes[event - 1])
        for stat, peak in zip(stats, peaks, strict=True):
            stat.peak = peak

    def _state(self, small: bool) -> Hashable:
        return self.allocator.state(self.live, small)

    def _counts(self) -> tuple[int, ...]:
        stats = self.allocator
        return self.left_out, stats.num_alloc_retries, stats.num_ooms, stats.num_device_free

    def _count(self, more: Iterable[int]) -> None:
        stats = self.allocator
        counts = (count + new for count, new in zip(self._counts(), more, strict=True))
        self.left_out, stats.num_alloc_retries, stats.num_ooms, stats.num_device_free = counts

    def _relabel(self, loop: Loop, alive: set[int], moving: Container[int]) -> None:
        """Hand each survivor of those ``moving`` the role it plays in the next iteration."""
        roles = {tensor: role for tensor, role in loop.roles.items() if tensor in moving}
        renamed = {roles.get(tensor, tensor): handle for tensor, handle in self.live.items()}
        if len(renamed) != len(self.live) or renamed.keys() != alive:
            extra, missing = sorted(renamed.keys() - alive), sorted(alive - renamed.keys())
            raise DerivationError(
                f"loop of events {loop.start}..{loop.end}: an iteration must end with the tensors it began with; "
                f"extra {extra[:8]}, missing {missing[:8]}, give their roles"
            )
        self.live.clear()
        self.live.update(renamed)

    def _run_events(self, start: int, end: int) -> None:
        events, sizes, live = self.replay.events, self.replay.sizes, self.live
        malloc, free = self.allocator.malloc, self.allocator.free
        stats = self.allocator
        requested, allocated, reserved = stats.requested_bytes, stats.allocated_bytes, stats.reserved_bytes
        highest = [requested.peak, allocated.peak, reserved.peak]
        retries = stats.num_alloc_retries
        for index in range(start, end):
            event = events[index]
            if event == 0:
                self.allocator.empty_cache()
                continue
            if event < 0:
                if -event - 1 in self.missing:
                    self.missing.discard(-event - 1)
                    continue
                handle = live.pop(-event - 1, None)
                if handle is None:
                    raise DerivationError(f"event {index}: frees tensor {-event - 1}, which is not alive")
                free(handle)
                continue
            self.index = index
            if event - 1 in live:
                raise DerivationError(f"event {index}: cannot allocate tensor {event - 1}")
            try:
                live[event - 1] = malloc(sizes[event - 1])
            except OutOfMemoryError:
                if event - 1 not in self.replay.optional:
                    raise
                self.left_out += 1
                self.missing.add(event - 1)
            if requested.peak > highest[0]:
                highest[0], self.peaks[0] = requested.peak, index
            if allocated.peak > highest[1]:
                highest[1], self.peaks[1] = allocated.peak, index
            if reserved.peak > highest[2]:
                highest[2], self.peaks[2] = reserved.peak, index
                self.fragmentation = stats.fragmentation()
            if stats.num_alloc_retries > retries:
                retries = stats.num_alloc_retries
                self._note_retry(index)

    def _note_retry(self, index: int) -> None:
        if self.first_retry is None:
            self.first_retry = index
