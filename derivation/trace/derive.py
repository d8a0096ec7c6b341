"""``derive(..., method="trace")``: the closed form of a transformer that the block walker does not know.

Only the transformer's call: text encoders, VAE, scheduler and the pipeline's own tensors are not in it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import Any

import sympy
import torch

from derivation.api import Derivation
from derivation.config.checkpoint import alone
from derivation.errors import DerivationError, shown
from derivation.options import Options
from derivation.peak.headline import Grid
from derivation.tape.program import Program
from derivation.tape.tape import tape
from derivation.trace.architectures import Inputs, MaskedAttention, Shapes, build_transformer, checked
from derivation.trace.runs import sdpa_mode
from derivation.trace.symbolic import SymbolicSizes, record
from derivation.trace.tracer import Trace, Tracer
from derivation.walk.components import Component

MODEL = "transformer"
# Distinct primes below every table of positions: they decide what the program asks of generic sizes.
GENERIC: Mapping[str, int] = {"B": 3, "L": 89, "h1": 37, "w1": 53}
# Level 1 is the grid of patches, two latents or 16 pixels a side.
GRID = Grid(8, 2)
APPLICABLE = ("dtype", "attention", "num_images_per_prompt", "pipeline")


def trace_derivation(
    model: object, options: Options | None = None, fixed: Mapping[str, int] | None = None
) -> TracedDerivation:
    """Derive a transformer's call from its real module: a config dict, its file, its folder or its pipeline's.

    Of ``options``, ``dtype``, ``attention`` and ``num_images_per_prompt`` apply, and ``pipeline`` makes no
    difference. Raises DerivationError for a class, a config or an option that is not supported.
    """
    options = options or Options()
    for field in fields(options):
        value = getattr(options, field.name)
        if field.name not in APPLICABLE and value != field.default:
            raise DerivationError(f"{field.name} = {value!r} is not supported with method = 'trace'")
    return TracedDerivation(*read_transformer_config(model), options, fixed)


def read_transformer_config(model: object) -> tuple[dict[str, Any], str]:
    """Return (config dict, file name for errors); raises DerivationError where there is none."""
    if isinstance(model, Mapping):
        return dict(model), "config"
    if not isinstance(model, str | Path):
        raise DerivationError(f"model = {shown(model)} is not supported (supported: a config dict, a file, a folder)")
    for path in (Path(model), Path(model) / "config.json", Path(model) / MODEL / "config.json"):
        if path.is_file():
            try:
                loaded = json.loads(path.read_text())
            except (ValueError, RecursionError) as error:
                raise DerivationError(f"{path}: no JSON: {error}") from None
            if isinstance(loaded, dict):
                return loaded, str(path)
    raise DerivationError(f"{model}: no config.json of a transformer")


class TracedDerivation(Derivation):
    """A Derivation of one transformer call, traced from the real module: ``method`` is "trace".

    Its symbols are B, L and the patch grid's sides h1 and w1; image sides are multiples of 16 pixels.
    """

    method = "trace"

    def __init__(
        self, config: Mapping[str, Any], file: str, options: Options, fixed: Mapping[str, int] | None = None
    ) -> None:
        self.architecture = checked(config, file, options)
        self.config, self.file = dict(config), file
        super().__init__(alone(config["_class_name"], file, {}), options, fixed)

    def __repr__(self) -> str:
        o = self.options
        return f"TracedDerivation({self.checkpoint.name!r}, {o.dtype}, attention={o.attention})"

    @cached_property
    def module(self) -> Any:
        """The real module, on ``meta``."""
        return build_transformer(self.config, self.options.dtype, self.options.attention == "eager")

    @property
    def grid(self) -> Grid:
        """How image sides map to the patch grid's: level 1 of 2."""
        return GRID

    @cached_property
    def calls(self) -> dict[str, Component]:
        """The transformer's call."""
        return {MODEL: Component(MODEL, MODEL, lambda options, guidance: self._run(guidance))}

    @cached_property
    def parameters(self) -> dict[str, dict[str, tuple[tuple[int, ...], str]]]:
        """Parameters and buffers: path -> (shape, dtype)."""
        tensors = [*self.module.named_parameters(), *self.module.named_buffers()]
        entries = {name: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in tensors}
        return {MODEL: entries}

    @property
    def parameter_counts(self) -> dict[str, int]:
        """Parameters, without buffers."""
        return {MODEL: sum(p.numel() for p in self.module.parameters())}

    def program(self, guidance: bool = True) -> Program:
        """Return the transformer's call as a recordable run."""
        return self.component(MODEL, guidance)

    def at(
        self,
        height: int | None = None,
        width: int | None = None,
        batch_size: int | None = None,
        prompt_length: int | None = None,
    ) -> TracedDerivation:
        """Return the derivation with some sizes fixed; raises DerivationError for a size that is rejected."""
        fixed = super().at(height, width, batch_size, prompt_length).fixed
        return TracedDerivation(self.config, self.file, self.options, fixed)

    def sizes(self, height: int, width: int, batch_size: int, prompt_length: int) -> dict[str, int]:
        """Return the value of every symbol for a call; raises DerivationError for sides that no patch grid fits."""
        for key, value in (("height", height), ("width", width)):
            if isinstance(value, int) and value % GRID.unit:
                raise DerivationError(f"{key} = {value} is not supported (supported: multiples of {GRID.unit})")
        return super().sizes(height, width, batch_size, prompt_length)

    def estimate(
        self, height: int, width: int, batch_size: int = 1, prompt_length: int = 77, guidance: bool = True
    ) -> dict[str, Any]:
        """Return everything known about one call, in bytes, ready for JSON."""
        return {**super().estimate(height, width, batch_size, prompt_length, guidance), "method": self.method}

    def latex(self) -> str:
        """Return the headline equation as a LaTeX align environment; exact cases are not enumerated for a trace."""
        return f"\\begin{{align}}\nM &= {sympy.latex(self.peak)}\n\\end{{align}}"

    def lambdify(self, target: str = "math") -> Callable[..., int]:
        """Return peak_vram(height, width, prompt_length, batch_size, guidance) in bytes, exact at every size.

        It evaluates this object; ``target`` is "math" (a trace has no generated code).
        """
        if target != "math":
            raise DerivationError(f"target = {shown(target)} is not supported with method = 'trace' (supported: math)")

        def peak_vram(
            height: int, width: int, prompt_length: int = 77, batch_size: int = 1, guidance: bool = True
        ) -> int:
            values = self.sizes(height, width, batch_size, prompt_length)
            [(peak, _)] = self.program(guidance).at(values).evaluator.peaks(values).values()
            return self.weights_bytes + peak

        return peak_vram

    def measure(
        self, height: int, width: int, batch_size: int = 1, prompt_length: int = 77, guidance: bool = True
    ) -> Trace:
        """Trace the real module at one size with plain integers: what the closed form must equal."""
        values = self.sizes(height, width, batch_size, prompt_length)
        return self._trace(values, guidance)

    def _run(self, guidance: bool) -> None:
        """Record the module's call on the active tape."""
        sizes = SymbolicSizes(tape(), {**GENERIC, **tape().fixed})
        tape().mark(MODEL)
        try:
            with sizes.kernels():
                trace = self._trace(sizes, guidance)
        except DerivationError as error:
            raise DerivationError(sizes.named(str(error))) from None
        record(trace, sizes)

    def _trace(self, sizes: Any, guidance: bool) -> Trace:
        """Call the module at ``sizes``, symbolic or not, under the tracer; what it rejects is the user's input."""
        rows = sizes["B"] * self.options.num_images_per_prompt * (2 if guidance and self.architecture.doubled else 1)
        shapes = Shapes(rows, sizes["L"], sizes["h1"], sizes["w1"], self.options.dtype)
        inputs = self.architecture.inputs(self.module.config, shapes)
        tracer = Tracer({MODEL: self.module}, _tensors(inputs), stage=MODEL)
        try:
            with torch.no_grad(), _attention(self.options.attention), tracer:
                _output = self.module(**inputs, return_dict=False)
        except DerivationError:
            raise
        except (ValueError, TypeError, RuntimeError) as error:
            raise DerivationError(f"{self.checkpoint.name}: the real module rejects the call: {error}") from None
        return tracer.trace


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
