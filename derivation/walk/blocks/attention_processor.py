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

# What cross-attention reads: text [N, L, K], and each IP-Adapter's image tokens too, [N, images, T, K]
Conditions = SymTensor | tuple[SymTensor, tuple[SymTensor, ...]]


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
    out_bias: bool = True

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
    ip_hidden_states: tuple[SymTensor, ...] = ()
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

    kept: dict[str, SymTensor] = {}
    for i, ip_tokens in enumerate(ip_hidden_states):
        kept.pop("current", None)
        kept["current"] = attend_to_image(i, query, ip_tokens, spec, kept)
        hidden_states = add(hidden_states, mul(kept["current"]))

    hidden_states = Linear("to_out.0", hidden_states, spec.query_dim, bias=spec.out_bias)
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


def attend_to_image(
    i: int, query: SymTensor, ip_hidden_states: SymTensor, spec: AttentionSpec, kept: dict[str, SymTensor]
) -> SymTensor:
    """Attention of the split query to the tokens [N, images, T, K] of IP-Adapter ``i``: [N, S, C].

    ``kept`` are the processor's variables, of which an adapter's replace those of the one before.
    """
    batch, images, tokens, _ = ip_hidden_states.shape
    kept["key"] = Linear(f"processor.to_k_ip.{i}", ip_hidden_states, spec.inner_dim, bias=False)
    kept["value"] = Linear(f"processor.to_v_ip.{i}", ip_hidden_states, spec.inner_dim, bias=False)
    if tape().options.attention == EAGER:
        for name in ("key", "value"):
            kept[name] = head_to_batch_dim(kept[name].view(batch, images * tokens, spec.inner_dim), spec)
        kept["probs"] = attention_scores(
            query, kept["key"], upcast=spec.upcast_attention, upcast_softmax=spec.upcast_softmax
        )
        return batch_to_head_dim(bmm(kept["probs"], kept["value"]), spec)
    for name in ("key", "value"):
        kept[name] = split_heads(kept[name].view(batch, images * tokens, spec.inner_dim), spec)
    current_ip_hidden_states = scaled_dot_product_attention(query, kept["key"], kept["value"])
    current_ip_hidden_states = current_ip_hidden_states.transpose(1, 2)
    return reshape(current_ip_hidden_states, *current_ip_hidden_states.shape[:2], spec.inner_dim)


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
