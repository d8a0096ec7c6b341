"""One pool by its free blocks alone, held to the caching allocator, and the lemma by which events are left out."""

import random

import numpy as np
import pytest
from conftest import SD15

from derivation import derive
from derivation.allocator import everywhere
from derivation.allocator.allocator import CachingAllocator
from derivation.allocator.config import AllocatorConfig
from derivation.allocator.lockstep import Pools, PoolsOfPages
from derivation.allocator.pools import MOST_CLOSED, SHIFT, Pages, Pool, Run, has_room, needs, parts
from derivation.allocator.report import MIB, SMALL_BYTES, SMALL_SEGMENT_BYTES


def stream(seed: int, is_small: bool, count: int = 400) -> tuple[list[int], list[int]]:
    """Return events of tensors and their bytes, rounded; each tensor is freed, most soon."""
    draw = random.Random(seed)
    most = SMALL_BYTES if is_small else 40 * MIB
    least = 512 if is_small else SMALL_BYTES + 512
    common = [draw.randrange(least, most, 512) for _ in range(6)]
    sizes = [draw.choice(common) if draw.random() < 0.7 else draw.randrange(least, most, 512) for _ in range(count)]
    events, alive = list[int](), list[int]()
    for tensor in range(count):
        events.append(tensor + 1)
        alive.append(tensor)
        while alive and draw.random() < 0.5:
            events.append(-alive.pop(draw.choice([-1, -1, 0])) - 1)
    return events + [-tensor - 1 for tensor in alive], sizes


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("is_small", [True, False])
@pytest.mark.parametrize("kind", [Pool, Pages])
def test_a_pool_is_the_allocator(seed: int, is_small: bool, kind: type[Pool]) -> None:
    events, sizes = stream(seed, is_small)
    config = AllocatorConfig(expandable_segments=kind is Pages)
    pool, allocator, handles = kind(is_small), CachingAllocator(config), dict[int, int]()
    for event in events:
        pool.play([event], sizes)
        if event > 0:
            handles[event - 1] = allocator.malloc(sizes[event - 1])
        else:
            allocator.free(handles.pop(-event - 1))
        assert sum(place >> SHIFT for place in pool.places.values()) == allocator.allocated_bytes.current
        assert sum(nbytes for _, nbytes in pool.opened) == allocator.reserved_bytes.current
    assert sorted(block >> SHIFT for block in pool.free) == sorted(s.total_size for s in allocator.snapshot())


@pytest.mark.parametrize("seed", range(30))
def test_what_is_left_out_opens_nothing(seed: int) -> None:
    events, sizes = stream(seed, is_small=True)
    known, pool, left_out = dict(enumerate(sizes)), Pool(is_small=True), 0

    def play(runs: list[Run]) -> None:
        nonlocal left_out
        for run in runs:
            free, opened = list(pool.free), len(pool.opened)
            has = run.is_closed and pool.has_room(*needs(run.events, known))
            if run.parts and not has:
                play(run.parts)
                continue
            pool.play(run.events, sizes)
            if has:
                left_out += 1
                assert (pool.free, len(pool.opened)) == (free, opened)

    play(parts(events, (64, 8)))
    assert left_out > 5


def test_runs_are_the_events_in_order() -> None:
    def flat(runs: list[Run]) -> list[int]:
        return [event for run in runs for event in (flat(run.parts) if run.parts else run.events)]

    for seed in range(10):
        events, _ = stream(seed, is_small=False)
        assert flat(parts(events, MOST_CLOSED)) == flat(parts(events, (16, 4))) == events


def test_room_is_what_the_largest_gaps_leave() -> None:
    # three blocks of 600 KiB may leave no gap of 600 KiB in 2 MiB and in 1 MiB, but not in two segments
    needed, largest = needs([1, 2, 3, 4, -1, -2, -3, -4], dict.fromkeys(range(4), 600 << 10))
    assert (needed, largest) == (3 * (600 << 10) + 3 * (600 << 10), 600 << 10)
    assert not has_room([SMALL_SEGMENT_BYTES, SMALL_BYTES], needed, largest)
    assert has_room([SMALL_SEGMENT_BYTES] * 3, needed, largest)
    assert not has_room([], 0, 512) and has_room([512], 0, 512)


@pytest.mark.parametrize("is_small", [True, False])
@pytest.mark.parametrize("kind", [Pool, Pages])
def test_pools_in_lockstep_are_each_the_allocator(is_small: bool, kind: type[Pool]) -> None:
    events, _ = stream(0, is_small, 150)
    draw = np.random.default_rng(0)
    asked = np.array([stream(seed, is_small, 150)[1] for seed in range(20)]).T * (draw.random((150, 20)) < 0.9)
    pools = (PoolsOfPages if kind is Pages else Pools).of(kind(is_small), 20)
    config = AllocatorConfig(expandable_segments=kind is Pages)
    allocators = [(CachingAllocator(config), dict[int, int]()) for _ in range(20)]
    for event in events:
        pools.play([event], range(150), asked // 512)
        for row, (allocator, handles) in enumerate(allocators):
            if event > 0:
                handles[event - 1] = allocator.malloc(int(asked[event - 1, row]))
            else:
                allocator.free(handles.pop(-event - 1))
            allocated = sum(int(units[row]) * 512 for _, units in pools.places.values())
            assert allocated == allocator.allocated_bytes.current
            assert sum(int(nbytes[row]) for _, nbytes in pools.opened) == allocator.reserved_bytes.current


@pytest.mark.parametrize("alloc_conf", [None, "expandable_segments:True"])
def test_sizes_together_open_what_each_opens(alloc_conf: str | None) -> None:
    form = derive(SD15, gpu="t4", num_inference_steps=30, alloc_conf=alloc_conf).equation.device
    for opened in (form.small, form.large):
        found = everywhere.at_all_points(opened)
        alone = type(opened)(form.requests, opened.is_small, form.kind)
        assert all(found[point] == alone.at(point) for point in range(0, len(form.points), 11))


def test_addresses_have_an_end() -> None:
    pools = Pools.of(Pool(is_small=False), 2)
    with pytest.raises(OverflowError):
        pools.play([1], [0], np.array([[1 << 31, 512]]))
