"""diffusers/models/resnet.py."""

from __future__ import annotations

from derivation.tape.block import block
from derivation.tape.tape import tape
from derivation.tape.tensor import SymTensor
from derivation.walk.blocks.activations import activation
from derivation.walk.ops import Conv2d, GroupNorm, Linear, add, contiguous, div


@block
def ResnetBlock2D(
    input_tensor: SymTensor,
    temb: SymTensor | None,
    *,
    out_channels: int,
    groups: int,
    groups_out: int | None = None,
    act_fn: str,
) -> SymTensor:
    """[N, C, h, w] -> [N, out_channels, h, w]; ``temb`` [N, K] is projected and added."""
    hidden_states = input_tensor

    hidden_states = GroupNorm("norm1", hidden_states, groups)
    hidden_states = activation(hidden_states, act_fn)
    hidden_states = Conv2d("conv1", hidden_states, out_channels, 3, padding=1)

    if temb is not None:
        temb = activation(temb, act_fn)
        temb = Linear("time_emb_proj", temb, out_channels).unsqueeze(2).unsqueeze(3)
        hidden_states = add(hidden_states, temb)

    hidden_states = GroupNorm("norm2", hidden_states, groups_out or groups)
    hidden_states = activation(hidden_states, act_fn)
    hidden_states = Conv2d("conv2", hidden_states, out_channels, 3, padding=1)

    if input_tensor.shape[1] != out_channels:
        input_tensor = Conv2d("conv_shortcut", _shortcut_input(input_tensor), out_channels, 1)

    output_tensor = div(add(input_tensor, hidden_states))
    return output_tensor


def _shortcut_input(input_tensor: SymTensor) -> SymTensor:
    """Some versions make it contiguous; only a GPU keeps a format that this changes."""
    copied = tape().hardware is not None and tape().libraries.follows("contiguous_shortcut")
    return contiguous(input_tensor) if copied else input_tensor
