"""The sizes up to which 64-bit integers are proven to suffice."""

from __future__ import annotations

from dataclasses import dataclass

from derivation.equation.derived import Derived
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


def limits(derived: Derived, function: Function) -> Limits:
    """Return the largest sides, halved from the most that is accepted, so that no value reaches 2^63.

    Theorem: every live set grows with each size, and so does every intermediate value, of which a point's bytes
    are a sum with counts >= 0; so the largest is at the corner of the domain, below 2 max(cases) there. Cut VAE
    tiles, which do not grow, are below a whole one.
    """
    length, batch = derived.fixed.get("L", MAX_LENGTH), derived.fixed.get("B", MAX_BATCH)
    side = derived.sides.most
    while side > derived.sides.least and _largest(derived, function, side, length, batch) >= MAX_BYTES:
        side //= 2
    return Limits(side, length, batch)


def _largest(derived: Derived, function: Function, side: int, length: int, batch: int) -> int:
    names = {"height": side, "width": side, "L": length, "B": batch, WEIGHTS: derived.weights_bytes}
    for let in function.sides:
        names[let.name] = names[f"T{let.name[1]}"] if let.name[0] in "RQ" else value(let.value, names)
    largest = 0
    for case in (case for listed in function.cases.values() for case in listed):
        inside = dict(names)
        for let in case.lets:
            inside[let.name] = value(let.value, inside)
        largest = max(largest, value(case.result, inside))
    return largest
