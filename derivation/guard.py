"""A guard for other people's code: will the next call of a live pipeline fit into the GPU's free memory?

>>> from derivation.guard import will_fit  # doctest: +SKIP
>>> found = will_fit(pipe, height=1024, width=1024, guidance_scale=5.0)  # doctest: +SKIP
>>> found.fits, found.needed_bytes, found.free_bytes  # doctest: +SKIP
(True, 1610612736, 8102345216)
"""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from derivation.api import Derivation, derive
from derivation.ask.fit import fit, peak_tensor_bytes
from derivation.ask.quick import Quick
from derivation.ask.recommend import EXPANDABLE, recommend
from derivation.call import Call
from derivation.config import is_live, is_live_traced
from derivation.errors import DerivationError, unsupported
from derivation.gpu.cards import of_device
from derivation.options.live import FREEU
from derivation.options.live.modules import MODELS, attentions, first_parameter, models_of, tuners, up_blocks
from derivation.options.live.traced import VAE_SWITCHES
from derivation.verdict import Verdict, of_tensors

# What can be set on a pipeline's VAE
ON_VAE = (*VAE_SWITCHES, "tile_sample_min_size", "tile_overlap_factor")

# What configures PyTorch's caching allocator.
ALLOC_CONF = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
# Arguments of the pipelines' __call__ that its memory does not depend on, or that only take some of it away.
IGNORED = (
    "generator eta output_type return_dict callback_on_step_end callback_on_step_end_tensor_inputs latents mask_image "
    "cross_attention_kwargs controlnet_conditioning_scale control_guidance_start control_guidance_end guess_mode "
    "control_image ip_adapter_image original_size crops_coords_top_left target_size negative_original_size "
    "negative_crops_coords_top_left negative_target_size aesthetic_score negative_aesthetic_score prompt_2 "
    "negative_prompt_2"
)
# What a traced call does not depend on: no pass holds more than those recorded, guidance has a negative prompt.
RECORDED = ("num_inference_steps", "negative_prompt")
# More than any GPU has: what is reserved where nothing has to be released.
UNLIMITED = 1 << 50

# A call -> bytes, weights included
Peak = Callable[[Call], int]
Watch = Callable[[Any], tuple[object, ...]]


@dataclass(frozen=True)
class Forecast:
    """The verdict on a call of a live pipeline; ``assumed`` says what could not be read and was guessed.

    ``verdict`` counts the weights, wherever they are; of them ``resident_bytes`` are on the GPU already, and
    ``free_bytes`` are what else the process may take: None where a whole card was asked about.
    """

    verdict: Verdict
    resident_bytes: int
    free_bytes: int | None
    assumed: tuple[str, ...] = ()
    _advise: Callable[[], tuple[str, ...]] = field(default=tuple, repr=False, compare=False)

    @property
    def fits(self) -> bool:
        """Whether the call runs; where no GPU is known, whether its tensors are within the free bytes."""
        return self.verdict.fits

    @property
    def sure(self) -> bool:
        """Whether what is left is at least the margin that measured calls justify."""
        return self.verdict.sure

    @property
    def needs_more(self) -> bool:
        """Whether the call ran out of memory there, so that ``needed_bytes`` is less than it needs."""
        return self.verdict.needs_more

    @property
    def needed_bytes(self) -> int:
        """What the call needs beyond the weights that are on the GPU already."""
        return (self.verdict.needs_bytes or 0) - self.resident_bytes

    @property
    def margin_bytes(self) -> int | None:
        """How much more a measured call needed at most than was predicted."""
        return self.verdict.margin_bytes

    @cached_property
    def advice(self) -> tuple[str, ...]:
        """What to switch on so that it fits, cheapest first; worked out when first read, empty if it fits."""
        return () if self.fits else self._advise()


@dataclass(frozen=True, slots=True)
class _Known:
    """What was read from one pipeline: its derivation, its exact peak, and how to see that it changed.

    ``peak`` is of tensors where no GPU is known, ``quick`` gives verdicts without a replay where one is, if compiled.
    """

    signature: tuple[object, ...]
    watched: Watch
    parameters: Mapping[str, Callable[[], Any]]
    derivation: Derivation
    peak: Peak | None
    quick: Quick | None
    answers: dict[object, Verdict]

    def resident_bytes(self) -> int:
        """Return the bytes of the weights that are on the GPU already."""
        weights = self.derivation.weights
        return sum(weights.get(name, 0) for name, get in self.parameters.items() if _device(get()) == "cuda")

    def verdict(self, call: Call, room: int | None) -> Verdict:
        """Return the verdict on a call in ``room`` bytes, None: on the whole card.

        Theorem: an allocator that may reserve what it reserves without a limit makes the same decisions.
        """
        if room is None:
            return self._once(call, None)
        if self.peak is not None:
            return of_tensors(self._once(call, UNLIMITED).needs_bytes or 0, room)
        most = self._once(call, UNLIMITED)
        if most.needs_bytes is not None and most.needs_bytes <= room:
            return replace(most, of_bytes=room, left_bytes=room - most.needs_bytes)
        return self._once(call, room)

    def _once(self, call: Call, room: int | None) -> Verdict:
        if (known := self.answers.get((call, room))) is None:
            self.derivation.sizes(call)
            if self.peak is not None and room is not None:
                known = of_tensors(self.peak(call), room)
            else:
                quick = None if self.quick is None else self.quick.verdict(call, room)
                known = quick or self.derivation.verdict(call, free_bytes=room)
            self.answers[call, room] = known
        return known


_KNOWN: weakref.WeakKeyDictionary[Any, _Known] = weakref.WeakKeyDictionary()


def will_fit(
    pipe: Any,
    height: int | None = None,
    width: int | None = None,
    batch_size: int | None = None,
    prompt_length: int | None = None,
    guidance: bool | None = None,
    free_bytes: int | None = None,
    compiled: bool = False,
    **arguments: Any,
) -> Forecast:
    """Return whether ``pipe(...)`` fits; ``arguments`` are those of its call, or options of ``derive``.

    With CUDA the card, torch and what the process holds are read off it; weights on the GPU count once. With
    ``gpu`` that card is asked about, all of it unless ``free_bytes`` says what is free there; with ``free_bytes``
    alone only weights and tensors are counted. A size seen before takes microseconds; with ``compiled``, after seconds
    for the first, a new one does, too: on a GPU where both sides are multiples of 64 from 512 to 2048 and nothing has
    to be released, without one everywhere. Raises DerivationError, with one line, for what is not supported.
    """
    if not (is_live(pipe) or is_live_traced(pipe)):
        raise unsupported("pipe", pipe, "a DiffusionPipeline")
    try:
        given = {"height": height, "width": width, "batch_size": batch_size, "guidance": guidance}
        sizes, options = _read_arguments(pipe, given, arguments)
        prompt_length = options.pop("max_sequence_length", None) if prompt_length is None else prompt_length
        machine = Machine.here() if options.get("gpu") is None else Machine()
        known = _known(pipe, compiled, {**machine.options, **options})
        for name, side in zip(("height", "width"), known.derivation.default_sides, strict=True):
            sizes[name] = side if sizes[name] is None else sizes[name]
        call = Call(prompt_length=prompt_length, **sizes).filled(known.derivation.prompt_length)
        return _forecast(known, call, _free_bytes(machine, options, free_bytes), machine.assumed)
    except DerivationError:
        raise
    except Exception as error:
        raise DerivationError(f"{type(pipe).__name__} cannot be read: {type(error).__name__}: {error}") from error


def _forecast(known: _Known, call: Call, free: int | None, assumed: tuple[str, ...]) -> Forecast:
    resident = 0 if free is None else known.resident_bytes()
    room = None if free is None else free + resident
    verdict = known.verdict(call, room)
    return Forecast(verdict, resident, free, assumed, lambda: _advice(known.derivation, room, call))


def _read_arguments(
    pipe: Any, given: dict[str, Any], arguments: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the sizes of a call, and the options, from the arguments of the pipeline's ``__call__``."""
    ignored = (*IGNORED.split(), *(RECORDED if is_live_traced(pipe) else ()))
    own = {name: value for name, value in arguments.items() if name not in ignored}
    prompt, image, scale = own.pop("prompt", None), own.pop("image", None), own.pop("guidance_scale", None)
    own = {name: value for name, value in own.items() if not name.endswith("prompt_embeds")}
    if "negative_prompt" in own and not isinstance(own["negative_prompt"], bool):
        own["negative_prompt"] = own["negative_prompt"] is not None
    prompts = len(prompt) if isinstance(prompt, (list, tuple)) else 1
    usual = {"batch_size": prompts, "guidance": scale is None or scale > 1}
    sizes = {name: usual.get(name) if value is None else value for name, value in given.items()}
    sizes["num_frames"] = own.pop("num_frames", None)
    for name, side in zip(("height", "width"), _image_size(image), strict=True):
        sizes[name] = side if sizes[name] is None else sizes[name]
    return sizes, own


def _image_size(image: Any) -> tuple[int | None, int | None]:
    """Return (height, width) of an image, PIL's or an array."""
    while isinstance(image, (list, tuple)) and image:
        image = image[0]
    if isinstance(size := getattr(image, "size", None), tuple):
        return int(size[1]), int(size[0])
    if (shape := getattr(image, "shape", None)) is not None and len(shape) > 1:
        # H x W x 3 of NumPy, (B x) 3 x H x W of torch
        return (int(shape[0]), int(shape[1])) if shape[-1] in (1, 3, 4) else (int(shape[-2]), int(shape[-1]))
    return None, None


def _known(pipe: Any, compiled: bool, options: dict[str, Any]) -> _Known:
    """Return what is known of ``pipe``, read again where it or the options changed."""
    known = _KNOWN.get(pipe)
    given = (compiled, *sorted(options.items()))
    if known is None or known.signature != (given, known.watched(pipe)):
        models = models_of(pipe)
        parameters = {name: first_parameter(model) for name, model in models.items()}
        watched = _watch(models, parameters)
        derivation = derive(pipe, **options)
        peak = _peak(derivation, compiled)
        quick = Quick(derivation) if compiled and peak is None else None
        known = _Known((given, watched(pipe)), watched, parameters, derivation, peak, quick, {})
        _KNOWN[pipe] = known
    return known


@dataclass(frozen=True, slots=True)
class Machine:
    """What CUDA says of where the process runs: options of ``derive``, and what they do not cover."""

    options: Mapping[str, Any] = field(default_factory=dict)
    assumed: tuple[str, ...] = ()

    @classmethod
    def here(cls) -> Machine:
        """Return this machine, one without options where torch was not imported or has no CUDA."""
        torch = sys.modules.get("torch")
        if torch is None or not torch.cuda.is_available():
            return cls()
        card = torch.cuda.get_device_properties(torch.cuda.current_device())
        assumed = [f"{name}={os.environ[name]} is not replayed" for name in ALLOC_CONF if os.environ.get(name)]
        try:
            gpu = of_device(card.name, card.total_memory)
        except DerivationError:
            gpu = f"sm{card.major}{card.minor}"
            assumed.append(f"{card.name} is not in the table: as any card of {gpu}")
        libraries = {name: getattr(sys.modules.get(name), "__version__", None) for name in ("torch", "diffusers")}
        found = {"gpu": gpu, **{name: version for name, version in libraries.items() if version is not None}}
        return cls(found, tuple(assumed))


def cuda_free_bytes() -> int:
    """Return the bytes that PyTorch can still allocate on the current GPU: free ones and its own cache.

    Raises DerivationError where torch was not imported or has no CUDA.
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        supported = "free_bytes=<bytes>, or gpu=<a card's name>"
        raise DerivationError(f"free_bytes is not given and CUDA is not available (supported: {supported})")
    return int(torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated())


def _free_bytes(machine: Machine, options: Mapping[str, Any], free_bytes: int | None) -> int | None:
    if free_bytes is not None or options.get("gpu") is not None:
        return free_bytes
    return cuda_free_bytes()


def _peak(derivation: Derivation, compiled: bool) -> Peak | None:
    """Return the peak of tensors as a function of the call, None where a GPU's replay says what is needed."""
    if derivation.options.gpu is not None:
        return None
    if compiled:
        generated = derivation.lambdify("math")
        return lambda call: int(generated(**call.as_dict()))
    return lambda call: peak_tensor_bytes(derivation, call)[1]


def _advice(derivation: Derivation, budget: int | None, call: Call) -> tuple[str, ...]:
    if budget is not None and budget < 1:
        return ("free some GPU memory: not even the weights fit",)
    found = recommend(derivation, budget, call)
    lines = [f"{step.name} saves {step.adds_bytes:,} bytes: {step.call}" for step in found.needed]
    if found.expandable is not None and found.expandable.fits:
        lines.insert(0, f"{EXPANDABLE.name} are enough: {EXPANDABLE.call}")
    if not found.fits:
        shape, rest = (call.width, call.height), (call.batch_size, call.prompt_length, call.guidance)
        largest = fit(derivation, budget, shape, *rest).image
        where = f"{largest.width}x{largest.height}" if largest else "none"
        lines.append(f"not enough even so; the largest image of this shape that fits as it is: {where}")
    lines += [f"with quantised weights it fits: {name}" for name in found.quantized]
    return tuple(lines)


def _watch(models: Mapping[str, Any], parameters: Mapping[str, Callable[[], Any]]) -> Watch:
    """Return a function of microseconds whose result changes with whatever the derivation depends on."""
    modules = list(attentions(models.values()))
    vae, unet, blocks = models.get("vae"), models.get("unet"), list(up_blocks(models))
    first = list(parameters.values())
    loras = [layer for _, layer in tuners(unet)][:1]

    def watched(pipe: Any) -> tuple[object, ...]:
        return (
            *[id(getattr(pipe, name, None)) for name in (*dict.fromkeys((*MODELS, *models)), "scheduler")],
            *[getattr(parameter(), "dtype", None) for parameter in first],
            *[_strides(parameter()) for parameter in first],
            *[
                (type(p := module.processor), getattr(p, "slice_size", None), getattr(p, "_attention_backend", None))
                for module in modules
            ],
            *[getattr(vae, name, None) for name in ON_VAE],
            *[getattr(block, FREEU[0], None) for block in blocks],
            *[id(getattr(model, hook, None)) for model in models.values() for hook in ("_hf_hook", "_diffusers_hook")],
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
