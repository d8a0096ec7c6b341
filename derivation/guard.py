"""A guard for other people's code: will the next call of a live pipeline fit into the GPU's free memory?

>>> from derivation.guard import will_fit  # doctest: +SKIP
>>> verdict = will_fit(pipe, height=1024, width=1024)  # doctest: +SKIP
>>> verdict.fits, verdict.needed_bytes, verdict.free_bytes  # doctest: +SKIP
(True, 1610612736, 8102345216)
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from derivation.api import Derivation, derived_live
from derivation.ask.fit import fit, peak_tensor_bytes
from derivation.ask.recommend import recommend
from derivation.call import Call
from derivation.config import is_live
from derivation.errors import DerivationError, unsupported
from derivation.options.live import FREEU
from derivation.options.live.modules import MODELS, attentions, first_parameter, models_of, tuners, up_blocks

# What a pipeline can set on its VAE
VAE_SWITCHES = ("use_slicing", "use_tiling", "tile_sample_min_size", "tile_overlap_factor")

# A call -> bytes, weights included
Peak = Callable[[Call], int]
Watch = Callable[[Any], tuple[object, ...]]


@dataclass(frozen=True)
class Verdict:
    """Whether a call fits: the bytes it needs beyond what is on the GPU already, and the bytes that are free."""

    fits: bool
    needed_bytes: int
    free_bytes: int
    _advise: Callable[[], tuple[str, ...]] = field(default=tuple, repr=False, compare=False)

    @cached_property
    def advice(self) -> tuple[str, ...]:
        """What to switch on so that it fits, cheapest first; worked out when first read, empty if it fits."""
        return () if self.fits else self._advise()


@dataclass(frozen=True, slots=True)
class _Known:
    """What was read from one pipeline: its derivation, its exact peak, and how to see that it changed."""

    signature: tuple[object, ...]
    watched: Watch
    parameters: Mapping[str, Callable[[], Any]]
    derivation: Derivation
    peak: Peak
    answers: dict[Call, int]

    def resident_bytes(self) -> int:
        """Return the bytes of the weights that are on the GPU already."""
        weights = self.derivation.weights
        return sum(weights.get(name, 0) for name, get in self.parameters.items() if _device(get()) == "cuda")


_KNOWN: weakref.WeakKeyDictionary[Any, _Known] = weakref.WeakKeyDictionary()


def will_fit(
    pipe: Any,
    height: int,
    width: int,
    batch_size: int = 1,
    prompt_length: int | None = None,
    guidance: bool = True,
    free_bytes: int | None = None,
    compiled: bool = False,
    **options: Any,
) -> Verdict:
    """Return whether ``pipe(...)`` at this size fits into the free memory; weights on the GPU count once.

    ``free_bytes`` defaults to what CUDA reports free, with what PyTorch has cached. ``options`` are those of
    ``derive`` that a pipeline object does not know (num_images_per_prompt, strength, gpu, ...). A size seen before
    takes microseconds, a new one a fraction of a millisecond; with ``compiled`` it takes microseconds too, after
    the first call spent some seconds on generating code. Raises DerivationError for a pipeline or a size that is
    not supported, or without CUDA and ``free_bytes``.
    """
    if not is_live(pipe):
        raise unsupported("pipe", pipe, "a DiffusionPipeline")
    known = _known(pipe, compiled, options)
    call = Call(height, width, batch_size, prompt_length, guidance).filled(known.derivation.prompt_length)
    if (peak := known.answers.get(call)) is None:
        known.derivation.sizes(call)
        peak = known.answers[call] = known.peak(call)
    free = cuda_free_bytes() if free_bytes is None else free_bytes
    needed = peak - known.resident_bytes()
    return Verdict(needed <= free, needed, free, lambda: _advice(known.derivation, peak - needed + free, call))


def _known(pipe: Any, compiled: bool, options: dict[str, Any]) -> _Known:
    """Return what is known of ``pipe``, read again where it or the options changed."""
    known = _KNOWN.get(pipe)
    given = (compiled, *sorted(options.items()))
    if known is None or known.signature != (given, known.watched(pipe)):
        models = models_of(pipe)
        parameters = {name: first_parameter(model) for name, model in models.items()}
        watched = _watch(models, parameters)
        derivation = derived_live(pipe, **options)
        known = _Known((given, watched(pipe)), watched, parameters, derivation, _peak(derivation, compiled), {})
        _KNOWN[pipe] = known
    return known


def cuda_free_bytes() -> int:
    """Return the bytes that PyTorch can still allocate on the current GPU: free ones and its own cache.

    Raises DerivationError where torch was not imported or has no CUDA.
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        raise DerivationError("free_bytes is not given and CUDA is not available (supported: free_bytes=<bytes>)")
    return int(torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated())


def _peak(derivation: Derivation, compiled: bool) -> Peak:
    """Return the peak as a function of the call: the GPU's where one is named, else from the tape or generated code."""
    if derivation.options.gpu is not None:
        return lambda call: _device_peak(derivation, call)
    if compiled:
        generated = derivation.lambdify("math")
        return lambda call: int(generated(**call.as_dict()))
    return lambda call: peak_tensor_bytes(derivation, call)[1]


def _device_peak(derivation: Derivation, call: Call) -> int:
    """Return the bytes that the allocator reserves on the GPU named; more than the card has where they do not fit."""
    found = derivation.device_memory(call)
    return found.reserved if found.failed is None else (found.total or found.reserved) + found.failed["short_bytes"]


def _advice(derivation: Derivation, budget: int, call: Call) -> tuple[str, ...]:
    if budget < 1:
        return ("free some GPU memory: not even the weights fit",)
    replayed = derivation.options.gpu is not None
    found = recommend(derivation, budget, call, replayed)
    lines = [f"{step.name} saves {step.adds_bytes:,} bytes: {step.call}" for step in found.needed]
    if not found.fits:
        shape, rest = (call.width, call.height), (call.batch_size, call.prompt_length, call.guidance)
        largest = fit(derivation, budget, shape, *rest, replayed).image
        where = f"{largest.width}x{largest.height}" if largest else "none"
        lines.append(f"not enough even so; the largest image of this shape that fits as it is: {where}")
    return tuple(lines)


def _watch(models: Mapping[str, Any], parameters: Mapping[str, Callable[[], Any]]) -> Watch:
    """Return a function of microseconds whose result changes with whatever the derivation depends on."""
    modules = list(attentions(models.values()))
    vae, unet, blocks = models.get("vae"), models.get("unet"), list(up_blocks(models))
    first = list(parameters.values())
    loras = [layer for _, layer in tuners(unet)][:1]

    def watched(pipe: Any) -> tuple[object, ...]:
        return (
            *[id(getattr(pipe, name, None)) for name in (*MODELS, "scheduler")],
            *[getattr(parameter(), "dtype", None) for parameter in first],
            *[_strides(parameter()) for parameter in first],
            *[(type(module.processor), getattr(module.processor, "slice_size", None)) for module in modules],
            *[getattr(vae, switch, None) for switch in VAE_SWITCHES],
            *[getattr(block, FREEU[0], None) for block in blocks],
            *[id(getattr(model, "_hf_hook", None)) for model in models.values()],
            id(getattr(unet, "encoder_hid_proj", None)),
            tuple(getattr(unet, "peft_config", ())),
            *[(bool(layer.merged), bool(layer.disable_adapters)) for layer in loras],
        )

    return watched


def _strides(parameter: Any) -> object:
    stride = getattr(parameter, "stride", None)
    return stride() if callable(stride) else None


def _device(parameter: Any) -> str:
    device = getattr(parameter, "device", "cpu")
    return str(getattr(device, "type", device)).split(":")[0]
