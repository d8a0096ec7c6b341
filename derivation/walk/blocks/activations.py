"""diffusers/models/activations.py and the activation functions of torch and transformers."""

from __future__ import annotations

from derivation.tape.block import block
from derivation.tape.tensor import SymTensor
from derivation.walk.ops import Linear, elementwise, mul


def activation(x: SymTensor, act_fn: str) -> SymTensor:
    """Apply an activation that allocates its result alone."""
    return elementwise(act_fn, x)


def quick_gelu(x: SymTensor) -> SymTensor:
    """transformers' QuickGELUActivation: ``x * sigmoid(1.702 * x)``."""
    return mul(x, elementwise("sigmoid", mul(x)))


@block
def GELU(hidden_states: SymTensor, *, dim_out: int, bias: bool) -> SymTensor:
    """[*, C] -> [*, dim_out]: a linear projection and the activation of its result."""
    return activation(Linear("proj", hidden_states, dim_out, bias=bias), "gelu")


@block
def GEGLU(hidden_states: SymTensor, *, dim_out: int) -> SymTensor:
    """[*, C] -> [*, dim_out]: a linear projection to 2 dim_out, one half gating the other."""
    hidden_states = Linear("proj", hidden_states, 2 * dim_out)
    hidden_states, gate = hidden_states.chunk(2, hidden_states.ndim - 1)
    return mul(hidden_states, activation(gate, "gelu"))
