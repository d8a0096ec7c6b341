"""diffusers/models/upsampling.py."""

from __future__ import annotations

from derivation.tape.block import block
from derivation.tape.symbols import Size
from derivation.tape.tape import tape
from derivation.tape.tensor import SymTensor
from derivation.walk.ops import Conv2d, contiguous, to, upsample_nearest2d

# upsampling.py: upsample_nearest_nhwc fails with large batches and above 2^31 elements
LARGE_BATCH = 64
LARGE_NUMEL = 2**31


@block
def Upsample2D(hidden_states: SymTensor, output_size: tuple[Size, Size] | None = None) -> SymTensor:
    """[N, C, h, w] -> [N, C, 2h, 2w], or ``output_size`` where the skip connection needs another."""
    batch, channels, height, width = hidden_states.shape
    dtype = hidden_states.dtype
    if dtype == "bfloat16" and tape().libraries.follows("float32_upsample"):
        hidden_states = to(hidden_states, "float32")
    assert isinstance(channels, int)
    if not hidden_states.is_contiguous() and tape().exceeds(batch, LARGE_BATCH - 1):
        hidden_states = contiguous(hidden_states)
    if not hidden_states.is_contiguous() and tape().exceeds(2 * hidden_states.numel(), LARGE_NUMEL):
        hidden_states = contiguous(hidden_states)
    size = (2 * height, 2 * width) if output_size is None else output_size
    hidden_states = upsample_nearest2d(hidden_states, size)
    hidden_states = to(hidden_states, dtype)
    hidden_states = Conv2d("conv", hidden_states, channels, 3, padding=1)
    return hidden_states
