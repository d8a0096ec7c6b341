"""The public API: ``derive`` and the ``Derivation`` it returns."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import Any

import sympy

from derivation.allocator.memory import DeviceMemory, device_memory
from derivation.config import VAE_SCALE_FACTOR, Checkpoint, is_live, load
from derivation.config.document import from_document, to_document
from derivation.errors import DerivationError, shown
from derivation.gpu.profile import hardware
from derivation.options import Options, one_of, options_of, positive
from derivation.options.live import live_options
from derivation.peak.headline import Grid, Term, maximum
from derivation.peak.record import Record, StageRecord, derive_record
from derivation.peak.witness import Witness, witness_at
from derivation.tape.program import Program, Variant
from derivation.tape.tape import Memory, Settings, tape
from derivation.tape.tiles import Tiling
from derivation.walk.components import Component, components, parameter_count, parameters, weights_bytes
from derivation.walk.pipelines import Pipeline
from derivation.walk.pipelines.offload import resident

DEFAULT_PROMPT_LENGTH = 77
MAX_SIDE_PIXELS = 1 << 20


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


class Derivation:
    """The peak GPU memory of one checkpoint's pipeline, in closed form and exact at any size."""

    def __init__(self, checkpoint: Checkpoint, options: Options, fixed: Mapping[str, int] | None = None) -> None:
        self.checkpoint = checkpoint
        self.options = options
        self.fixed = dict(fixed or {})
        self._pipelines: dict[bool, Program] = {}
        self._components: dict[tuple[str, bool], Program] = {}
        self._records: dict[bool, Record] = {}
        self._memory: Memory = {}

    def __repr__(self) -> str:
        o = self.options
        return f"Derivation({self.checkpoint.name!r}, {o.pipeline}, {o.dtype}, attention={o.attention})"

    def __reduce__(self) -> tuple[type[Derivation], tuple[Checkpoint, Options, dict[str, int]]]:
        return Derivation, (self.checkpoint, self.options, self.fixed)

    def to_json(self) -> str:
        """Return the configs, options and fixed sizes that the derivation follows from, as JSON."""
        document = {"checkpoint": to_document(self.checkpoint), "options": self.options.as_dict(), "fixed": self.fixed}
        return json.dumps(document)

    @classmethod
    def from_json(cls, text: str) -> Derivation:
        """Return the derivation of ``to_json``; raises DerivationError for anything else."""
        try:
            document = json.loads(text)
            found = cls(from_document(document["checkpoint"]), options_of(document["options"]))
            return found._fixed_as(document["fixed"])
        except DerivationError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DerivationError(f"not a derivation: {error}") from None

    def _fixed_as(self, fixed: Mapping[str, int]) -> Derivation:
        """Return the derivation with level sides, batch and prompt length fixed; raises DerivationError for others."""
        factor = self.grid.vae_scale_factor
        sides = {name: fixed[key] * factor for name, key in (("height", "h0"), ("width", "w0")) if key in fixed}
        others = {name: fixed[key] for name, key in (("batch_size", "B"), ("prompt_length", "L")) if key in fixed}
        found = self.at(**sides, **others)
        if found.fixed != fixed or any(type(value) is not int for value in fixed.values()):
            raise DerivationError(f"fixed = {shown(fixed)} is not supported (supported: what at() fixes)")
        return found

    def _repr_latex_(self) -> str:
        return f"$\\displaystyle {sympy.latex(self.peak)}$"

    @cached_property
    def settings(self) -> Settings:
        """What the symbolic modules read; raises DerivationError for an unknown GPU or version."""
        o = self.options
        card = None if o.gpu is None else hardware(o.gpu, torch=o.torch, diffusers=o.diffusers, scratch=o.scratch)
        return o.settings(card)

    @cached_property
    def grid(self) -> Grid:
        """How image sides map to level sides; without a VAE a latent is 8 pixels wide."""
        vae, unet = self.checkpoint.vae, self.checkpoint.unet
        factor = VAE_SCALE_FACTOR if vae is None else vae.scale_factor
        tile = Tiling.of(vae, self.options).tile if vae is not None and self.options.vae_tiling else None
        return Grid(factor, 1 if unet is None else len(unet.block_out_channels), tile)

    @cached_property
    def calls(self) -> dict[str, Component]:
        """The component calls, in pipeline order."""
        return components(self.checkpoint, self.options)

    @cached_property
    def parameters(self) -> dict[str, dict[str, tuple[tuple[int, ...], str]]]:
        """Parameters and buffers of each model: path -> (shape, dtype)."""
        return parameters(self.checkpoint, self.options)

    @cached_property
    def resident(self) -> dict[str, dict[str, tuple[tuple[int, ...], str]]]:
        """Parameters and buffers that are on the GPU throughout a call: all, or what offload leaves there."""
        return resident(self.parameters, self.options)

    @cached_property
    def weights(self) -> dict[str, int]:
        """Bytes of each model's ``resident`` parameters and buffers, each tensor in 512-byte blocks."""
        return {model: weights_bytes(entries) for model, entries in self.resident.items()}

    @property
    def parameter_counts(self) -> dict[str, int]:
        """Parameters of each model."""
        return {model: parameter_count(entries) for model, entries in self.parameters.items()}

    @property
    def weights_bytes(self) -> int:
        """Bytes of all weights that are on the GPU throughout; others are part of the stages that use them."""
        return sum(self.weights.values())

    def program(self, guidance: bool = True) -> Program:
        """Return the whole pipeline as a recordable run; of a component alone, its calls, each a stage."""
        if guidance not in self._pipelines:
            pipeline = Pipeline(self.checkpoint, self.options, guidance)
            run = pipeline.__call__ if self.checkpoint.whole else lambda: self._call_each(guidance)
            self._pipelines[guidance] = Program(run, self.settings, self.fixed, self._memory)
        return self._pipelines[guidance]

    def _call_each(self, guidance: bool) -> None:
        """Run every component call on the active tape, each on inputs that exist before it."""
        if not self.calls:
            raise DerivationError(f"{self.checkpoint.source}: nothing in it runs on the GPU: pass a whole checkpoint")
        for name, component in self.calls.items():
            tape().mark(name)
            _outputs = component.call(self.options, guidance)
            del _outputs

    def component(self, name: str, guidance: bool = True) -> Program:
        """Return one component call as a recordable run; raises DerivationError for an unknown name."""
        if name not in self.calls:
            raise DerivationError(f"component {name!r} is not part of this checkpoint ({', '.join(self.calls)})")
        key = (name, guidance)
        if key not in self._components:
            call = self.calls[name].call
            self._components[key] = Program(
                lambda: call(self.options, guidance), self.settings, self.fixed, self._memory
            )
        return self._components[key]

    def record(self, guidance: bool = True) -> Record:
        """Return every intermediate of the symbolic derivation; raises DerivationError where it has no end."""
        if guidance not in self._records:
            self._records[guidance] = derive_record(self.program(guidance), self.grid)
        return self._records[guidance]

    def stages_with(self, guidance: bool) -> dict[str, Stage]:
        """Return the closed form of every stage, with or without classifier-free guidance."""
        variant = self.program(guidance).generic
        return {name: self._stage(stage, variant) for name, stage in self.record(guidance).stages.items()}

    @cached_property
    def stages(self) -> dict[str, Stage]:
        """The closed form of every stage under guidance."""
        return self.stages_with(guidance=True)

    def _stage(self, record: StageRecord, variant: Variant) -> Stage:
        witnesses = tuple(witness_at(term.point.stage, variant.tape, term.point.event) for term in record.terms)
        return Stage(record.name, record, witnesses, self.grid)

    def pipeline_stage(self, guidance: bool = True) -> Stage:
        """Return the Max over all stages as one closed form, without the weights."""
        return self._stage(self.record(guidance).pipeline, self.program(guidance).generic)

    def peak_with(self, guidance: bool) -> sympy.Expr:
        """Return weights + Max over stages, in bytes."""
        return sympy.Add(self.weights_bytes, self.pipeline_stage(guidance).peak, evaluate=False)

    @cached_property
    def peak(self) -> sympy.Expr:
        """Peak bytes of the pipeline under guidance, in H, W, L, B: weights + Max over stages."""
        return self.peak_with(guidance=True)

    def at(
        self,
        height: int | None = None,
        width: int | None = None,
        batch_size: int | None = None,
        prompt_length: int | None = None,
    ) -> Derivation:
        """Return the derivation with some sizes fixed: its closed forms have fewer symbols.

        Raises DerivationError for a size that the pipeline rejects.
        """
        if self.options.vae_tiling and (height is None) != (width is None):
            raise DerivationError("vae_tiling = True takes height and width together: tiles depend on both")
        given = {"h": height, "w": width, "B": batch_size, "L": prompt_length}
        some = {"h": self.grid.unit, "w": self.grid.unit, "B": 1, "L": 1}
        values = self.sizes(*(some[key] if value is None else value for key, value in given.items()))
        fixed = {name: value for name, value in values.items() if given.get(name[0], height) is not None}
        return Derivation(self.checkpoint, self.options, {**self.fixed, **fixed})

    def sizes(self, height: int, width: int, batch_size: int, prompt_length: int) -> dict[str, int]:
        """Return the value of every symbol for a call; raises DerivationError for a size the pipeline rejects."""
        for key, value in (("height", height), ("width", width)):
            self._check_side(key, value)
        positive("batch_size", batch_size)
        positive("prompt_length", prompt_length)
        self._check_prompt_length(prompt_length)
        return {"B": batch_size, "L": prompt_length, **self.grid.sizes(height, width)}

    def _check_side(self, key: str, value: int) -> None:
        factor = self.grid.vae_scale_factor
        if positive(key, value) < factor:
            raise DerivationError(f"{key} = {value} is not supported (supported: integers from {factor})")
        if self.options.pipeline == "txt2img" and value % factor:
            raise DerivationError(f"{key} = {value} is not supported (supported: multiples of {factor})")
        if value > MAX_SIDE_PIXELS:
            raise DerivationError(f"{key} = {value} is not supported (supported: up to {MAX_SIDE_PIXELS})")

    def _check_prompt_length(self, prompt_length: int) -> None:
        """Raise for more tokens than a text encoder alone takes; a pipeline cuts longer prompts into chunks."""
        config = self.checkpoint.text_encoder
        if not self.checkpoint.whole and config is not None and prompt_length > config.max_position_embeddings:
            supported = f"up to max_position_embeddings = {config.max_position_embeddings}"
            raise DerivationError(f"prompt_length = {prompt_length} is not supported (supported: {supported})")

    def component_peaks(
        self,
        height: int,
        width: int,
        batch_size: int = 1,
        prompt_length: int = DEFAULT_PROMPT_LENGTH,
        guidance: bool = True,
    ) -> dict[str, int]:
        """Return each component call's peak bytes: storages allocated during the call, 512-byte blocks.

        The component's weights count where sequential offload loads them during the call, else they precede it.
        A text encoder takes at most its number of positions; longer prompts reach it in chunks.
        Raises DerivationError for a size that the pipeline rejects.
        """
        values = self.sizes(height, width, batch_size, prompt_length)
        peaks: dict[str, int] = {}
        for name in self.calls:
            at = self.chunked(name, values)
            [(peak, _)] = self.component(name, guidance).at(at).evaluator.peaks(at).values()
            peaks[name] = peak
        return peaks

    def chunked(self, name: str, values: Mapping[str, int]) -> dict[str, int]:
        """Return ``values`` with the prompt length that one call of component ``name`` can take."""
        config = getattr(self.checkpoint, name, None) if name.startswith("text_encoder") else None
        limit = values["L"] if config is None else config.max_position_embeddings
        return {**values, "L": min(values["L"], limit)}

    def stage_peaks(
        self,
        height: int,
        width: int,
        batch_size: int = 1,
        prompt_length: int = DEFAULT_PROMPT_LENGTH,
        guidance: bool = True,
    ) -> dict[str, int]:
        """Return each stage's peak bytes over the whole pipeline call, beyond ``weights_bytes``."""
        values = self.sizes(height, width, batch_size, prompt_length)
        peaks = self.program(guidance).at(values).evaluator.peaks(values)
        return {name: peak for name, (peak, _) in peaks.items()}

    def estimate(
        self,
        height: int,
        width: int,
        batch_size: int = 1,
        prompt_length: int = DEFAULT_PROMPT_LENGTH,
        guidance: bool = True,
    ) -> dict[str, Any]:
        """Return everything known about one call, in bytes, ready for JSON."""
        values = self.sizes(height, width, batch_size, prompt_length)
        variant = self.program(guidance).at(values)
        peaks = variant.evaluator.peaks(values)
        peak_stage = max(peaks, key=lambda name: peaks[name][0])
        stage_bytes, event = peaks[peak_stage]
        return {
            "model": self.checkpoint.name,
            **self.options.as_dict(),
            "height": height,
            "width": width,
            "batch_size": batch_size,
            "prompt_length": prompt_length,
            "guidance": guidance,
            "weights_bytes": self.weights_bytes,
            "weights": self.weights,
            "components": self.component_peaks(height, width, batch_size, prompt_length, guidance),
            "stages": {name: peak for name, (peak, _) in peaks.items()},
            "peak_stage": peak_stage,
            "peak_tensor_bytes": self.weights_bytes + stage_bytes,
            "witness": witness_at(peak_stage, variant.tape, event).at(values),
            **({} if self.options.gpu is None else self._replayed(variant, values).as_dict()),
        }

    def device_memory(
        self,
        height: int,
        width: int,
        batch_size: int = 1,
        prompt_length: int = DEFAULT_PROMPT_LENGTH,
        guidance: bool = True,
    ) -> DeviceMemory:
        """Return what the allocator and nvidia-smi say on the GPU; raises DerivationError where none is named."""
        values = self.sizes(height, width, batch_size, prompt_length)
        return self._replayed(self.program(guidance).at(values), values)

    def _replayed(self, variant: Variant, values: Mapping[str, int]) -> DeviceMemory:
        if self.options.gpu is None:
            raise DerivationError("gpu = None is not supported (supported: a GPU's name, for what its allocator does)")
        return device_memory(self.options.gpu, self.resident, variant.tape, values)

    def latex(self) -> str:
        """Return the equation as a LaTeX align environment."""
        from derivation.export import export

        return export(self, "latex")

    def lambdify(self, target: str = "math") -> Callable[..., Any]:
        """Return peak_vram(height, width, prompt_length, batch_size, guidance) in bytes, exact at every size.

        ``target`` is "math" (Python integers), "numpy" or "torch" (int64 arrays that broadcast); raises
        DerivationError for another.
        """
        from derivation.export import compiled

        return compiled(self, target)


def derive(
    model: object,
    pipeline: str | None = None,
    dtype: str | None = None,
    attention: str | None = None,
    gpu: str | None = None,
    method: str = "walk",
    revision: str | None = None,
    local_files_only: bool = False,
    **options: Any,
) -> Derivation:
    """Derive the peak memory of ``model``: a bundled id, a folder, a config file, a Hub id or a live pipeline.

    What is not given is read off a live pipeline, and is Options' default elsewhere. A Hub id is "org/name" or
    "org/name@revision"; with ``local_files_only`` it is read from the Hub's cache alone. The derivation of one
    component's config is that of its calls.

    ``method`` "walk" interprets diffusers' blocks; "trace" runs the real module with symbolic shapes (a
    transformer's config, folder or dict; needs the extra ``verify``). Raises DerivationError, with one line,
    for a config or an option that is not supported.
    """
    one_of("method", method, ("walk", "trace"))
    named = {"pipeline": pipeline, "dtype": dtype, "attention": attention, "gpu": gpu}
    given = {**{name: value for name, value in named.items() if value is not None}, **options}
    if method == "trace":
        return _traced(model, options_of(given))
    chosen = live_options(model, **given) if is_live(model) else options_of(given)
    return Derivation(load(model, revision, local_files_only), chosen)


def _traced(model: object, options: Options) -> Derivation:
    try:
        trace = import_module("derivation.trace.derive")
    except ImportError as error:
        raise DerivationError(f"method = 'trace' needs the extra verify (missing: {error.name})") from None
    traced: Derivation = trace.trace_derivation(model, options)
    return traced


