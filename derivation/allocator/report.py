"""Sizes, counters, snapshots and errors of the caching allocator, named as torch names them."""

from dataclasses import dataclass

from derivation.allocator.config import ROUNDUP_INTERVALS

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
MIN_BLOCK_BYTES = 512  # kMinBlockSize
SMALL_BYTES = 1 * MIB  # kSmallSize: the largest request of the small pool
SMALL_SEGMENT_BYTES = 2 * MIB  # kSmallBuffer
MIN_LARGE_BYTES = 10 * MIB  # kMinLargeAlloc: from here on a request gets its own segment
ROUND_LARGE_BYTES = 2 * MIB  # kRoundLarge
LARGE_PAGE_BYTES = 20 * MIB  # kLargeBuffer: the pages of the large pool's expandable segments


def round_size(nbytes: int, divisions: tuple[int, ...] = (0,) * ROUNDUP_INTERVALS) -> int:
    """Bytes of the block a request is rounded to: 512s, or a fraction of its power of two.

    >>> round_size(1), round_size(1200, (4,) * 16), round_size(5 * 1048576, (4,) * 16) // 1048576
    (512, 1536, 5)
    """
    if nbytes < MIN_BLOCK_BYTES:
        return MIN_BLOCK_BYTES
    interval = min(max(nbytes.bit_length() - 21, 0), ROUNDUP_INTERVALS - 1)
    division = divisions[interval]
    step = MIN_BLOCK_BYTES
    if division > 1 and nbytes > MIN_BLOCK_BYTES * division:
        step = (1 << (nbytes.bit_length() - 1)) // division
    return -(-nbytes // step) * step


def segment_size(size: int, large_segment_bytes: int = LARGE_PAGE_BYTES) -> int:
    """Bytes asked of cudaMalloc for a block of `size` rounded bytes (get_allocation_size)."""
    if size <= SMALL_BYTES:
        return SMALL_SEGMENT_BYTES
    if size < MIN_LARGE_BYTES:
        return large_segment_bytes
    return -(-size // ROUND_LARGE_BYTES) * ROUND_LARGE_BYTES


def format_size(nbytes: int) -> str:
    """`nbytes` as torch's messages print it.

    >>> format_size(20 << 20)
    '20.00 MiB'
    """
    for unit, name in ((KIB, "bytes"), (MIB, "KiB"), (GIB, "MiB")):
        if nbytes <= unit:
            return f"{nbytes} bytes" if name == "bytes" else f"{nbytes / (unit >> 10):.2f} {name}"
    return f"{nbytes / GIB:.2f} GiB"


@dataclass(frozen=True, slots=True)
class OutOfMemory:
    """What torch's out-of-memory message carries, in bytes; `tried_bytes` is the segment, not the request."""

    requested_bytes: int
    tried_bytes: int
    total_bytes: int
    free_bytes: int
    allowed_bytes: int | None
    allocated_bytes: int
    reserved_bytes: int

    @property
    def message(self) -> str:
        """One line in torch's words."""
        allowed = "" if self.allowed_bytes is None else f"{format_size(self.allowed_bytes)} allowed; "
        return (
            f"CUDA out of memory. Tried to allocate {format_size(self.tried_bytes)}. GPU 0 has a total "
            f"capacity of {format_size(self.total_bytes)} of which {format_size(self.free_bytes)} is free. "
            f"{allowed}Of the allocated memory {format_size(self.allocated_bytes)} is allocated by PyTorch, "
            f"and {format_size(self.reserved_bytes - self.allocated_bytes)} is reserved by PyTorch but "
            "unallocated."
        )


class OutOfMemoryError(RuntimeError):
    """Raised by `malloc` where torch raises torch.OutOfMemoryError; `report` holds the figures."""

    def __init__(self, report: OutOfMemory) -> None:
        super().__init__(report.message)
        self.report = report


class Stat:
    """A counter in bytes with its peak since the last `reset_peak_memory_stats`."""

    __slots__ = ("current", "peak")

    def __init__(self) -> None:
        self.current = self.peak = 0

    def add(self, nbytes: int) -> None:
        """Change the counter, keeping the peak."""
        self.current = current = self.current + nbytes
        if current > self.peak:
            self.peak = current


@dataclass(frozen=True, slots=True)
class Fragmentation:
    """Reserved, allocated and largest free block, in bytes, at one moment."""

    reserved_bytes: int
    allocated_bytes: int
    largest_free_bytes: int

    @property
    def free_bytes(self) -> int:
        """Bytes reserved but not allocated."""
        return self.reserved_bytes - self.allocated_bytes

    @property
    def ratio(self) -> float:
        """Share of the free bytes outside the largest free block: 0 is one piece, towards 1 is dust."""
        return 1 - self.largest_free_bytes / self.free_bytes if self.free_bytes else 0.0


@dataclass(frozen=True, slots=True)
class BlockInfo:
    """A block in `snapshot`, in bytes; an inactive one has no requested size."""

    address: int
    size: int
    requested_size: int
    allocated: bool


@dataclass(frozen=True, slots=True)
class SegmentInfo:
    """A segment, or a mapped run of an expandable one, in `snapshot`, with its blocks by address."""

    address: int
    total_size: int
    segment_type: str
    is_expandable: bool
    blocks: tuple[BlockInfo, ...]
