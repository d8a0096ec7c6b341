"""Several calls in one process, one after another: what the allocator keeps for the next one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from derivation.allocator.allocator import CachingAllocator
from derivation.allocator.memory import DeviceMemory, allocator_of, failed_at, figures, load_pipeline
from derivation.allocator.report import OutOfMemoryError
from derivation.allocator.simulate import replay
from derivation.api import Derivation
from derivation.call import Call
from derivation.errors import unsupported
from derivation.gpu.cards import lookup
from derivation.verdict import Verdict, on_card


@dataclass(frozen=True, slots=True)
class Turn:
    """One call of several: the peaks during it, its verdict, and what was ``cached`` before and is after it.

    Cached bytes are reserved and not allocated.
    """

    call: Call
    memory: DeviceMemory
    verdict: Verdict
    cached_before_bytes: int
    cached_after_bytes: int

    def as_dict(self) -> dict[str, Any]:
        """Return the call, its figures and its verdict, ready for JSON."""
        cached = {"cached_before_bytes": self.cached_before_bytes, "cached_after_bytes": self.cached_after_bytes}
        return {**self.call.as_dict(), **self.memory.as_dict(), **self.verdict.as_dict(), **cached}


def sequence(derivation: Derivation, calls: Iterable[Call], empty_cache: bool = False) -> tuple[Turn, ...]:
    """Return what each of some calls needs after those before it, up to the first that does not fit.

    With ``empty_cache`` the program calls torch.cuda.empty_cache() after each. Raises DerivationError without a GPU,
    for a pipeline whose weights do not stay on the GPU as they are, and where these alone do not fit.
    """
    gpu = derivation.options.gpu
    if gpu is None:
        raise unsupported("gpu", None, "a GPU's name, for what its allocator keeps")
    card = lookup(gpu)
    allocator = allocator_of(card, derivation.options.alloc_conf, CachingAllocator)
    try:
        weights = load_pipeline(allocator, derivation.resident)
    except OutOfMemoryError as error:
        raise unsupported("gpu", gpu, f"a card with room for the weights: {error}") from None
    loaded, turns = allocator.reserved_bytes.current, list[Turn]()
    for call in calls:
        values = derivation.sizes(call)
        tape = derivation.program(call.guidance).at(values).tape
        if any(a.loaded for a in tape.allocations):
            raise unsupported("then", "a further call", "pipelines whose weights stay on the GPU in one dtype")
        before = _cached(allocator)
        result = replay(tape, values, weights).run(allocator)
        failed = failed_at(result.out_of_memory, tape, values)
        for handle in result.live.values():
            allocator.free(handle)
        if empty_cache:
            allocator.empty_cache()
        memory = figures(card, result, loaded, failed)
        turns.append(Turn(call, memory, on_card(gpu, memory), before, _cached(allocator)))
        if failed:
            break
    return tuple(turns)


def _cached(allocator: CachingAllocator) -> int:
    return allocator.reserved_bytes.current - allocator.allocated_bytes.current
