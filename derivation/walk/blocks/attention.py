"""diffusers/models/attention.py."""

from __future__ import annotations

from derivation.errors import DerivationError
from derivation.tape.block import block
from derivation.tape.tape import tape
from derivation.tape.tensor import SymTensor
from derivation.walk.blocks.activations import GEGLU, GELU
from derivation.walk.blocks.attention_processor import Attention, AttentionSpec, Conditions
from derivation.walk.ops import LayerNorm, Linear, add

# attention.py FeedForward: mult=4
FEED_FORWARD_MULT = 4


@block
def FeedForward(
    hidden_states: SymTensor, *, dim_out: int, inner_dim: int, geglu: bool = True, bias: bool = True
) -> SymTensor:
    """[N, S, C] -> [N, S, dim_out] through a GEGLU or GELU of width ``inner_dim``."""
    if geglu:
        hidden_states = GEGLU("net.0", hidden_states, dim_out=inner_dim)
    else:
        hidden_states = GELU("net.0", hidden_states, dim_out=inner_dim, bias=bias)
    hidden_states = Linear("net.2", hidden_states, dim_out, bias=bias)
    return hidden_states


def attention_slice(heads: int) -> int | None:
    """Return ``set_attention_slice``'s slice size for a layer; raises DerivationError for one that is too large."""
    chosen = tape().options.attention_slicing
    if chosen is None:
        return None
    size = {"auto": heads // 2, "max": 1}.get(chosen, 0) if isinstance(chosen, str) else chosen
    if not 1 <= size <= heads:
        raise DerivationError(f"attention_slicing = {chosen!r} is not supported (supported here: 1 to {heads} heads)")
    return size


@block
def BasicTransformerBlock(
    hidden_states: SymTensor,
    encoder_hidden_states: Conditions | None,
    *,
    heads: int,
    upcast_attention: bool,
) -> SymTensor:
    """[N, S, C] -> [N, S, C]: self-attention, cross-attention to [N, L, K], feed-forward."""
    dim = hidden_states.shape[-1]
    assert isinstance(dim, int)
    spec = AttentionSpec(
        dim,
        heads,
        dim // heads,
        upcast_attention=upcast_attention,
        slice_size=attention_slice(heads),
    )

    norm_hidden_states = LayerNorm("norm1", hidden_states)
    attn_output = Attention("attn1", norm_hidden_states, spec=spec)
    hidden_states = add(attn_output, hidden_states)

    norm_hidden_states = LayerNorm("norm2", hidden_states)
    attn_output = Attention("attn2", norm_hidden_states, encoder_hidden_states, spec=spec)
    hidden_states = add(attn_output, hidden_states)

    norm_hidden_states = LayerNorm("norm3", hidden_states)
    ff_output = FeedForward("ff", norm_hidden_states, dim_out=dim, inner_dim=FEED_FORWARD_MULT * dim)
    hidden_states = add(ff_output, hidden_states)
    return hidden_states
