"""diffusers/models/embeddings.py: what makes an IP-Adapter's image tokens."""

from __future__ import annotations

from derivation.config import ImageProjectionConfig
from derivation.config.ip_adapter import DEPTH, DIM_HEAD, FFN_RATIO, FULL, PLAIN
from derivation.tape.block import block
from derivation.tape.tensor import SymTensor
from derivation.walk.blocks.attention import FeedForward
from derivation.walk.blocks.attention_processor import Attention, AttentionSpec
from derivation.walk.ops import LayerNorm, Linear, add, cat, parameter, repeat


@block
def ImageProjection(image_embeds: SymTensor, *, config: ImageProjectionConfig) -> SymTensor:
    """[N, P] -> [N, tokens, K]."""
    batch = image_embeds.shape[0]
    image_embeds = Linear("image_embeds", image_embeds, config.tokens * config.output_dims)
    image_embeds = image_embeds.view(batch, config.tokens, config.output_dims)
    image_embeds = LayerNorm("norm", image_embeds)
    return image_embeds


@block
def IPAdapterFullImageProjection(image_embeds: SymTensor, *, config: ImageProjectionConfig) -> SymTensor:
    """[N, S, C] -> [N, S, K]."""
    width = config.embed_dims
    return LayerNorm("norm", FeedForward("ff", image_embeds, dim_out=config.output_dims, inner_dim=width, geglu=False))


@block
def IPAdapterPlusImageProjectionBlock(
    x: SymTensor, latents: SymTensor, residual: SymTensor, *, config: ImageProjectionConfig
) -> SymTensor:
    """Image [N, S, C] and latents [N, tokens, C] -> [N, tokens, C]."""
    dim = config.hidden_dims
    encoder_hidden_states = LayerNorm("ln0", x)
    latents = LayerNorm("ln1", latents)
    encoder_hidden_states = cat([encoder_hidden_states, latents], 1)
    spec = AttentionSpec(dim, config.heads, DIM_HEAD, out_bias=False)
    latents = add(Attention("attn", latents, encoder_hidden_states, spec=spec), residual)
    made = {"dim_out": dim, "inner_dim": FFN_RATIO * dim}
    return add(FeedForward("ff.1", LayerNorm("ff.0", latents), **made, geglu=False, bias=False), latents)


@block
def IPAdapterPlusImageProjection(x: SymTensor, *, config: ImageProjectionConfig) -> SymTensor:
    """[N, S, P] -> [N, tokens, K] through the resampler."""
    latents = parameter("latents", (1, config.tokens, config.hidden_dims))
    latents = repeat(latents, x.shape[0], 1, 1)
    x = Linear("proj_in", x, config.hidden_dims)
    for i in range(DEPTH):
        residual = latents
        latents = IPAdapterPlusImageProjectionBlock(f"layers.{i}", x, latents, residual, config=config)
    latents = Linear("proj_out", latents, config.output_dims)
    return LayerNorm("norm_out", latents)


@block
def MultiIPAdapterImageProjection(
    image_embeds: tuple[SymTensor, ...], *, configs: tuple[ImageProjectionConfig, ...]
) -> tuple[SymTensor, ...]:
    """Each adapter's [N, images, P] or [N, images, S, P] -> [N, images, tokens, K]."""
    projected_image_embeds: tuple[SymTensor, ...] = ()
    for i, (image_embed, config) in enumerate(zip(image_embeds, configs, strict=True)):
        batch, images, *rest = image_embed.shape
        image_embed = image_embed.view(batch * images, *rest)
        name = f"image_projection_layers.{i}"
        if config.kind == PLAIN:
            image_embed = ImageProjection(name, image_embed, config=config)
        elif config.kind == FULL:
            image_embed = IPAdapterFullImageProjection(name, image_embed, config=config)
        else:
            image_embed = IPAdapterPlusImageProjection(name, image_embed, config=config)
        image_embed = image_embed.view(batch, images, *image_embed.shape[1:])
        projected_image_embeds += (image_embed,)
    return projected_image_embeds
