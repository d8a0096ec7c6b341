"""Larger images that need less: what is reserved does not grow with every step of a side.

A tensor of whole multiples of 2 MiB fills its segment, so nothing is left over for others to reuse; at the next size
it leaves a rest that they take, and a segment less is opened.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import product

from derivation.allocator.everywhere import reserved_bytes
from derivation.allocator.memory import weight_bytes
from derivation.allocator.opened import Opened, Requests
from derivation.allocator.symbolic import Points
from derivation.api import Derivation
from derivation.call import Call
from derivation.errors import DerivationError

# Larger sides that are looked at: the next multiples of STEP, up to REACH pixels away.
STEP, REACH = 64, 128
MOST = 2


@dataclass(frozen=True, slots=True)
class Nearby:
    """A larger image, what the allocator reserves for it, and how much less that is."""

    height: int
    width: int
    reserved_bytes: int
    saves_bytes: int


def cheaper_sizes(derivation: Derivation, call: Call) -> tuple[Nearby, ...]:
    """Return at most two images that are no smaller than the call's and reserve less, the cheapest first.

    On a card that has room for both; none without a GPU, or where the allocator is configured or empties its cache.
    """
    if derivation.options.gpu is None or derivation.options.alloc_conf:
        return ()
    variant = derivation.program(call.guidance).at(derivation.sizes(call))
    near = [call, *(other for other in _larger(derivation, call) if variant.holds(derivation.sizes(other)))]
    points = Points([derivation.sizes(other) for other in near])
    try:
        requests = Requests(variant.tape, weight_bytes(derivation.resident), points)
    except DerivationError:
        return ()
    asked, *others = reserved_bytes(Opened(requests, is_small=True), Opened(requests, is_small=False)).tolist()
    found = sorted((n, other.height, other.width) for n, other in zip(others, near[1:], strict=True) if n < asked)
    return tuple(Nearby(height, width, n, asked - n) for n, height, width in found[:MOST])


def _larger(derivation: Derivation, call: Call) -> Iterator[Call]:
    """Yield calls of the next multiples of 64 that the pipeline accepts, one side or both."""
    sides = (
        [side, *range(-(-(side + 1) // STEP) * STEP, side + REACH + 1, STEP)] for side in (call.height, call.width)
    )
    for height, width in product(*sides):
        larger = replace(call, height=height, width=width)
        with suppress(DerivationError):
            derivation.sizes(larger)
            if larger != call:
                yield larger
