"""A subject with some symbols fixed: its programs, its symbolic record stage by stage, its peak at one call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NoReturn, Self, TypeVar

import sympy

from derivation.allocator.config import AllocatorConfig
from derivation.call import Call
from derivation.errors import DerivationError, meant, shown, unsupported
from derivation.options import Options
from derivation.peak.headline import Term, maximum
from derivation.peak.record import Record, StageRecord, derive_record
from derivation.peak.witness import Witness, witness_at
from derivation.tape.grid import Grid, Range, Sides
from derivation.tape.program import Recordings, Variant
from derivation.tape.subject import Parameters, Subject, weights_bytes

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Stage:
    """The closed form of one stage: its bytes beyond the weights, and where they peak."""

    name: str
    record: StageRecord
    witnesses: tuple[Witness, ...]
    grid: Grid

    @property
    def terms(self) -> tuple[Term, ...]:
        """The polynomials of the headline Max, one witness each."""
        return self.record.terms

    @property
    def peak(self) -> sympy.Expr:
        """Bytes in H, W, L and B for sides that are multiples of the grid's unit."""
        return maximum(self.grid.explicit(term.expression) for term in self.record.terms)

    @property
    def witness(self) -> Witness:
        """The witness of the first polynomial, the one that wins most often."""
        return self.witnesses[0]


@dataclass(frozen=True, slots=True)
class Example:
    """One call and its exact peak in bytes."""

    height: int
    width: int
    bytes: int


def peaks_of(recordings: Recordings, values: Mapping[str, int]) -> Variant:
    """Return the variant that has the peaks at ``values``: VAE tiles in closed form where there is one, else walked."""
    return recordings.regime(values) if "E" in values else recordings.at(values)


class StagesByName(dict[str, Stage]):
    """Stages by name; another name raises DerivationError, which lists those there are."""

    def __missing__(self, name: object) -> NoReturn:
        raise unsupported("stage", name, f"{', '.join(self)}{meant(name, self)}")


def _check_allocator(conf: str) -> None:
    try:
        AllocatorConfig.parse(conf)
    except DerivationError as error:
        raise DerivationError(f"alloc_conf = {shown(conf)} is not supported: {error}") from None


class Derived:
    """What follows from a subject's tapes, with the symbols in ``fixed`` as numbers.

    What depends on guidance is a method of it; every part is made when it is first read, and kept.
    """

    def __init__(self, subject: Subject, fixed: Mapping[str, int]) -> None:
        _check_allocator(subject.options.alloc_conf or "")
        self.subject = subject
        self.fixed = dict(fixed)
        self._made: dict[tuple[object, ...], Any] = {}

    def _once(self, make: Callable[..., T], *arguments: Any) -> T:
        key = (make, *arguments)
        if key not in self._made:
            self._made[key] = make(*arguments)
        found: T = self._made[key]
        return found

    @property
    def name(self) -> str:
        """The model's name."""
        return self.subject.name

    @property
    def options(self) -> Options:
        """The options of the run."""
        return self.subject.options

    @property
    def grid(self) -> Grid:
        """How image sides map to level sides."""
        return self.subject.grid

    @property
    def resident(self) -> Parameters:
        """Parameters and buffers that are on the GPU throughout a call."""
        return self.subject.resident

    @cached_property
    def weights(self) -> dict[str, int]:
        """Bytes of each model's ``resident`` parameters and buffers, each tensor in 512-byte blocks."""
        return {model: weights_bytes(entries) for model, entries in self.resident.items()}

    @property
    def weights_bytes(self) -> int:
        """Bytes of all weights that are on the GPU throughout; others are part of the stages that use them."""
        return sum(self.weights.values())

    def program(self, guidance: bool = True) -> Recordings:
        """Return the whole call as a recordable run."""
        return self._once(self._program, guidance)

    def _program(self, guidance: bool) -> Recordings:
        return self.subject.program(guidance, self.fixed)

    def component(self, name: str, guidance: bool = True) -> Recordings:
        """Return one component call as a recordable run; raises DerivationError for an unknown name."""
        return self._once(self._component, name, guidance and name in self.subject.guided)

    def _component(self, name: str, guidance: bool) -> Recordings:
        return self.subject.component(name, guidance, self.fixed)

    def sizes(self, call: Call) -> dict[str, int]:
        """Return the value of every symbol for a call; raises DerivationError for one that the pipeline rejects."""
        call = call.filled(self.prompt_length)
        length = call.prompt_length or self.prompt_length
        for key, side in (("height", call.height), ("width", call.width)):
            self.sides.check(key, side)
        self.subject.check(call)
        if self.grid.frames is None and call.num_frames is not None:
            raise unsupported("num_frames", call.num_frames, "pipelines of videos")
        frames = {} if self.grid.frames is None else {"F": self.grid.frames.latent(call.num_frames)}
        return {"B": call.batch_size, "L": length, **frames, **self.grid.sizes(call.height, call.width)}

    def stage_peaks(self, call: Call) -> dict[str, int]:
        """Return each stage's peak bytes over the whole call, beyond ``weights_bytes``."""
        values = self.sizes(call)
        peaks = peaks_of(self.program(call.guidance), values).evaluator.peaks(values)
        return {name: peak for name, (peak, _) in peaks.items()}

    def record(self, guidance: bool = True) -> Record:
        """Return every intermediate of the symbolic derivation; raises DerivationError where it has no end."""
        return self._once(self._record, guidance)

    def _record(self, guidance: bool) -> Record:
        return derive_record(self.program(guidance), self.grid)

    def stages(self, guidance: bool = True) -> StagesByName:
        """Return the closed form of every stage."""
        return self._once(self._stages, guidance)

    def _stages(self, guidance: bool) -> StagesByName:
        variant = self.program(guidance).generic
        found = {name: self._stage(stage, variant) for name, stage in self.record(guidance).stages.items()}
        return StagesByName(found)

    def _stage(self, record: StageRecord, variant: Variant) -> Stage:
        witnesses = tuple(witness_at(term.point.stage, variant.tape, term.point.event) for term in record.terms)
        return Stage(record.name, record, witnesses, self.grid)

    def pipeline_stage(self, guidance: bool = True) -> Stage:
        """Return the Max over all stages as one closed form, without the weights."""
        return self._once(self._pipeline_stage, guidance)

    def _pipeline_stage(self, guidance: bool) -> Stage:
        return self._stage(self.record(guidance).pipeline, self.program(guidance).generic)

    def peak(self, guidance: bool = True) -> sympy.Expr:
        """Return weights + Max over stages, in bytes."""
        return sympy.Add(self.weights_bytes, self.pipeline_stage(guidance).peak, evaluate=False)

    @property
    def factor(self) -> int:
        """Image pixels per latent, along a side."""
        return self.grid.vae_scale_factor

    @property
    def sides(self) -> Sides:
        """The image sides that are accepted."""
        return self.subject.sides

    def accepts(self, values: Mapping[str, int]) -> bool:
        """Return whether level sides are those of an image that is not too large for the pipeline."""
        sides = {name: value for name, value in values.items() if name[0] in "hw"}
        most = self.subject.sides.most
        return all(value * (self.factor << int(name[1:])) <= most for name, value in sides.items())

    @property
    def bounds(self) -> Mapping[str, Range]:
        """The values that batch_size and prompt_length may have, where those are fewer than all."""
        names = {"B": "batch_size", "L": "prompt_length"}
        given = {names[name] for name in self.given if name in names}
        return {name: bound for name, bound in self.subject.bounds.items() if name not in given}

    @property
    def symbols(self) -> tuple[str, ...]:
        """The symbols of a call."""
        frames = () if self.grid.frames is None else ("F",)
        return ("B", "L", *frames, *self.grid.sizes(self.grid.unit, self.grid.unit))

    def chunked(self, name: str, values: Mapping[str, int]) -> dict[str, int]:
        """Return ``values`` with the prompt length that one call of component ``name`` can take."""
        longest = self.subject.longest_prompt(name)
        return {**values, "L": values["L"] if longest is None else min(values["L"], longest)}

    @property
    def given(self) -> dict[str, int]:
        """Symbols that have one value here, of those that a caller gives."""
        return {name: value for name, value in self.fixed.items() if name in ("B", "L", "h0", "w0")}

    @property
    def defaults(self) -> dict[str, int]:
        """What B and L are where the caller says nothing."""
        return {"L": self.prompt_length, "B": self.fixed.get("B", 1)}

    @property
    def prompt_length(self) -> int:
        """The prompt length in tokens of a call that says none."""
        return self.fixed.get("L", self.subject.prompt_length)

    @property
    def default_sides(self) -> tuple[int, int]:
        """The height and width in pixels of a call that says none: those that are fixed, else the pipeline's own."""
        sides = zip(("h0", "w0"), self.subject.default_sides, strict=True)
        height, width = (self.fixed[key] * self.factor if key in self.fixed else side for key, side in sides)
        return height, width

    @property
    def example(self) -> Example:
        """A call that says no size, and its peak from the replayed tape."""
        height, width = self.default_sides
        call = Call(height, width, self.defaults["B"], self.defaults["L"])
        return Example(height, width, self.weights_bytes + max(self.stage_peaks(call).values()))

    def at(self, **given: int | None) -> Self:
        """Return the same with some of height, width, batch_size and prompt_length fixed."""
        least = -(-self.sides.least // self.grid.unit) * self.grid.unit
        some = {"height": least, "width": least, "batch_size": 1, "prompt_length": 1}
        known = {name: value for name, value in given.items() if value is not None}
        if self.options.vae_tiling and ("height" in known) != ("width" in known):
            raise unsupported("vae_tiling", True, "height and width together: tiles depend on both")
        sides = {**some, **known}
        values = self.sizes(Call(**sides))  # type: ignore[arg-type]
        short = {"h": "height", "w": "width", "B": "batch_size", "L": "prompt_length"}
        fixed = {name: value for name, value in values.items() if short.get(name[0], "height") in known}
        return type(self)(self.subject, {**self.fixed, **fixed})
