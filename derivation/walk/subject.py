"""A checkpoint as a Subject: its pipeline and components, walked by our own blocks without torch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

from derivation.call import DEFAULT_PROMPT_LENGTH, Call
from derivation.config import Checkpoint, load
from derivation.config.document import from_document, to_document
from derivation.errors import DerivationError, unsupported
from derivation.gpu.profile import Hardware, UnfusedAttention, hardware, lacks_fused_attention
from derivation.libraries import LIBRARIES, tell_unverified
from derivation.options import Options
from derivation.options.choices import EAGER
from derivation.options.live import live_options, refuse_other_weights
from derivation.options.named import options_of
from derivation.tape.adapters import Adapters
from derivation.tape.grid import Grid, Range, Sides
from derivation.tape.program import Program
from derivation.tape.subject import Parameters
from derivation.tape.tape import Memory, tape
from derivation.tape.tiles import Tiling
from derivation.walk.components import GUIDED, Component, components, lora, parameter_count, parameters
from derivation.walk.pipelines import Pipeline
from derivation.walk.pipelines.offload import resident


class WalkedSubject:
    """A checkpoint under options.

    Raises DerivationError for an unknown GPU or version, a LoRA that does not fit, or tiles that the VAE does not cut.
    """

    method = "walk"
    guided = GUIDED
    prompt_length = DEFAULT_PROMPT_LENGTH
    bounds: Mapping[str, Range] = {}
    remarks: tuple[str, ...] = ()

    def __init__(self, checkpoint: Checkpoint, options: Options) -> None:
        self.checkpoint = checkpoint
        self.options = options
        self.hardware = _hardware(options)
        self._memory: Memory = {}
        if options.lora is not None:
            lora(checkpoint, options)
        if options.vae_tiling and checkpoint.vae is not None:
            Tiling.of(checkpoint.vae, options)

    @classmethod
    def live(cls, pipe: object, **given: Any) -> WalkedSubject:
        """Return a live pipeline as it is switched now; raises DerivationError for what is not read off it."""
        options = live_options(pipe, **given)
        subject = cls(load(pipe, scheduler=options.scheduler), options)
        refuse_other_weights(pipe, subject.parameters)
        return subject

    def __reduce__(self) -> tuple[type[WalkedSubject], tuple[Checkpoint, Options]]:
        return WalkedSubject, (self.checkpoint, self.options)

    @property
    def name(self) -> str:
        """The model's name."""
        return self.checkpoint.name

    @property
    def whole(self) -> bool:
        """Whether this is a pipeline, not a component alone."""
        return self.checkpoint.whole

    @cached_property
    def grid(self) -> Grid:
        """How image sides map to level sides; without a VAE a latent is 8 pixels wide."""
        vae, unet = self.checkpoint.vae, self.checkpoint.unet
        tile = Tiling.of(vae, self.options).tile if vae is not None and self.options.vae_tiling else None
        return Grid(self.checkpoint.vae_scale_factor, 1 if unet is None else len(unet.block_out_channels), tile)

    @cached_property
    def components(self) -> dict[str, Component]:
        """The component calls, in pipeline order."""
        return components(self.checkpoint, self.options)

    @property
    def calls(self) -> tuple[str, ...]:
        """The names of the component calls."""
        return tuple(self.components)

    @cached_property
    def parameters(self) -> Parameters:
        """Parameters and buffers of each model: path -> (shape, dtype)."""
        return parameters(self.checkpoint, self.options)

    @cached_property
    def resident(self) -> Parameters:
        """Parameters and buffers that are on the GPU throughout a call: all, or what offload leaves there."""
        return resident(self.parameters, self.options)

    @property
    def parameter_counts(self) -> dict[str, int]:
        """Parameters of each model."""
        return {model: parameter_count(entries) for model, entries in self.parameters.items()}

    def program(self, guidance: bool, fixed: Mapping[str, int]) -> Program:
        """Return the pipeline as a recordable run; of a component alone, its calls, each a stage."""
        pipeline = Pipeline(self.checkpoint, self.options, guidance)
        run = pipeline.__call__ if self.whole else lambda: self._call_each(guidance)
        return self._recordable(run, fixed)

    def _call_each(self, guidance: bool) -> None:
        """Run every component call on the active tape, each on inputs that exist before it."""
        if not self.components:
            raise DerivationError(f"{self.checkpoint.source}: nothing in it runs on the GPU: pass a whole checkpoint")
        for name, component in self.components.items():
            tape().mark(name)
            _outputs = component.call(self.options, guidance)
            del _outputs

    def component(self, name: str, guidance: bool, fixed: Mapping[str, int]) -> Program:
        """Return one component call as a recordable run; raises DerivationError for an unknown name."""
        if name not in self.components:
            raise DerivationError(f"component {name!r} is not part of this checkpoint ({', '.join(self.calls)})")
        call = self.components[name].call
        return self._recordable(lambda: call(self.options, guidance), fixed)

    def _recordable(self, run: Callable[[], object], fixed: Mapping[str, int]) -> Program:
        """Return ``run`` with the LoRAs on the models' layers as a recordable run."""

        def adapted() -> object:
            with tape().adapted(self.adapters):
                return run()

        return Program(adapted, self.options, fixed, self._memory, self.hardware)

    @cached_property
    def adapters(self) -> Adapters:
        """The LoRAs on the models' layers."""
        return lora(self.checkpoint, self.options)

    @property
    def default_sides(self) -> tuple[int, int]:
        """The height and width of a call that says none."""
        return self.checkpoint.default_sides

    @property
    def sides(self) -> Sides:
        """txt2img asks for multiples of the VAE's factor; images of other sides are cut."""
        factor = self.grid.vae_scale_factor
        return Sides(factor, factor if self.options.pipeline == "txt2img" else 1)

    def check(self, call: Call) -> None:
        """Raise DerivationError for a prompt that is too long for a text encoder alone."""
        config = self.checkpoint.text_encoder
        if not self.whole and config is not None and (call.prompt_length or 0) > config.max_position_embeddings:
            supported = f"up to max_position_embeddings = {config.max_position_embeddings}"
            raise unsupported("prompt_length", call.prompt_length, supported)

    def longest_prompt(self, name: str) -> int | None:
        """Return a text encoder's positions; a pipeline cuts longer prompts into chunks."""
        config = getattr(self.checkpoint, name, None) if name.startswith("text_encoder") else None
        return None if config is None else int(config.max_position_embeddings)

    def changed(self, **options: Any) -> WalkedSubject:
        """Return the same checkpoint under other options; what its blocks recorded is shared."""
        found = WalkedSubject(self.checkpoint, replace(self.options, **options))
        found._memory = self._memory
        return found

    def document(self) -> dict[str, Any]:
        """Return the configs and the options as JSON values."""
        return {"checkpoint": to_document(self.checkpoint), "options": self.options.as_dict()}

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> WalkedSubject:
        """Return the subject of ``document()``; raises DerivationError, KeyError or TypeError for anything else."""
        return cls(from_document(document["checkpoint"]), options_of(document["options"]))


def _hardware(options: Options) -> Hardware | None:
    versions = {name: getattr(options, name) for name in LIBRARIES}
    if options.gpu is None:
        tell_unverified(**versions)
        return None
    if options.attention not in (EAGER, "math") and lacks_fused_attention(options.gpu, options.dtype):
        told = f"no fused attention takes bfloat16 on {options.gpu}: PyTorch runs its math path; float16 has one"
        warnings.warn(told, UnfusedAttention, stacklevel=3)
    return hardware(options.gpu, **versions, scratch=options.scratch)
