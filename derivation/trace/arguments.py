"""The arguments of any pipeline's call at given sizes: which symbols it has, and how each is passed."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import ceil
from typing import Any

import torch
from PIL import Image

from derivation.call import DEFAULT_PROMPT_LENGTH, Call
from derivation.tape.grid import Frames, Grid
from derivation.tape.symbols import MAX_LEVELS

# Pipelines ask for sides that are multiples of 8 or, where latents are packed two by two, of 16 pixels.
LEAST_UNIT = 16
# The attributes in which pipelines keep how many pixels a latent is, and how many frames a latent frame.
_SPATIAL = ("vae_scale_factor", "vae_scale_factor_spatial", "vae_spatial_compression_ratio")
_TEMPORAL = ("vae_scale_factor_temporal", "vae_temporal_compression_ratio", "vae_scale_factor_temporal_ratio")
_GUIDANCE = ("guidance_scale", "true_cfg_scale")
_IMAGES = ("image", "mask_image", "control_image", "video", "image_reference")


@dataclass(frozen=True)
class Arguments:
    """How a pipeline is called: ``given`` arguments that do not depend on sizes, ``steps`` passes of the loop."""

    pipe: Any
    given: Mapping[str, Any]
    steps: int = 2

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
        candidates = [self.names[name].default, *(c.get(n) for c in configs for n in ("num_frames", "sample_frames"))]
        return Frames(ratio or 1, next((n for n in candidates if isinstance(n, int)), 16))

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
        default = self.names["max_sequence_length"].default if self.pads else None
        return default if isinstance(default, int) else DEFAULT_PROMPT_LENGTH

    def at(self, call: Call, padded: bool = True) -> dict[str, Any]:
        """Return the arguments of one call; ``padded`` says whether L is ``max_sequence_length`` or the words."""
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
            return {}
        words = 1 if padded and self.pads else call.prompt_length or self.prompt_length
        prompts = [" ".join(["a"] * words)] * call.batch_size
        found: dict[str, Any] = {"prompt": prompts}
        if call.guidance and "negative_prompt" in self.names:
            found["negative_prompt"] = prompts
        return found | ({"max_sequence_length": call.prompt_length} if padded and self.pads else {})

    def _images(self, call: Call) -> dict[str, Any]:
        """Return the images that the call cannot go without, and those that are given at this size."""
        wanted = [n for n in _IMAGES if n in self.names and self.names[n].default is inspect.Parameter.empty]
        wanted += [n for n, value in self.given.items() if n not in wanted and _is_image(value)]
        return {name: _resized(self.given.get(name), call) for name in wanted}


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
