"""Any pipeline of diffusers as a recorded subject: its real ``__call__`` on ``meta``, traced and interpolated."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import torch

from derivation.call import Call
from derivation.config.traced import GROUPS
from derivation.errors import DerivationError, shown
from derivation.options import Options
from derivation.tape.evaluate import Evaluator
from derivation.tape.grid import Grid
from derivation.tape.loop import normalised
from derivation.tape.tape import Tape
from derivation.trace.arguments import Arguments
from derivation.trace.build import REJECTIONS, Description, State, build, cast_layerwise
from derivation.trace.groups import grouped
from derivation.trace.interpolate import Values
from derivation.trace.modules import modules_of, quiet
from derivation.trace.offload import offload_pipeline
from derivation.trace.shadows import ShadowTracer
from derivation.trace.tracer import marked, without_collector
from derivation.trace.world import meta_world

# Image sides of the sizes that are traced, in pixels; a video's are smaller.
SIDES, VIDEO_SIDES, MIDDLE = (256, 2048), (256, 1280), 512
# Passes of the denoising loop: PNDM's history of four outputs is the longest.
LEAST_STEPS, MOST_STEPS = 2, 8
MODEL = "pipeline"


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
        hooked = partial(cast_layerwise, self.pipe, description)
        if options.offload is None:
            hooked()
        else:
            offload_pipeline(self.pipe, options.offload, hooked)
        self.arguments = Arguments(self.pipe, {"output_type": "pt", **(given or {})})
        self.grid: Grid = self.arguments.grid
        self.sides: tuple[int, int] | None = sides or (SIDES if self.grid.frames is None else VIDEO_SIDES)
        self.middle = (0, 0)
        self._state: State | None = None
        self._tapes: dict[tuple[object, ...], Tape] = {}
        self.padded = True
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
        """Return a call that the pipeline takes: of images, a bare prompt, smaller sides or its own, where it must."""
        errors: dict[tuple[str, ...], DerivationError] = {}
        for sides, middle in self._candidates():
            self.sides, self.middle = sides, middle
            for images, bare in product(self.arguments.image_choices, (False, True)):
                self.arguments = replace(self.arguments, images=images, bare=bare)
                try:
                    self.trace(self.base())
                except DerivationError as error:
                    errors.setdefault(images, error)
                else:
                    return self.base()
        if errors:  # with all images, where some may be asked for
            raise errors[max(errors, key=len)]
        raise DerivationError(f"{self.description.class_name}: no side is a multiple of {self.grid.unit} pixels")

    def _candidates(self) -> Iterator[tuple[tuple[int, int] | None, tuple[int, int]]]:
        """Yield (the sides between which images are traced, those of one between), None for images of one size."""
        unit, (least, most) = self.grid.unit, self.sides or SIDES
        while most > 2 * unit:
            side = -(-min(MIDDLE, most // 2) // unit) * unit
            yield (min(least, most // 4), most), (side, side)
            most //= 2
        yield None, self.usual

    @property
    def usual(self) -> tuple[int, int]:
        """The height and width of a call that says none, in whole units."""
        unit = self.grid.unit
        height, width = (-(-side // unit) * unit for side in self.arguments.usual_sides or (MIDDLE, MIDDLE))
        return height, width

    def base(self, length: int | None = None, guidance: bool = True) -> Call:
        """Return a call of one image of middling size."""
        frames, tokens = self.grid.frames, length or self.arguments.prompt_length
        return Call(*self.middle, 1, tokens, guidance, None if frames is None else frames.default)

    def accepts(self, call: Call) -> bool:
        """Return whether the pipeline takes a call."""
        try:
            self.trace(call)
        except DerivationError:
            return False
        return True

    def _with_steps(self, steps: int, call: Call) -> dict[str, int]:
        self.arguments = replace(self.arguments, steps=steps)
        peaks = Evaluator(self.trace(call)).peaks({})
        return {stage: peak for stage, (peak, _) in peaks.items()}

    def trace(self, call: Call) -> Tape:
        """Return the tape of one call, in integers; raises DerivationError for what the pipeline rejects."""
        key = (call, self.padded, self.arguments.steps, self.arguments.images, self.arguments.bare, self.arguments.full)
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
        given = self.arguments.at(call, self.padded)
        tensors = [value for value in given.values() if isinstance(value, torch.Tensor)]
        tracer = ShadowTracer(modules_of(self.pipe), tensors, stage=MODEL)
        try:
            with (
                quiet(),
                meta_world(self._backend, tracer.tape.empty_cache),
                self._grouped(tracer),
                _stages(self.pipe, tracer),
                tracer,
            ):
                output = self.pipe(**given)
                del output
        except DerivationError:
            raise
        except (*REJECTIONS, NotImplementedError, AssertionError) as error:
            said = shown(" ".join(str(error).split())[:200])
            raise DerivationError(f"{self.description.class_name}: {type(error).__name__}: {said}") from error
        self.unknown |= dict.fromkeys(tracer.unknown)
        return tracer.tape

    @contextmanager
    def _grouped(self, tracer: ShadowTracer) -> Iterator[None]:
        """Put group offload onto the models that have it, as a first call finds it; stages are told inside, too.

        With streams its hooks take off the outermost forward after the first call (LazyPrefetchGroupOffloadingHook).
        """
        parts = {
            name: part.config[GROUPS] for name, part in self.description.parts.items() if part and GROUPS in part.config
        }
        if not parts:
            yield
            return
        with _stages(self.pipe, tracer), grouped((getattr(self.pipe, name), given) for name, given in parts.items()):
            yield

    @property
    def _backend(self) -> str:
        return "math" if self.options.attention == "eager" else self.options.attention

    def at(self, guidance: bool, values: Mapping[str, int]) -> Tape:
        """Return the tape at the symbols' ``values``, deepest sides and all."""
        return self.trace(self.call(guidance, values))

    def call(self, guidance: bool, values: Mapping[str, int]) -> Call:
        """Return the call at the symbols' ``values``."""
        deepest, unit = self.grid.levels - 1, self.grid.unit
        frames = None if self.grid.frames is None else self.grid.frames.frames(values["F"])
        height, width = (values[f"{side}{deepest}"] * unit for side in "hw")
        return Call(height, width, values["B"], values["L"], guidance, frames)

    def blamed(self, guidance: bool, values: Values) -> frozenset[str]:
        """Return the symbols for whose ``values`` a call is rejected: batch, frames, prompt or all, else the sides."""
        frames = {} if self.grid.frames is None else {"F": self.grid.frames.latent(None)}
        usual = {"B": 1, **frames, "L": self.arguments.prompt_length}
        other = [name for name in usual if values[name] != usual[name]]
        for names in (*((name,) for name in other), tuple(other)):
            if names and self.accepts(self.call(guidance, {**values, **{name: usual[name] for name in names}})):
                return frozenset(names)
        return frozenset(name for name in values if name[0] in "hw")

    def use_prompt(self, call: Call) -> bool:
        """Find out how the prompt's length is passed; returns whether the tape depends on it."""
        shorter = replace(call, prompt_length=(call.prompt_length or 0) // 2)
        for padded in (True, False) if self.arguments.pads else (False,):
            self.padded = padded
            try:
                if not same(self.trace(call), self.trace(shorter)):
                    self._fill(call)
                    return True
            except DerivationError:  # a model of one prompt length (CogVideoX)
                continue
        self.padded = True
        return False

    def _fill(self, call: Call) -> None:
        """Fill a padded prompt with words where that takes more: a model may drop the padding (Z-Image)."""
        short, least = self.arguments, self._peak(call)
        self.arguments = replace(short, full=True)
        if not self.accepts(call) or self._peak(call) <= least:
            self.arguments = short

    def _peak(self, call: Call) -> int:
        return max(peak for peak, _ in Evaluator(self.trace(call)).peaks({}).values())


def same(one: Tape, other: Tape) -> bool:
    """Return whether two tapes have the same events and bytes."""
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
