"""The answer without offload, with model offload and with sequential offload, side by side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from derivation.api import Derivation, derive
from derivation.options import OFFLOADS, Options
from derivation.report.answer import PROMPT_LENGTH, SIZES, square_peaks, stage_title
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


def placements(model: object, options: Options) -> tuple[OffloadRow, ...]:
    """Return the rows of a whole pipeline, "own" where a row has the options of the report; raises DerivationError."""
    chosen: dict[str, Any] = options.as_dict()
    derived = (derive(model, **{**chosen, "offload": offload}) for offload in (None, *OFFLOADS))
    return tuple(_row(d, d.options.offload == options.offload) for d in derived)


def _row(d: Derivation, own: bool) -> OffloadRow:
    peaks = [square_peaks(d, side) for side in SIZES]
    least = values_at(d.grid, SIZES[0], SIZES[0], PROMPT_LENGTH, 1)
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
