"""PyTorch's CUDA caching allocator on one stream, numerically.

Facts: c10/cuda/CUDACachingAllocator.cpp of torch 2.13. The one liberty: cudaMalloc addresses only ever grow.
"""

from bisect import bisect_left, insort
from collections.abc import Hashable, Iterator, Mapping

from derivation.allocator.config import AllocatorConfig
from derivation.allocator.pools import has_room
from derivation.allocator.report import (
    MIB,
    MIN_BLOCK_BYTES,
    ROUND_LARGE_BYTES,
    SMALL_BYTES,
    SMALL_SEGMENT_BYTES,
    BlockInfo,
    Fragmentation,
    OutOfMemory,
    OutOfMemoryError,
    SegmentInfo,
    Stat,
    round_size,
    segment_size,
)
from derivation.errors import DerivationError

_UNLIMITED = 1 << 62


class _Block:
    """A run of bytes in a segment; free and mapped ones stand in their pool's `free`."""

    __slots__ = ("address", "allocated", "base", "born", "mapped", "next", "pool", "prev", "requested", "size")

    def __init__(self, pool: "_Pool", address: int, size: int, base: int, mapped: bool = True) -> None:
        self.pool, self.address, self.size, self.base, self.mapped = pool, address, size, base, mapped
        self.allocated, self.requested, self.born = False, 0, 0
        self.prev: _Block | None = None
        self.next: _Block | None = None

    @property
    def is_split(self) -> bool:
        return self.prev is not None or self.next is not None

    def carve(self, size: int, mapped: bool) -> "_Block":
        """Cut the block after `size` bytes and return the rest."""
        rest = _Block(self.pool, self.address + size, self.size - size, self.base, mapped)
        rest.prev, rest.next, self.next, self.size = self, self.next, rest, size
        if rest.next is not None:
            rest.next.prev = rest
        return rest

    def absorb_next(self) -> None:
        following = self.next
        assert following is not None
        self.size += following.size
        self.next = following.next
        if self.next is not None:
            self.next.prev = self


class _Pool:
    """The small or the large pool: free blocks by (size, address), unmapped ranges by address."""

    __slots__ = ("free", "is_small", "searches", "unmapped")

    def __init__(self, is_small: bool) -> None:
        self.is_small, self.searches = is_small, 0
        self.free: list[tuple[int, int, _Block]] = []
        self.unmapped: list[tuple[int, _Block]] = []

    def insert(self, block: _Block) -> None:
        if block.mapped:
            block.born = self.searches
            insort(self.free, (block.size, block.address, block))
        else:
            insort(self.unmapped, (block.address, block))

    def remove(self, block: _Block) -> None:
        if block.mapped:
            del self.free[bisect_left(self.free, (block.size, block.address))]
        else:
            del self.unmapped[bisect_left(self.unmapped, (block.address,))]

    def lower_bound(self, size: int) -> int:
        return bisect_left(self.free, (size,))


class CachingAllocator:
    """The caching allocator of one CUDA device and stream; handles are device addresses, 0 the null one.

    `capacity_bytes` is what the driver can hand to segments (device total less context and other
    processes; None: no limit). `total_memory_bytes` is torch's total_memory, which scales
    `process_fraction` (default: the config's per_process_memory_fraction) and the address space of
    expandable segments; it defaults to `capacity_bytes`.
    """

    def __init__(
        self,
        config: AllocatorConfig | None = None,
        capacity_bytes: int | None = None,
        total_memory_bytes: int | None = None,
        process_fraction: float | None = None,
    ) -> None:
        self.config = config = config or AllocatorConfig()
        self.capacity_bytes = _UNLIMITED if capacity_bytes is None else capacity_bytes
        self.total_memory_bytes = self.capacity_bytes if total_memory_bytes is None else total_memory_bytes
        fraction = config.per_process_memory_fraction if process_fraction is None else process_fraction
        # DeviceCachingAllocator::setMemoryFraction: 1.0 lifts the limit and with it garbage collection.
        self.allowed_bytes = int(fraction * self.total_memory_bytes) if fraction < 1 else None
        self.requested_bytes, self.allocated_bytes = Stat(), Stat()
        self.reserved_bytes, self.inactive_split_bytes = Stat(), Stat()
        self.num_alloc_retries = self.num_ooms = self.num_device_free = 0
        self._small, self._large = _Pool(True), _Pool(False)
        self._live: dict[int, _Block] = {}
        self._rounded: dict[int, int] = {}
        self._heads: dict[int, _Block] = {}
        self._next_address = self._large_bytes = config.large_segment_size_mb * MIB
        split = config.max_split_size_mb
        self._max_split_bytes = _UNLIMITED if split is None else split * MIB
        self._rounding_bytes = config.max_non_split_rounding_mb * MIB
        self._expandable, self._divisions = config.expandable_segments, config.roundup_power2_divisions
        self._collects = self.allowed_bytes is not None and config.garbage_collection_threshold > 0

    @property
    def pools_are_apart(self) -> bool:
        """Whether the small and the large pool see nothing of each other until the driver refuses."""
        return not self._collects

    @property
    def active_bytes(self) -> Stat:
        """Equal to `allocated_bytes`: on one stream a free completes at once."""
        return self.allocated_bytes

    def malloc(self, nbytes: int) -> int:
        """Allocate `nbytes` and return the handle; raises OutOfMemoryError."""
        if nbytes <= 0:
            if nbytes < 0:
                raise DerivationError(f"malloc of {nbytes} bytes, expected 0 or more")
            return 0
        size = self.rounded(nbytes)
        pool = self._small if size <= SMALL_BYTES else self._large
        block = self._find_free(pool, size) or self._new_block(pool, size)
        if block is None:
            raise self._out_of_memory(nbytes, size)
        return self._hand_out(block, size, nbytes)

    def reuse(self, nbytes: int) -> int | None:
        """Allocate `nbytes` as `malloc` does if that takes nothing from the driver, else return None."""
        if not nbytes:
            return 0
        size = self.rounded(nbytes)
        block = self._find_free(self._small if size <= SMALL_BYTES else self._large, size)
        return None if block is None else self._hand_out(block, size, nbytes)

    def small_pool_has_room(self, needed: int, largest: int) -> bool:
        """Whether requests of the small pool with these needs (pools.py, lemma 2) take nothing from the driver."""
        return has_room((size for size, _, _ in reversed(self._small.free)), needed, largest)

    def rounded(self, nbytes: int) -> int:
        """Bytes of the block that a request is rounded to."""
        size = self._rounded.get(nbytes)
        if size is None:
            size = self._rounded[nbytes] = round_size(nbytes, self._divisions)
        return size

    def segment_bytes(self, size: int) -> int:
        """Bytes of the segment that is asked for a block of `size` bytes."""
        return segment_size(size, self._large_bytes)

    def _hand_out(self, block: _Block, size: int, nbytes: int) -> int:
        self._occupy(block.pool, block, size)
        block.requested = nbytes
        self.requested_bytes.add(nbytes)
        self.allocated_bytes.add(block.size)
        self._live[block.address] = block
        return block.address

    def free(self, handle: int) -> None:
        """Give the block of `handle` back to its pool, merged with free neighbours; 0 is ignored."""
        if handle == 0:
            return
        block = self._live.pop(handle, None)
        if block is None:
            raise DerivationError(f"free of {handle}: not an allocated handle")
        size = block.size
        block.allocated = False
        self.requested_bytes.current -= block.requested
        self.allocated_bytes.current -= size
        block.requested = 0
        merged = self._merge(block)
        merged.pool.insert(merged)
        if not self._expandable:
            split = merged.prev is not None or merged.next is not None
            self.inactive_split_bytes.add(size if split else size - merged.size)

    def empty_cache(self) -> None:
        """Return every unsplit free segment (every free page of expandable ones) to the driver."""
        for pool in (self._large, self._small):
            for _, _, block in list(pool.free):
                if self._expandable:
                    self._unmap(block)
                elif not block.is_split:
                    self._release(block)

    def reset_peak_memory_stats(self) -> None:
        """Set every peak to its current value."""
        for stat in (self.requested_bytes, self.allocated_bytes, self.reserved_bytes, self.inactive_split_bytes):
            stat.peak = stat.current

    def memory_stats(self) -> dict[str, int]:
        """The counters under the keys of torch.cuda.memory_stats, in bytes."""
        names = ("requested", "allocated", "active", "reserved", "inactive_split")
        stats: dict[str, int] = {"num_alloc_retries": self.num_alloc_retries, "num_ooms": self.num_ooms}
        for key in (f"{name}_bytes" for name in names):
            stat: Stat = getattr(self, key)
            stats |= {f"{key}.all.current": stat.current, f"{key}.all.peak": stat.peak}
        return stats

    def fragmentation(self) -> Fragmentation:
        """Reserved, allocated and largest free bytes now."""
        largest = max((pool.free[-1][0] for pool in (self._small, self._large) if pool.free), default=0)
        return Fragmentation(self.reserved_bytes.current, self.allocated_bytes.current, largest)

    def snapshot(self) -> tuple[SegmentInfo, ...]:
        """Segments and blocks by address, as torch.cuda.memory_snapshot lists them."""
        runs = (run for address in sorted(self._heads) for run in _mapped_runs(self._heads[address]))
        return tuple(_segment_info(run, self._expandable) for run in runs)

    def state(self, live: Mapping[int, int], small: bool) -> Hashable:
        """All that a pool's later calls depend on where names stand for handles and no other block is ever freed.

        Addresses are compared by order alone: a segment's rank stands for its own.
        """
        rank = {base: i for i, base in enumerate(self._heads)}  # by address: those only grow
        pool = self._small if small else self._large
        idle = [(block, None) for _, _, block in pool.free] + [(block, None) for _, block in pool.unmapped]
        named = ((self._live[handle], name) for name, handle in sorted(live.items()) if handle)
        used = [(block, name) for block, name in named if block.pool is pool]
        rows = (
            (rank[b.base], b.address - b.base, b.size, b.mapped, name, self._collects and pool.searches - b.born)
            for b, name in (*idle, *used)
        )
        return len(rank), *rows

    def _find_free(self, pool: _Pool, size: int) -> _Block | None:
        """Best fit: the smallest free block that holds `size`, at the lowest address (get_free_block)."""
        if self._collects:
            pool.searches += 1
        index, free = pool.lower_bound(size), pool.free
        if index == len(free):
            return None
        if self._expandable:
            while index + 1 < len(free) and _reach(free[index + 1][2]) < _reach(free[index][2]):
                index += 1
        found = free[index][0]
        limit = self._max_split_bytes
        if (found >= limit) if size < limit else (found >= size + self._rounding_bytes):
            return None
        return free.pop(index)[2]

    def _new_block(self, pool: _Pool, size: int) -> _Block | None:
        """A free block from the driver, after giving cached memory back where it is full."""
        if self._collects:
            self._collect_garbage()
        block = self._from_driver(pool, size)
        if block is None and self._release_oversize(pool, size):
            block = self._from_driver(pool, size)
        if block is None:
            self.empty_cache()
            self.num_alloc_retries += 1
            block = self._from_driver(pool, size)
        return block

    def _from_driver(self, pool: _Pool, size: int) -> _Block | None:
        nbytes = self.segment_bytes(size)
        reserved = self.reserved_bytes.current
        if self.allowed_bytes is not None and reserved + nbytes > self.allowed_bytes:
            return None
        if self._expandable:
            return self._expand(pool, size)
        if reserved + nbytes > self.capacity_bytes:
            return None
        self.reserved_bytes.add(nbytes)
        return self._new_segment(pool, nbytes, mapped=True)

    def _new_segment(self, pool: _Pool, nbytes: int, mapped: bool) -> _Block:
        address = self._next_address
        self._next_address += -(-nbytes // ROUND_LARGE_BYTES) * ROUND_LARGE_BYTES
        block = self._heads[address] = _Block(pool, address, nbytes, address, mapped)
        return block

    def _occupy(self, pool: _Pool, block: _Block, size: int) -> None:
        """Mark `block` allocated, splitting off what should_split lets go (alloc_found_block)."""
        was_split, rest_bytes = block.prev is not None or block.next is not None, block.size - size
        block.allocated = True
        if pool.is_small or self._expandable:
            splits = rest_bytes >= MIN_BLOCK_BYTES
        else:
            splits = rest_bytes > SMALL_BYTES and size < self._max_split_bytes
        if splits:
            pool.insert(block.carve(size, mapped=True))
        if not self._expandable:
            if was_split:
                self.inactive_split_bytes.current -= block.size
            elif splits:
                self.inactive_split_bytes.add(rest_bytes)

    def _merge(self, block: _Block) -> _Block:
        """Merge an unlisted free block with equal neighbours and return it."""
        pool = block.pool
        previous, following = block.prev, block.next
        if following is not None and not following.allocated and following.mapped == block.mapped:
            pool.remove(following)
            block.absorb_next()
        if previous is not None and not previous.allocated and previous.mapped == block.mapped:
            pool.remove(previous)
            previous.absorb_next()
            block = previous
        return block

    def _release(self, block: _Block) -> None:
        block.pool.remove(block)
        del self._heads[block.address]
        self.reserved_bytes.current -= block.size
        self.num_device_free += 1

    def _release_oversize(self, pool: _Pool, size: int) -> bool:
        """Free one cached block that is large enough, or the largest ones until they sum up to it."""
        if self._max_split_bytes == _UNLIMITED or self._expandable:
            return False
        target = max(size, self._max_split_bytes)
        index = pool.lower_bound(target)
        if index < len(pool.free):
            self._release(pool.free[index][2])
            return True
        released = 0
        while released < target and pool.free and pool.free[-1][0] >= self._max_split_bytes:
            released += pool.free[-1][0]
            self._release(pool.free[-1][2])
        return released >= target

    def _collect_garbage(self) -> None:
        """Free cached large blocks of at least average age until reserved falls under the threshold."""
        assert self.allowed_bytes is not None
        threshold = int(self.config.garbage_collection_threshold * self.allowed_bytes)
        target = self.reserved_bytes.current - threshold
        pool = self._large
        idle = [] if self._expandable else [block for _, _, block in pool.free if not block.is_split]
        while target > 0 and idle:
            age = sum(pool.searches - block.born for block in idle) / len(idle)
            for block in (old := [b for b in idle if pool.searches - b.born >= age]):
                target -= block.size
                self._release(block)
            idle = [block for block in idle if block not in old]

    def _expand(self, pool: _Pool, size: int) -> _Block | None:
        """Map pages at the lowest address with room for `size` (try_allocate_expandable_block)."""
        block = self._expandable_room(pool, size)
        if not block.mapped:
            mapped = self._map(block, min(block.size, size))
            if mapped is None:
                return None
            block = mapped
        while block.size < size:
            following = block.next
            assert following is not None
            mapped = self._map(following, min(size - block.size, following.size))
            if mapped is None:
                return None
            block = mapped
        pool.remove(block)
        return block

    def _expandable_room(self, pool: _Pool, size: int) -> _Block:
        for _, start in pool.unmapped:
            previous = start.prev
            block = previous if previous is not None and not previous.allocated else start
            room, cursor = 0, block
            while room < size and not cursor.allocated:
                room += cursor.size
                if cursor.next is None:
                    break
                cursor = cursor.next
            if room >= size:
                return block
        page = self._page_bytes(pool)
        space = min(self.total_memory_bytes, _UNLIMITED >> 8)
        fresh = self._new_segment(pool, -(-(space + space // 8) // page) * page, mapped=False)
        pool.insert(fresh)
        return fresh

    def _page_bytes(self, pool: _Pool) -> int:
        return SMALL_SEGMENT_BYTES if pool.is_small else self._large_bytes

    def _map(self, block: _Block, size: int) -> _Block | None:
        """Map whole pages over the first `size` bytes of an unmapped block; None if the device is full."""
        page = self._page_bytes(block.pool)
        nbytes = -(-size // page) * page
        if self.reserved_bytes.current + nbytes > self.capacity_bytes:
            return None
        block.pool.remove(block)
        block.mapped = True
        if nbytes < block.size:
            block.pool.insert(block.carve(nbytes, mapped=False))
        self.reserved_bytes.add(nbytes)
        merged = self._merge(block)
        merged.pool.insert(merged)
        return merged

    def _unmap(self, block: _Block) -> None:
        """Unmap the whole pages inside a free block; drop the segment where nothing else is left."""
        pool, page = block.pool, self._page_bytes(block.pool)
        begin = -(-(block.address - block.base) // page) * page + block.base
        end = (block.address + block.size - block.base) // page * page + block.base
        if begin >= end:
            return
        pool.remove(block)
        if begin > block.address:
            inner = block.carve(begin - block.address, mapped=True)
            pool.insert(block)
            block = inner
        if end < block.address + block.size:
            pool.insert(block.carve(end - block.address, mapped=True))
        block.mapped = False
        self.reserved_bytes.current -= block.size
        self.num_device_free += 1
        merged = self._merge(block)
        if merged.is_split:
            pool.insert(merged)
        else:
            del self._heads[merged.address]

    def _out_of_memory(self, nbytes: int, size: int) -> OutOfMemoryError:
        self.num_ooms += 1
        reserved = self.reserved_bytes.current
        report = OutOfMemory(
            requested_bytes=nbytes,
            tried_bytes=self.segment_bytes(size),
            total_bytes=self.total_memory_bytes,
            free_bytes=min(self.capacity_bytes, self.total_memory_bytes) - reserved,
            allowed_bytes=self.allowed_bytes,
            allocated_bytes=self.allocated_bytes.current,
            reserved_bytes=reserved,
        )
        return OutOfMemoryError(report)


def _reach(block: _Block) -> int:
    """Bytes a free expandable block can grow to."""
    following = block.next
    return block.size + (following.size if following is not None and not following.mapped else 0)


def _mapped_runs(head: _Block) -> Iterator[list[_Block]]:
    run: list[_Block] = []
    cursor: _Block | None = head
    while cursor is not None:
        if cursor.mapped:
            run.append(cursor)
        elif run:
            yield run
            run = []
        cursor = cursor.next
    if run:
        yield run


def _segment_info(run: list[_Block], is_expandable: bool) -> SegmentInfo:
    blocks = tuple(BlockInfo(b.address, b.size, b.requested, b.allocated) for b in run)
    kind = "small" if run[0].pool.is_small else "large"
    return SegmentInfo(run[0].address, sum(b.size for b in run), kind, is_expandable, blocks)
