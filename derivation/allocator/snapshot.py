"""The allocator's replay as ``torch.cuda.memory._snapshot`` has it: a file that PyTorch's memory_viz opens.

Fields and actions: torch/csrc/cuda/memory_snapshot.cpp and torch/cuda/_memory_viz.py of torch 2.13.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

from derivation.allocator.allocator import CachingAllocator, _Block, _Pool
from derivation.allocator.memory import Parameters, allocator_of, load_pipeline
from derivation.allocator.report import OutOfMemoryError, SegmentInfo
from derivation.allocator.simulate import one_by_one, replay
from derivation.gpu.cards import lookup
from derivation.tape.events import Allocation
from derivation.tape.tape import Tape

Frame = dict[str, Any]


class Request(int):
    """The bytes of a request that knows its allocation."""

    of: Allocation


class RecordingAllocator(CachingAllocator):
    """A caching allocator that keeps what it did, one entry an action, as ``device_traces`` holds them.

    Iterations of a loop that repeat an earlier one are played, and so kept, once.
    """

    entries: list[dict[str, Any]]

    def __init__(self, *given: Any, **named: Any) -> None:
        self.entries, self.frames = [], dict[int, list[Frame]]()
        super().__init__(*given, **named)

    @property
    def pools_are_apart(self) -> bool:
        """False, so that every iteration that is played is played in both pools."""
        return False

    def malloc(self, nbytes: int) -> int:
        """Allocate `nbytes` and return the handle; raises OutOfMemoryError."""
        frames = [_frame(nbytes.of)] if isinstance(nbytes, Request) else []
        try:
            handle = super().malloc(nbytes)
        except OutOfMemoryError as error:
            self._note("oom", 0, int(nbytes), frames, device_free=error.report.free_bytes)
            raise
        if handle:
            self.frames[handle] = frames
            self._note("alloc", handle, int(nbytes), frames)
        return handle

    def free(self, handle: int) -> None:
        """Give the block of `handle` back to its pool."""
        if handle:
            requested, frames = self._live[handle].requested, self.frames.pop(handle)
            for action in ("free_requested", "free_completed"):
                self._note(action, handle, int(requested), frames)
        super().free(handle)

    def name(self, handles: Mapping[str, int]) -> None:
        """Name allocations after parameters, by their handles."""
        paths = {handle: path for path, handle in handles.items()}
        for entry in self.entries:
            if entry["action"] == "alloc" and (path := paths.get(entry["addr"])) is not None:
                entry["frames"] = self.frames[entry["addr"]] = [{"filename": path, "line": 0, "name": "load"}]

    def _new_segment(self, pool: _Pool, nbytes: int, mapped: bool) -> _Block:
        block = super()._new_segment(pool, nbytes, mapped)
        if mapped:
            self._note("segment_alloc", block.address, nbytes, [])
        return block

    def _release(self, block: _Block) -> None:
        self._note("segment_free", block.address, block.size, [])
        super()._release(block)

    def _map(self, block: _Block, size: int) -> _Block | None:
        address, before = block.address, self.reserved_bytes.current
        mapped = super()._map(block, size)
        if mapped is not None:
            self._note("segment_map", address, self.reserved_bytes.current - before, [])
        return mapped

    def _unmap(self, block: _Block) -> None:
        page, before = self._page_bytes(block.pool), self.reserved_bytes.current
        address = block.base - (block.base - block.address) // page * page
        super()._unmap(block)
        if before > self.reserved_bytes.current:
            self._note("segment_unmap", address, before - self.reserved_bytes.current, [])

    def _note(self, action: str, address: int, size: int, frames: list[Frame], **more: int) -> None:
        order = {"stream": 0, "time_us": len(self.entries), "compile_context": "N/A"}
        self.entries.append({"action": action, "addr": address, "size": size, "frames": frames, **order, **more})


def snapshot(
    gpu: str, parameters: Parameters, tape: Tape, values: Mapping[str, int], alloc_conf: str | None = None
) -> dict[str, Any]:
    """Return the weights and ``tape`` at ``values`` on a card, ready to be pickled; sizes in bytes.

    A call that runs out of memory ends with its ``oom`` entry. Raises DerivationError for an unknown GPU.
    """
    allocator = allocator_of(lookup(gpu), alloc_conf, RecordingAllocator)
    with suppress(OutOfMemoryError):
        handles = load_pipeline(allocator, parameters)
        allocator.name(handles)
        run = replay(tape, values, handles)
        replace(run, sizes=list(_requests(tape, values, run.sizes))).run(allocator)
    return {
        "segments": [_segment(info, allocator) for info in allocator.snapshot()],
        "device_traces": [allocator.entries],
        "allocator_settings": {"PYTORCH_CUDA_ALLOC_CONF": alloc_conf or ""},
        "external_annotations": [],
    }


def _requests(tape: Tape, values: Mapping[str, int], sizes: Any) -> Iterator[Request]:
    for allocation, nbytes in zip(one_by_one(tape, values), sizes, strict=True):
        request = Request(nbytes)
        request.of = allocation
        yield request


def _frame(allocation: Allocation) -> Frame:
    return {"filename": allocation.path or "pipeline", "line": 0, "name": allocation.op}


def _segment(info: SegmentInfo, allocator: RecordingAllocator) -> dict[str, Any]:
    blocks: list[dict[str, Any]] = [
        {
            "address": b.address,
            "size": b.size,
            "requested_size": int(b.requested_size),
            "state": "active_allocated" if b.allocated else "inactive",
            "frames": allocator.frames.get(b.address, []),
        }
        for b in info.blocks
    ]
    used = [block for block in blocks if block["state"] == "active_allocated"]
    allocated = sum(block["size"] for block in used)
    return {
        "device": 0,
        "address": info.address,
        "total_size": info.total_size,
        "allocated_size": allocated,
        "active_size": allocated,
        "requested_size": sum(block["requested_size"] for block in used),
        "stream": 0,
        "segment_type": info.segment_type,
        "segment_pool_id": (0, 0),
        "is_expandable": info.is_expandable,
        "frames": [],
        "blocks": blocks,
    }
