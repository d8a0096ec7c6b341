"""Which sizes one tape covers: where it is traced, and what is fixed or coarser where the structure depends on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from itertools import product
from typing import Any

import torch

from derivation.call import DEFAULT_SIDE
from derivation.config.traced import GROUPS
from derivation.errors import DerivationError
from derivation.options import Options
from derivation.tape.grid import Range, Sides
from derivation.tape.recorded import RecordedSubject
from derivation.tape.regime import Regime
from derivation.tape.tape import Tape
from derivation.trace.build import Description
from derivation.trace.interpolate import Parted, Values, fit, parting, points
from derivation.trace.loops import Span, spans, verify
from derivation.trace.modules import modules_of
from derivation.trace.pieces import pieces
from derivation.trace.pipeline import TracedPipeline, same
from derivation.trace.quantized import parameter_count

Ranges = Mapping[str, Range]
Progress = Callable[[str], None]
BATCH = Range(2, 9)
# PyTorch pads an attention mask to multiples of 8 (attention.cpp: pad_bias); pipelines pad prompts to one length.
LENGTH_STEP = 8
# transformer_z_image.py pads the prompt's tokens to multiples of 32 (SEQ_MULTI_OF).
COARSEST_LENGTHS = 32
# Shorter prompts fill a chat template's room, and no padding follows.
LONG_PROMPT = 64
# The largest step of sides, in units; where the structure still depends on them the pipeline's own size is taken.
COARSEST = 8
SEED = 0


def record(
    description: Description,
    options: Options,
    source: str,
    name: str,
    given: Mapping[str, Any] | None = None,
    progress: Progress = lambda _: None,
    sides: tuple[int, int] | None = None,
) -> RecordedSubject:
    """Trace a pipeline at a few sizes and return it as a subject; raises DerivationError for one that does not run."""
    progress(f"building {description.class_name}")
    traced = TracedPipeline(description, options, given, sides)
    tokens = lengths(traced)
    found: list[Regime] = []
    for guidance in _guidances(traced, tokens):
        found += list(regimes(traced, guidance, tokens, progress, found))
    modules = modules_of(traced.pipe)
    return RecordedSubject(
        name,
        description.class_name,
        source,
        options,
        traced.grid,
        _sides(traced, found),
        tokens.last,
        {n: entries(n, module) for n, module in modules.items()},
        {n: parameter_count(module) for n, module in modules.items()},
        tuple(found),
        traced.arguments.steps,
        tuple((traced.pipe.model_cpu_offload_seq or "").split("->")),
        {library: version(library) for library in ("torch", "diffusers", "transformers")},
        traced.arguments.default_sides or (DEFAULT_SIDE, DEFAULT_SIDE),
        tuple(name for name, part in description.parts.items() if part is not None and GROUPS in part.config),
        traced.at,
    )


def _sides(traced: TracedPipeline, found: list[Regime]) -> Sides:
    """Return the image sides that every regime covers: steps are powers of 2, of which the largest is a multiple."""
    unit, deepest = traced.grid.unit, traced.grid.levels - 1
    heights, widths = ([regime.ranges[f"{side}{deepest}"] for regime in found] for side in "hw")
    if all(r.is_one for r in (*heights, *widths)):
        several = [r.first * unit for r in (*heights, *widths)]
        return Sides(min(several), unit, max(several))
    first, last = max(r.first for r in heights), min(r.last for r in heights)
    step = max(r.step for r in heights)
    return Sides(-(-first // step) * step * unit, step * unit, last * unit)


def entries(root: str, module: torch.nn.Module) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return a component's parameters and buffers: path, the component's name before it -> (shape, dtype)."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return {f"{root}.{name}": (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in tensors}


def prepared(description: Description, options: Options) -> TracedPipeline:
    """Return a pipeline that knows how its prompt's length is passed; raises DerivationError for one that fails."""
    traced = TracedPipeline(description, options)
    lengths(traced)
    return traced


def lengths(traced: TracedPipeline) -> Range:
    """Return the prompt lengths that are traced: one where the tape does not depend on it."""
    most = traced.arguments.prompt_length
    if most < 2 or not traced.use_prompt(traced.base(most)):
        return Range(most, most)
    return Range(most % LENGTH_STEP or LENGTH_STEP, most, LENGTH_STEP) if traced.padded else Range(1, most)


def _guidances(traced: TracedPipeline, tokens: Range) -> tuple[bool, ...]:
    with_it, without = (traced.trace(traced.base(tokens.last, guidance)) for guidance in (True, False))
    return (True,) if same(with_it, without) else (True, False)


def regimes(
    traced: TracedPipeline,
    guidance: bool,
    tokens: Range,
    progress: Progress = lambda _: None,
    guided: Sequence[Regime] = (),
) -> Iterator[Regime]:
    """Yield what covers several images a call, where one structure does, and one image.

    Sides and prompt lengths are looked for no wider than those ``guided`` are, where they are all alike.
    """
    ranges = {**_side_ranges(traced, *(traced.sides or (0, 0))), "L": tokens}
    if traced.grid.frames is not None:
        usual = traced.grid.frames.latent(None)
        ranges["F"] = Range(2, usual + usual // 2) if usual > 2 else Range(usual, usual)
    for count in (BATCH, Range(1, 1)) if traced.arguments.batched else (Range(1, 1),):
        known = [regime.ranges for regime in guided if regime.ranges["B"] == count]
        alike = {name: known[0][name] for name in known[0] if name[0] in "hwL"} if known else {}
        alike = {name: each for name, each in alike.items() if all(other[name] == each for other in known)}
        try:
            yield from _regimes(traced, guidance, {**ranges, **alike, "B": count}, progress)
        except Parted as error:
            if count.is_one:
                raise
            progress(f"batch: {error}")


def _side_ranges(traced: TracedPipeline, least: int, most: int) -> dict[str, Range]:
    """Return the ranges of the deepest sides, from ``least`` to ``most`` pixels; (0, 0) is the pipeline's own size."""
    unit, deepest = traced.grid.unit, traced.grid.levels - 1
    usual = [side // unit for side in traced.usual]
    last = max(most // unit, 3)
    ranges = [Range(max(least // unit, 2), last) if most else Range(side, side) for side in usual]
    return {f"{side}{deepest}": each for side, each in zip("hw", ranges, strict=True)}


class _Fitting:
    """Fits one tape after another to a call of one pipeline, at the latent frames of one span, where it has frames."""

    def __init__(self, traced: TracedPipeline, guidance: bool, progress: Progress) -> None:
        self.traced, self.guidance, self.progress = traced, guidance, progress
        self.span: Span | None = None
        self.base: Values = {}
        self.rejected: list[Values] = []
        self._searched: list[Values] = []
        self._said: set[str] = set()

    def run(self, values: Values) -> Tape:
        """Return the tape at the symbols' values, its loop folded; raises Parted for a call that is rejected."""
        tape = self.whole(values)
        return tape if self.span is None else self.span.folded(tape, values, self.base)

    def whole(self, values: Values) -> Tape:
        """Return the tape at the symbols' values; raises Parted for a call that is rejected."""
        line = ", ".join(f"{name} = {value}" for name, value in values.items())
        if line not in self._said:
            self._said.add(line)
            self.progress(line)
        try:
            return self.traced.at(self.guidance, values)
        except DerivationError as error:
            self.rejected.append(values)
            raise Parted(self.traced.blamed(self.guidance, values), str(error)) from error

    def regime(self, ranges: Ranges) -> Regime:
        """Return one tape for ``ranges``; raises Parted where there is none."""
        looped = self._looped(ranges)
        through, held = points(looped, SEED)
        self.base = through[0]
        held += [{**through[0], "F": usual} for usual in self._usual if usual in looped["F"] and held]
        self.traced.unknown.clear()
        tape = fit(self.run, through, held)
        loop = None if self.span is None else self.span.loop
        if loop is not None:
            held += [{**held[-1], "F": loop.least}] if loop.least in ranges["F"] else []
            verify(loop, tape, self.whole, held)
        assumed = tuple(self.traced.unknown)
        return Regime(self.guidance, ranges, tape, tuple(through), tuple(held), assumed, loop).decided()

    @property
    def _usual(self) -> list[int]:
        return [] if self.traced.grid.frames is None else [self.traced.grid.frames.latent(None)]

    def _looped(self, ranges: Ranges) -> Ranges:
        """Return ranges whose frames pass the loop."""
        if self.span is None or (loop := self.span.loop) is None:
            return ranges
        return {**ranges, "F": replace(ranges["F"], first=max(ranges["F"].first, loop.least + loop.period))}

    def spans(self, ranges: Ranges) -> list[Span]:
        """Return the parts of the frames at the base of ``ranges``; none where they have no parts, or are known."""
        base = {**points(ranges, SEED)[0][0], "F": 0}
        sides = [name for name in base if name[0] in "hw" and not ranges[name].is_one]
        if not self._usual or ranges["F"].is_one or base in self._searched or (self.span and sides):
            return []
        for name in sides:  # where no mask's padding depends on F
            base[name] = max(base[name] // COARSEST * COARSEST, COARSEST)
        self._searched.append(base)
        try:
            found = spans(lambda frames: self.whole({**base, "F": frames}), ranges["F"], *self._usual)
        except Parted:
            return []
        return found if len(found) > 1 or any(span.loop for span in found) else []

    def lengths(self, ranges: Ranges) -> list[Range]:
        """Return the parts of the prompt lengths that have one tape each, none where they have no parts."""
        return pieces(self.run, points(self._looped(ranges), SEED)[0][0], ranges["L"])

    def symbols(self, error: Parted) -> frozenset[str]:
        """Return the symbols of an error: those alone without whose change there is none, where there are such."""
        if error.between is None or len(error.symbols) == 1:
            return error.symbols
        base, values = error.between
        return frozenset(n for n in error.symbols if self._alike(base, {**values, n: base[n]})) or error.symbols

    def _alike(self, one: Values, other: Values) -> bool:
        try:
            return parting(self.run(one), self.run(other)) is None
        except Parted:
            return False


def _regimes(traced: TracedPipeline, guidance: bool, ranges: Ranges, progress: Progress) -> list[Regime]:
    """Return tapes for ``ranges``, made coarser where the structure depends on a symbol; raises Parted."""
    fitting, parts = _Fitting(traced, guidance, progress), [ranges["L"]]
    parted: list[Span | None] = [None]
    while True:
        fitting.rejected.clear()
        try:
            return list(_fitted(fitting, ranges, parts, parted))
        except Parted as error:
            progress(f"parted: {error}")
            rejected = bool(fitting.rejected)
            symbols = fitting.symbols(error)
            if "F" in symbols and not rejected and (found := fitting.spans(ranges)):
                parted = [*found]
                continue
            if fitting.span not in (None, parted[0]) and symbols == {"F"}:
                parted = [span for span in parted if span is not fitting.span]
                continue
            if "L" in symbols and not rejected and len(parts) == 1 and len(pieces := fitting.lengths(ranges)) > 1:
                parts = pieces
                continue
            others = symbols - {"F"} if fitting.span is not None and fitting.span.loop else symbols
            coarser = _coarser(traced, ranges, others, rejected) or _coarser(traced, ranges, symbols, rejected)
            if coarser is None:
                raise
            parts = parts if coarser["L"] == ranges["L"] else [coarser["L"]]
            parted = parted if coarser.get("F") == ranges.get("F") else [None]
            ranges = coarser


def _fitted(fitting: _Fitting, ranges: Ranges, parts: list[Range], parted: list[Span | None]) -> Iterator[Regime]:
    """Yield a tape for each span of frames and part of the prompt lengths; raises Parted."""
    for fitting.span, length in product(parted, parts):
        frames = {} if fitting.span is None else {"F": fitting.span.frames}
        yield fitting.regime({**ranges, **frames, "L": length})


def _coarser(traced: TracedPipeline, ranges: Ranges, symbols: frozenset[str], rejected: bool) -> Ranges | None:
    """Return ranges in which what parts has one value or larger steps, None where it cannot: the batch does."""
    frames, length = traced.grid.frames, ranges["L"]
    if "F" in symbols and frames is not None and not ranges["F"].is_one:
        usual, longest = frames.latent(None), ranges["F"].last
        return {**ranges, "F": Range(ranges["F"].first if rejected and longest > usual else usual, usual)}
    if "L" in symbols and not length.is_one:
        return {**ranges, "L": _coarser_lengths(length)}
    sides = [name for name in ranges if name[0] in "hw"]
    if not symbols.intersection(sides) or all(ranges[name].is_one for name in sides):
        return None
    found = _smaller(traced, ranges, sides) if rejected else None
    return {**ranges, **(found or _stepped(ranges, sides) or _side_ranges(traced, 0, 0))}


def _coarser_lengths(length: Range) -> Range:
    """Return lengths padded as a mask is, then long ones, then those in steps twice as large, then the last."""
    last, step = length.last, max(LENGTH_STEP, 2 * length.step)
    if length.step == 1:
        return Range(last % step or step, last, step)
    first = LONG_PROMPT + last % length.step
    if length.first < first < last:
        return Range(first, last, length.step)
    first = LONG_PROMPT + last % step
    return Range(first, last, step) if step <= COARSEST_LENGTHS and first < last else Range(last, last)


def _smaller(traced: TracedPipeline, ranges: Ranges, sides: list[str]) -> Ranges | None:
    """Return sides up to the middling ones, None where the pipeline takes the largest, or they are as small already."""
    unit = traced.grid.unit
    most, middle = max(ranges[name].last for name in sides), max(traced.middle) // unit
    largest = replace(traced.base(ranges["L"].last), height=most * unit, width=most * unit)
    if middle >= most or traced.accepts(largest):
        return None
    return {name: replace(ranges[name], first=min(ranges[name].first, middle), last=middle) for name in sides}


def _stepped(ranges: Ranges, sides: list[str]) -> Ranges | None:
    """Return sides with steps that are twice as large, None where they cannot be."""
    found = {}
    for name in sides:
        step = 2 * ranges[name].step
        first, last = -(-ranges[name].first // step) * step, ranges[name].last // step * step
        if step > COARSEST or first >= last:
            return None
        found[name] = Range(first, last, step)
    return found
