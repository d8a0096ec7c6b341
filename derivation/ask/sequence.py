"""Several calls in one process, one after another: what the allocator keeps for the next one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from derivation.allocator.allocator import CachingAllocator
from derivation.allocator.memory import (
    DeviceMemory,
    allocator_of,
    failed_at,
    figures,
    load_pipeline,
    weight_bytes,
)
from derivation.allocator.replay import ReplayResult
from derivation.allocator.report import OutOfMemoryError
from derivation.allocator.simulate import one_by_one, replay
from derivation.api import Derivation
from derivation.call import Call
from derivation.errors import unsupported
from derivation.gpu.cards import lookup
from derivation.tape.events import Allocation, Category
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


@dataclass(slots=True)
class _Process:
    """What stays from call to call: the allocator, weights by path, the libraries' workspaces by operator."""

    allocator: CachingAllocator
    weights: dict[str, int]
    workspaces: dict[str, int] = field(default_factory=dict)

    @property
    def cached(self) -> int:
        return self.allocator.reserved_bytes.current - self.allocator.allocated_bytes.current

    def leave(self, result: ReplayResult, allocations: Sequence[Allocation]) -> None:
        """Free what a call leaves, but for weights that it loaded again and workspaces."""
        for tensor, handle in result.live.items():
            a = allocations[tensor]
            if a.category is Category.WEIGHT:
                self.weights[a.path] = handle
            elif a.category is Category.SCRATCH:
                self.workspaces[a.op] = handle
            else:
                self.allocator.free(handle)


def sequence(derivation: Derivation, calls: Iterable[Call], empty_cache: bool = False) -> tuple[Turn, ...]:
    """Return what each of some calls needs after those before it, up to the first that does not fit.

    With ``empty_cache`` the program calls torch.cuda.empty_cache() after each. Raises DerivationError without a GPU,
    for a pipeline whose calls do not leave the weights as they found them, and where these alone do not fit.
    """
    gpu = derivation.options.gpu
    if gpu is None:
        raise unsupported("gpu", None, "a GPU's name, for what its allocator keeps")
    allocator = allocator_of(lookup(gpu), derivation.options.alloc_conf, CachingAllocator)
    try:
        process = _Process(allocator, load_pipeline(allocator, derivation.resident))
    except OutOfMemoryError as error:
        raise unsupported("gpu", gpu, f"a card with room for the weights: {error}") from None
    loaded, turns = allocator.reserved_bytes.current, list[Turn]()
    for call in calls:
        turns.append(_turn(process, derivation, call, loaded, empty_cache))
        if turns[-1].memory.failed:
            break
    return tuple(turns)


def _turn(process: _Process, derivation: Derivation, call: Call, loaded: int, empty_cache: bool) -> Turn:
    gpu, values = str(derivation.options.gpu), derivation.sizes(call)
    tape = derivation.program(call.guidance).at(values).tape
    allocations, before = list(one_by_one(tape, values)), process.cached
    held = {i: process.workspaces[a.op] for i, a in enumerate(allocations) if a.op in process.workspaces}
    result = replay(tape, values, process.weights).holding(held).run(process.allocator)
    failed = failed_at(result.out_of_memory, tape, values)
    process.leave(result, allocations)
    if not failed:
        _check_weights(derivation, allocations, result)
    if empty_cache:
        process.allocator.empty_cache()
    memory = figures(lookup(gpu), result, loaded, failed)
    return Turn(call, memory, on_card(gpu, memory), before, process.cached)


def _check_weights(derivation: Derivation, allocations: Sequence[Allocation], result: ReplayResult) -> None:
    """Raise DerivationError where a call's weights are not at its end what they were before it."""
    expected = weight_bytes(derivation.resident)
    dropped = {a.path for i, a in enumerate(allocations) if a.loaded and i not in result.live}
    left = (allocations[tensor] for tensor in result.live)
    found = {a.path: a.nbytes for a in left if a.category is Category.WEIGHT}
    if dropped - found.keys() or any(expected.get(path) != nbytes for path, nbytes in found.items()):
        raise unsupported("then", "a further call", "pipelines whose calls leave the weights as they found them")
