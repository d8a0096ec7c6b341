"""A pipeline's tapes as data: recorded once by tracing, read and evaluated without torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from derivation.call import DEFAULT_SIDE, Call
from derivation.errors import DerivationError, unsupported
from derivation.libraries import libraries
from derivation.options import Options
from derivation.options.named import options_of
from derivation.tape.grid import Frames, Grid, Range, Sides
from derivation.tape.program import Variant
from derivation.tape.regime import Regime, regime_document, regime_of, specialised
from derivation.tape.subject import Parameters
from derivation.tape.tape import Tape

FORMAT = "derivation-recorded-1"
# Said with a card (derivation.trace.scratch), where a convolution's output is [N, C, F, H, W].
UNMEASURED = "workspaces of conv3d are what cuDNN answers without a card: none was measured"
COLUMNS, VIDEO_RANK = "conv3d takes columns, as torch 2.9 in half precision", 5
# The arguments of a call that give each symbol.
ARGUMENTS = {"h": "height", "w": "width", "B": "batch_size", "L": "prompt_length", "F": "num_frames"}


# Traces a call at integers: (guidance, values) -> the tape.
Retrace = Callable[[bool, Mapping[str, int]], Tape]


class RecordedProgram:
    """The regimes of one guidance; sizes that none covers are traced where that can be done.

    ``others`` returns those of other frames than the closed form has.
    """

    def __init__(
        self,
        regimes: Iterable[Regime],
        others: Callable[[int], Iterable[Regime]],
        retrace: Callable[[Mapping[str, int]], Tape],
    ) -> None:
        self._own = [(regime, Variant(regime.tape)) for regime in regimes]
        self._others: dict[int, list[tuple[Regime, Variant]]] = {}
        self._made, self._retrace = others, retrace
        self._traced: list[Variant] = []

    @property
    def generic(self) -> Variant:
        """The first regime, of the most general sizes."""
        return self._own[0][1]

    def regime(self, values: Mapping[str, int]) -> Variant:
        """Return the variant of the decisions at ``values``."""
        known = [*(variant for _, variant in self._own), *self._traced]
        return next((v for v in known if v.holds(values)), None) or self._trace(values)

    def at(self, values: Mapping[str, int]) -> Variant:
        """Return the variant that covers ``values``, tracing them if there is none; raises DerivationError."""
        found = next((v for regime, v in self._at(values) if regime.covers(values) and v.holds(values)), None)
        return found or next((v for v in self._traced if v.holds(values)), None) or self._trace(values)

    def _at(self, values: Mapping[str, int]) -> Iterator[tuple[Regime, Variant]]:
        yield from self._own
        if (frames := values.get("F")) is not None:
            if frames not in self._others:
                self._others[frames] = [(regime, Variant(regime.tape)) for regime in self._made(frames)]
            yield from self._others[frames]

    def _trace(self, values: Mapping[str, int]) -> Variant:
        self._traced.append(Variant(self._retrace(values)))
        return self._traced[-1]


@dataclass(frozen=True)
class RecordedSubject:
    """A traced pipeline: its tapes under guidance and without, by sizes, and its parameters.

    ``retrace`` records a call at sizes that no regime covers, ``under`` returns the pipeline with other options;
    ``offload_order`` is the pipeline's ``model_cpu_offload_seq``, ``own_sides`` are the height and width of a call
    that says none, which the regimes need not cover. Components that are ``grouped`` come to the GPU group by group.
    """

    name: str
    class_name: str
    source: str
    options: Options
    grid: Grid
    sides: Sides
    prompt_length: int
    parameters: Parameters
    parameter_counts: Mapping[str, int]
    regimes: tuple[Regime, ...]
    passes: int
    offload_order: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    own_sides: tuple[int, int] = (DEFAULT_SIDE, DEFAULT_SIDE)
    grouped: tuple[str, ...] = ()
    retrace: Retrace | None = field(default=None, compare=False)
    under: Callable[[Options], RecordedSubject] | None = field(default=None, compare=False)

    method, whole, calls, guided = "trace", True, (), ()

    @property
    def remarks(self) -> tuple[str, ...]:
        """What was traced, where the closed form was checked, and what it takes for granted."""
        fitted = sum(len(regime.fitted) for regime in self.regimes)
        checked = sum(len(regime.checked) for regime in self.regimes)
        libraries = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        lines = dict.fromkeys(line for regime in self.regimes for line in regime.assumed)
        frames = None if self.grid.frames is None or "F" not in self.fixed else self.grid.frames.frames(self.fixed["F"])
        return (
            f"the real call of {self.class_name} on meta tensors ({libraries}), traced at {fitted} sizes and "
            f"interpolated; equal to the byte at {checked} other sizes, not proven between them",
            f"{self.passes} passes of the denoising loop stand for any number; use_resolution_binning is off",
            *(() if frames is None else (f"num_frames = {frames}",)),
            *(f"unknown when it was traced: {line}" for line in lines),
            *((self._conv3d,) if self.options.gpu is not None and self._convolves_videos else ()),
        )

    @property
    def _conv3d(self) -> str:
        """What is counted of convolutions of videos."""
        half = self.options.dtype != "float32"
        return COLUMNS if half and libraries(self.options.torch).follows("conv3d_columns") else UNMEASURED

    @property
    def _convolves_videos(self) -> bool:
        """Whether some convolution is one of videos."""
        allocations = (a for regime in self.regimes for a in regime.tape.allocations)
        return any("convolution" in a.op and len(a.shape) == VIDEO_RANK for a in allocations)

    @property
    def default_sides(self) -> tuple[int, int]:
        """The height and width of a call that says none, rounded up to sides that are covered."""
        least, step, most = self.sides.least, self.sides.step, self.sides.most
        height, width = (min(max(-(-side // step) * step, least), most) for side in self.own_sides)
        return height, width

    @cached_property
    def bounds(self) -> dict[str, Range]:
        """The values that arguments of a call may have beside the image's sides, where some regime covers several."""
        found: dict[str, Range] = {}
        for key, name in (("B", "batch_size"), ("L", "prompt_length")):
            ranges = [r.ranges[key] for r in self.regimes]
            if not all(r.is_one for r in ranges) or key == "B":
                found[name] = Range(
                    min(r.first for r in ranges), max(r.last for r in ranges), max(r.step for r in ranges)
                )
        return {name: found[name] for name in found if not found[name].is_one}

    @cached_property
    def fixed(self) -> dict[str, int]:
        """The symbols that no regime leaves open, at the values of the first; a call may have others, traced anew.

        Closed forms have one number of frames, the usual one, also where a regime covers several.
        """
        first = self.regimes[0].fixed | dict.fromkeys(self.regimes[0].tape.ones, 1)
        found = {n: v for n, v in first.items() if all(regime.ranges[n].is_one for regime in self.regimes)}
        deepest = self.grid.levels - 1
        alone = [side for side in "hw" if f"{side}{deepest}" in found]
        sides = {f"{s}{k}": found[f"{s}{deepest}"] << (deepest - k) for k in range(deepest) for s in alone}
        frames = {} if self.grid.frames is None else {"F": self.grid.frames.latent(None)}
        return {**frames, **found, **sides}

    def program(self, guidance: bool, fixed: Mapping[str, int]) -> RecordedProgram:
        """Return the whole call's tapes, ``fixed`` symbols as numbers, the frames where they are a loop's."""
        if self.grid.frames is not None and any(regime.loop for regime in self.regimes):
            fixed = {"F": self.grid.frames.latent(None), **fixed}
        own = [r for r in self.regimes if r.guidance == guidance] or list(self.regimes)
        fitting = [r for r in own if all(value in r.ranges[name] for name, value in fixed.items() if name in r.ranges)]
        lengths = sorted({regime.ranges["L"].last for regime in own})[:-1]
        regimes = [specialised(regime, fixed, lengths) for regime in fitting]
        if not regimes:
            wanted = {**self.regimes[0].fixed, **fixed}
            regimes = [specialised(r, {}) for r in self.regimes if r.guidance == guidance and r.fixed == wanted]
        if not regimes:
            raise unsupported(self._spelled(fixed), self._values(fixed), self._covered())
        rest = {name: value for name, value in fixed.items() if name != "F"}

        def others(frames: int) -> list[Regime]:
            return [specialised(r, {**rest, "F": frames}, lengths) for r in own if frames in r.ranges.get("F", ())]

        return RecordedProgram(regimes, others, lambda values: self._traced(guidance, values))

    def _traced(self, guidance: bool, values: Mapping[str, int]) -> Tape:
        if self.retrace is None:
            raise DerivationError(
                f"{self.name}: {self._values(values)} was not recorded (recorded: {self._covered()}); "
                "with the extra verify it is traced"
            )
        return self.retrace(guidance, values)

    def _covered(self) -> str:
        return "; ".join(dict.fromkeys(", ".join(f"{n} {r}" for n, r in g.ranges.items()) for g in self.regimes))

    @staticmethod
    def _spelled(values: Mapping[str, int]) -> str:
        return ", ".join(dict.fromkeys(ARGUMENTS[name[0]] for name in values))

    @staticmethod
    def _values(values: Mapping[str, int]) -> str:
        return ", ".join(f"{name} = {value}" for name, value in values.items())

    def component(self, name: str, guidance: bool, fixed: Mapping[str, int]) -> RecordedProgram:
        """Raise DerivationError: components are recorded as stages of the whole call."""
        raise unsupported("component", name, "the stages of a whole call")

    def check(self, call: Call) -> None:
        """Raise DerivationError for frames of a pipeline of images, and for frames that the VAE rejects."""
        if self.grid.frames is not None:
            self.grid.frames.latent(call.num_frames)
        elif call.num_frames is not None:
            raise unsupported("num_frames", call.num_frames, "pipelines of videos")

    def longest_prompt(self, name: str) -> int | None:
        """Return None: prompts are recorded whole."""
        return None

    @property
    def resident(self) -> Parameters:
        """Parameters and buffers that are on the GPU throughout: all, or none under model offload."""
        return {} if self.options.offload else {n: p for n, p in self.parameters.items() if n not in self.grouped}

    def on(self, options: Options, changed: Callable[[Tape], Tape]) -> RecordedSubject:
        """Return the same pipeline under other ``options``, every tape ``changed``."""
        regimes = tuple(r.changed(lambda tape: replace(changed(tape), options=options)) for r in self.regimes)
        traced = self.retrace
        retrace = None if traced is None else lambda guidance, values: changed(traced(guidance, values))
        return replace(self, options=options, regimes=regimes, retrace=retrace)

    def changed(self, **options: Any) -> RecordedSubject:
        """Return the same pipeline under other options; raises DerivationError for those that tracing does not obey."""
        wanted = replace(self.options, **options)
        if wanted == self.options:
            return self
        if self.under is None:
            raise DerivationError(f"{self.name}: a recorded pipeline alone has no other options")
        return self.under(wanted)

    def document(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        frames = self.grid.frames
        return {
            "format": FORMAT,
            "name": self.name,
            "class": self.class_name,
            "source": self.source,
            "options": self.options.as_dict(),
            "grid": [self.grid.vae_scale_factor, self.grid.levels],
            "frames": None if frames is None else [frames.factor, frames.default],
            "sides": [self.sides.least, self.sides.step, self.sides.most],
            "own_sides": list(self.own_sides),
            "grouped": list(self.grouped),
            "prompt_length": self.prompt_length,
            "parameters": {m: [[n, list(s), d] for n, (s, d) in es.items()] for m, es in self.parameters.items()},
            "parameter_counts": dict(self.parameter_counts),
            "passes": self.passes,
            "offload_order": list(self.offload_order),
            "versions": dict(self.versions),
            "regimes": [regime_document(regime) for regime in self.regimes],
        }

    @classmethod
    def from_document(cls, document: Mapping[str, Any], retrace: Retrace | None = None) -> RecordedSubject:
        """Return the subject of ``document()``; raises DerivationError for another format."""
        if document.get("format") != FORMAT:
            raise unsupported("format", document.get("format"), FORMAT)
        frames, (factor, levels) = document["frames"], document["grid"]
        height, width = document.get("own_sides", (DEFAULT_SIDE, DEFAULT_SIDE))
        options = options_of(document["options"])
        return cls(
            document["name"],
            document["class"],
            document["source"],
            options,
            Grid(factor, levels, None, None if frames is None else Frames(*frames)),
            Sides(*document["sides"]),
            document["prompt_length"],
            {m: {n: (tuple(s), d) for n, s, d in entries} for m, entries in document["parameters"].items()},
            document["parameter_counts"],
            tuple(regime_of(regime, options) for regime in document["regimes"]),
            document["passes"],
            tuple(document["offload_order"]),
            document["versions"],
            (height, width),
            tuple(document.get("grouped", ())),
            retrace,
        )
