"""The models of a pipeline: UNet2DConditionModel, AutoencoderKL, CLIPTextModel, the safety checker."""

from __future__ import annotations

from derivation.blocks.activations import activation
from derivation.blocks.autoencoder_kl import decode, encode
from derivation.blocks.embeddings import TimestepEmbedding, get_timestep_embedding
from derivation.blocks.modeling_clip import CLIPTextModel, CLIPTextModelWithProjection
from derivation.blocks.safety_checker import StableDiffusionSafetyChecker
from derivation.blocks.transformer_2d import TransformerSpec
from derivation.blocks.unet_2d_blocks import (
    BlockSpec,
    CrossAttnDownBlock2D,
    CrossAttnUpBlock2D,
    DownBlock2D,
    UNetMidBlock2D,
    UNetMidBlock2DCrossAttn,
    UpBlock2D,
)
from derivation.config import UNet2DConditionConfig
from derivation.ops import Conv2d, GroupNorm, add, cat, empty, to
from derivation.symbols import Size
from derivation.tape import Category, SymTensor, block

__all__ = [
    "CLIP_TEXT_MODELS",
    "CLIPTextModel",
    "CLIPTextModelWithProjection",
    "StableDiffusionSafetyChecker",
    "UNet2DConditionModel",
    "decode",
    "encode",
]

CLIP_TEXT_MODELS = {
    "CLIPTextModel": CLIPTextModel,
    "CLIPTextModelWithProjection": CLIPTextModelWithProjection,
}


@block
def UNet2DConditionModel(
    sample: SymTensor,
    timestep: SymTensor,
    encoder_hidden_states: SymTensor,
    added_cond: tuple[SymTensor, SymTensor] | None = None,
    *,
    config: UNet2DConditionConfig,
) -> SymTensor:
    """sample [N, in_channels, h, w], encoder_hidden_states [N, L, K] -> [N, out_channels, h, w].

    ``timestep`` [1], or a scalar on the CPU, which is copied inside; ``added_cond`` = text_embeds [N, P]
    and time_ids [N, T] where addition_embed_type is text_time.
    """
    t_emb = _time_embed(sample, timestep, config)
    time_embed_dim = config.time_embedding_dim or 4 * config.block_out_channels[0]
    emb = TimestepEmbedding("time_embedding", t_emb, time_embed_dim=time_embed_dim, act_fn=config.act_fn)
    aug_emb = None
    if added_cond is not None:
        aug_emb = _aug_embed(emb, added_cond, config)
    emb = add(emb, aug_emb) if aug_emb is not None else emb

    sample = Conv2d(
        "conv_in",
        sample,
        config.block_out_channels[0],
        config.conv_in_kernel,
        padding=(config.conv_in_kernel - 1) // 2,
    )

    down_block_res_samples: tuple[SymTensor, ...] = (sample,)
    for i, down_block_type in enumerate(config.down_block_types):
        spec = _down_spec(config, i)
        if down_block_type == "CrossAttnDownBlock2D":
            sample, res_samples = CrossAttnDownBlock2D(
                f"down_blocks.{i}", sample, emb, encoder_hidden_states, spec=spec
            )
        else:
            sample, res_samples = DownBlock2D(f"down_blocks.{i}", sample, emb, spec=spec)
        down_block_res_samples += res_samples

    if config.mid_block_type == "UNetMidBlock2DCrossAttn":
        sample = UNetMidBlock2DCrossAttn("mid_block", sample, emb, encoder_hidden_states, spec=_mid_spec(config))
    elif config.mid_block_type == "UNetMidBlock2D":
        sample = UNetMidBlock2D("mid_block", sample, emb, spec=_mid_spec(config), attention=None)

    for i, up_block_type in enumerate(config.up_block_types):
        spec = _up_spec(config, i)
        res_samples = down_block_res_samples[-spec.layers :]
        down_block_res_samples = down_block_res_samples[: -spec.layers]
        upsample_size: tuple[Size, Size] | None = None
        if spec.resample:
            upsample_size = down_block_res_samples[-1].shape[2:]  # type: ignore[assignment]
        if up_block_type == "CrossAttnUpBlock2D":
            sample = CrossAttnUpBlock2D(
                f"up_blocks.{i}", sample, res_samples, emb, upsample_size, encoder_hidden_states, spec=spec
            )
        else:
            sample = UpBlock2D(f"up_blocks.{i}", sample, res_samples, emb, upsample_size, spec=spec)

    sample = GroupNorm("conv_norm_out", sample, config.norm_num_groups)
    sample = activation(sample, config.act_fn)
    sample = Conv2d(
        "conv_out",
        sample,
        config.out_channels,
        config.conv_out_kernel,
        padding=(config.conv_out_kernel - 1) // 2,
    )
    return sample


def _time_embed(sample: SymTensor, timestep: SymTensor, config: UNet2DConditionConfig) -> SymTensor:
    timesteps = timestep
    if timesteps.ndim == 0:
        timesteps = empty((1,), timestep.dtype, "_to_copy", Category.PIPELINE)
    timesteps = timesteps.expand(sample.shape[0])
    t_emb = get_timestep_embedding(
        timesteps, config.block_out_channels[0], flip_sin_to_cos=config.flip_sin_to_cos
    )
    t_emb = to(t_emb, sample.dtype)
    return t_emb


def _aug_embed(
    emb: SymTensor, added_cond: tuple[SymTensor, SymTensor], config: UNet2DConditionConfig
) -> SymTensor:
    """``get_aug_embed`` for addition_embed_type text_time."""
    text_embeds, time_ids = added_cond
    embed_dim, time_embed_dim = config.addition_time_embed_dim, emb.shape[-1]
    assert isinstance(embed_dim, int)
    assert isinstance(time_embed_dim, int)
    batch, count = time_ids.shape
    time_embeds = get_timestep_embedding(
        time_ids.view(batch * count), embed_dim, flip_sin_to_cos=config.flip_sin_to_cos
    )
    time_embeds = time_embeds.view(batch, count * embed_dim)
    add_embeds = cat([time_embeds, text_embeds], 1)
    add_embeds = to(add_embeds, emb.dtype)
    return TimestepEmbedding("add_embedding", add_embeds, time_embed_dim=time_embed_dim, act_fn=config.act_fn)


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


def _down_spec(config: UNet2DConditionConfig, i: int) -> BlockSpec:
    return BlockSpec(
        out_channels=config.block_out_channels[i],
        layers=config.layers_per_block[i],
        groups=config.norm_num_groups,
        act_fn=config.act_fn,
        resample=i < len(config.block_out_channels) - 1,
        transformers=_transformers(config, i, config.transformer_layers_per_block[i]),
    )


def _mid_spec(config: UNet2DConditionConfig) -> BlockSpec:
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


def _up_spec(config: UNet2DConditionConfig, i: int) -> BlockSpec:
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

