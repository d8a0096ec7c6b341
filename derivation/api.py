"""The public API: ``derive`` and the ``Derivation`` it returns."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import sympy

from derivation.allocator.memory import DeviceMemory, device_memory
from derivation.allocator.snapshot import snapshot
from derivation.call import Call, takes_call
from derivation.config import Checkpoint, OtherPipeline, hub_folder, is_live, is_live_traced, load, traced_folder
from derivation.equation.derived import Stage, peaks_of
from derivation.equation.record import Equation
from derivation.errors import DerivationError, one_of, unsupported
from derivation.export import compiled
from derivation.export.latex import latex
from derivation.gpu.cards import tell_variants
from derivation.options import Options, named
from derivation.peak.record import Record
from derivation.peak.witness import witness_at
from derivation.tape.grid import Grid
from derivation.tape.program import Recordings
from derivation.tape.subject import Parameters, Subject
from derivation.tape.tape import Tape
from derivation.trace import store
from derivation.verdict import Verdict, free_on, of_tensors, on_card
from derivation.walk.subject import WalkedSubject

METHODS = ("walk", "trace")


class Derivation:
    """The peak GPU memory of one subject, in closed form and exact at any size."""

    def __init__(self, subject: Subject, fixed: Mapping[str, int] | None = None) -> None:
        self.equation = Equation(subject, fixed or {})
        self._replays: dict[tuple[str, Call], DeviceMemory] = {}

    def __repr__(self) -> str:
        o = self.options
        return f"Derivation({self.equation.name!r}, {o.pipeline}, {o.dtype}, attention={o.attention})"

    def __reduce__(self) -> tuple[type[Derivation], tuple[Subject, dict[str, int]]]:
        return Derivation, (self.subject, self.fixed)

    def to_json(self) -> str:
        """Return the configs, options and fixed sizes that the derivation follows from, as JSON."""
        return json.dumps({"method": self.method, **self.subject.document(), "fixed": self.fixed})

    @classmethod
    def from_json(cls, text: str) -> Derivation:
        """Return the derivation of ``to_json``; raises DerivationError for anything else."""
        try:
            document = json.loads(text)
            one_of("method", document.get("method", "walk"), METHODS)
            read = store.from_document if document.get("method") == "trace" else WalkedSubject.from_document
            return cls(read(document))._fixed_as(document["fixed"])
        except DerivationError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DerivationError(f"not a derivation: {error}") from None

    def _fixed_as(self, fixed: Mapping[str, int]) -> Derivation:
        """Return the derivation with level sides, batch and prompt length fixed; raises DerivationError for others."""
        factor = self.equation.factor
        sides = {name: fixed[key] * factor for name, key in (("height", "h0"), ("width", "w0")) if key in fixed}
        others = {name: fixed[key] for name, key in (("batch_size", "B"), ("prompt_length", "L")) if key in fixed}
        found = self.at(**sides, **others)
        if found.fixed != fixed or any(type(value) is not int for value in fixed.values()):
            raise unsupported("fixed", fixed, "what at() fixes")
        return found

    def _repr_latex_(self) -> str:
        return f"$\\displaystyle {sympy.latex(self.peak)}$"

    @property
    def subject(self) -> Subject:
        """What the derivation is of."""
        return self.equation.subject

    @property
    def name(self) -> str:
        """The model's name."""
        return self.equation.name

    @property
    def method(self) -> str:
        """How the tape was recorded: "walk" or "trace"."""
        return self.subject.method

    @property
    def options(self) -> Options:
        """The options of the run."""
        return self.subject.options

    @property
    def checkpoint(self) -> Checkpoint:
        """The configs of a walked subject; raises DerivationError for a traced one."""
        if not isinstance(self.subject, WalkedSubject):
            raise DerivationError(f"{self.equation.name}: a traced model has no checkpoint")
        return self.subject.checkpoint

    @property
    def fixed(self) -> dict[str, int]:
        """The symbols that have one value."""
        return self.equation.fixed

    @property
    def grid(self) -> Grid:
        """How image sides map to level sides."""
        return self.equation.grid

    @property
    def prompt_length(self) -> int:
        """The prompt length in tokens of a call that says none."""
        return self.equation.prompt_length

    @property
    def default_sides(self) -> tuple[int, int]:
        """The height and width in pixels of a call that says none."""
        return self.equation.default_sides

    @property
    def calls(self) -> tuple[str, ...]:
        """The names of the component calls, in pipeline order."""
        return self.subject.calls

    @property
    def parameters(self) -> Parameters:
        """Parameters and buffers of each model: path -> (shape, dtype)."""
        return self.subject.parameters

    @property
    def resident(self) -> Parameters:
        """Parameters and buffers that are on the GPU throughout a call: all, or what offload leaves there."""
        return self.equation.resident

    @property
    def parameter_counts(self) -> Mapping[str, int]:
        """Parameters of each model."""
        return self.subject.parameter_counts

    @property
    def weights(self) -> dict[str, int]:
        """Bytes of each model's ``resident`` parameters and buffers, each tensor in 512-byte blocks."""
        return self.equation.weights

    @property
    def weights_bytes(self) -> int:
        """Bytes of all weights that are on the GPU throughout; others are part of the stages that use them."""
        return self.equation.weights_bytes

    def program(self, guidance: bool = True) -> Recordings:
        """Return the whole call as a recordable run; of a component alone, its calls, each a stage."""
        return self.equation.program(guidance)

    def component(self, name: str, guidance: bool = True) -> Recordings:
        """Return one component call as a recordable run; raises DerivationError for an unknown name."""
        return self.equation.component(name, guidance)

    def record(self, guidance: bool = True) -> Record:
        """Return every intermediate of the symbolic derivation; raises DerivationError where it has no end."""
        return self.equation.record(guidance)

    @property
    def stages(self) -> dict[str, Stage]:
        """The closed form of every stage under guidance."""
        return self.equation.stages(guidance=True)

    @cached_property
    def peak(self) -> sympy.Expr:
        """Peak bytes of the pipeline under guidance, in H, W, L, B: weights + Max over stages."""
        return self.equation.peak(guidance=True)

    @property
    def allocated(self) -> sympy.Expr:
        """torch.cuda.max_memory_allocated(), in H, W and BEYOND of DeviceForm; raises DerivationError without a GPU."""
        return self.equation.device.allocated

    @property
    def reserved(self) -> sympy.Expr:
        """torch.cuda.max_memory_reserved() under guidance, in H, W and N of DeviceForm."""
        return self.equation.device.reserved

    @property
    def device(self) -> sympy.Expr:
        """What nvidia-smi shows: ``reserved`` and the CUDA context."""
        return self.equation.device.device

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
        fixed = self.equation.at(height=height, width=width, batch_size=batch_size, prompt_length=prompt_length).fixed
        return Derivation(self.subject, fixed)

    @takes_call
    def sizes(self, call: Call) -> dict[str, int]:
        """Return every symbol's value for a call; raises DerivationError for one that the pipeline rejects."""
        return self.equation.sizes(call)

    @takes_call
    def component_peaks(self, call: Call) -> dict[str, int]:
        """Return each component call's peak bytes: storages allocated during the call, 512-byte blocks.

        The component's weights count where sequential offload loads them during the call, else they precede it.
        A text encoder takes at most its number of positions; longer prompts reach it in chunks.
        Raises DerivationError for a size that the pipeline rejects.
        """
        values = self.equation.sizes(call)
        peaks: dict[str, int] = {}
        for name in self.calls:
            at = self.equation.chunked(name, values)
            [(peaks[name], _)] = peaks_of(self.component(name, call.guidance), at).evaluator.peaks(at).values()
        return peaks

    @takes_call
    def stage_peaks(self, call: Call) -> dict[str, int]:
        """Return each stage's peak bytes over the whole pipeline call, beyond ``weights_bytes``."""
        return self.equation.stage_peaks(call)

    @takes_call
    def estimate(self, call: Call) -> dict[str, Any]:
        """Return everything known about one call, in bytes, ready for JSON; with a GPU its verdict, too."""
        variant = peaks_of(self.program(call.guidance), values := self.equation.sizes(call))
        peaks = variant.evaluator.peaks(values)
        peak_stage = max(peaks, key=lambda name: peaks[name][0])
        stage_bytes, event = peaks[peak_stage]
        return {
            "model": self.equation.name,
            **({} if self.method == "walk" else {"method": self.method}),
            **self.options.as_dict(),
            **call.as_dict(),
            "weights_bytes": self.weights_bytes,
            "model_weights_bytes": self.weights,
            "components_bytes": self.component_peaks(call),
            "stages_bytes": {name: peak for name, (peak, _) in peaks.items()},
            "peak_stage": peak_stage,
            "peak_tensor_bytes": self.weights_bytes + stage_bytes,
            "witness": witness_at(peak_stage, variant.tape, event).at(values),
            "figure": "peak_tensor_bytes" if (gpu := self.options.gpu) is None else "needs_bytes",
            **({} if gpu is None else self._replayed(gpu, call).as_dict() | self.verdict(call).as_dict()),
        }

    @takes_call
    def device_memory(self, call: Call) -> DeviceMemory:
        """Return what the allocator and nvidia-smi say; raises DerivationError where no GPU is named."""
        return self._replayed(self._gpu(), call)

    @takes_call
    def snapshot(self, call: Call) -> dict[str, Any]:
        """Return the replay as PyTorch's memory snapshot, for memory_viz; raises DerivationError without a GPU."""
        return snapshot(self._gpu(), self.resident, *self._run(call), self.options.alloc_conf)

    @takes_call
    def verdict(self, call: Call, free_bytes: int | None = None) -> Verdict:
        """Return whether one call fits: on the GPU, or in the memory that is free there.

        Where no GPU is named ``free_bytes`` are for weights and tensors; raises DerivationError without both.
        """
        if self.options.gpu is None and free_bytes is not None:
            return of_tensors(self.weights_bytes + max(self.equation.stage_peaks(call).values()), free_bytes)
        gpu = free_on(self._gpu(), free_bytes)
        return on_card(gpu, self._replayed(gpu, call))

    def _replayed(self, gpu: str, call: Call) -> DeviceMemory:
        """Return the replay of a call on a card; each is done once."""
        if (gpu, call) not in self._replays:
            self._replays[gpu, call] = device_memory(gpu, self.resident, *self._run(call), self.options.alloc_conf)
        return self._replays[gpu, call]

    def _run(self, call: Call) -> tuple[Tape, dict[str, int]]:
        values = self.equation.sizes(call)
        return self.program(call.guidance).at(values).tape, values

    def _gpu(self) -> str:
        if self.options.gpu is None:
            raise unsupported("gpu", None, "a GPU's name, for what its allocator does")
        return self.options.gpu

    def latex(self, which: str = "peak", notes: bool = False, gpu: str | None = None) -> str:
        """Return the labelled equation of the "peak", a stage's, "terms" or "device"'s, on ``gpu`` or the own card."""
        here = self if gpu is None else Derivation(self.subject.changed(gpu=gpu), self.fixed)
        return latex(here.equation, which, notes)

    def lambdify(self, target: str = "math") -> Callable[..., Any]:
        """Return peak_vram(height, width, prompt_length, batch_size, guidance) in bytes, exact at every size.

        ``target`` is "math" (Python integers), "numpy" or "torch" (int64 arrays that broadcast); raises
        DerivationError for another. The function can be pickled.
        """
        return compiled(self.equation, target)


def derive(
    model: object,
    pipeline: str | None = None,
    dtype: str | None = None,
    attention: str | None = None,
    gpu: str | None = None,
    method: str | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
    progress: Callable[[str], None] = lambda _: None,
    **options: Any,
) -> Derivation:
    """Derive the peak memory of ``model``: a bundled id, a folder, a config file, a Hub id or a live pipeline.

    What is not given is read off a live pipeline, and is Options' default elsewhere, ``pipeline`` that of the class
    in model_index.json. ``gpu`` is a card's name or JSON file, ``memory`` among the options another capacity of it,
    such as "12GiB". A Hub id is "org/name" or "org/name@revision"; with ``local_files_only`` it is read from the Hub's
    cache alone. The derivation of one component's config is that of its calls.

    ``method`` "walk" interprets diffusers' blocks, for the classes that are walked the default; "trace" runs the real
    code: a pipeline of any other class, called on ``meta`` at a few sizes and interpolated (shipped for the bundled
    ones, else with the extra ``verify``, when ``progress`` is called with a line before each size), or a transformer's
    config, folder or dict, with symbolic shapes. ``transformer=`` a GGUF file gives a traced pipeline its weights.
    Raises DerivationError, with one line, for a config or an option that is not supported.
    """
    one_of("method", method or METHODS[0], METHODS)
    own = {"pipeline": pipeline, "dtype": dtype, "attention": attention, "gpu": gpu}.items()
    given = {**{name: value for name, value in own if value is not None}, **options}
    tell_variants(gpu, options.get("memory"))
    if method != "walk" and (folder := traced_folder(model, revision, method == "trace")) is not None:
        return Derivation(*store.recorded(folder, given, progress))
    if method == "trace":
        return Derivation(store.transformer(model, named.options_of(given)))
    if is_live_traced(model):
        return Derivation(*store.live(model, given, progress))
    if is_live(model):
        return Derivation(WalkedSubject.live(model, **given))
    try:
        checkpoint = load(model, revision, local_files_only, named.options_of(given).scheduler)
    except OtherPipeline:
        if method == "walk" or os.path.exists(str(model)):
            raise
        return Derivation(*store.recorded(hub_folder(model, revision, local_files_only), given, progress))
    return Derivation(WalkedSubject(checkpoint, named.options_of({"pipeline": checkpoint.task, **given})))
