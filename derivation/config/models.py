"""UNet and VAE config tables, with diffusers' field names and defaults."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from .checks import (
    MAX_LAYERS,
    At,
    Check,
    activation,
    anything,
    each_block,
    expect_class,
    flag,
    flag_or_null,
    integer,
    key,
    layers,
    listed,
    number,
    odd_kernel,
    one_of,
    optional,
    pair,
    per_block,
    positive,
    read,
    size,
)

DOWN = one_of("CrossAttnDownBlock2D", "DownBlock2D")
MID = one_of("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None)
UP = one_of("UpBlock2D", "CrossAttnUpBlock2D")
CROSS_DOWN = ("CrossAttnDownBlock2D",) * 3
CROSS_UP = ("CrossAttnUpBlock2D",) * 3
# pipeline_stable_diffusion.py: vae_scale_factor without a VAE
VAE_SCALE_FACTOR = 8
ACCEPTED: dict[str, Check[Any]] = {"dropout": number, "addition_embed_type_num_heads": size}


def _depth(value: object, at: At) -> int | tuple[int, ...]:
    depth = integer(0, MAX_LAYERS)
    return listed(depth)(value, at) if isinstance(value, list | tuple) else depth(value, at)


@dataclass(frozen=True, slots=True)
class UNet2DConditionConfig:
    """The config of ``UNet2DConditionModel``; per-block tuples follow ``down_block_types``.

    ``attention_head_dim`` is the number of heads (diffusers' historic misnomer).
    ``transformer_layers_per_block`` has one tuple a down block, one entry an attention;
    ``reverse_transformer_layers_per_block`` the same for the up blocks, in their order.
    """

    sample_size: int | tuple[int, int] | None = key(optional(pair(size)), None)
    in_channels: int = key(size, 4)
    out_channels: int = key(size, 4)
    center_input_sample: bool = key(one_of(False), False)
    flip_sin_to_cos: bool = key(flag, True)
    freq_shift: float = key(number, 0)
    down_block_types: tuple[str, ...] = key(each_block(DOWN), (*CROSS_DOWN, "DownBlock2D"))
    mid_block_type: str | None = key(MID, "UNetMidBlock2DCrossAttn")
    up_block_types: tuple[str, ...] = key(each_block(UP), ("UpBlock2D", *CROSS_UP))
    only_cross_attention: tuple[bool, ...] = key(per_block(one_of(False)), False)
    block_out_channels: tuple[int, ...] = key(each_block(size), (320, 640, 1280, 1280))
    layers_per_block: tuple[int, ...] = key(per_block(layers), 2)
    downsample_padding: int = key(one_of(1), 1)
    mid_block_scale_factor: float = key(positive, 1)
    act_fn: str = key(activation, "silu")
    norm_num_groups: int = key(size, 32)
    norm_eps: float = key(positive, 1e-5)
    cross_attention_dim: tuple[int, ...] = key(per_block(size), 1280)
    transformer_layers_per_block: tuple[tuple[int, ...], ...] = key(per_block(_depth), 1)
    reverse_transformer_layers_per_block: tuple[tuple[int, ...], ...] = key(optional(each_block(_depth)), None)
    encoder_hid_dim: None = key(one_of(None), None)
    encoder_hid_dim_type: None = key(one_of(None), None)
    attention_head_dim: tuple[int, ...] = key(per_block(size), 8)
    num_attention_heads: None = key(one_of(None), None)
    dual_cross_attention: bool = key(one_of(False), False)
    use_linear_projection: bool = key(flag, False)
    class_embed_type: None = key(one_of(None), None)
    addition_embed_type: str | None = key(one_of(None, "text_time"), None)
    addition_time_embed_dim: int | None = key(optional(size), None)
    num_class_embeds: None = key(one_of(None), None)
    upcast_attention: bool = key(flag_or_null, False)
    resnet_time_scale_shift: str = key(one_of("default"), "default")
    resnet_skip_time_act: bool = key(one_of(False), False)
    resnet_out_scale_factor: float = key(positive, 1.0)
    time_embedding_type: str = key(one_of("positional"), "positional")
    time_embedding_dim: int | None = key(optional(size), None)
    time_embedding_act_fn: None = key(one_of(None), None)
    timestep_post_act: None = key(one_of(None), None)
    time_cond_proj_dim: int | None = key(optional(size), None)
    conv_in_kernel: int = key(odd_kernel, 3)
    conv_out_kernel: int = key(odd_kernel, 3)
    projection_class_embeddings_input_dim: int | None = key(optional(size), None)
    attention_type: str = key(one_of("default"), "default")
    class_embeddings_concat: bool = key(one_of(False), False)
    mid_block_only_cross_attention: bool | None = key(one_of(None, False), None)
    cross_attention_norm: None = key(one_of(None), None)

    def doubled(self, guidance: bool) -> bool:
        """Whether classifier-free guidance doubles the rows: not where the guidance scale is an input."""
        return guidance and self.time_cond_proj_dim is None


@dataclass(frozen=True, slots=True)
class AutoencoderKLConfig:
    """The config of ``AutoencoderKL``."""

    in_channels: int = key(size, 3)
    out_channels: int = key(size, 3)
    down_block_types: tuple[str, ...] = key(each_block(one_of("DownEncoderBlock2D")), ("DownEncoderBlock2D",))
    up_block_types: tuple[str, ...] = key(each_block(one_of("UpDecoderBlock2D")), ("UpDecoderBlock2D",))
    block_out_channels: tuple[int, ...] = key(each_block(size), (64,))
    layers_per_block: int = key(layers, 1)
    act_fn: str = key(activation, "silu")
    latent_channels: int = key(size, 4)
    norm_num_groups: int = key(size, 32)
    sample_size: int | tuple[int, int] = key(pair(size), 32)
    scaling_factor: float = key(positive, 0.18215)
    shift_factor: float | None = key(optional(number), None)
    latents_mean: tuple[float, ...] | None = key(optional(listed(number, 1024)), None)
    latents_std: tuple[float, ...] | None = key(optional(listed(number, 1024)), None)
    force_upcast: bool = key(flag, True)
    use_quant_conv: bool = key(flag, True)
    use_post_quant_conv: bool = key(flag, True)
    mid_block_add_attention: bool = key(flag, True)

    @property
    def scale_factor(self) -> int:
        """Image pixels per latent, along a side (``vae_scale_factor`` of diffusers' pipelines)."""
        return 1 << (len(self.block_out_channels) - 1)


@dataclass(frozen=True, slots=True)
class AutoencoderTinyConfig:
    """The config of ``AutoencoderTiny``; each half has one number of channels, as its convolutions ask."""

    in_channels: int = key(size, 3)
    out_channels: int = key(size, 3)
    encoder_block_out_channels: tuple[int, ...] = key(listed(size), (64, 64, 64, 64))
    decoder_block_out_channels: tuple[int, ...] = key(listed(size), (64, 64, 64, 64))
    act_fn: str = key(activation, "relu")
    upsample_fn: str = key(one_of("nearest"), "nearest")
    latent_channels: int = key(size, 4)
    upsampling_scaling_factor: int = key(one_of(2), 2)
    num_encoder_blocks: tuple[int, ...] = key(listed(integer(0, MAX_LAYERS)), (1, 3, 3, 3))
    num_decoder_blocks: tuple[int, ...] = key(listed(integer(0, MAX_LAYERS)), (3, 3, 3, 1))
    latent_magnitude: float = key(number, 3)
    latent_shift: float = key(number, 0.5)
    scaling_factor: float = key(positive, 1.0)
    shift_factor: float = key(number, 0.0)
    class_name: str = "AutoencoderTiny"

    @property
    def block_out_channels(self) -> tuple[int, ...]:
        """What the class registers for the pipelines' ``vae_scale_factor``."""
        return self.decoder_block_out_channels

    @property
    def scale_factor(self) -> int:
        """Image pixels per latent, along a side (``vae_scale_factor`` of diffusers' pipelines)."""
        return 1 << (len(self.block_out_channels) - 1)

    @property
    def force_upcast(self) -> bool:
        """False, whatever the file says: the class registers it so."""
        return False


VAEConfig = AutoencoderKLConfig | AutoencoderTinyConfig


def block_count(mapping: object, file: str, default: int) -> int:
    """Return the blocks of a model by its ``down_block_types``; raises UnsupportedConfig for what is no list."""
    if not isinstance(mapping, Mapping) or "down_block_types" not in mapping:
        return default
    return len(listed(anything)(mapping["down_block_types"], At(file, "down_block_types")))


def _divides(divisor: int, channels: Sequence[int], at: At, what: str) -> None:
    for count in channels:
        if count % divisor:
            raise at.unsupported(channels, f"multiples of {what} = {divisor}")


def spread_depths(depth: Sequence[int | tuple[int, ...]], layers: Sequence[int], at: At) -> tuple[tuple[int, ...], ...]:
    """Return one depth a layer of each block, of one a block; raises UnsupportedConfig for another count of them."""
    spread = tuple((n,) * count if isinstance(n, int) else n for n, count in zip(depth, layers, strict=True))
    for given, count in zip(spread, layers, strict=True):
        if len(given) != count:
            raise at.unsupported(given, f"one integer, or a list of {count}, one a layer of the block")
    return spread


def _transformer_layers(values: dict[str, Any], file: str) -> None:
    depth, reverse = values["transformer_layers_per_block"], values["reverse_transformer_layers_per_block"]
    down, up = values["layers_per_block"], [n + 1 for n in reversed(values["layers_per_block"])]
    at = At(file, "reverse_transformer_layers_per_block")
    if reverse is None and not all(isinstance(n, int) for n in depth):
        raise at.unsupported(None, "a list, where transformer_layers_per_block has nested lists")
    values["reverse_transformer_layers_per_block"] = spread_depths(depth[::-1] if reverse is None else reverse, up, at)
    values["transformer_layers_per_block"] = spread_depths(depth, down, at._replace(key="transformer_layers_per_block"))


def _check_depth(unet: UNet2DConditionConfig, file: str) -> None:
    """Raise UnsupportedConfig for more than MAX_LAYERS resnets, or transformer blocks, in all."""
    types = (*unet.down_block_types, *unet.up_block_types)
    depths = (*unet.transformer_layers_per_block, *unet.reverse_transformer_layers_per_block)
    transformers = sum(sum(depth) for name, depth in zip(types, depths, strict=True) if "Cross" in name)
    resnets = sum(unet.layers_per_block) * (2 if unet.up_block_types else 1)
    for name, count in (("layers_per_block", resnets), ("transformer_layers_per_block", transformers)):
        if count > MAX_LAYERS:
            raise At(file, name).unsupported(getattr(unet, name), f"at most {MAX_LAYERS} in all; these are {count}")


def check_unet(unet: UNet2DConditionConfig, file: str) -> None:
    """Raise UnsupportedConfig where the values of a UNet, or of its encoder alone, exclude each other."""
    _check_depth(unet, file)
    at = At(file, "block_out_channels")
    _divides(unet.norm_num_groups, unet.block_out_channels, at, "norm_num_groups")
    kinds = zip_longest(unet.down_block_types, reversed(unet.up_block_types), fillvalue="")
    crossed = ["Cross" in down + up for down, up in kinds]
    crossed[-1] |= unet.mid_block_type == "UNetMidBlock2DCrossAttn"
    for cross, heads, channels in zip(crossed, unet.attention_head_dim, unet.block_out_channels, strict=True):
        if cross:
            _divides(heads, (channels,), at, "the number of heads, attention_head_dim")
    for name in ("addition_time_embed_dim", "projection_class_embeddings_input_dim"):
        if unet.addition_embed_type == "text_time" and getattr(unet, name) is None:
            raise At(file, name).unsupported(None, "an integer, as addition_embed_type is text_time")


def unet_config(mapping: object, file: str = "unet/config.json") -> UNet2DConditionConfig:
    """Return the checked config of a ``UNet2DConditionModel``; raises ``DerivationError``."""
    expect_class(mapping, file, "UNet2DConditionModel")
    values = read(UNet2DConditionConfig, mapping, file, extra=ACCEPTED, blocks=block_count(mapping, file, 4))
    _transformer_layers(values, file)
    unet = UNet2DConditionConfig(**values)
    check_unet(unet, file)
    return unet


def vae_config(mapping: object, file: str = "vae/config.json", class_name: str = "AutoencoderKL") -> VAEConfig:
    """Return the checked config of a VAE of class ``class_name``; raises ``DerivationError``."""
    expect_class(mapping, file, class_name)
    if class_name == "AutoencoderTiny":
        return _tiny_config(mapping, file)
    count = block_count(mapping, file, 1)
    vae = AutoencoderKLConfig(**read(AutoencoderKLConfig, mapping, file, extra={}, blocks=count))
    _divides(vae.norm_num_groups, vae.block_out_channels, At(file, "block_out_channels"), "norm_num_groups")
    return vae


def _tiny_config(mapping: object, file: str) -> AutoencoderTinyConfig:
    extra: dict[str, Check[Any]] = {"block_out_channels": anything, "force_upcast": flag_or_null}
    vae = AutoencoderTinyConfig(**read(AutoencoderTinyConfig, mapping, file, extra=extra))
    levels = len(vae.decoder_block_out_channels)
    for name in ("encoder_block_out_channels", "decoder_block_out_channels"):
        if len(value := getattr(vae, name)) != levels or len(set(value)) > 1:
            raise At(file, name).unsupported(value, f"{levels} times the same")
    for name in ("num_encoder_blocks", "num_decoder_blocks"):
        if len(value := getattr(vae, name)) != levels or sum(value) > MAX_LAYERS:
            raise At(file, name).unsupported(value, f"{levels} values, at most {MAX_LAYERS} in all")
    return vae
