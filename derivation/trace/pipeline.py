"""Any pipeline of diffusers as a recorded subject: its real ``__call__`` on ``meta``, traced and interpolated."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import torch

from derivation.call import Call
from derivation.errors import DerivationError, shown
from derivation.options import Options
from derivation.tape.evaluate import Evaluator
from derivation.tape.grid import Frames, Grid, Range, Sides
from derivation.tape.recorded import RecordedSubject
from derivation.tape.regime import Regime
from derivation.tape.tape import Tape
from derivation.trace.arguments import Arguments
from derivation.trace.build import REJECTIONS, Description, State, build
from derivation.trace.interpolate import Parted, Values, fit, normalised, points
from derivation.trace.modules import modules_of, quiet
from derivation.trace.offload import offload_pipeline
from derivation.trace.shadows import ShadowTracer
from derivation.trace.tracer import marked, without_collector
from derivation.trace.world import meta_world

# Image sides of the sizes that are traced, in pixels; a video's are smaller.
SIDES, VIDEO_SIDES = (256, 2048), (256, 1280)
BATCH = Range(2, 9)
# PyTorch pads an attention mask to multiples of 8 (attention.cpp: pad_bias).
LENGTH_STEP = 8
# Shorter prompts fill a chat template's room, and no padding follows.
LONG_PROMPT = 64
# Passes of the denoising loop: PNDM's history of four outputs is the longest.
LEAST_STEPS, MOST_STEPS = 2, 8
# How often ranges are made coarser before a closed form is given up: frames, lengths, then the steps of sides.
ATTEMPTS = 6
MODEL = "pipeline"
SEED = 0
Progress = Callable[[str], None]


class TracedPipeline:
    """The real pipeline of a description, called at sizes on ``meta``; calls are remembered by their sizes."""

    def __init__(
        self,
        description: Description,
        options: Options,
        given: Mapping[str, Any] | None = None,
        sides: tuple[int, int] | None = None,
    ) -> None:
        self.description, self.options = description, options
        self.pipe = build(description, options.dtype)
        if options.offload is not None:
            offload_pipeline(self.pipe, options.offload)
        self.arguments = Arguments(self.pipe, {"output_type": "pt", **(given or {})})
        self.grid: Grid = self.arguments.grid
        self.sides = sides or (SIDES if self.grid.frames is None else VIDEO_SIDES)
        self._state: State | None = None
        self._tapes: dict[tuple[object, ...], Tape] = {}
        self._padded = True
        self.unknown: dict[str, None] = {}
        self._settle()

    def _settle(self) -> None:
        """Find the passes of the loop from which on another one holds nothing more: a scheduler's history is whole."""
        call = self._accepted()
        known = {LEAST_STEPS: self._with_steps(LEAST_STEPS, call)}
        for steps in range(LEAST_STEPS, MOST_STEPS):
            known[steps + 1] = self._with_steps(steps + 1, call)
            if known[steps] == known[steps + 1]:
                break
        self.arguments = replace(self.arguments, steps=steps)

    def _accepted(self) -> Call:
        """Return a call that the pipeline takes: of one bare prompt, or of smaller sides, where it must be."""
        first: DerivationError | None = None
        least, most = self.sides
        while most > 2 * self.grid.unit:
            self.sides = min(least, most // 4), most
            for bare in (False, True):
                self.arguments = replace(self.arguments, bare=bare)
                call = _base(self)
                try:
                    self.trace(call)
                except DerivationError as error:
                    first = first or error
                else:
                    return call
            most //= 2
        raise first or DerivationError(f"{self.description.class_name}: sides of {most} pixels are too small")

    def _with_steps(self, steps: int, call: Call) -> dict[str, int]:
        self.arguments = replace(self.arguments, steps=steps)
        peaks = Evaluator(self.trace(call)).peaks({})
        return {stage: peak for stage, (peak, _) in peaks.items()}

    def trace(self, call: Call) -> Tape:
        """Return the tape of one call, in integers; raises DerivationError for what the pipeline rejects."""
        key = (call, self._padded, self.arguments.steps, self.arguments.bare)
        if key not in self._tapes:
            with without_collector():
                if self._state is None:  # transformers wraps methods at the first call
                    self._state = State(self.pipe)
                    self._run(call)
                self._tapes[key] = normalised(self._run(call))
        return self._tapes[key]

    def _run(self, call: Call) -> Tape:
        assert self._state is not None
        self._state.restore()
        given = self.arguments.at(call, self._padded)
        tensors = [value for value in given.values() if isinstance(value, torch.Tensor)]
        tracer = ShadowTracer(modules_of(self.pipe), tensors, stage=MODEL)
        try:
            with quiet(), meta_world(self._backend), _stages(self.pipe, tracer), tracer:
                output = self.pipe(**given)
                del output
        except DerivationError:
            raise
        except (*REJECTIONS, NotImplementedError, AssertionError) as error:
            said = shown(" ".join(str(error).split())[:200])
            raise DerivationError(f"{self.description.class_name}: {type(error).__name__}: {said}") from error
        self.unknown |= dict.fromkeys(tracer.unknown)
        return tracer.tape

    @property
    def _backend(self) -> str:
        return "math" if self.options.attention == "eager" else self.options.attention

    def at(self, guidance: bool, values: Mapping[str, int]) -> Tape:
        """Return the tape at the symbols' ``values``, deepest sides and all."""
        deepest, unit = self.grid.levels - 1, self.grid.unit
        frames = None if self.grid.frames is None else self.grid.frames.frames(values["F"])
        sides = (values[f"{side}{deepest}"] * unit for side in "hw")
        height, width = sides
        return self.trace(Call(height, width, values["B"], values["L"], guidance, frames))

    def blamed(self, guidance: bool, values: Values) -> frozenset[str]:
        """Return the symbols for whose ``values`` a call is rejected: the batch, the frames, else the sides."""
        usual = {"B": 1} if self.grid.frames is None else {"B": 1, "F": self.grid.frames.latent(None)}
        for name in usual:
            if values[name] != usual[name]:
                try:
                    self.at(guidance, {**values, name: usual[name]})
                except DerivationError:
                    continue
                return frozenset({name})
        return frozenset(name for name in values if name[0] in "hw")

    def use_prompt(self, call: Call) -> bool:
        """Find out how the prompt's length is passed; returns whether the tape depends on it."""
        shorter = replace(call, prompt_length=(call.prompt_length or 0) // 2)
        for padded in (True, False) if self.arguments.pads else (False,):
            self._padded = padded
            try:
                if not _same(self.trace(call), self.trace(shorter)):
                    return True
            except DerivationError:  # a model of one prompt length (CogVideoX)
                continue
        self._padded = True
        return False


def _same(one: Tape, other: Tape) -> bool:
    return one.events == other.events and [a.nbytes for a in one.allocations] == [a.nbytes for a in other.allocations]


@contextmanager
def _stages(pipe: Any, tracer: ShadowTracer) -> Iterator[None]:
    """Name the stage of each component's calls after it; ``encode`` and ``decode`` are calls of their own."""
    with ExitStack() as scope:
        for name, module in modules_of(pipe).items():
            for method in ("forward", "encode", "decode", "generate", "get_image_features"):
                if callable(getattr(module, method, None)):
                    stage = name if method in ("forward", "generate", "get_image_features") else f"{name}_{method}"
                    scope.callback(marked(module, method, tracer, stage, MODEL, outermost=True))
        yield


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
    found = [r for guidance in _guidances(traced, tokens) for r in regimes(traced, guidance, tokens, progress)]
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
        {n: sum(p.numel() for p in module.parameters()) for n, module in modules.items()},
        tuple(found),
        traced.arguments.steps,
        tuple((traced.pipe.model_cpu_offload_seq or "").split("->")),
        {library: version(library) for library in ("torch", "diffusers", "transformers")},
        traced.at,
    )


def _sides(traced: TracedPipeline, found: list[Regime]) -> Sides:
    """Return the image sides that every regime covers: steps are powers of 2, of which the largest is a multiple."""
    unit, ranges = traced.grid.unit, [r.ranges[f"h{traced.grid.levels - 1}"] for r in found]
    first, last, step = max(r.first for r in ranges), min(r.last for r in ranges), max(r.step for r in ranges)
    return Sides(-(-first // step) * step * unit, step * unit, last * unit)


def entries(root: str, module: torch.nn.Module) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return a component's parameters and buffers: path, the component's name before it -> (shape, dtype)."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return {f"{root}.{name}": (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in tensors}


def _base(traced: TracedPipeline, length: int | None = None, guidance: bool = True) -> Call:
    unit, frames = traced.grid.unit, traced.grid.frames
    side = -(-min(512, traced.sides[1] // 2) // unit) * unit
    tokens = length or traced.arguments.prompt_length
    return Call(side, side, 1, tokens, guidance, None if frames is None else frames.default)


def lengths(traced: TracedPipeline) -> Range:
    """Return the prompt lengths that are traced: one where the tape does not depend on it."""
    most = traced.arguments.prompt_length
    if most < 2 or not traced.use_prompt(_base(traced, most)):
        return Range(most, most)
    return Range(most % LENGTH_STEP or LENGTH_STEP, most, LENGTH_STEP)


def _guidances(traced: TracedPipeline, tokens: Range) -> tuple[bool, ...]:
    with_it, without = (traced.trace(_base(traced, tokens.last, guidance)) for guidance in (True, False))
    return (True,) if _same(with_it, without) else (True, False)


def regimes(
    traced: TracedPipeline, guidance: bool, tokens: Range, progress: Progress = lambda _: None
) -> Iterator[Regime]:
    """Yield what covers several images a call, where one structure does, and one image."""
    deepest, unit, frames = traced.grid.levels - 1, traced.grid.unit, traced.grid.frames
    first, last = (side // unit for side in traced.sides)
    sides = {f"{side}{deepest}": Range(max(first, 2), max(last, 3)) for side in "hw"}
    ranges = {**sides, "L": tokens}
    if frames is not None:
        usual = frames.latent(None)
        ranges["F"] = Range(2, usual + usual // 2) if usual > 2 else Range(usual, usual)
    for count in (BATCH, Range(1, 1)) if traced.arguments.batched else (Range(1, 1),):
        try:
            yield _regime(traced, guidance, {**ranges, "B": count}, progress)
        except Parted as error:
            if count.is_one:
                raise
            progress(f"batch: {error}")


def _regime(traced: TracedPipeline, guidance: bool, ranges: Mapping[str, Range], progress: Progress) -> Regime:
    """Return one tape for ``ranges``, made coarser where the structure depends on a side or the prompt's length."""
    for attempt in range(ATTEMPTS):
        through, held = points(ranges, SEED)
        traced.unknown.clear()

        def run(values: Values) -> Tape:
            progress(", ".join(f"{name} = {value}" for name, value in values.items()))
            try:
                return traced.at(guidance, values)
            except DerivationError as error:
                raise Parted(traced.blamed(guidance, values), str(error)) from error

        try:
            tape = fit(run, through, held)
        except Parted as error:
            coarser = _coarser(ranges, error.symbols, traced.grid.frames)
            if coarser is None or attempt == ATTEMPTS - 1:
                raise
            progress(f"coarser: {error}")
            ranges = coarser
            continue
        return Regime(guidance, ranges, tape, tuple(through), tuple(held), tuple(traced.unknown)).decided()
    raise AssertionError("unreachable")


def _coarser(ranges: Mapping[str, Range], symbols: frozenset[str], frames: Frames | None) -> dict[str, Range] | None:
    """Return ranges in which the symbols that part have larger steps, None where they cannot: the batch does."""
    sides = frozenset(name for name in ranges if name[0] in "hw")
    length = ranges["L"]
    if "F" in symbols and frames is not None and not ranges["F"].is_one:
        return {**ranges, "F": Range(frames.latent(None), frames.latent(None))}
    if "L" in symbols and not length.is_one:
        first = LONG_PROMPT + length.last % LENGTH_STEP
        first = first if length.first < first < length.last else length.last
        return {**ranges, "L": Range(first, length.last, length.step)}
    if not symbols & sides:
        return None
    found = dict(ranges)
    for name in sides:
        step = 2 * ranges[name].step
        first = -(-ranges[name].first // step) * step
        if first >= (last := ranges[name].last // step * step):
            return None
        found[name] = Range(first, last, step)
    return found
