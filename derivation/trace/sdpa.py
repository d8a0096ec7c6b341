"""Route scaled dot product attention on the ``meta`` device to the backend that PyTorch would choose on CUDA."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

aten = torch.ops.aten
# attention.cpp: mem_eff_alignment
BIAS_ALIGNMENT = 8


class SdpaMode(TorchFunctionMode):
    """Route ``F.scaled_dot_product_attention`` to the ATen op that PyTorch would choose on CUDA.

    ``backend`` is what the user allows first; what it cannot run falls through to the next:

    - ``flash``: no mask, float16 or bfloat16, head dim at most 256. A head dim that is no multiple of
      8 is zero-padded to one and the output sliced (aten/src/ATen/native/transformers/attention.cpp:
      scaled_dot_product_attention, pad_last_dim, post_process_flash_output).
    - ``efficient``: head dims that are multiples of 8 (half types) or 4 (float32 on sm80 and later).
    - ``math``: always; the function is left alone, as it takes the math path on ``meta``.

    Both fused ones want equal head dims and a last stride of 1. Source: aten/src/ATen/native/
    transformers/cuda/sdp_utils.cpp: check_head_dim_size_flash, check_head_dim_size_mem_efficient,
    minimum_gemm_alignment, check_last_dim_stride_equals_1_dense. A mask, which transformers before 5 passes, keeps
    flash out; for ``efficient`` its rows are padded to eights (attention.cpp: preprocess_mask, pad_bias).
    Grouped queries keep efficient out; dropout raises NotImplementedError.
    """

    def __init__(self, backend: str) -> None:
        super().__init__()
        if backend not in ("math", "efficient", "flash"):
            raise ValueError(f"attention backend {backend!r}: expected 'math', 'efficient' or 'flash'")
        self.backend = backend

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention and self.backend != "math":
            return self._route(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _route(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:
        if dropout_p:
            raise NotImplementedError(f"{self.backend} attention with dropout")
        if self.backend == "flash" and attn_mask is None and _flash_can_run(query, key, value):
            return _flash(query, key, value, is_causal, scale)
        if _efficient_can_run(query, key, value):
            bias = None if attn_mask is None else _bias(attn_mask, query, key)
            return aten._scaled_dot_product_efficient_attention(
                query, key, value, bias, False, 0.0, is_causal, scale=scale
            )[0]
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
        )


def _bias(mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Return a mask as the efficient kernel's bias; a boolean one becomes additive (convert_boolean_attn_mask)."""
    if mask.dtype is torch.bool:
        low = torch.scalar_tensor(float("-inf"), dtype=query.dtype, device=mask.device)
        mask = torch.where(mask, 0.0, low)
    return _padded(mask, query, key)


def _dense(*qkv: torch.Tensor) -> bool:
    return qkv[0].dim() == 4 and len({t.shape[-1] for t in qkv}) == 1 and all(t.stride(-1) == 1 for t in qkv)


def _flash_can_run(*qkv: torch.Tensor) -> bool:
    half = qkv[0].dtype in (torch.float16, torch.bfloat16)
    return half and _dense(*qkv) and qkv[0].shape[-1] <= 256


def _efficient_can_run(*qkv: torch.Tensor) -> bool:
    alignment = 4 if qkv[0].dtype == torch.float32 else 8
    grouped = qkv[0].shape[1] != qkv[1].shape[1]
    return _dense(*qkv) and qkv[0].shape[-1] % alignment == 0 and not grouped


def _padded(mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Return a bias whose strides the kernel takes: [N, heads, S, T], a slice of rows that are padded to eights."""
    if mask.stride(-1) != 1 or any(stride % BIAS_ALIGNMENT for stride in mask.stride()[:-1]):
        tokens = mask.shape[-1]
        mask = F.pad(mask, (0, BIAS_ALIGNMENT - tokens % BIAS_ALIGNMENT))[..., :tokens]
    return mask.expand(*query.shape[:3], key.shape[2])


def _flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, is_causal: bool, scale: float | None) -> Any:
    head_dim = query.shape[-1]
    padding = -head_dim % 8
    if not padding:
        return aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal, scale=scale)[0]
    query, key, value = (F.pad(t, (0, padding)) for t in (query, key, value))
    scale = head_dim**-0.5 if scale is None else scale
    out = aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal, scale=scale)[0]
    return out[..., :head_dim]
