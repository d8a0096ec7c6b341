"""The models of a pipeline: UNet2DConditionModel, AutoencoderKL, CLIPTextModel, the safety checker."""

from __future__ import annotations

from collections.abc import Sequence

from derivation.config import (
    AutoencoderKLConfig,
    ControlNetConfig,
    ImageProjectionConfig,
    UNet2DConditionConfig,
    VAEConfig,
)
from derivation.tape.block import block
from derivation.tape.symbols import Size
from derivation.tape.tape import tape
from derivation.tape.tensor import SymTensor
from derivation.walk.blocks import autoencoder_kl, autoencoder_tiny
from derivation.walk.blocks.activations import activation
from derivation.walk.blocks.attention_processor import Conditions
from derivation.walk.blocks.controlnet import ControlNetModel, MultiControlNetModel, Residuals
from derivation.walk.blocks.embeddings import (
    TimestepEmbedding,
    get_timestep_embedding,
    one_timestep,
)
from derivation.walk.blocks.ip_adapter import MultiIPAdapterImageProjection
from derivation.walk.blocks.modeling_clip import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionModelWithProjection,
)
from derivation.walk.blocks.safety_checker import StableDiffusionSafetyChecker
from derivation.walk.blocks.unet_2d_blocks import (
    CrossAttnDownBlock2D,
    CrossAttnUpBlock2D,
    DownBlock2D,
    UNetMidBlock2D,
    UNetMidBlock2DCrossAttn,
    UpBlock2D,
    down_spec,
    mid_spec,
    up_spec,
)
from derivation.walk.ops import Conv2d, GroupNorm, add, cat, to

__all__ = [
    "CLIP_TEXT_MODELS",
    "CLIPTextModel",
    "CLIPTextModelWithProjection",
    "CLIPVisionModelWithProjection",
    "Residuals",
    "StableDiffusionSafetyChecker",
    "UNet2DConditionModel",
    "controlnet",
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
    residuals: Residuals | None = None,
    *,
    image_embeds: tuple[SymTensor, ...] = (),
    projections: tuple[ImageProjectionConfig, ...] = (),
    timestep_cond: SymTensor | None = None,
    config: UNet2DConditionConfig,
) -> SymTensor:
    """sample [N, in_channels, h, w], encoder_hidden_states [N, L, K] -> [N, out_channels, h, w].

    ``timestep`` [1], or a scalar on the CPU, which is copied inside; ``added_cond`` = text_embeds [N, P]
    and time_ids [N, T] where addition_embed_type is text_time; ``residuals`` = down_block_additional_residuals
    and mid_block_additional_residual of a ControlNet; ``image_embeds`` are those of each IP-Adapter,
    [N, images, P] or [N, images, S, P], which ``projections`` take;
    ``timestep_cond`` [N, time_cond_proj_dim] is a guidance scale embedding.
    """
    t_emb = _time_embed(sample, timestep, config)
    time_embed_dim = config.time_embedding_dim or 4 * config.block_out_channels[0]
    emb = TimestepEmbedding("time_embedding", t_emb, timestep_cond, time_embed_dim=time_embed_dim, act_fn=config.act_fn)
    aug_emb = None
    if added_cond is not None:
        aug_emb = _aug_embed(emb, added_cond, config)
    emb = add(emb, aug_emb) if aug_emb is not None else emb
    conditions = _process_encoder_hidden_states(encoder_hidden_states, image_embeds, projections)

    sample = Conv2d(
        "conv_in",
        sample,
        config.block_out_channels[0],
        config.conv_in_kernel,
        padding=(config.conv_in_kernel - 1) // 2,
    )

    down_block_res_samples: tuple[SymTensor, ...] = (sample,)
    for i, down_block_type in enumerate(config.down_block_types):
        spec = down_spec(config, i)
        if down_block_type == "CrossAttnDownBlock2D":
            sample, res_samples = CrossAttnDownBlock2D(f"down_blocks.{i}", sample, emb, conditions, spec=spec)
        else:
            sample, res_samples = DownBlock2D(f"down_blocks.{i}", sample, emb, spec=spec)
        down_block_res_samples += res_samples

    if residuals is not None:
        new_down_block_res_samples: tuple[SymTensor, ...] = ()
        for down_block_res_sample, additional_residual in zip(down_block_res_samples, residuals[0], strict=True):
            down_block_res_sample = add(down_block_res_sample, additional_residual)
            new_down_block_res_samples += (down_block_res_sample,)
        down_block_res_samples = new_down_block_res_samples

    if config.mid_block_type == "UNetMidBlock2DCrossAttn":
        sample = UNetMidBlock2DCrossAttn("mid_block", sample, emb, conditions, spec=mid_spec(config))
    elif config.mid_block_type == "UNetMidBlock2D":
        sample = UNetMidBlock2D("mid_block", sample, emb, spec=mid_spec(config), attention=None)
    if residuals is not None:
        sample = add(sample, residuals[1])

    for i, up_block_type in enumerate(config.up_block_types):
        spec = up_spec(config, i)
        res_samples = down_block_res_samples[-spec.layers :]
        down_block_res_samples = down_block_res_samples[: -spec.layers]
        upsample_size: tuple[Size, Size] | None = None
        if spec.resample:
            upsample_size = down_block_res_samples[-1].shape[2:]  # type: ignore[assignment]
        if up_block_type == "CrossAttnUpBlock2D":
            sample = CrossAttnUpBlock2D(
                f"up_blocks.{i}", sample, res_samples, emb, upsample_size, conditions, spec=spec
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


def controlnet(
    sample: SymTensor,
    timestep: SymTensor,
    encoder_hidden_states: SymTensor,
    controlnet_cond: Sequence[SymTensor],
    added_cond: tuple[SymTensor, SymTensor] | None = None,
    *,
    configs: tuple[ControlNetConfig, ...],
) -> Residuals:
    """A pipeline's ``controlnet``: ControlNetModel for one image, MultiControlNetModel for several.

    What is set on the UNet alone does not reach it; set_attention_slice, which MultiControlNetModel lacks, reaches one.
    """
    if len(controlnet_cond) == 1:
        with tape().choosing(channels_last=False):
            return ControlNetModel(
                "controlnet", sample, timestep, encoder_hidden_states, controlnet_cond[0], added_cond, config=configs[0]
            )
    with tape().choosing(channels_last=False, attention_slicing=None):
        return MultiControlNetModel(
            "controlnet", sample, timestep, encoder_hidden_states, tuple(controlnet_cond), added_cond, configs=configs
        )


def encode(x: SymTensor, config: VAEConfig) -> SymTensor:
    """``retrieve_latents(vae.encode(x))``: [N, 3, H, W] -> latents [N, C, H/f, W/f]."""
    if isinstance(config, AutoencoderKLConfig):
        return autoencoder_kl.encode(x, config).sample()
    return autoencoder_tiny.encode(x, config)


def decode(z: SymTensor, config: VAEConfig) -> SymTensor:
    """``vae.decode(z, return_dict=False)[0]``: latents [N, C, h, w] -> [N, 3, f h, f w]."""
    if isinstance(config, AutoencoderKLConfig):
        return autoencoder_kl.decode(z, config)
    return autoencoder_tiny.decode(z, config)


def _time_embed(sample: SymTensor, timestep: SymTensor, config: UNet2DConditionConfig) -> SymTensor:
    timesteps = one_timestep(timestep).expand(sample.shape[0])
    t_emb = get_timestep_embedding(timesteps, config.block_out_channels[0], flip_sin_to_cos=config.flip_sin_to_cos)
    t_emb = to(t_emb, sample.dtype)
    return t_emb


def _aug_embed(emb: SymTensor, added_cond: tuple[SymTensor, SymTensor], config: UNet2DConditionConfig) -> SymTensor:
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


def _process_encoder_hidden_states(
    encoder_hidden_states: SymTensor,
    image_embeds: tuple[SymTensor, ...],
    projections: tuple[ImageProjectionConfig, ...],
) -> Conditions:
    """``process_encoder_hidden_states``: with IP-Adapters, a tuple with each one's tokens [N, images, T, K]."""
    if not projections:
        return encoder_hidden_states
    tokens = MultiIPAdapterImageProjection("encoder_hid_proj", image_embeds, configs=projections)
    return encoder_hidden_states, tokens
