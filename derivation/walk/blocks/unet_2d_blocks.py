"""diffusers/models/unets/unet_2d_blocks.py."""

from __future__ import annotations

from dataclasses import dataclass

from derivation.config import UNet2DConditionConfig
from derivation.tape.block import block
from derivation.tape.symbols import Size
from derivation.tape.tensor import SymTensor
from derivation.walk.blocks.attention_processor import Attention, AttentionSpec, Conditions
from derivation.walk.blocks.downsampling import Downsample2D
from derivation.walk.blocks.resnet import ResnetBlock2D
from derivation.walk.blocks.transformer_2d import Transformer2DModel, TransformerSpec
from derivation.walk.blocks.upsampling import Upsample2D
from derivation.walk.ops import cat


@dataclass(frozen=True, slots=True)
class BlockSpec:
    """The constructor arguments of an up, mid or down block that matter for memory.

    ``transformers`` holds one entry a layer (None: no attention in this block).
    """

    out_channels: int
    layers: int
    groups: int
    act_fn: str
    resample: bool
    transformers: tuple[TransformerSpec, ...] | None = None


def _resnet(name: str, hidden_states: SymTensor, temb: SymTensor | None, spec: BlockSpec) -> SymTensor:
    return ResnetBlock2D(
        name, hidden_states, temb, out_channels=spec.out_channels, groups=spec.groups, act_fn=spec.act_fn
    )


@block
def DownBlock2D(
    hidden_states: SymTensor, temb: SymTensor, *, spec: BlockSpec
) -> tuple[SymTensor, tuple[SymTensor, ...]]:
    """[N, C, h, w] -> the next level's [N, C', h', w'] and every intermediate for the skip connections."""
    output_states: tuple[SymTensor, ...] = ()
    for i in range(spec.layers):
        hidden_states = _resnet(f"resnets.{i}", hidden_states, temb, spec)
        output_states = (*output_states, hidden_states)
    if spec.resample:
        hidden_states = Downsample2D("downsamplers.0", hidden_states, padding=1)
        output_states = (*output_states, hidden_states)
    return hidden_states, output_states


@block
def CrossAttnDownBlock2D(
    hidden_states: SymTensor, temb: SymTensor, encoder_hidden_states: Conditions, *, spec: BlockSpec
) -> tuple[SymTensor, tuple[SymTensor, ...]]:
    """DownBlock2D with a Transformer2DModel after each resnet."""
    assert spec.transformers is not None
    output_states: tuple[SymTensor, ...] = ()
    for i, transformer in enumerate(spec.transformers):
        hidden_states = _resnet(f"resnets.{i}", hidden_states, temb, spec)
        hidden_states = Transformer2DModel(f"attentions.{i}", hidden_states, encoder_hidden_states, spec=transformer)
        output_states = (*output_states, hidden_states)
    if spec.resample:
        hidden_states = Downsample2D("downsamplers.0", hidden_states, padding=1)
        output_states = (*output_states, hidden_states)
    return hidden_states, output_states


@block
def UNetMidBlock2DCrossAttn(
    hidden_states: SymTensor, temb: SymTensor, encoder_hidden_states: Conditions, *, spec: BlockSpec
) -> SymTensor:
    """[N, C, h, w] -> [N, C, h, w]: a resnet, then transformer and resnet for each layer."""
    assert spec.transformers is not None
    hidden_states = _resnet("resnets.0", hidden_states, temb, spec)
    for i, transformer in enumerate(spec.transformers):
        hidden_states = Transformer2DModel(f"attentions.{i}", hidden_states, encoder_hidden_states, spec=transformer)
        hidden_states = _resnet(f"resnets.{i + 1}", hidden_states, temb, spec)
    return hidden_states


@block
def UNetMidBlock2D(
    hidden_states: SymTensor, temb: SymTensor | None = None, *, spec: BlockSpec, attention: AttentionSpec | None
) -> SymTensor:
    """[N, C, h, w] -> [N, C, h, w]: a resnet, then attention over h w tokens and resnet for each layer."""
    hidden_states = _resnet("resnets.0", hidden_states, temb, spec)
    for i in range(spec.layers):
        if attention is not None:
            hidden_states = Attention(f"attentions.{i}", hidden_states, spec=attention)
        hidden_states = _resnet(f"resnets.{i + 1}", hidden_states, temb, spec)
    return hidden_states


@block
def UpBlock2D(
    hidden_states: SymTensor,
    res_hidden_states_tuple: tuple[SymTensor, ...],
    temb: SymTensor,
    upsample_size: tuple[Size, Size] | None,
    *,
    spec: BlockSpec,
) -> SymTensor:
    """[N, C, h, w] and the skip connections -> the previous level's [N, C', h', w']."""
    for i in range(spec.layers):
        res_hidden_states = res_hidden_states_tuple[-1]
        res_hidden_states_tuple = res_hidden_states_tuple[:-1]
        hidden_states = cat([hidden_states, res_hidden_states], 1)
        hidden_states = _resnet(f"resnets.{i}", hidden_states, temb, spec)
    if spec.resample:
        hidden_states = Upsample2D("upsamplers.0", hidden_states, upsample_size)
    return hidden_states


@block
def CrossAttnUpBlock2D(
    hidden_states: SymTensor,
    res_hidden_states_tuple: tuple[SymTensor, ...],
    temb: SymTensor,
    upsample_size: tuple[Size, Size] | None,
    encoder_hidden_states: Conditions,
    *,
    spec: BlockSpec,
) -> SymTensor:
    """UpBlock2D with a Transformer2DModel after each resnet."""
    assert spec.transformers is not None
    for i, transformer in enumerate(spec.transformers):
        res_hidden_states = res_hidden_states_tuple[-1]
        res_hidden_states_tuple = res_hidden_states_tuple[:-1]
        hidden_states = cat([hidden_states, res_hidden_states], 1)
        hidden_states = _resnet(f"resnets.{i}", hidden_states, temb, spec)
        hidden_states = Transformer2DModel(f"attentions.{i}", hidden_states, encoder_hidden_states, spec=transformer)
    if spec.resample:
        hidden_states = Upsample2D("upsamplers.0", hidden_states, upsample_size)
    return hidden_states


@block
def DownEncoderBlock2D(hidden_states: SymTensor, *, spec: BlockSpec) -> SymTensor:
    """[N, C, H, W] -> [N, C', H/2, W/2]."""
    for i in range(spec.layers):
        hidden_states = _resnet(f"resnets.{i}", hidden_states, None, spec)
    if spec.resample:
        hidden_states = Downsample2D("downsamplers.0", hidden_states, padding=0)
    return hidden_states


@block
def UpDecoderBlock2D(hidden_states: SymTensor, *, spec: BlockSpec) -> SymTensor:
    """[N, C, h, w] -> [N, C', 2h, 2w]."""
    for i in range(spec.layers):
        hidden_states = _resnet(f"resnets.{i}", hidden_states, None, spec)
    if spec.resample:
        hidden_states = Upsample2D("upsamplers.0", hidden_states)
    return hidden_states


def _transformers(config: UNet2DConditionConfig, level: int, depths: tuple[int, ...]) -> tuple[TransformerSpec, ...]:
    return tuple(
        TransformerSpec(
            heads=config.attention_head_dim[level],
            layers=depth,
            groups=config.norm_num_groups,
            use_linear_projection=config.use_linear_projection,
            upcast_attention=config.upcast_attention,
        )
        for depth in depths
    )


def down_spec(config: UNet2DConditionConfig, i: int) -> BlockSpec:
    """Return what down block ``i`` is built with."""
    return BlockSpec(
        out_channels=config.block_out_channels[i],
        layers=config.layers_per_block[i],
        groups=config.norm_num_groups,
        act_fn=config.act_fn,
        resample=i < len(config.block_out_channels) - 1,
        transformers=_transformers(config, i, config.transformer_layers_per_block[i]),
    )


def mid_spec(config: UNet2DConditionConfig) -> BlockSpec:
    """Return what the mid block is built with."""
    cross = config.mid_block_type == "UNetMidBlock2DCrossAttn"
    depths = config.transformer_layers_per_block[-1][:1]
    return BlockSpec(
        out_channels=config.block_out_channels[-1],
        layers=1 if cross else 0,
        groups=config.norm_num_groups,
        act_fn=config.act_fn,
        resample=False,
        transformers=_transformers(config, -1, depths) if cross else None,
    )


def up_spec(config: UNet2DConditionConfig, i: int) -> BlockSpec:
    """Return what up block ``i`` is built with."""
    level = len(config.block_out_channels) - 1 - i
    depths = config.reverse_transformer_layers_per_block[i]
    return BlockSpec(
        out_channels=config.block_out_channels[level],
        layers=config.layers_per_block[level] + 1,
        groups=config.norm_num_groups,
        act_fn=config.act_fn,
        resample=level > 0,
        transformers=_transformers(config, level, depths),
    )
