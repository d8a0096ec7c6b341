"""Everything a report says about one model, as plain data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

from derivation.api import Derivation, derive
from derivation.evidence.table import recorded as predictions
from derivation.options import EAGER, Options
from derivation.report.answer import SIZES, Answer, PolynomialRow, answer, reference_side
from derivation.report.assumptions import assumptions, chips, counted, summary
from derivation.report.calculator import (
    ATTENTION_SIDES,
    BACKENDS_SHOWN,
    Backend,
    Calculator,
    backend,
    calculator,
    combinations,
    replayed_cards,
    replays,
    resolved,
    titled,
    typeset,
)
from derivation.report.document import Math, Picture
from derivation.report.mathml import equation
from derivation.report.offload import OffloadRow, placements
from derivation.report.pictures import attention_picture, pictures
from derivation.report.reduction import StageReduction, reductions
from derivation.report.text import PixelTerms, slug
from derivation.report.tiles import Definition, definitions
from derivation.report.validation import Validation, validation
from derivation.report.walk import Walk, walks
from derivation.tape.symbols import SYMBOLS, Symbol, is_tile

Progress = Callable[[str], None]

TILED_CROSSINGS = (
    "VAE tiles depend on both sides of the image, so no single area or prompt length separates the stages; "
    "the figure of each stage's peak against image size marks where the largest one changes."
)


@dataclass(frozen=True, slots=True)
class Content:
    """The data of one report."""

    model: str
    slug: str
    command: str
    options: Options
    chips: tuple[str, ...]
    counted: str
    whole: bool
    sizes: tuple[int, ...]
    unit: int
    factor: int
    summary: str
    equation: Math
    where: tuple[Definition, ...]
    side: int
    rounding_bytes: int
    answer: Answer
    placements: tuple[OffloadRow, ...]
    crossings: tuple[str, ...]
    indifferent: tuple[tuple[str, str], ...]
    assumptions: Sequence[tuple[str, str]]
    symbols: tuple[Symbol, ...]
    events: int
    points: int
    reductions: tuple[StageReduction, ...]
    walks: tuple[Walk, ...]
    figures: Mapping[str, Picture]
    validation: Validation
    calculator: Calculator

    @property
    def peak_terms(self) -> list[PixelTerms]:
        """Return the polynomials that are the peak at one of SIZES."""
        return [row.terms for row in self.answer.polynomials if self.peak_sides(row)]

    @property
    def shown(self) -> int:
        """Return which of SIZES witnesses are listed at: the first, or the last where a VAE works in tiles."""
        return -1 if self.where else 0

    def peak_sides(self, row: PolynomialRow) -> list[int]:
        """Return the SIZES at which a polynomial is the largest of the headline."""
        largest = [max(p.bytes_at[i] for p in self.answer.polynomials) for i in range(len(self.sizes))]
        return [side for i, side in enumerate(self.sizes) if row.bytes_at[i] == largest[i]]


def content(model: object, options: Options, command: str, progress: Progress, verify: bool = False) -> Content:
    """Derive ``model`` and return everything its report says; independent parts run in processes of their own."""
    progress("deriving")
    d = _derive(model, options)
    with ProcessPoolExecutor() as pool:
        pairs = combinations(d.checkpoint, options)
        derived = {pair: pool.submit(backend, d.checkpoint, options, *pair) for pair in pairs}
        cards = replayed_cards(d.checkpoint, options)
        replayed = {card: pool.submit(replays, d.checkpoint, options, card) for card in cards}
        placed = pool.submit(placements, d.checkpoint, options) if d.checkpoint.whole else None
        found = answer(d)
        walked, reduced = walks(d), reductions(d)
        progress("drawing figures")
        drawn = pictures(d, found)
        solved = d.equation.crossovers(), d.equation.irrelevant()
        progress("deriving every precision and attention backend for the calculator")
        backends = {pair: future.result() for pair, future in derived.items()}
        verdicts = {card: future.result() for card, future in replayed.items()}
        progress("comparing with measurements")
        checked = validation(d.checkpoint.name, options, predictions(), verify)
    drawn |= {"attention": _attention(d, backends)}
    eager = next((b.crossings for b in backends.values() if b.crossings and options.attention != EAGER), ())
    return Content(
        model=d.checkpoint.name,
        slug=slug(d.checkpoint.name),
        command=command,
        options=options,
        chips=chips(d),
        counted=counted(options),
        whole=d.checkpoint.whole,
        sizes=SIZES,
        unit=d.grid.unit,
        factor=d.grid.vae_scale_factor,
        summary=summary(d, found),
        equation=equation(found.weights_bytes, [(p.terms, p.title) for p in found.polynomials]),
        where=definitions(d.equation.pipeline_stage().terms, d.grid),
        side=reference_side(d),
        rounding_bytes=max(row.rounding_bytes for row in found.polynomials),
        answer=found,
        placements=placed.result() if placed else (),
        crossings=(
            *titled(solved[0]),
            *(f"With eager attention: {text}" for text in eager),
            *((TILED_CROSSINGS,) if d.grid.tile else ()),
        ),
        indifferent=tuple((x.quantity, typeset(x.sentence)) for x in solved[1]),
        assumptions=assumptions(d),
        symbols=_symbols(d),
        events=len(d.record().tape.events),
        points=len(d.record().points),
        reductions=reduced,
        walks=walked,
        figures=drawn,
        validation=checked,
        calculator=calculator(d, backends, verdicts),
    )


def _derive(model: object, options: Options) -> Derivation:
    """Return the derivation once its tape is recorded: what it refuses is refused before any process starts."""
    chosen: dict[str, Any] = options.as_dict()
    d = derive(model, **chosen)
    _ = d.program(True).generic
    return d


def _attention(d: Derivation, backends: Mapping[tuple[str, str], Backend]) -> Picture:
    names = dict.fromkeys([d.options.attention, *BACKENDS_SHOWN])
    pairs = {name: resolved(d.checkpoint, d.options.dtype, name) for name in names}
    return attention_picture(ATTENTION_SIDES, {name: backends[pair].totals for name, pair in pairs.items()})


def _symbols(d: Derivation) -> tuple[Symbol, ...]:
    """Return the symbols of a call; the sides of every deeper level share one line."""
    named = {s.name: s for s in SYMBOLS}
    deeper = Symbol("hₖ, wₖ", "h_k, w_k", "sides at UNet level k: half of the level above, rounded up")
    tiles = [s for s in SYMBOLS if is_tile(s.name) and s.name != "E"] if d.grid.tile else []
    return (named["B"], named["L"], named["h0"], named["w0"], deeper, *tiles)
