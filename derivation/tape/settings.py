"""What a run assumes: what the symbolic modules read of the options, and the GPU."""

from __future__ import annotations

from dataclasses import dataclass

from derivation.gpu.profile import Hardware
from derivation.tape.tiles import TILE_OVERLAP_FACTOR


@dataclass(frozen=True, slots=True)
class Settings:
    """What a run assumes: the dtype of weights and activations, the attention backend, and the GPU.

    Without ``hardware`` operators allocate what PyTorch dispatches on the meta device, and nothing else.
    """

    dtype: str
    attention: str
    hardware: Hardware | None = None
    vae_slicing: bool = False
    vae_tiling: bool = False
    tile_sample_min_size: int | None = None
    tile_overlap_factor: float = TILE_OVERLAP_FACTOR
    attention_slicing: str | int | None = None
    channels_last: bool = False
    offload: str | None = None
    lora_rank: int | None = None
    lora_fused: bool = False
    ip_adapter_tokens: int | None = None
