"""``derive(..., method="trace")``: the closed form of a transformer that the block walker does not know.

Only the transformer's call: text encoders, VAE, scheduler and the pipeline's own tensors are not in it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from derivation.call import DEFAULT_PROMPT_LENGTH, DEFAULT_SIDE, MAX_SIDE_PIXELS, Call
from derivation.errors import DerivationError, one_of, unsupported
from derivation.options import Options
from derivation.options.named import options_of
from derivation.tape.grid import Grid, Range, Sides
from derivation.tape.program import Program
from derivation.tape.subject import Parameters
from derivation.tape.tape import Tape, tape
from derivation.trace.architectures import Inputs, MaskedAttention, Shapes, build_transformer, checked
from derivation.trace.runs import sdpa_mode
from derivation.trace.symbolic import SymbolicSizes
from derivation.trace.tracer import Onto, Tracer

MODEL = "transformer"
# Distinct primes below every table of positions: they decide what the program asks of generic sizes.
GENERIC: Mapping[str, int] = {"B": 3, "L": 89, "h1": 37, "w1": 53}
# Level 1 is the grid of patches, two latents or 16 pixels a side.
GRID = Grid(8, 2)
APPLICABLE = ("dtype", "attention", "num_images_per_prompt", "pipeline")


def read_transformer_config(model: object) -> tuple[dict[str, Any], str]:
    """Return (config dict, file name for errors); raises DerivationError where there is none."""
    if isinstance(model, Mapping):
        return dict(model), "config"
    if not isinstance(model, str | Path):
        raise unsupported("model", model, "a config dict, a file, a folder")
    for path in (Path(model), Path(model) / "config.json", Path(model) / MODEL / "config.json"):
        if path.is_file():
            try:
                loaded = json.loads(path.read_text())
            except (ValueError, RecursionError) as error:
                raise DerivationError(f"{path}: no JSON: {error}") from None
            if isinstance(loaded, dict):
                return loaded, str(path)
    raise DerivationError(f"{model}: no config.json of a transformer")


class TracedTransformer:
    """One transformer's call, traced from the real module; its symbols are B, L and the patch grid's sides h1, w1.

    Image sides are multiples of 16 pixels.
    """

    method, whole, grid, calls, guided = "trace", False, GRID, (MODEL,), (MODEL,)
    prompt_length = DEFAULT_PROMPT_LENGTH
    bounds: Mapping[str, Range] = {}
    remarks: tuple[str, ...] = ()

    def __init__(self, config: Mapping[str, Any], file: str, options: Options) -> None:
        self.architecture = checked(config, file, options)
        self.config, self.file, self.options = dict(config), file, options
        self.name = str(config["_class_name"])

    @classmethod
    def read(cls, model: object, options: Options | None = None) -> TracedTransformer:
        """Return the subject of a config dict, its file, its folder or its pipeline's.

        Of ``options``, ``dtype``, ``attention`` and ``num_images_per_prompt`` apply, and ``pipeline`` makes no
        difference. Raises DerivationError for a class, a config or an option that is not supported.
        """
        options = options or Options()
        for field in fields(options):
            value = getattr(options, field.name)
            if field.name not in APPLICABLE and value != field.default:
                raise DerivationError(f"{field.name} = {value!r} is not supported with method = 'trace'")
        return cls(*read_transformer_config(model), options)

    def __reduce__(self) -> tuple[type[TracedTransformer], tuple[dict[str, Any], str, Options]]:
        return TracedTransformer, (self.config, self.file, self.options)

    def document(self) -> dict[str, Any]:
        """Return the config and the options as JSON values."""
        return {"config": self.config, "file": self.file, "options": self.options.as_dict()}

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> TracedTransformer:
        """Return the subject of ``document()``; raises DerivationError, KeyError or TypeError for anything else."""
        return cls(document["config"], document["file"], options_of(document["options"]))

    @cached_property
    def module(self) -> Any:
        """The real module, on ``meta``."""
        return build_transformer(self.config, self.options.dtype, self.options.attention == "eager")

    @cached_property
    def parameters(self) -> Parameters:
        """Parameters and buffers: path -> (shape, dtype)."""
        tensors = [*self.module.named_parameters(), *self.module.named_buffers()]
        entries = {name: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in tensors}
        return {MODEL: entries}

    @property
    def resident(self) -> Parameters:
        """All parameters and buffers."""
        return self.parameters

    @property
    def parameter_counts(self) -> dict[str, int]:
        """Parameters, without buffers."""
        return {MODEL: sum(p.numel() for p in self.module.parameters())}

    def program(self, guidance: bool, fixed: Mapping[str, int]) -> Program:
        """Return the transformer's call as a recordable run."""
        return Program(lambda: self._run(guidance), self.options, fixed)

    def component(self, name: str, guidance: bool, fixed: Mapping[str, int]) -> Program:
        """Return the transformer's call; raises DerivationError for another name."""
        one_of("component", name, self.calls)
        return self.program(guidance, fixed)

    @property
    def default_sides(self) -> tuple[int, int]:
        """The config's ``sample_size`` latents a side in whole patches, where it has one."""
        latents = self.config.get("sample_size")
        side = latents * GRID.vae_scale_factor if isinstance(latents, int) else DEFAULT_SIDE
        return (-(-side // GRID.unit) * GRID.unit,) * 2

    @property
    def sides(self) -> Sides:
        """Whole patches, up to the table of positions where the module has one (PatchEmbed.cropped_pos_embed)."""
        positions = self.config.get("pos_embed_max_size")
        return Sides(GRID.unit, GRID.unit, MAX_SIDE_PIXELS if positions is None else GRID.unit * positions)

    def check(self, call: Call) -> None:
        """Accept every call."""

    def longest_prompt(self, name: str) -> int | None:
        """Return None: the caller's embeddings are of any length."""
        return None

    def changed(self, **options: Any) -> TracedTransformer:
        """Return the same transformer under other options."""
        return TracedTransformer(self.config, self.file, replace(self.options, **options))

    def measure(self, call: Call) -> Tape:
        """Trace the real module at one size with plain integers: what the closed form must equal."""
        for key, side in (("height", call.height), ("width", call.width)):
            self.sides.check(key, side)
        sides = GRID.sizes(call.height, call.width)
        return self._trace({"B": call.batch_size, "L": call.prompt_length, **sides}, call.guidance)

    def _run(self, guidance: bool) -> None:
        """Record the module's call on the active tape."""
        sizes = SymbolicSizes(tape(), {**GENERIC, **tape().fixed})
        try:
            with sizes.kernels():
                self._trace(sizes, guidance, sizes.onto)
        except DerivationError as error:
            raise DerivationError(sizes.named(str(error))) from None
        sizes.decide()

    def _trace(self, sizes: Any, guidance: bool, onto: Onto | None = None) -> Tape:
        """Call the module at ``sizes``, symbolic or not, under the tracer; what it rejects is the user's input."""
        rows = sizes["B"] * self.options.num_images_per_prompt * (2 if guidance and self.architecture.doubled else 1)
        shapes = Shapes(rows, sizes["L"], sizes["h1"], sizes["w1"], self.options.dtype)
        inputs = self.architecture.inputs(self.module.config, shapes)
        tracer = Tracer({MODEL: self.module}, _tensors(inputs), stage=MODEL, onto=onto)
        try:
            with torch.no_grad(), _attention(self.options.attention), tracer:
                _output = self.module(**inputs, return_dict=False)
        except DerivationError:
            raise
        except (ValueError, TypeError, RuntimeError) as error:
            raise DerivationError(f"{self.name}: the real module rejects the call: {error}") from None
        return tracer.tape


def _attention(backend: str) -> ExitStack:
    scope = ExitStack()
    scope.enter_context(sdpa_mode(backend))
    if backend in ("efficient", "flash"):
        scope.enter_context(MaskedAttention())
    return scope


def _tensors(inputs: Inputs) -> list[torch.Tensor]:
    nested = [value for value in inputs.values() if isinstance(value, dict)]
    flat = [*inputs.values(), *(tensor for value in nested for tensor in value.values())]
    return [value for value in flat if isinstance(value, torch.Tensor)]
