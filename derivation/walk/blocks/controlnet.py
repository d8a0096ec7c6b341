"""diffusers/models/controlnets: controlnet.py and multicontrolnet.py."""

from __future__ import annotations

from itertools import pairwise

from derivation.config import ControlNetConfig
from derivation.tape.block import block
from derivation.tape.tensor import SymTensor
from derivation.walk.blocks.embeddings import TimestepEmbedding, get_timestep_embedding, one_timestep
from derivation.walk.blocks.unet_2d_blocks import (
    CrossAttnDownBlock2D,
    DownBlock2D,
    UNetMidBlock2D,
    UNetMidBlock2DCrossAttn,
    down_spec,
    mid_spec,
)
from derivation.walk.ops import Conv2d, add, cat, elementwise, empty, mul, to

# down_block_res_samples and mid_block_res_sample
Residuals = tuple[tuple[SymTensor, ...], SymTensor]


@block
def ControlNetConditioningEmbedding(conditioning: SymTensor, *, config: ControlNetConfig) -> SymTensor:
    """[N, 3, 8h, 8w] -> [N, block_out_channels[0], h, w]."""
    block_out_channels = config.conditioning_embedding_out_channels
    embedding = Conv2d("conv_in", conditioning, block_out_channels[0], 3, padding=1)
    embedding = elementwise("silu", embedding)
    for i, (channel_in, channel_out) in enumerate(pairwise(block_out_channels)):
        embedding = Conv2d(f"blocks.{2 * i}", embedding, channel_in, 3, padding=1)
        embedding = elementwise("silu", embedding)
        embedding = Conv2d(f"blocks.{2 * i + 1}", embedding, channel_out, 3, stride=2, padding=1)
        embedding = elementwise("silu", embedding)
    embedding = Conv2d("conv_out", embedding, config.block_out_channels[0], 3, padding=1)
    return embedding


@block
def ControlNetModel(
    sample: SymTensor,
    timestep: SymTensor,
    encoder_hidden_states: SymTensor,
    controlnet_cond: SymTensor,
    added_cond: tuple[SymTensor, SymTensor] | None = None,
    *,
    config: ControlNetConfig,
) -> Residuals:
    """sample [N, C, h, w], controlnet_cond [N, 3, 8h, 8w] -> a residual for each skip connection and the mid block.

    ``timestep``, ``encoder_hidden_states`` and ``added_cond`` are the UNet's. Every local lives to the end, as those
    of ``forward`` do.
    """
    if config.controlnet_conditioning_channel_order == "bgr":
        controlnet_cond = elementwise("flip", controlnet_cond)
    timesteps = one_timestep(timestep).expand(sample.shape[0])
    channels, flip = config.block_out_channels[0], config.flip_sin_to_cos
    t_emb = get_timestep_embedding(timesteps, channels, flip_sin_to_cos=flip)
    t_emb = to(t_emb, sample.dtype)
    emb = TimestepEmbedding("time_embedding", t_emb, time_embed_dim=4 * channels, act_fn=config.act_fn)
    if added_cond is not None and config.addition_embed_type is not None:
        text_embeds, time_ids = added_cond
        embed_dim, (batch, count) = config.addition_time_embed_dim, time_ids.shape
        assert embed_dim is not None
        time_embeds = get_timestep_embedding(time_ids.view(batch * count), embed_dim, flip_sin_to_cos=flip)
        time_embeds = time_embeds.view(batch, count * embed_dim)
        add_embeds = cat([time_embeds, text_embeds], 1)  # float32, the wider dtype
        add_embeds = to(add_embeds, emb.dtype)
        aug_emb = TimestepEmbedding("add_embedding", add_embeds, time_embed_dim=4 * channels, act_fn=config.act_fn)
        emb = add(emb, aug_emb)

    sample = Conv2d("conv_in", sample, channels, 3, padding=1)
    controlnet_cond = ControlNetConditioningEmbedding("controlnet_cond_embedding", controlnet_cond, config=config)
    sample = add(sample, controlnet_cond)

    down_block_res_samples: tuple[SymTensor, ...] = (sample,)
    for i, down_block_type in enumerate(config.down_block_types):
        name, spec = f"down_blocks.{i}", down_spec(config, i)
        if down_block_type == "CrossAttnDownBlock2D":
            sample, res_samples = CrossAttnDownBlock2D(name, sample, emb, encoder_hidden_states, spec=spec)
        else:
            sample, res_samples = DownBlock2D(name, sample, emb, spec=spec)
        down_block_res_samples = (*down_block_res_samples, *res_samples)

    if config.mid_block_type == "UNetMidBlock2DCrossAttn":
        sample = UNetMidBlock2DCrossAttn("mid_block", sample, emb, encoder_hidden_states, spec=mid_spec(config))
    else:
        sample = UNetMidBlock2D("mid_block", sample, emb, spec=mid_spec(config), attention=None)

    controlnet_down_block_res_samples: tuple[SymTensor, ...] = ()
    for i, down_block_res_sample in enumerate(down_block_res_samples):
        down_block_res_sample = zero_conv(f"controlnet_down_blocks.{i}", down_block_res_sample)
        controlnet_down_block_res_samples = (*controlnet_down_block_res_samples, down_block_res_sample)
    down_block_res_samples = controlnet_down_block_res_samples
    mid_block_res_sample = zero_conv("controlnet_mid_block", sample)

    down_block_res_samples = tuple(mul(sample) for sample in down_block_res_samples)
    mid_block_res_sample = mul(mid_block_res_sample)
    if config.global_pool_conditions:
        down_block_res_samples = tuple(pooled(sample) for sample in down_block_res_samples)
        mid_block_res_sample = pooled(mid_block_res_sample)
    return down_block_res_samples, mid_block_res_sample


def pooled(sample: SymTensor) -> SymTensor:
    """``torch.mean(sample, dim=(2, 3), keepdim=True)``: [N, C, h, w] -> [N, C, 1, 1]."""
    return empty((*sample.shape[:2], 1, 1), sample.dtype, "mean")


def zero_conv(name: str, x: SymTensor) -> SymTensor:
    """``zero_module(nn.Conv2d(channels, channels, kernel_size=1))``: [N, C, h, w] -> [N, C, h, w]."""
    channels = x.shape[1]
    assert isinstance(channels, int)
    return Conv2d(name, x, channels, 1)


@block
def MultiControlNetModel(
    sample: SymTensor,
    timestep: SymTensor,
    encoder_hidden_states: SymTensor,
    controlnet_cond: tuple[SymTensor, ...],
    added_cond: tuple[SymTensor, SymTensor] | None = None,
    *,
    configs: tuple[ControlNetConfig, ...],
) -> Residuals:
    """One ControlNet after the other, one an image of ``controlnet_cond``: the sums of their residuals."""
    for i, (image, config) in enumerate(zip(controlnet_cond, configs, strict=True)):
        down_samples, mid_sample = ControlNetModel(
            f"nets.{i}", sample, timestep, encoder_hidden_states, image, added_cond, config=config
        )
        if i == 0:
            down_block_res_samples, mid_block_res_sample = down_samples, mid_sample
        else:
            down_block_res_samples = tuple(
                add(samples_prev, samples_curr)
                for samples_prev, samples_curr in zip(down_block_res_samples, down_samples, strict=True)
            )
    return down_block_res_samples, mid_block_res_sample
