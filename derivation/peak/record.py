"""config files -> tape -> live sets -> undominated peaks -> closed form."""

from __future__ import annotations

from dataclasses import dataclass

from derivation.peak.dominance import Reduction, reduce_points
from derivation.peak.headline import Term, headline
from derivation.peak.liveness import Point, local_maxima
from derivation.tape.grid import Grid
from derivation.tape.program import Recordings
from derivation.tape.tape import Tape


@dataclass(frozen=True, slots=True)
class StageRecord:
    """One stage: its undominated points at all sizes, and its headline polynomials."""

    name: str
    reduction: Reduction
    terms: tuple[Term, ...]


@dataclass(frozen=True, slots=True)
class Record:
    """Every intermediate of one derivation."""

    tape: Tape
    points: tuple[Point, ...]
    stages: dict[str, StageRecord]
    pipeline: StageRecord


def derive_record(program: Recordings, grid: Grid) -> Record:
    """Return the symbolic peaks of ``program``, stage by stage and over all of them."""
    variant = program.generic  # [configs] -> [alloc and free events]
    points = local_maxima(variant.tape, variant.evaluator)  # [events] -> [live sets: bytes polynomial -> count]
    names = dict.fromkeys(point.stage for point in points)
    stages = {  # [live sets] -> [undominated live sets] -> [polynomials in H, W, L, B]
        name: _stage(name, [point for point in points if point.stage == name], grid) for name in names
    }
    survivors = [point for stage in stages.values() for point in stage.reduction.kept]
    return Record(variant.tape, tuple(points), stages, _stage("pipeline", survivors, grid))


def _stage(name: str, points: list[Point], grid: Grid) -> StageRecord:
    reduction = reduce_points(points)
    return StageRecord(name, reduction, headline(reduction.kept, grid))
