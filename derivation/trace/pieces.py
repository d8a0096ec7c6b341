"""Prompt lengths between which one tape reaches: a model may cut long prompts, a template hold short ones."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable

from derivation.tape.grid import Range
from derivation.tape.tape import Tape
from derivation.trace.interpolate import Parted, Values, check, fit

# Of fewer lengths no part says what the others are.
LEAST = 16


def pieces(run: Callable[[Values], Tape], base: Values, whole: Range) -> list[Range]:
    """Return ``whole``, the values of L, in parts of one tape each at ``base``; empty where its middle is no part.

    Lengths below and above the part that holds the middle are left out where they are not one part each.
    """
    lengths = list(whole)
    if len(lengths) < LEAST:
        return []
    core = lengths[len(lengths) // 4 : 3 * len(lengths) // 4]
    tape = _fitted(run, base, core)
    if tape is None:
        return []

    def fits(length: int) -> bool:
        values = {**base, "L": length}
        try:
            check(tape, run(values), base, values)
        except Parted:
            return False
        return True

    below, above = lengths[: lengths.index(core[0])], lengths[lengths.index(core[-1]) + 1 :]
    first = 0 if fits(below[0]) else bisect_left(below, True, key=fits)
    last = bisect_left(above, True, key=lambda length: not fits(length))
    parts = (below[:first], [*below[first:], *core, *above[:last]], above[last:])
    found = [p for p in parts if p and (p[0] <= core[0] <= p[-1] or _fitted(run, base, p) is not None)]
    return [Range(part[0], part[-1], whole.step) for part in found]


def _fitted(run: Callable[[Values], Tape], base: Values, lengths: list[int]) -> Tape | None:
    """Return one tape for some values of L, None where there is none."""
    through = list(dict.fromkeys(lengths[i * (len(lengths) - 1) // 3] for i in range(4)))
    held = {**base, "L": lengths[len(lengths) // 5]}
    try:
        return fit(run, [{**base, "L": length} for length in through], [held])
    except Parted:
        return None
