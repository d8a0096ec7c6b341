"""Two event streams side by side: what each allocates, in order, and what died before; and the plainest peak sum."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from derivation.tape.events import Allocation
from derivation.tape.symbols import ceil512, evaluate
from derivation.tape.tape import Tape


@dataclass(frozen=True, slots=True)
class Birth:
    """An allocation, its bytes, and the bytes that died since the one before (-> how many storages)."""

    nbytes: Any
    died: Counter[Any]
    made: Allocation

    def same(self, other: Birth) -> bool:
        """Return True if both allocate and free the same sizes."""
        return bool(self.nbytes == other.nbytes) and self.died == other.died

    def __str__(self) -> str:
        deaths = ", ".join(f"{count} x {nbytes}" for nbytes, count in self.died.items()) or "nothing"
        where = f"{self.made.path} {self.made.op} {list(self.made.shape)}"
        return f"{self.nbytes} B at {where} after the death of {deaths}"


def births(tape: Tape, size: Callable[[Allocation], tuple[Hashable, int]]) -> list[Birth]:
    """Return the allocations of a tape, loops unrolled; ``size`` gives each one's bytes and how many alike it is.

    Storages that die between the same two allocations have no order.
    """
    found: list[Birth] = []
    died: Counter[Any] = Counter()
    sizes = {identity: size(a) for identity, a in {id(a): a for a in tape.allocations}.items()}
    for event in unrolled(tape):
        allocation = tape.allocations[abs(event) - 1]
        nbytes, count = sizes[id(allocation)]
        if event < 0:
            died[nbytes] += count
            continue
        for _ in range(count):
            found.append(Birth(nbytes, died, allocation))
            died = Counter()
    return found


def births_at(tape: Tape, values: Mapping[str, int]) -> list[Birth]:
    """Return the allocations of a tape at ``values``."""
    return births(tape, lambda a: (evaluate(a.nbytes, values), evaluate(a.count, values)))


def parting(derived: list[Birth], traced: list[Birth]) -> str | None:
    """Return where two streams part, in one sentence, or None where they are the same."""
    for i, (ours, theirs) in enumerate(zip(derived, traced, strict=False)):
        if not ours.same(theirs):
            return f"allocation {i}: derived {ours}, traced {theirs}"
    if len(derived) != len(traced):
        return f"derived {len(derived)} allocations, traced {len(traced)}"
    return None


def unrolled(tape: Tape) -> Iterator[int]:
    """Yield the tape's events in program order, loops repeated."""
    position = 0
    for start, end, times in tape.loops:
        yield from tape.events[position:start]
        for _ in range(times):
            yield from tape.events[start:end]
        position = end
    yield from tape.events[position:]


def naive_peaks(tape: Tape) -> dict[str, int]:
    """Return each stage's most live bytes of a tape of integers: one running sum, independent of the evaluator."""
    begins = {mark.event: mark.stage for mark in tape.marks}
    peaks: dict[str, int] = {}
    stage, live = begins.get(0, ""), 0
    for i, event in enumerate(tape.events):
        stage = begins.get(i, stage)
        nbytes = ceil512(int(tape.allocations[abs(event) - 1].nbytes))
        before, live = live, live + (nbytes if event > 0 else -nbytes)
        peaks[stage] = max(peaks.get(stage, before), before, live)
    return peaks


def naive_peak(tape: Tape) -> int:
    """Return the most live bytes of a tape of integers."""
    return max(naive_peaks(tape).values(), default=0)
