"""The arguments of any pipeline's call at given sizes: which symbols it has, and how each is passed."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import ceil
from typing import Any

import torch
from PIL import Image

from derivation.call import DEFAULT_PROMPT_LENGTH, Call
from derivation.errors import unsupported
from derivation.tape.grid import Frames, Grid
from derivation.tape.symbols import MAX_LEVELS

# Pipelines ask for sides that are multiples of 8 or, where latents are packed two by two, of 16 pixels.
LEAST_UNIT = 16
# The attributes in which pipelines keep how many pixels a latent is, and how many frames a latent frame.
_SPATIAL = ("vae_scale_factor", "vae_scale_factor_spatial", "vae_spatial_compression_ratio")
_TEMPORAL = ("vae_scale_factor_temporal", "vae_temporal_compression_ratio", "vae_scale_factor_temporal_ratio")
PROMPTS = ("prompt", "negative_prompt")
_GUIDANCE = ("guidance_scale", "true_cfg_scale")
# The arguments that say how many images a call makes, before and after those that hold images.
_BATCHED, _REPEATED = ("prompt", "class_labels", "batch_size"), ("num_images_per_prompt", "num_videos_per_prompt")
_STILL = ("image", "mask_image", "control_image", "image_reference")
_IMAGES = (*_STILL, "video")


@dataclass(frozen=True)
class Arguments:
    """How a pipeline is called: ``given`` arguments that do not depend on sizes, ``steps`` passes of the loop.

    ``bare``: one prompt is a string, for pipelines that take no list; ``full``: a padded prompt has as many words as
    its length. ``images`` are arguments that have a default, but that the call is given.
    """

    pipe: Any
    given: Mapping[str, Any]
    steps: int = 2
    bare: bool = False
    full: bool = False
    images: tuple[str, ...] = ()

    @cached_property
    def names(self) -> Mapping[str, inspect.Parameter]:
        """The parameters of the call."""
        return inspect.signature(self.pipe.__call__).parameters

    @cached_property
    def grid(self) -> Grid:
        """How image sides map to the sides of the deepest level: patches of a transformer, a UNet's last block."""
        factor = next((v for n in _SPATIAL if isinstance(v := getattr(self.pipe, n, None), int)), 8)
        unet = getattr(self.pipe, "unet", None) or getattr(self.pipe, "prior", None)
        blocks = getattr(getattr(unet, "config", None), "block_out_channels", None)
        levels = len(blocks) if blocks else 1
        while factor << (levels - 1) < LEAST_UNIT:
            levels += 1
        return Grid(factor, min(levels, MAX_LEVELS), frames=self.frames)

    @cached_property
    def frames(self) -> Frames | None:
        """How frames map to latent frames; None for a pipeline of images."""
        if (name := self._frames_name) is None:
            return None
        ratio = next((v for n in _TEMPORAL if isinstance(v := getattr(self.pipe, n, None), int)), None)
        models = [getattr(self.pipe, n, None) for n in ("unet", "transformer")]
        configs = [dict(m.config) for m in models if m is not None]
        candidates = [self.given.get(name), self.names[name].default]
        candidates += [c.get(n) for c in configs for n in ("num_frames", "sample_frames")]
        default = next((n for n in candidates if isinstance(n, int)), 16)
        return Frames(1 if ratio is None or (default - 1) % ratio else ratio, default)

    @cached_property
    def usual_sides(self) -> tuple[int, int] | None:
        """The height and width of a call that says none, in pixels; None where nothing says them."""
        own = (self._side("height"), self._side("width"))
        return None if None in own else own  # type: ignore[return-value]

    @property
    def default_sides(self) -> tuple[int, int] | None:
        """The height and width of a call that says none, as the call's own code has them; None where nothing does."""
        own = (self._default("height"), self._default("width"))
        return None if None in own else own  # type: ignore[return-value]

    def _default(self, name: str) -> int | None:
        """Return a side: the signature's, N of ``name = name or N``, else the pipeline's or its model's sample size."""
        code = inspect.getsource(type(self.pipe).__call__)
        number = re.search(rf"\b{name} = {name} or (\d+)\b", code)
        latents = getattr(self.pipe, "default_sample_size", None)
        known = (self.given.get(name), self.names[name].default if name in self.names else None)
        found = (*known, number and int(number[1]), isinstance(latents, int) and latents * self.grid.vae_scale_factor)
        return next((side for side in found if side), None) or self._side(name)

    def _side(self, name: str) -> int | None:
        factor = self.grid.vae_scale_factor
        models = [model for n in ("transformer", "unet") if (model := getattr(self.pipe, n, None)) is not None]
        sizes = [dict(model.config).get(key) for model in models for key in (f"sample_{name}", "sample_size")]
        known = [self.given.get(name), self.names[name].default if name in self.names else None]
        return next((side for side in (*known, *(s * factor for s in sizes if isinstance(s, int))) if side), None)

    @property
    def _frames_name(self) -> str | None:
        return next((name for name in ("num_frames", "video_length") if name in self.names), None)

    @property
    def pads(self) -> bool:
        """Whether prompts may be padded to ``max_sequence_length``; else a prompt's own tokens count."""
        return "max_sequence_length" in self.names

    @property
    def prompt_length(self) -> int:
        """The prompt length of a call that says nothing about it, in tokens."""
        own = self.names["max_sequence_length"].default if self.pads else None
        default = self.given.get("max_sequence_length", own)
        return default if isinstance(default, int) else DEFAULT_PROMPT_LENGTH

    @property
    def batched(self) -> str | None:
        """The argument that says how many images a call makes; None for a pipeline that makes one."""
        return next((name for name in (*_BATCHED, *self._missing, *_REPEATED) if name in self.names), None)

    @property
    def _missing(self) -> list[str]:
        """The images that a call cannot go without and that are not given."""
        empty = inspect.Parameter.empty
        return [n for n in self._not_given if self.names[n].default is empty or n in self.images]

    @property
    def _not_given(self) -> list[str]:
        return [n for n in _IMAGES if n in self.names and n not in self.given]

    @property
    def image_choices(self) -> tuple[tuple[str, ...], ...]:
        """What ``images`` can be: none, all that may be None and are not typed so, or one of them."""
        names = [n for n in self._not_given if n in _STILL and _asked(self.names[n])]
        return tuple(dict.fromkeys([(), tuple(names), *((n,) for n in names)]))

    def at(self, call: Call, padded: bool = True) -> dict[str, Any]:
        """Return the arguments of one call; ``padded`` says whether L is ``max_sequence_length`` or the words.

        Raises DerivationError for several images of a pipeline that makes one.
        """
        if call.batch_size > 1 and self.batched is None:
            raise unsupported("batch_size", call.batch_size, "1")
        found = dict(self.given)
        found |= self._sizes(call) | self._prompt(call, padded) | self._images(call)
        if "use_resolution_binning" in self.names:
            found["use_resolution_binning"] = False  # else a table of sizes replaces height and width
        if not call.guidance:
            found |= {name: 1.0 for name in _GUIDANCE if name in self.names}
        return {name: value for name, value in found.items() if name in self.names}

    def _sizes(self, call: Call) -> dict[str, Any]:
        found: dict[str, Any] = {"height": call.height, "width": call.width}
        if (name := self._frames_name) is not None:
            found[name] = call.num_frames or self.frames.default  # type: ignore[union-attr]
        strength = self.names["strength"].default if "strength" in self.names else 1.0
        steps = ceil(self.steps / strength) if isinstance(strength, float) and strength else self.steps
        return found | {"num_inference_steps": self.given.get("num_inference_steps", steps)}

    def _prompt(self, call: Call, padded: bool) -> dict[str, Any]:
        if "prompt" not in self.names:
            name = None if self.batched in _IMAGES else self.batched
            labels = [0] * call.batch_size if name == "class_labels" else call.batch_size
            return {} if name is None else {name: labels}
        one = padded and self.pads and not self.full
        words = 1 if one else call.prompt_length or self.prompt_length
        text = " ".join(["a"] * words)
        prompts = text if self.bare and call.batch_size == 1 else [text] * call.batch_size
        found: dict[str, Any] = {"prompt": prompts}
        if call.guidance and "negative_prompt" in self.names:
            found["negative_prompt"] = prompts
        return found | ({"max_sequence_length": call.prompt_length} if padded and self.pads else {})

    def _images(self, call: Call) -> dict[str, Any]:
        """Return the images that the call cannot go without, and those that are given at this size."""
        wanted = [*self._missing, *(n for n, value in self.given.items() if _is_image(value))]
        return {name: _resized(self.given.get(name), call) for name in wanted}


def _asked(parameter: inspect.Parameter) -> bool:
    """Return whether None is a parameter's default and not one of its types."""
    return parameter.default is None and "None" not in str(parameter.annotation)


def _is_image(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and _is_image(value[0])
    return (hasattr(value, "resize") and not isinstance(value, torch.Tensor)) or _is_image_tensor(value)


def _is_image_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() >= 3 and min(value.shape[-2:]) > 8


def _resized(value: Any, call: Call) -> Any:
    if isinstance(value, list):
        frames = call.num_frames if call.num_frames and len(value) > 1 else len(value)
        return [_resized(value[0], call)] * frames
    if isinstance(value, torch.Tensor):
        return torch.zeros(*value.shape[:-2], call.height, call.width, dtype=value.dtype, device="cpu")
    if value is None:
        images = [Image.new("RGB", (call.width, call.height))] * call.batch_size
        return images if call.batch_size > 1 else images[0]
    return value.resize((call.width, call.height))
