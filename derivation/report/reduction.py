"""How many program points compete, which survive, and the proof behind each large one that was dropped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from derivation.api import Derivation
from derivation.peak.dominance import MIX, MIX_AMONG
from derivation.peak.headline import Term
from derivation.peak.liveness import Point, local_maxima
from derivation.peak.proof import margin, proven_nonnegative
from derivation.peak.record import Record, StageRecord
from derivation.report.answer import PIPELINE, reference_side, stage_title
from derivation.report.text import PixelTerms, as_pixel_terms, size_text
from derivation.tape.symbols import ceil512, evaluate
from derivation.tape.tape import Tape

PROOFS_SHOWN = 6
DIRECT = "every coefficient is ≥ 0"
SHIFTED = "every coefficient is ≥ 0 once each symbol is written as its lower bound plus a shift"


@dataclass(frozen=True, slots=True)
class Candidate:
    """A program point: module, operator and the exact bytes alive at the reference size."""

    label: str
    module: str
    op: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class Proof:
    """Why a candidate was dropped: the survivors (with weights) that dominate it, the margin, the theorem."""

    candidate: Candidate
    uppers: tuple[tuple[str, int], ...]
    weight: int
    margin: str
    theorem: str


@dataclass(frozen=True, slots=True)
class StageReduction:
    """The reduction of one stage."""

    name: str
    title: str
    candidates: int
    dominated: int
    unproven: int
    printed: int
    kept: tuple[Candidate, ...]
    proofs: tuple[Proof, ...]
    steps: tuple[Step, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """A printed polynomial in every level's sides, in the deepest level's, and in the image's."""

    label: str
    levels: str
    deepest: str
    terms: PixelTerms


def reductions(d: Derivation) -> tuple[StageReduction, ...]:
    """Return the reduction of every stage under guidance."""
    record = d.record()
    points = local_maxima(record.tape)
    side = reference_side(d)
    values = d.sizes(side, side, 1, d.prompt_length)
    return tuple(
        _stage(stage, record, [p for p in points if p.stage == name], values) for name, stage in record.stages.items()
    )


def _stage(stage: StageRecord, record: Record, points: Sequence[Point], values: Mapping[str, int]) -> StageReduction:
    kept = sorted(stage.reduction.kept, key=lambda p: -_bytes(p, values))
    labels = {id(p): f"P{i}" for i, p in enumerate(kept, 1)}
    survivors = {(p.event, p.terms) for p in kept}
    dropped = sorted((p for p in points if (p.event, p.terms) not in survivors), key=lambda p: -_bytes(p, values))
    places = {_place(p, record.tape): p for p in reversed(dropped)}
    shown = sorted(places.values(), key=lambda p: -_bytes(p, values))[:PROOFS_SHOWN]
    found = (_proof(p, kept, labels, record.tape, values) for p in shown)
    return StageReduction(
        name=stage.name,
        title=stage_title(stage.name),
        candidates=stage.reduction.candidates,
        dominated=stage.reduction.dominated,
        unproven=stage.reduction.unproven,
        printed=len(stage.terms),
        kept=tuple(_candidate(p, record.tape, values, labels[id(p)]) for p in kept),
        proofs=tuple(proof for proof in found if proof is not None),
        steps=tuple(_step(term, kept, labels) for term in stage.terms),
    )


def _step(term: Term, kept: Sequence[Point], labels: Mapping[int, str]) -> Step:
    point = next(p for p in kept if p.event == term.point.event)
    levels, deepest = size_text(point.raw()), size_text(term.polynomial)
    return Step(labels[id(point)], levels, deepest, as_pixel_terms(term.expression))


def _bytes(point: Point, values: Mapping[str, int]) -> int:
    return sum(ceil512(evaluate(n, values)) * evaluate(count, values) for n, count in point.terms)


def _candidate(point: Point, tape: Tape, values: Mapping[str, int], label: str) -> Candidate:
    return Candidate(label, *_place(point, tape), _bytes(point, values))


def _place(point: Point, tape: Tape) -> tuple[str, str]:
    """Return the module and operator whose storage appears or dies at a point."""
    if point.event < 0:
        return "(before the first event)", ""
    allocation = tape.allocations[abs(tape.events[point.event]) - 1]
    return allocation.path or PIPELINE, allocation.op


def _proof(
    lower: Point, kept: Sequence[Point], labels: Mapping[int, str], tape: Tape, values: Mapping[str, int]
) -> Proof | None:
    for uppers in _mixtures(kept):
        if any(p.max_length not in (None, lower.max_length) for p, _ in uppers):
            continue
        weight = sum(w for _, w in uppers)
        if sum(w * _bytes(p, values) for p, w in uppers) < weight * _bytes(lower, values):
            continue
        difference = margin(uppers, lower)
        if proven_nonnegative(difference, lower):
            direct = all(c >= 0 for c in difference.values())
            return Proof(
                candidate=_candidate(lower, tape, values, ""),
                uppers=tuple((labels[id(p)], w) for p, w in uppers),
                weight=weight,
                margin=size_text(difference),
                theorem=DIRECT if direct else SHIFTED,
            )
    return None


def _mixtures(kept: Sequence[Point]) -> Iterator[tuple[tuple[Point, int], ...]]:
    """Yield single survivors, then weighted pairs of the largest."""
    yield from (((p, 1),) for p in kept)
    for a, b in combinations(kept[:MIX_AMONG], 2):
        yield from (((a, t), (b, MIX - t)) for t in range(1, MIX))
