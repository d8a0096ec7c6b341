"""diffusers/models/transformers/transformer_2d.py."""

from __future__ import annotations

from dataclasses import dataclass

from derivation.tape.block import block
from derivation.tape.symbols import Size
from derivation.tape.tensor import SymTensor
from derivation.walk.blocks.attention import BasicTransformerBlock
from derivation.walk.blocks.attention_processor import Conditions
from derivation.walk.ops import Conv2d, GroupNorm, Linear, add, contiguous, reshape


@dataclass(frozen=True, slots=True)
class TransformerSpec:
    """The constructor arguments of ``Transformer2DModel`` that matter for memory."""

    heads: int
    layers: int
    groups: int
    use_linear_projection: bool
    upcast_attention: bool


@block
def Transformer2DModel(
    hidden_states: SymTensor, encoder_hidden_states: Conditions | None, *, spec: TransformerSpec
) -> SymTensor:
    """[N, C, h, w] -> [N, C, h, w] through ``spec.layers`` transformer blocks over h w tokens."""
    batch, channels, height, width = hidden_states.shape
    assert isinstance(channels, int)
    inner_dim = channels // spec.heads * spec.heads
    residual = hidden_states
    hidden_states = _project_in(hidden_states, inner_dim, spec)
    for i in range(spec.layers):
        hidden_states = BasicTransformerBlock(
            f"transformer_blocks.{i}",
            hidden_states,
            encoder_hidden_states,
            heads=spec.heads,
            upcast_attention=spec.upcast_attention,
        )
    output = _project_out(hidden_states, residual, (batch, height, width, inner_dim), channels, spec)
    return output


def _project_in(hidden_states: SymTensor, inner_dim: int, spec: TransformerSpec) -> SymTensor:
    """``_operate_on_continuous_inputs``: [N, C, h, w] -> [N, h w, C]."""
    batch, _, height, width = hidden_states.shape
    hidden_states = GroupNorm("norm", hidden_states, spec.groups)
    if not spec.use_linear_projection:
        hidden_states = Conv2d("proj_in", hidden_states, inner_dim, 1)
        hidden_states = reshape(hidden_states.permute(0, 2, 3, 1), batch, height * width, inner_dim)
    else:
        channels = hidden_states.shape[1]
        hidden_states = reshape(hidden_states.permute(0, 2, 3, 1), batch, height * width, channels)
        hidden_states = Linear("proj_in", hidden_states, inner_dim)
    return hidden_states


def _project_out(
    hidden_states: SymTensor,
    residual: SymTensor,
    shape: tuple[Size, Size, Size, Size],
    channels: int,
    spec: TransformerSpec,
) -> SymTensor:
    """``_get_output_for_continuous_inputs``: [N, h w, C] -> [N, C, h, w], plus the residual."""
    batch, height, width, inner_dim = shape
    if not spec.use_linear_projection:
        hidden_states = contiguous(reshape(hidden_states, *shape).permute(0, 3, 1, 2))
        hidden_states = Conv2d("proj_out", hidden_states, channels, 1)
    else:
        hidden_states = Linear("proj_out", hidden_states, channels)
        hidden_states = reshape(hidden_states, batch, height, width, channels)
        hidden_states = contiguous(hidden_states.permute(0, 3, 1, 2))
    output = add(hidden_states, residual)
    return output
