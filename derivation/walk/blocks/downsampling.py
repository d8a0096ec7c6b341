"""diffusers/models/downsampling.py."""

from __future__ import annotations

from derivation.tape.block import block
from derivation.tape.tensor import SymTensor
from derivation.walk.ops import Conv2d, pad


@block
def Downsample2D(hidden_states: SymTensor, *, padding: int) -> SymTensor:
    """[N, C, h, w] -> [N, C, ceil(h/2), ceil(w/2)] (padding 1) or floor (padding 0, padded by hand)."""
    channels = hidden_states.shape[1]
    assert isinstance(channels, int)
    if padding == 0:
        hidden_states = pad(hidden_states, 1, 1)
    hidden_states = Conv2d("conv", hidden_states, channels, 3, stride=2, padding=padding)
    return hidden_states
