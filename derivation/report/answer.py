"""The first page: the equation term by term, and what each stage peaks at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

import sympy

from derivation.api import Derivation
from derivation.equation.derived import Stage
from derivation.peak.witness import Witness, WitnessTensor
from derivation.report.document import Code, Text
from derivation.report.text import PixelTerms, Powers, as_pixel_terms, pixel_terms, shape_text, value_at, values_at
from derivation.report.tiles import tile_meaning
from derivation.walk.components import parameter_count

SIZES = (512, 768, 1024)
ORIGINS_SHOWN = 4
PIPELINE = "(pipeline)"
# What the tape calls a parameter's arrival on the GPU.
LOAD = "load"

STAGE_TITLES: Mapping[str, str] = {
    "text_encoder": "Encode the prompt",
    "vae_encode": "Encode the image",
    "prepare_latents": "Draw the first latents",
    "unet": "Denoise (UNet)",
    "vae_decode": "Decode the image",
    "safety_checker": "Safety checker",
    "postprocess": "Postprocess",
}


@dataclass(frozen=True, slots=True)
class Origin:
    """Tensors of one kind behind a term: how many, where they were made, their shape, their coefficient."""

    count: int
    where: str
    op: str
    shape: str
    share: Fraction


@dataclass(frozen=True, slots=True)
class TermRow:
    """One monomial of a polynomial: powers of VARIABLES, coefficient, meaning, bytes at SIZES, origin."""

    key: Powers
    terms: PixelTerms
    meaning: str
    bytes_at: tuple[int, ...]
    origins: tuple[Origin, ...]
    others: int


@dataclass(frozen=True, slots=True)
class PolynomialRow:
    """One polynomial of the headline Max with its rows and its witness."""

    stage: str
    title: str
    terms: PixelTerms
    rows: tuple[TermRow, ...]
    bytes_at: tuple[int, ...]
    witness: WitnessRow


@dataclass(frozen=True, slots=True)
class WitnessRow:
    """The tensors alive at a peak, ready to be listed; ``total`` is their sum in pixels."""

    module: str
    op: str
    tensors: tuple[TensorRow, ...]
    total: PixelTerms
    bytes_at: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TensorRow:
    """One tensor of a witness."""

    module: str
    op: str
    shape: str
    dtype: str
    count: str
    terms: PixelTerms
    bytes_at: tuple[int, ...]

    @property
    def loaded(self) -> bool:
        """Whether it is a parameter that offload brought to the GPU."""
        return self.op == LOAD

    @property
    def model(self) -> str:
        """The model that its module is part of."""
        return model_of(self.module)


@dataclass(frozen=True, slots=True)
class StageRow:
    """One stage: its polynomials, and its exact bytes at SIZES (weights excluded)."""

    name: str
    title: str
    polynomials: tuple[PolynomialRow, ...]
    bytes_at: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class WeightRow:
    """One model's parameters and bytes."""

    model: str
    parameters: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Answer:
    """What the report opens with."""

    weights: tuple[WeightRow, ...]
    weights_bytes: int
    polynomials: tuple[PolynomialRow, ...]
    stages: tuple[StageRow, ...]
    totals: tuple[int, ...]
    peak_stages: tuple[str, ...]
    expression: sympy.Expr


def answer(d: Derivation) -> Answer:
    """Return the answer of a derivation under guidance, at one image and the pipeline's own prompt length."""
    peaks = [square_peaks(d, side) for side in SIZES]
    stages = tuple(
        StageRow(name, stage_title(name), polynomials(d, stage), tuple(p[name] for p in peaks))
        for name, stage in d.stages.items()
    )
    return Answer(
        weights=tuple(WeightRow(m, parameter_count(d.resident[m]), n) for m, n in d.weights.items()),
        weights_bytes=d.weights_bytes,
        polynomials=polynomials(d, d.equation.pipeline_stage()),
        stages=stages,
        totals=tuple(d.weights_bytes + max(p.values()) for p in peaks),
        peak_stages=tuple(max(p, key=lambda name: p[name]) for p in peaks),
        expression=d.peak,
    )


def square_peaks(d: Derivation, side: int) -> dict[str, int]:
    """Return each stage's exact peak beyond the weights for one square image.

    VAE tiles are counted, not walked one by one: the bytes are the same.
    """
    values = d.sizes(side, side, 1, d.prompt_length)
    return {name: peak for name, (peak, _) in d.program().regime(values).evaluator.peaks(values).items()}


def reference_side(d: Derivation) -> int:
    """Return the side of the square image that details are shown for: one that a tiled VAE cuts into tiles."""
    tile = d.grid.tile
    pixels = 0 if tile is None else tile.side * d.grid.vae_scale_factor
    return SIZES[0] if pixels < SIZES[0] else 2 * pixels


def stage_title(name: str) -> str:
    """Return a stage's name as a heading."""
    return STAGE_TITLES.get(name, name.replace("_", " ").capitalize())


def place(op: str, module: str) -> Text:
    """Return an operator and where it ran, in words."""
    return (Code(op), " in the pipeline itself" if module == PIPELINE else (" at ", Code(module)))


def model_of(module: str) -> str:
    """Return the model that a module's path starts with."""
    return module.split(".")[0]


def polynomials(d: Derivation, stage: Stage) -> tuple[PolynomialRow, ...]:
    """Return the polynomials of a stage, the largest at 512 x 512 first."""
    rows = [
        _polynomial(d, as_pixel_terms(term.expression), witness)
        for term, witness in zip(stage.terms, stage.witnesses, strict=True)
    ]
    return tuple(sorted(rows, key=lambda row: -row.bytes_at[0]))


def _polynomial(d: Derivation, terms: PixelTerms, witness: Witness) -> PolynomialRow:
    rows = (_term_row(d, key, {key: value}, witness) for key, value in terms.items())
    return PolynomialRow(
        stage=witness.stage,
        title=stage_title(witness.stage),
        terms=terms,
        rows=tuple(sorted(rows, key=lambda row: -row.bytes_at[-1])),
        bytes_at=_bytes_at(d, terms),
        witness=_witness_row(d, witness),
    )


def _bytes_at(d: Derivation, terms: PixelTerms) -> tuple[int, ...]:
    return tuple(value_at(terms, values_at(d.grid, side, side, d.prompt_length, 1)) for side in SIZES)


def _witness_row(d: Derivation, witness: Witness) -> WitnessRow:
    rows = tuple(_tensor_row(d, tensor) for tensor in witness.tensors)
    total: PixelTerms = {}
    for row in rows:
        for key, value in row.terms.items():
            total[key] = total.get(key, value * 0) + value
    sums = zip(*(row.bytes_at for row in rows), strict=True)
    total = {key: value for key, value in total.items() if value}
    return WitnessRow(witness.module or PIPELINE, witness.op, rows, total, tuple(map(sum, sums)))


def _tensor_row(d: Derivation, tensor: WitnessTensor) -> TensorRow:
    terms = _tensor_terms(d, tensor)
    return TensorRow(
        module=tensor.module or PIPELINE,
        op=tensor.op,
        shape=shape_text(tensor.shape),
        dtype=tensor.dtype,
        count=shape_text((tensor.count,)),
        terms=terms,
        bytes_at=_bytes_at(d, terms),
    )


def _tensor_terms(d: Derivation, tensor: WitnessTensor) -> PixelTerms:
    return pixel_terms(tensor.nbytes * tensor.count, d.grid)


def _term_row(d: Derivation, key: Powers, terms: PixelTerms, witness: Witness) -> TermRow:
    groups: dict[tuple[str, str, str], list[Fraction]] = {}
    for tensor in witness.tensors:
        share = _tensor_terms(d, tensor)
        if key in share:
            place, shape = tensor.module or PIPELINE, shape_text(tensor.shape)
            kind = (place, tensor.op, shape) if tensor.op != LOAD else (model_of(place), LOAD, "parameters")
            groups.setdefault(kind, []).append(share[key])
    origins = sorted((Origin(len(v), *k, sum(v, Fraction(0))) for k, v in groups.items()), key=lambda o: -o.share)
    shown = tuple(origins[:ORIGINS_SHOWN])
    others = sum(o.count for o in origins[ORIGINS_SHOWN:])
    return TermRow(key, terms, meaning(key, terms[key]), _bytes_at(d, terms), shown, others)


def meaning(key: Powers, coefficient: Fraction) -> str:
    """Return what a monomial grows with, in words."""
    height, width, length, batch, *tiles = key
    if not any(key):
        return "fixed: the same for every call"
    each = "per image" if batch else "once a call"
    if any(tiles):
        return f"{tile_meaning(key, coefficient)}, {each}"
    if height + width >= 4:
        return f"attention scores, every pixel against every pixel, {each}"
    if height and length:
        return f"attention scores, every pixel against every token, {each}"
    if height and width:
        return f"feature maps: grows with the image area, {each}"
    if length > 1:
        return f"attention scores, every token against every token, {each}"
    if length:
        return f"prompt embeddings: grows with the prompt length, {each}"
    return f"{each}, whatever its size"
