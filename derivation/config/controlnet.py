"""ControlNetModel's config table, with diffusers' field names and defaults, and the files that an option names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..errors import shown
from .checks import At, expect_class, flag, key, layers, listed, one_of, read, same_for_all, size
from .json_file import read_json
from .models import ACCEPTED, UNet2DConditionConfig, block_count, check_unet, spread_depths
from .named_files import names, stamp

CONFIG = "config.json"
# the most layers of the conditioning embedding
MAX_EMBEDDING = 8
IMAGE_CHANNELS = 3
EMBEDDING = (16, 32, 96, 256)
# What ControlNetModel.__init__ has no argument for, and the UNet's walk reads.
UNET_ALONE: Mapping[str, Any] = {
    **dict.fromkeys(("sample_size", "time_embedding_act_fn", "timestep_post_act", "time_cond_proj_dim"), None),
    **dict.fromkeys(("time_embedding_dim", "cross_attention_norm", "mid_block_only_cross_attention"), None),
    **dict.fromkeys(("center_input_sample", "dual_cross_attention", "resnet_skip_time_act"), False),
    **dict.fromkeys(("up_block_types", "reverse_transformer_layers_per_block"), ()),
    **{"out_channels": 4, "resnet_out_scale_factor": 1.0, "time_embedding_type": "positional"},
    **{"conv_in_kernel": 3, "conv_out_kernel": 3, "attention_type": "default", "class_embeddings_concat": False},
}
# What a ControlNet's residuals, and the prompt that it is given, share with the UNet; the rest under text_time alone.
SHARED = ("block_out_channels", "layers_per_block", "cross_attention_dim")
SHARED_TIME = ("addition_embed_type", "addition_time_embed_dim", "projection_class_embeddings_input_dim")


@dataclass(frozen=True, slots=True)
class ControlNetConfig(UNet2DConditionConfig):
    """The config of ``ControlNetModel``: the encoder of a UNet, and what embeds the control image."""

    layers_per_block: tuple[int, ...] = key(same_for_all(layers), 2)
    cross_attention_dim: tuple[int, ...] = key(same_for_all(size), 1280)
    mid_block_type: str | None = key(one_of("UNetMidBlock2DCrossAttn", "UNetMidBlock2D"), "UNetMidBlock2DCrossAttn")
    conditioning_channels: int = key(one_of(IMAGE_CHANNELS), IMAGE_CHANNELS)
    conditioning_embedding_out_channels: tuple[int, ...] = key(listed(size, MAX_EMBEDDING), EMBEDDING)
    controlnet_conditioning_channel_order: str = key(one_of("rgb", "bgr"), "rgb")
    global_pool_conditions: bool = key(flag, False)

    @property
    def conditioning_factor(self) -> int:
        """Pixels of the conditioning image per latent, along a side."""
        return 1 << (len(self.conditioning_embedding_out_channels) - 1)

    @classmethod
    def from_unet(cls, unet: UNet2DConditionConfig) -> ControlNetConfig:
        """``ControlNetModel.from_unet``, for a sample of latents alone, as the pipelines pass it.

        Raises DerivationError for a UNet that ControlNetModel has no arguments for.
        """
        for name in ("layers_per_block", "cross_attention_dim"):
            if len(set(getattr(unet, name))) > 1:
                raise At("ControlNetModel", name).unsupported(getattr(unet, name), "one value for all blocks")
        if unet.mid_block_type is None:
            raise At("ControlNetModel", "mid_block_type").unsupported(None, "a block")
        copied = {field.name: getattr(unet, field.name) for field in fields(unet)}
        own = {"in_channels": unet.out_channels, "conv_in_kernel": 3, "time_embedding_dim": None}
        defaults = {field.name: field.metadata["default"] for field in fields(cls) if field.name not in copied}
        return cls(**{**defaults, **copied, **own})

    def require_fit(self, unet: UNet2DConditionConfig, file: str) -> None:
        """Raise UnsupportedConfig where its residuals or its inputs are not those of ``unet``."""
        timed = SHARED_TIME if self.addition_embed_type is not None else ()
        for name in (*SHARED, *timed):
            if getattr(self, name) != (expected := getattr(unet, name)):
                raise At(file, name).unsupported(getattr(self, name), f"the UNet's {shown(expected)}")
        if self.in_channels != unet.out_channels:
            raise At(file, "in_channels").unsupported(self.in_channels, f"the {unet.out_channels} of the latents")


def controlnet_config(mapping: object, file: str = "controlnet/config.json") -> ControlNetConfig:
    """Return the checked config of a ``ControlNetModel``; raises ``DerivationError``."""
    expect_class(mapping, file, "ControlNetModel")
    count = block_count(mapping, file, 4)
    values = read(ControlNetConfig, mapping, file, extra=ACCEPTED, blocks=count, unread=UNET_ALONE)
    values["transformer_layers_per_block"] = spread_depths(
        values["transformer_layers_per_block"], values["layers_per_block"], At(file, "transformer_layers_per_block")
    )
    found = ControlNetConfig(**{**UNET_ALONE, **values})
    check_unet(found, file)
    return found


def controlnet_files(option: str) -> tuple[str, ...]:
    """Return the config files that the option names, itself or by their folders; raises DerivationError."""
    named = names("controlnet", option, "folders")
    return tuple(str(Path(name, CONFIG)) if Path(name).is_dir() else name for name in named)


def read_controlnet(file: str) -> ControlNetConfig:
    """Return the ControlNet of a config file; raises DerivationError naming it."""
    return _read(file, *stamp(file))


@lru_cache(maxsize=32)
def _read(file: str, *_: int) -> ControlNetConfig:
    return controlnet_config(read_json(Path(file)), file)
