"""The transformers that the block walker does not know, on ``meta``, and the inputs their pipelines give them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor
from torch.overrides import TorchFunctionMode

from derivation.errors import DerivationError, UnsupportedConfig, shown
from derivation.options import Options

aten = torch.ops.aten

Inputs = dict[str, Any]
MAX_LAYERS = 1024


@dataclass(frozen=True, slots=True)
class Shapes:
    """The sizes of one call, integers or symbolic: rows, text tokens, and the grid of 2 x 2 latent patches."""

    rows: Any
    tokens: Any
    height: Any
    width: Any
    dtype: str

    def empty(self, *shape: Any, dtype: str | None = None) -> torch.Tensor:
        """Return a meta tensor, by default in the run's dtype."""
        return torch.empty(shape, dtype=getattr(torch, dtype or self.dtype), device="meta")

    def latents(self, channels: int) -> torch.Tensor:
        """Return latents [rows, channels, 2 height, 2 width]."""
        return self.empty(self.rows, channels, 2 * self.height, 2 * self.width)


@dataclass(frozen=True, slots=True)
class Architecture:
    """One transformer class: its patch size, how its pipeline calls it, and whether guidance doubles the rows."""

    inputs: Callable[[Any, Shapes], Inputs]
    patch_size: int
    doubled: bool
    eager: bool


def _sd3(config: Any, s: Shapes) -> Inputs:
    """pipeline_stable_diffusion_3.py: StableDiffusion3Pipeline.__call__."""
    return {
        "hidden_states": s.latents(config.in_channels),
        "timestep": s.empty(s.rows, dtype="float32"),
        "encoder_hidden_states": s.empty(s.rows, s.tokens, config.joint_attention_dim),
        "pooled_projections": s.empty(s.rows, config.pooled_projection_dim),
    }


def _flux(config: Any, s: Shapes) -> Inputs:
    """pipeline_flux.py: FluxPipeline.__call__, latents packed to one token a patch."""
    inputs = {
        "hidden_states": s.empty(s.rows, s.height * s.width, config.in_channels),
        "timestep": s.empty(s.rows),
        "pooled_projections": s.empty(s.rows, config.pooled_projection_dim),
        "encoder_hidden_states": s.empty(s.rows, s.tokens, config.joint_attention_dim),
        "txt_ids": s.empty(s.tokens, 3),
        "img_ids": s.empty(s.height * s.width, 3),
    }
    return inputs | ({"guidance": s.empty(s.rows, dtype="float32")} if config.guidance_embeds else {})


def _pixart(config: Any, s: Shapes) -> Inputs:
    """pipeline_pixart_alpha.py: PixArtAlphaPipeline.__call__."""
    conditions: dict[str, Any] = {"resolution": None, "aspect_ratio": None}
    if config.use_additional_conditions or (config.use_additional_conditions is None and config.sample_size == 128):
        conditions = {"resolution": s.empty(s.rows, 2), "aspect_ratio": s.empty(s.rows, 1)}
    return {
        "hidden_states": s.latents(config.in_channels),
        "encoder_hidden_states": s.empty(s.rows, s.tokens, config.caption_channels),
        "encoder_attention_mask": s.empty(s.rows, s.tokens, dtype="int64"),
        "timestep": s.empty(s.rows, dtype="int64"),
        "added_cond_kwargs": conditions,
    }


ARCHITECTURES: Mapping[str, Architecture] = {
    "SD3Transformer2DModel": Architecture(_sd3, patch_size=2, doubled=True, eager=False),
    "FluxTransformer2DModel": Architecture(_flux, patch_size=1, doubled=False, eager=False),
    "PixArtTransformer2DModel": Architecture(_pixart, patch_size=2, doubled=True, eager=True),
}


def checked(config: Mapping[str, Any], file: str, options: Options) -> Architecture:
    """Return the architecture of a config dict; raises UnsupportedConfig or DerivationError for any other."""
    name = config.get("_class_name")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise UnsupportedConfig(file, "_class_name", name, ", ".join(ARCHITECTURES))
    architecture = ARCHITECTURES[name]
    patch_size = config.get("patch_size", architecture.patch_size)
    if patch_size != architecture.patch_size:
        raise UnsupportedConfig(file, "patch_size", patch_size, str(architecture.patch_size))
    for key, value in config.items():
        if "layers" in key and isinstance(value, int) and value > MAX_LAYERS:
            raise UnsupportedConfig(file, key, value, f"up to {MAX_LAYERS}")
    if options.attention == "eager" and not architecture.eager:
        raise DerivationError(f"{name}: attention = 'eager' is not supported (its processors call SDPA)")
    return architecture


def build_transformer(config: Mapping[str, Any], dtype: str, eager: bool) -> Any:
    """Return the transformer of a config dict on ``meta``, in the dtypes that ``from_pretrained`` gives.

    Raises DerivationError for a config that diffusers rejects.
    """
    try:
        values = json.dumps(config, sort_keys=True)
    except (TypeError, ValueError, RecursionError) as error:
        raise DerivationError(f"config: no JSON: {error}") from None
    return _build(values, dtype, eager)


@lru_cache(maxsize=4)
def _build(config: str, dtype: str, eager: bool) -> Any:
    values = json.loads(config)
    try:
        with torch.device("meta"):
            model = getattr(diffusers, values["_class_name"]).from_config(values)
    except (TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        raise DerivationError(f"{values['_class_name']}: diffusers rejects the config: {shown(str(error))}") from None
    if eager:
        model.set_attn_processor(AttnProcessor())
    return _cast(model, getattr(torch, dtype)).eval()


def _cast(model: Any, dtype: torch.dtype) -> Any:
    """Cast what a state dict holds; other buffers keep the dtype they are built in."""
    kept = [
        (module, name, getattr(module, name))
        for module in model.modules()
        for name in module._non_persistent_buffers_set
    ]
    torch.nn.Module.to(model, dtype)
    for module, name, buffer in kept:
        setattr(module, name, buffer)
    return model


class MaskedAttention(TorchFunctionMode):
    """SDPA with a mask: flash cannot; efficient takes it as a bias expanded to every query, math where heads are odd.

    On CUDA a mask whose last side is no multiple of 8 is copied into a padded one first (attention.cpp: pad_bias);
    that copy is not counted.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        mask = kwargs.get("attn_mask")
        if func is not F.scaled_dot_product_attention or mask is None:
            return func(*args, **kwargs)
        query, key, value = args
        alignment = 4 if query.dtype == torch.float32 else 8
        if query.shape[-1] % alignment:
            return aten.scaled_dot_product_attention(query, key, value, mask, scale=kwargs.get("scale"))
        bias = mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
        op = aten._scaled_dot_product_efficient_attention
        return op(query, key, value, bias, False, 0.0, False, scale=kwargs.get("scale"))[0]
