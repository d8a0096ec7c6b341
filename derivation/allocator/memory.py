"""From a tape to what torch.cuda and nvidia-smi show on one card: weights, allocator replay, context."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from math import prod
from typing import Any, TypeVar

from derivation.allocator.allocator import CachingAllocator
from derivation.allocator.config import AllocatorConfig
from derivation.allocator.replay import OutOfMemoryEvent, ReplayResult, load_weights
from derivation.allocator.report import OutOfMemory, OutOfMemoryError
from derivation.allocator.simulate import one_by_one, replay
from derivation.gpu.cards import Gpu, lookup
from derivation.options import Options
from derivation.tape.symbols import DTYPE_BYTES, evaluate
from derivation.tape.tape import Tape
from derivation.walk.pipelines.weights import registered

A = TypeVar("A", bound=CachingAllocator)
IN_BYTES = ("requested", "allocated", "reserved", "device", "device_before_run", "total", "context")
Parameters = Mapping[str, Mapping[str, tuple[tuple[int, ...], str]]]


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Peaks in bytes over loading and one call, named as torch.cuda.memory_stats names them.

    ``device`` is nvidia-smi's used memory: reserved plus the CUDA context; ``device_before_run`` the same
    with weights only. Unknown figures are None. Where the call runs out of memory the peaks are those reached until
    then, and ``failed`` is the request that failed. ``slower_convolutions`` counts convolutions whose workspace did
    not fit, so that cuDNN's next plan runs.
    """

    requested: int
    allocated: int
    reserved: int
    device: int | None
    device_before_run: int | None
    total: int | None
    context: int | None
    context_source: str
    num_alloc_retries: int
    fragmentation: float
    slower_convolutions: int
    failed: dict[str, Any] | None

    def as_dict(self) -> dict[str, Any]:
        """Return the fields by name, ready for JSON; those in bytes end so."""
        return {f"{name}_bytes" if name in IN_BYTES else name: value for name, value in asdict(self).items()}


def device_memory(
    gpu: str, parameters: Parameters, tape: Tape, values: Mapping[str, int], alloc_conf: str | None = None
) -> DeviceMemory:
    """Load the weights, replay ``tape`` at ``values``, add the context.

    ``alloc_conf`` is what PYTORCH_CUDA_ALLOC_CONF holds. Raises DerivationError for an unknown GPU or an option of it
    that is not supported.
    """
    card = lookup(gpu)
    allocator = allocator_of(card, alloc_conf, CachingAllocator)
    try:
        weights = load_pipeline(allocator, parameters)
    except OutOfMemoryError as error:
        failed = _failed("the weights, while they are loaded", "load", (), error.report)
        return figures(card, replay(Tape(Options()), {}).run(allocator), None, failed)
    loaded = allocator.reserved_bytes.current
    result = replay(tape, values, weights).run(allocator)
    return figures(card, result, loaded, failed_at(result.out_of_memory, tape, values))


def figures(card: Gpu, result: ReplayResult, loaded: int | None, failed: dict[str, Any] | None) -> DeviceMemory:
    """Return what a replay on a card says: ``loaded`` bytes are reserved for the weights, None where they failed."""
    context, source = context_of(card)
    reserved = result.reserved_bytes.nbytes
    device = None if context is None else reserved + context
    return DeviceMemory(
        requested=result.requested_bytes.nbytes,
        allocated=result.allocated_bytes.nbytes,
        reserved=reserved,
        device=device,
        device_before_run=None if context is None or loaded is None else loaded + context,
        total=card.total_memory_bytes,
        context=context,
        context_source=source,
        num_alloc_retries=result.num_alloc_retries,
        fragmentation=result.fragmentation.ratio,
        slower_convolutions=result.left_out,
        failed=failed,
    )


def allocator_of(card: Gpu, alloc_conf: str | None, kind: type[A]) -> A:
    """Return a new allocator with what the card has beside the context; raises DerivationError for ``alloc_conf``."""
    total, (context, _) = card.total_memory_bytes, context_of(card)
    capacity = None if total is None else total - (context or 0)
    return kind(AllocatorConfig.parse(alloc_conf or ""), capacity, total)


def load_pipeline(allocator: CachingAllocator, parameters: Parameters) -> dict[str, int]:
    """Allocate the weights as ``pipe.to("cuda")`` does and return each parameter's handle; raises OutOfMemoryError.

    pipeline_utils.py (``_get_signature_keys``): the models in alphabetical order, since diffusers 0.33.
    """
    weights = weight_bytes(parameters)
    return dict(zip(weights, load_weights(allocator, weights.values()), strict=True))


def weight_bytes(parameters: Parameters) -> dict[str, int]:
    """Return each parameter's bytes in the order in which ``pipe.to("cuda")`` loads them."""
    models = (parameters[model] for model in sorted(parameters))
    entries = ((path, *model[path]) for model in models for path in registered(model))
    return {path: prod(shape) * DTYPE_BYTES[dtype] for path, shape, dtype in entries}


def context_of(card: Gpu) -> tuple[int | None, str]:
    """Return the bytes of a CUDA context and the card they were read on."""
    if card.context_bytes is not None:
        return card.context_bytes, card.name
    nearest = card.nearest_context()
    return (None, "unknown") if nearest is None else (nearest[0], f"nearest documented card: {nearest[1].name}")


def failed_at(event: OutOfMemoryEvent | None, tape: Tape, values: Mapping[str, int]) -> dict[str, Any] | None:
    """Return the request that failed: its module path, or the operator outside modules; None where none did."""
    if event is None:
        return None
    a = next(islice(one_by_one(tape, values), event.tensor, None))
    shape = tuple(evaluate(dim, values) for dim in a.shape)
    return _failed(a.path or f"the pipeline's {a.op}", a.op, shape, event.report)


def _failed(module: str, op: str, shape: tuple[int, ...], report: OutOfMemory) -> dict[str, Any]:
    short = max(report.tried_bytes - report.free_bytes, 0)
    sizes = {"requested_bytes": report.requested_bytes, "free_bytes": report.free_bytes, "short_bytes": short}
    return {"module": module, "op": op, "shape": list(shape), **sizes}
