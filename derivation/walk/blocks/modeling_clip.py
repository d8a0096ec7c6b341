"""transformers/models/clip/modeling_clip.py."""

from __future__ import annotations

from typing import NamedTuple

from derivation.config import CLIPTextConfig, CLIPVisionConfig
from derivation.tape.block import block
from derivation.tape.tape import tape
from derivation.tape.tensor import SymTensor, is_many
from derivation.walk.attention import scaled_dot_product_attention
from derivation.walk.blocks.activations import activation, quick_gelu
from derivation.walk.ops import (
    Conv2d,
    Embedding,
    LayerNorm,
    Linear,
    add,
    cat,
    contiguous,
    elementwise,
    empty,
    parameter,
    reshape,
    to,
)

Config = CLIPTextConfig | CLIPVisionConfig


class TextOutput(NamedTuple):
    """[N, L, C], [N, C] and, where asked for, the embeddings and every layer's output [N, L, C]."""

    last_hidden_state: SymTensor
    pooler_output: SymTensor
    hidden_states: tuple[SymTensor, ...]


class VisionOutput(NamedTuple):
    """[N, T, C], [N, C] and, where asked for, the first layer's input and every layer's output [N, T, C]."""

    last_hidden_state: SymTensor
    pooler_output: SymTensor
    hidden_states: tuple[SymTensor, ...]


class VisionProjectionOutput(NamedTuple):
    """[N, P], [N, T, C] and, where asked for, the first layer's input and every layer's output [N, T, C]."""

    image_embeds: SymTensor
    last_hidden_state: SymTensor
    hidden_states: tuple[SymTensor, ...]


class TextProjectionOutput(NamedTuple):
    """[N, P], [N, L, C] and, where asked for, the embeddings and every layer's output [N, L, C]."""

    text_embeds: SymTensor
    last_hidden_state: SymTensor
    hidden_states: tuple[SymTensor, ...]


@block
def CLIPMLP(hidden_states: SymTensor, *, config: Config) -> SymTensor:
    """[N, S, C] -> [N, S, C] through ``intermediate_size`` channels."""
    hidden_states = Linear("fc1", hidden_states, config.intermediate_size)
    if config.hidden_act == "quick_gelu":
        hidden_states = quick_gelu(hidden_states)
    else:
        hidden_states = activation(hidden_states, config.hidden_act)
    hidden_states = Linear("fc2", hidden_states, config.hidden_size)
    return hidden_states


def _sdpa_attention_forward(
    query: SymTensor, key: SymTensor, value: SymTensor, is_causal: bool, attention_mask: SymTensor | None
) -> SymTensor:
    """integrations/sdpa_attention.py: [N, heads, S, D] each -> [N, S, heads, D]."""
    if tape().libraries.follows("contiguous_qkv"):
        query, key, value = (contiguous(x) for x in (query, key, value))
    attn_output = scaled_dot_product_attention(query, key, value, is_causal, attention_mask)
    return contiguous(attn_output.transpose(1, 2))


@block
def CLIPAttention(
    hidden_states: SymTensor, attention_mask: SymTensor | None = None, *, config: Config, is_causal: bool
) -> SymTensor:
    """[N, S, C] -> [N, S, C] through transformers' ``sdpa`` attention."""
    batch, tokens, dim = hidden_states.shape
    assert isinstance(dim, int)
    heads = config.num_attention_heads
    queries = Linear("q_proj", hidden_states, dim)
    keys = Linear("k_proj", hidden_states, dim)
    values = Linear("v_proj", hidden_states, dim)
    queries, keys, values = (
        x.view(batch, tokens, heads, dim // heads).transpose(1, 2) for x in (queries, keys, values)
    )
    is_causal = is_causal and attention_mask is None and is_many(tokens)
    attn_output = _sdpa_attention_forward(queries, keys, values, is_causal, attention_mask)
    attn_output = reshape(attn_output, batch, tokens, dim)
    attn_output = Linear("out_proj", attn_output, dim)
    return attn_output


@block
def CLIPEncoderLayer(
    hidden_states: SymTensor, attention_mask: SymTensor | None = None, *, config: Config, is_causal: bool
) -> SymTensor:
    """[N, S, C] -> [N, S, C]: attention and MLP, each with its residual."""
    residual = hidden_states
    hidden_states = LayerNorm("layer_norm1", hidden_states)
    hidden_states = CLIPAttention("self_attn", hidden_states, attention_mask, config=config, is_causal=is_causal)
    hidden_states = add(residual, hidden_states)

    residual = hidden_states
    hidden_states = LayerNorm("layer_norm2", hidden_states)
    hidden_states = CLIPMLP("mlp", hidden_states, config=config)
    hidden_states = add(residual, hidden_states)
    return hidden_states


@block
def CLIPEncoder(
    inputs_embeds: SymTensor,
    attention_mask: SymTensor | None = None,
    *,
    config: Config,
    is_causal: bool,
    collected: list[SymTensor] | None = None,
) -> SymTensor:
    """[N, S, C] -> [N, S, C] through ``num_hidden_layers`` layers; ``collected`` takes all hidden states."""
    hidden_states = inputs_embeds
    if collected is not None:
        collected.append(hidden_states)
    for i in range(config.num_hidden_layers):
        hidden_states = CLIPEncoderLayer(
            f"layers.{i}", hidden_states, attention_mask, config=config, is_causal=is_causal
        )
        if collected is not None:
            collected.append(hidden_states)
    return hidden_states


@block
def CLIPTextEmbeddings(input_ids: SymTensor, *, config: CLIPTextConfig) -> SymTensor:
    """[N, L] -> [N, L, C]."""
    position_ids = parameter("position_ids", (1, config.max_position_embeddings), "int64")
    position_ids = position_ids.narrow(1, input_ids.shape[1])
    inputs_embeds = Embedding("token_embedding", input_ids, config.vocab_size, config.hidden_size)
    position_embeddings = Embedding(
        "position_embedding", position_ids, config.max_position_embeddings, config.hidden_size
    )
    return add(inputs_embeds, position_embeddings)


@block
def CLIPTextModel(input_ids: SymTensor, *, config: CLIPTextConfig, output_hidden_states: bool = False) -> TextOutput:
    """[N, L] int64 -> last hidden state, pooled output and, with ``output_hidden_states``, all hidden states."""
    collected: list[SymTensor] | None = [] if output_hidden_states else None
    hidden_states = CLIPTextEmbeddings("embeddings", input_ids, config=config)
    mask = _causal_mask(hidden_states) if tape().libraries.follows("causal_mask") else None
    if tape().libraries.follows("arange_for_mask"):
        empty(hidden_states.shape[1:2], "int64", "arange")
    encoder_outputs = CLIPEncoder("encoder", hidden_states, mask, config=config, is_causal=True, collected=collected)
    last_hidden_state = LayerNorm("final_layer_norm", encoder_outputs)
    pooled_output = _end_of_text(last_hidden_state, input_ids, config.eos_token_id)
    return TextOutput(last_hidden_state, pooled_output, tuple(collected or ()))


@block
def CLIPTextModelWithProjection(
    input_ids: SymTensor, *, config: CLIPTextConfig, output_hidden_states: bool = False
) -> TextProjectionOutput:
    """[N, L] int64 -> CLIPTextModel's outputs, the pooled one projected to [N, projection_dim]."""
    text_outputs = CLIPTextModel("text_model", input_ids, config=config, output_hidden_states=output_hidden_states)
    text_embeds = Linear("text_projection", text_outputs.pooler_output, config.projection_dim, bias=False)
    return TextProjectionOutput(text_embeds, text_outputs.last_hidden_state, text_outputs.hidden_states)


def _causal_mask(hidden_states: SymTensor) -> SymTensor | None:
    """modeling_attn_mask_utils.py (_make_causal_mask): [1, 1, L, L], made in float32; one token has none."""
    tokens = hidden_states.shape[1]
    if not is_many(tokens):
        return None
    mask = empty((tokens, tokens), "float32", "full")
    mask_cond = empty((tokens,), "int64", "arange")
    later = elementwise("add", mask_cond)
    below = empty((tokens, tokens), "bool", "lt")
    del later, below
    mask = to(mask, hidden_states.dtype)
    return mask.view(1, 1, tokens, tokens)


def _end_of_text(last_hidden_state: SymTensor, input_ids: SymTensor, eos_token_id: int) -> SymTensor:
    """Pick each prompt's end token: [N, L, C] -> [N, C]."""
    batch, _, dim = last_hidden_state.shape
    rows = empty((batch,), "int64", "arange")
    if eos_token_id == 2:
        columns = _argmax(to(input_ids, "int32"))
    else:
        columns = _argmax(to(elementwise("eq", to(input_ids, "int32"), dtype="bool"), "int32"))
    pooled = empty((batch, dim), last_hidden_state.dtype, "index")
    del rows, columns
    return pooled


def _argmax(x: SymTensor) -> SymTensor:
    return empty((x.shape[0],), "int64", "argmax")


@block
def CLIPVisionEmbeddings(pixel_values: SymTensor, *, config: CLIPVisionConfig) -> SymTensor:
    """[N, 3, S, S] -> [N, 1 + (S / patch_size)^2, C]."""
    batch = pixel_values.shape[0]
    dim, patches = config.hidden_size, (config.image_size // config.patch_size) ** 2
    class_embedding = parameter("class_embedding", (dim,))
    position_ids = parameter("position_ids", (1, patches + 1), "int64")
    patch_embeds = Conv2d("patch_embedding", pixel_values, dim, config.patch_size, stride=config.patch_size, bias=False)
    patch_embeds = patch_embeds.view(batch, dim, patches).transpose(1, 2)
    class_embeds = class_embedding.expand(batch, 1, dim)
    embeddings = cat([class_embeds, patch_embeds], 1)
    embeddings = add(embeddings, Embedding("position_embedding", position_ids, patches + 1, dim))
    return embeddings


@block
def CLIPVisionModel(
    pixel_values: SymTensor, *, config: CLIPVisionConfig, output_hidden_states: bool = False
) -> VisionOutput:
    """[N, 3, S, S] -> last hidden state, pooled output and, with ``output_hidden_states``, all hidden states."""
    collected: list[SymTensor] | None = [] if output_hidden_states else None
    hidden_states = CLIPVisionEmbeddings("embeddings", pixel_values, config=config)
    hidden_states = LayerNorm("pre_layrnorm", hidden_states)
    last_hidden_state = CLIPEncoder("encoder", hidden_states, config=config, is_causal=False, collected=collected)
    pooled_output = last_hidden_state.select(1)
    pooled_output = LayerNorm("post_layernorm", pooled_output)
    return VisionOutput(last_hidden_state, pooled_output, tuple(collected or ()))


@block
def CLIPVisionModelWithProjection(
    pixel_values: SymTensor, *, config: CLIPVisionConfig, output_hidden_states: bool = False
) -> VisionProjectionOutput:
    """[N, 3, S, S] -> CLIPVisionModel's outputs, the pooled one projected to [N, projection_dim]."""
    vision_outputs = CLIPVisionModel(
        "vision_model", pixel_values, config=config, output_hidden_states=output_hidden_states
    )
    image_embeds = Linear("visual_projection", vision_outputs.pooler_output, config.projection_dim, bias=False)
    return VisionProjectionOutput(image_embeds, vision_outputs.last_hidden_state, vision_outputs.hidden_states)
