"""The sizes up to which 64-bit integers are proven to suffice."""

from __future__ import annotations

from dataclasses import dataclass

from derivation.api import MAX_SIDE_PIXELS
from derivation.equation.expression import value
from derivation.equation.function import WEIGHTS, Function

MAX_BYTES = 2**62
MAX_BATCH = 1024
MAX_LENGTH = 65536


@dataclass(frozen=True, slots=True)
class Limits:
    """The largest image side in pixels, prompt length and batch size that are accepted."""

    side: int
    prompt_length: int
    batch_size: int


def limits(function: Function) -> Limits:
    """Return the largest power of two for the sides, so that no value reaches 2^63.

    Theorem: every live set grows with each size, and so does every intermediate value, of which a point's bytes
    are a sum with counts >= 0; so the largest is at the corner of the domain, below 2 max(cases) there. Cut VAE
    tiles, which do not grow, are below a whole one.
    """
    length, batch = function.fixed.get("L", MAX_LENGTH), function.fixed.get("B", MAX_BATCH)
    side = MAX_SIDE_PIXELS
    while side > function.factor and _largest(function, side, length, batch) >= MAX_BYTES:
        side //= 2
    return Limits(side, length, batch)


def _largest(function: Function, side: int, length: int, batch: int) -> int:
    weights = function.derivation.weights_bytes
    names = {"height": side, "width": side, "L": length, "B": batch, WEIGHTS: weights}
    for let in function.sides:
        names[let.name] = names[f"T{let.name[1]}"] if let.name[0] in "RQ" else value(let.value, names)
    largest = 0
    for case in (case for listed in function.cases.values() for case in listed):
        inside = dict(names)
        for let in case.lets:
            inside[let.name] = value(let.value, inside)
        largest = max(largest, value(case.result, inside))
    return largest
