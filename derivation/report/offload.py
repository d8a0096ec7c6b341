"""The answer without offload, with model offload and with sequential offload, side by side."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

from derivation.api import Derivation
from derivation.errors import DerivationError
from derivation.options.choices import OFFLOADS
from derivation.report.answer import SIZES, square_peaks, stage_title
from derivation.report.text import PixelTerms, as_pixel_terms, value_at, values_at

TITLES = {
    None: "All models on the GPU",
    "model": "enable_model_cpu_offload()",
    "sequential": "enable_sequential_cpu_offload()",
}


@dataclass(frozen=True, slots=True)
class OffloadRow:
    """One way to place the models: weights that stay, the polynomials beyond them, exact peaks at SIZES."""

    title: str
    weights_bytes: int
    polynomials: tuple[PixelTerms, ...]
    totals: tuple[int, ...]
    stages: tuple[str, ...]
    own: bool


def placements(d: Derivation) -> tuple[OffloadRow, ...]:
    """Return the rows of a whole pipeline, "own" where a row is the report's; those that can be derived."""
    rows = []
    for offload in (None, *OFFLOADS):
        with suppress(DerivationError):
            own = offload == d.options.offload
            rows.append(_row(d if own else Derivation(d.subject.changed(offload=offload), d.fixed), own))
    return tuple(rows)


def _row(d: Derivation, own: bool) -> OffloadRow:
    peaks = [square_peaks(d, side) for side in SIZES]
    least = values_at(d.grid, SIZES[0], SIZES[0], d.prompt_length, 1)
    winners = [max(p, key=lambda name: p[name]) for p in peaks]
    polynomials = [as_pixel_terms(term.expression) for term in d.equation.pipeline_stage().terms]
    return OffloadRow(
        title=TITLES[d.options.offload],
        weights_bytes=d.weights_bytes,
        polynomials=tuple(sorted(polynomials, key=lambda terms: value_at(terms, least), reverse=True)),
        totals=tuple(d.weights_bytes + p[name] for p, name in zip(peaks, winners, strict=True)),
        stages=tuple(stage_title(name) for name in winners),
        own=own,
    )
