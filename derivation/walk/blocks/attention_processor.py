"""diffusers/models/attention_processor.py."""

from __future__ import annotations

from dataclasses import dataclass

from derivation.options.choices import EAGER
from derivation.tape.block import block
from derivation.tape.symbols import Size, floor_div
from derivation.tape.tape import tape
from derivation.tape.tensor import SymTensor
from derivation.walk.attention import attention_scores, scaled_dot_product_attention
from derivation.walk.ops import GroupNorm, Linear, add, bmm, div, empty, mul, reshape

# What cross-attention reads: text [N, L, K], and with an IP-Adapter the image's tokens too, [N, 1, T, K]
Conditions = SymTensor | tuple[SymTensor, SymTensor]


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """The constructor arguments of ``Attention`` that matter for memory."""

    query_dim: int
    heads: int
    dim_head: int
    bias: bool = False
    upcast_attention: bool = False
    upcast_softmax: bool = False
    norm_num_groups: int | None = None
    slice_size: int | None = None
    residual_connection: bool = False

    @property
    def inner_dim(self) -> int:
        """Channels of query, key and value: heads x dim_head."""
        return self.heads * self.dim_head


@block
def Attention(
    hidden_states: SymTensor, encoder_hidden_states: Conditions | None = None, *, spec: AttentionSpec
) -> SymTensor:
    """[N, S, C] or [N, C, h, w] -> the same shape; keys and values from ``encoder_hidden_states`` [N, T, K].

    SlicedAttnProcessor with a slice size, else AttnProcessor (explicit scores [N heads, S, T]) where attention
    is eager, else AttnProcessor2_0; with image tokens IPAdapterAttnProcessor or IPAdapterAttnProcessor2_0.
    """
    residual = hidden_states
    ip_hidden_states = None
    if isinstance(encoder_hidden_states, tuple):
        encoder_hidden_states, ip_hidden_states = encoder_hidden_states
    input_shape = hidden_states.shape
    if hidden_states.ndim == 4:
        batch, channels, height, width = input_shape
        hidden_states = hidden_states.view(batch, channels, height * width).transpose(1, 2)
    if spec.norm_num_groups is not None:
        hidden_states = GroupNorm("group_norm", hidden_states.transpose(1, 2), spec.norm_num_groups).transpose(1, 2)

    query = Linear("to_q", hidden_states, spec.inner_dim, bias=spec.bias)
    if encoder_hidden_states is None:
        encoder_hidden_states = hidden_states
    key = Linear("to_k", encoder_hidden_states, spec.inner_dim, bias=spec.bias)
    value = Linear("to_v", encoder_hidden_states, spec.inner_dim, bias=spec.bias)

    if spec.slice_size is not None:
        query = head_to_batch_dim(query, spec)
        key = head_to_batch_dim(key, spec)
        value = head_to_batch_dim(value, spec)
        hidden_states = empty(query.shape, query.dtype, "zeros")
        for part in slices(query.shape[0], spec.slice_size):
            query_slice, key_slice = query.narrow(0, part), key.narrow(0, part)
            attn_slice = attention_scores(
                query_slice, key_slice, upcast=spec.upcast_attention, upcast_softmax=spec.upcast_softmax
            )
            attn_slice = bmm(attn_slice, value.narrow(0, part))
        hidden_states = batch_to_head_dim(hidden_states, spec)
    elif tape().options.attention == EAGER:
        query = head_to_batch_dim(query, spec)
        key = head_to_batch_dim(key, spec)
        value = head_to_batch_dim(value, spec)
        attention_probs = attention_scores(query, key, upcast=spec.upcast_attention, upcast_softmax=spec.upcast_softmax)
        hidden_states = bmm(attention_probs, value)
        hidden_states = batch_to_head_dim(hidden_states, spec)
    else:
        query, key, value = (split_heads(x, spec) for x in (query, key, value))
        hidden_states = scaled_dot_product_attention(query, key, value)
        hidden_states = hidden_states.transpose(1, 2)
        hidden_states = reshape(hidden_states, *hidden_states.shape[:2], spec.inner_dim)

    if ip_hidden_states is not None:
        image_attention = attend_to_image(query, ip_hidden_states, spec)
        hidden_states = add(hidden_states, mul(image_attention[0]))

    hidden_states = Linear("to_out.0", hidden_states, spec.query_dim)
    if len(input_shape) == 4:
        hidden_states = reshape(hidden_states.transpose(1, 2), *input_shape)
    if spec.residual_connection:
        hidden_states = add(hidden_states, residual)
    hidden_states = div(hidden_states)
    return hidden_states


def slices(rows: Size, slice_size: int) -> tuple[Size, ...]:
    """Return the sizes of the slices to record: the first, and the second, which every further one equals."""
    if not tape().exceeds(rows, slice_size):
        return (rows,)
    return (slice_size, slice_size)


def attend_to_image(query: SymTensor, ip_hidden_states: SymTensor, spec: AttentionSpec) -> tuple[SymTensor, ...]:
    """Attention of the split query to image tokens [N, 1, T, K]: [N, S, C] first, then what the processor keeps."""
    batch, _, tokens, _ = ip_hidden_states.shape
    ip_key = Linear("processor.to_k_ip.0", ip_hidden_states, spec.inner_dim, bias=False)
    ip_value = Linear("processor.to_v_ip.0", ip_hidden_states, spec.inner_dim, bias=False)
    ip_key, ip_value = (x.view(batch, tokens, spec.inner_dim) for x in (ip_key, ip_value))
    if tape().options.attention == EAGER:
        ip_key = head_to_batch_dim(ip_key, spec)
        ip_value = head_to_batch_dim(ip_value, spec)
        ip_attention_probs = attention_scores(
            query, ip_key, upcast=spec.upcast_attention, upcast_softmax=spec.upcast_softmax
        )
        current_ip_hidden_states = bmm(ip_attention_probs, ip_value)
        current_ip_hidden_states = batch_to_head_dim(current_ip_hidden_states, spec)
        return current_ip_hidden_states, ip_key, ip_value, ip_attention_probs
    ip_key, ip_value = split_heads(ip_key, spec), split_heads(ip_value, spec)
    current_ip_hidden_states = scaled_dot_product_attention(query, ip_key, ip_value)
    current_ip_hidden_states = current_ip_hidden_states.transpose(1, 2)
    current_ip_hidden_states = reshape(current_ip_hidden_states, *current_ip_hidden_states.shape[:2], spec.inner_dim)
    return current_ip_hidden_states, ip_key, ip_value


def split_heads(x: SymTensor, spec: AttentionSpec) -> SymTensor:
    """[N, S, C] -> a view [N, heads, S, D]."""
    batch, tokens, _ = x.shape
    return x.view(batch, tokens, spec.heads, spec.dim_head).transpose(1, 2)


def head_to_batch_dim(x: SymTensor, spec: AttentionSpec) -> SymTensor:
    """[N, S, C] -> [N heads, S, D]."""
    batch, tokens, _ = x.shape
    return reshape(split_heads(x, spec), batch * spec.heads, tokens, spec.dim_head)


def batch_to_head_dim(x: SymTensor, spec: AttentionSpec) -> SymTensor:
    """[N heads, S, D] -> [N, S, C]."""
    rows, tokens, dim_head = x.shape
    batch = floor_div(rows, spec.heads)
    x = x.view(batch, spec.heads, tokens, dim_head)
    return reshape(x.transpose(1, 2), batch, tokens, spec.inner_dim)
