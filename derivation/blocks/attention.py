"""diffusers/models/attention.py."""

from __future__ import annotations

from derivation.blocks.activations import GEGLU
from derivation.blocks.attention_processor import Attention, AttentionSpec
from derivation.ops import LayerNorm, Linear, add
from derivation.tape import SymTensor, block

# attention.py FeedForward: mult=4
FEED_FORWARD_MULT = 4


@block
def FeedForward(hidden_states: SymTensor) -> SymTensor:
    """[N, S, C] -> [N, S, C] through a GEGLU of width 4 C."""
    dim = hidden_states.shape[-1]
    assert isinstance(dim, int)
    hidden_states = GEGLU("net.0", hidden_states, dim_out=FEED_FORWARD_MULT * dim)
    hidden_states = Linear("net.2", hidden_states, dim)
    return hidden_states


@block
def BasicTransformerBlock(
    hidden_states: SymTensor, encoder_hidden_states: SymTensor | None, *, heads: int, upcast_attention: bool
) -> SymTensor:
    """[N, S, C] -> [N, S, C]: self-attention, cross-attention to [N, L, K], feed-forward."""
    dim = hidden_states.shape[-1]
    assert isinstance(dim, int)
    spec = AttentionSpec(dim, heads, dim // heads, upcast_attention=upcast_attention)

    norm_hidden_states = LayerNorm("norm1", hidden_states)
    attn_output = Attention("attn1", norm_hidden_states, spec=spec)
    hidden_states = add(attn_output, hidden_states)

    norm_hidden_states = LayerNorm("norm2", hidden_states)
    attn_output = Attention("attn2", norm_hidden_states, encoder_hidden_states, spec=spec)
    hidden_states = add(attn_output, hidden_states)

    norm_hidden_states = LayerNorm("norm3", hidden_states)
    ff_output = FeedForward("ff", norm_hidden_states)
    hidden_states = add(ff_output, hidden_states)
    return hidden_states
