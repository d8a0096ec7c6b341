"""From a tape to what torch.cuda and nvidia-smi show on one card: weights, allocator replay, context, verdict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from math import prod
from typing import Any

from derivation.allocator.allocator import CachingAllocator
from derivation.allocator.replay import ReplayResult, load_weights
from derivation.allocator.simulate import replay
from derivation.gpu.cards import Gpu, lookup
from derivation.tape.symbols import DTYPE_BYTES, evaluate
from derivation.tape.tape import Tape
from derivation.walk.pipelines.weights import registered

Parameters = Mapping[str, Mapping[str, tuple[tuple[int, ...], str]]]


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Peaks in bytes over loading and one call, named as torch.cuda.memory_stats names them.

    ``device`` is nvidia-smi's used memory: reserved plus the CUDA context; ``device_before_run`` the same
    with weights only; ``headroom`` what is left of the card at the peak. Unknown figures are None.
    """

    requested: int
    allocated: int
    reserved: int
    device: int | None
    device_before_run: int | None
    total: int | None
    headroom: int | None
    context: int | None
    context_source: str
    num_alloc_retries: int
    fragmentation: float
    verdict: str

    def as_dict(self) -> dict[str, Any]:
        """Return the fields by name, ready for JSON."""
        return asdict(self)


def device_memory(gpu: str, parameters: Parameters, tape: Tape, values: Mapping[str, int]) -> DeviceMemory:
    """Load the weights, replay ``tape`` at ``values``, add the context; raises DerivationError for an unknown GPU."""
    card = lookup(gpu)
    context, source = _context(card)
    capacity = None if card.total_memory_bytes is None else card.total_memory_bytes - (context or 0)
    allocator = CachingAllocator(capacity_bytes=capacity)
    weights = load_pipeline(allocator, parameters)
    loaded = allocator.reserved_bytes.current
    result = replay(tape, values, weights).run(allocator)
    reserved = result.reserved_bytes.nbytes
    device = None if context is None else reserved + context
    total = card.total_memory_bytes
    return DeviceMemory(
        requested=result.requested_bytes.nbytes,
        allocated=result.allocated_bytes.nbytes,
        reserved=reserved,
        device=device,
        device_before_run=None if context is None else loaded + context,
        total=total,
        headroom=None if total is None or device is None else total - device,
        context=context,
        context_source=source,
        num_alloc_retries=result.num_alloc_retries,
        fragmentation=result.fragmentation.ratio,
        verdict=_verdict(result, tape, values, total),
    )


def load_pipeline(allocator: CachingAllocator, parameters: Parameters) -> dict[str, int]:
    """Allocate the weights as ``pipe.to("cuda")`` does and return each parameter's handle; raises OutOfMemoryError.

    pipeline_utils.py (``_get_signature_keys``): the models in alphabetical order, since diffusers 0.33.
    """
    models = (parameters[model] for model in sorted(parameters))
    entries = [(path, *model[path]) for model in models for path in registered(model)]
    handles = load_weights(allocator, (prod(shape) * DTYPE_BYTES[dtype] for _, shape, dtype in entries))
    return dict(zip((path for path, _, _ in entries), handles, strict=True))


def _context(card: Gpu) -> tuple[int | None, str]:
    """Return the bytes of a CUDA context and the card they were read on."""
    if card.context_bytes is not None:
        return card.context_bytes, card.name
    nearest = card.nearest_context()
    return (None, "unknown") if nearest is None else (nearest[0], f"nearest documented card: {nearest[1].name}")


def _verdict(result: ReplayResult, tape: Tape, values: Mapping[str, int], total: int | None) -> str:
    if total is None:
        return "no verdict: the architecture names no card"
    if result.out_of_memory is not None:
        return f"out of memory at {_place(result.out_of_memory.tensor, tape, values)}"
    return "fits only with allocator retries" if result.num_alloc_retries else "fits"


def _place(tensor: int, tape: Tape, values: Mapping[str, int]) -> str:
    """Return the module path (or the operator, outside modules) of a replayed tensor."""
    numbered = (a for a in tape.allocations for _ in range(evaluate(a.count, values)))
    allocation = next(islice(numbered, tensor, None))
    return allocation.path or f"the pipeline's {allocation.op}"
