"""Everything a report says about one model, as plain data."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from derivation.api import Derivation, derive
from derivation.equation.crossover import Crossover
from derivation.equation.device_regime import Beside
from derivation.equation.record import Equation
from derivation.errors import DerivationError
from derivation.evidence.table import recorded as predictions
from derivation.options import Options
from derivation.options.choices import EAGER
from derivation.peak.headline import rounding
from derivation.report.answer import (
    SIZES,
    Answer,
    PolynomialRow,
    answer,
    reference_side,
    square_peaks,
    stage_title,
)
from derivation.report.assumptions import assumptions, chips, counted, summary
from derivation.report.beside import beside
from derivation.report.calculator import Calculator, Part, calculator, record_part
from derivation.report.document import Math, Picture, Table, Text
from derivation.report.kernels import Kernel, kernels_of, shares
from derivation.report.mathml import equation
from derivation.report.offload import OffloadRow, placements
from derivation.report.pictures import attention_picture, pictures
from derivation.report.reduction import StageReduction, reductions
from derivation.report.segments import segments_table, usual_equation
from derivation.report.text import PixelTerms, slug
from derivation.report.tiles import Definition, definitions
from derivation.report.validation import Validation, validation
from derivation.report.walk import Walk, walks
from derivation.tape.symbols import SYMBOLS, Symbol, is_tile
from derivation.text import NARROW_SPACE
from derivation.walk.subject import WalkedSubject

ATTENTION_SIDES = tuple(range(256, 2049, 128))
Progress = Callable[[str], None]

TILED_CROSSINGS = (
    "VAE tiles depend on both sides of the image, so no single area or prompt length separates the stages; "
    "the figure of each stage's peak against image size marks where the largest one changes."
)


class Form:
    """A calculator to come."""

    def __init__(self, d: Derivation, executor: Executor | None) -> None:
        self._d, self._kernels = d, kernels_of(d)
        self._parts = _recorded(d, self._kernels, executor)

    @cached_property
    def calculator(self) -> Calculator:
        """The calculator, once its parts are there."""
        return calculator(self._d, _latex(self._d), self._kernels, [part.result() for part in self._parts])


@dataclass(frozen=True, slots=True)
class Device:
    """What nvidia-smi shows on a card: the equation, and where it holds with its last term's bounds."""

    card: str
    equation: Math
    beside: Beside


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
    beside: Text
    headline: Math
    where: tuple[Definition, ...]
    side: int
    length: int
    rounding_bytes: tuple[int, int]
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
    form: Form
    equation: Equation
    latex: tuple[str, ...]
    device: Device | None
    segments: Table | None

    @property
    def calculator(self) -> Calculator:
        """The calculator, waited for where other processes record its calls."""
        return self.form.calculator

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


def content(
    model: object,
    given: Mapping[str, Any],
    command: str,
    progress: Progress,
    verify: bool = False,
    executor: Executor | None = None,
) -> Content:
    """Derive ``model`` under ``given`` options and return everything its report says.

    Where there is an executor, it records the calculator's calls while this process does the rest.
    """
    progress(f"deriving {model}")
    d = derive(model, **given)
    form = Form(d, executor)
    found = answer(d)
    progress("drawing figures")
    drawn = pictures(d, found) | _attention(d)
    progress("comparing with measurements")
    checked = validation(d.name, d.options, predictions(), verify)
    return Content(
        model=d.name,
        slug=slug(d.name),
        command=command,
        options=d.options,
        chips=chips(d),
        counted=counted(d.options),
        whole=d.subject.whole,
        sizes=SIZES,
        unit=d.grid.unit,
        factor=d.grid.vae_scale_factor,
        summary=summary(d, found),
        beside="" if d.options.gpu else beside(d),
        headline=equation(found.weights_bytes, [(p.terms, p.title) for p in found.polynomials]),
        where=definitions(d.equation.pipeline_stage().terms, d.grid),
        side=reference_side(d),
        length=d.prompt_length,
        rounding_bytes=rounding(d.equation.pipeline_stage().terms),
        answer=found,
        placements=placements(d) if d.subject.whole else (),
        crossings=_crossings(d),
        indifferent=tuple((x.quantity, typeset(x.sentence)) for x in d.equation.irrelevant()),
        assumptions=assumptions(d),
        symbols=_symbols(d),
        events=len(d.record().tape.events),
        points=len(d.record().points),
        reductions=reductions(d),
        walks=walks(d),
        figures=drawn,
        validation=checked,
        form=form,
        equation=d.equation,
        latex=tuple(_latex(d)),
        device=_device(d),
        segments=segments_table(d, SIZES),
    )


def _recorded(d: Derivation, kernels: Sequence[Kernel], executor: Executor | None) -> list[Future[Part]]:
    """Return the calculator's parts to come: what is recorded is not walked again, and is large to send."""
    if executor is not None and isinstance(d.subject, WalkedSubject):
        return [executor.submit(record_part, d, share) for share in shares(kernels)]
    made: Future[Part] = Future()
    made.set_result(record_part(d, kernels))
    return [made]


def _latex(d: Derivation) -> dict[str, str]:
    """Return what the page has to copy."""
    return {"peak": d.latex(), **({"device": d.latex("device")} if _device(d) else {})}


def _device(d: Derivation) -> Device | None:
    """Return what nvidia-smi shows on the report's card, None where none is named or that has no form."""
    if d.options.gpu is None:
        return None
    with suppress(DerivationError):
        form = d.equation.device
        return Device(form.card.name, usual_equation(form), form.beside_pixels)
    return None


def _crossings(d: Derivation) -> tuple[str, ...]:
    """Return where the largest stage changes, with eager attention as well."""
    eager = () if (found := _eager(d)) is None else titled(found.equation.crossovers())
    return (
        *titled(d.equation.crossovers()),
        *(f"With eager attention: {text}" for text in eager),
        *((TILED_CROSSINGS,) if d.grid.tile else ()),
    )


def _eager(d: Derivation) -> Derivation | None:
    """Return the derivation with diffusers' eager attention, None where that is its own or there is none."""
    if not isinstance(d.subject, WalkedSubject) or d.options.attention == EAGER:
        return None
    return Derivation(d.subject.changed(attention=EAGER), d.fixed)


def _attention(d: Derivation) -> dict[str, Picture]:
    eager = _eager(d)
    if eager is None:
        return {}
    each = {d.options.attention: d, EAGER: eager}
    totals = {
        name: [x.weights_bytes + max(square_peaks(x, side).values()) for side in ATTENTION_SIDES]
        for name, x in each.items()
    }
    return {"attention": attention_picture(ATTENTION_SIDES, totals)}


def titled(found: Sequence[Crossover]) -> tuple[str, ...]:
    """Return the sentences of crossovers with the stages' titles."""
    return tuple(typeset(c.sentence.replace(f"from {c.before} to {c.after}", _move(c))) for c in found)


def _move(c: Crossover) -> str:
    return f"from “{stage_title(c.before)}” to “{stage_title(c.after)}”"


def typeset(text: str) -> str:
    """Return a sentence with the report's digit groups and multiplication signs.

    >>> ascii(typeset("6,093 pixels (about 78 x 78)").replace(NARROW_SPACE, "_"))
    "'6_093 pixels (about 78 \\\\xd7 78)'"
    """
    return re.sub(r"(?<=\d),(?=\d{3})", NARROW_SPACE, re.sub(r"(?<=\d) x (?=\d)", " \N{MULTIPLICATION SIGN} ", text))


def _symbols(d: Derivation) -> tuple[Symbol, ...]:
    """Return the symbols of a call; the sides of every deeper level share one line."""
    named = {s.name: s for s in SYMBOLS}
    deeper = Symbol("hₖ, wₖ", "h_k, w_k", "sides at UNet level k: half of the level above, rounded up")
    tiles = [s for s in SYMBOLS if is_tile(s.name) and s.name != "E"] if d.grid.tile else []
    return (named["B"], named["L"], named["h0"], named["w0"], deeper, *tiles)
