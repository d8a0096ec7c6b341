"""What CUDA operators allocate inside themselves, beside their results; nothing at all with ``gpu=None``.

Each function records one operator's own buffers on the tape. Those that return storages keep them alive
until the caller drops the value, which is when the real operator returns.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from derivation.gpu.profile import Hardware
from derivation.tape.events import Category
from derivation.tape.symbols import DTYPE_BYTES, Size, nonnegative_from_one
from derivation.tape.tape import Storage, tape
from derivation.tape.tensor import SymTensor

P = ParamSpec("P")
R = TypeVar("R")
Buffers = tuple[Storage | None, ...]


def inside(kernel: Callable[P, R]) -> Callable[P, R | None]:
    """Make ``kernel`` a no-op where the run has no GPU."""

    @wraps(kernel)
    def call(*args: P.args, **kwargs: P.kwargs) -> R | None:
        return None if tape().hardware is None else kernel(*args, **kwargs)

    return call


def _buffer(shape: tuple[Size, ...], dtype: str, op: str) -> Storage | None:
    return tape().allocate(shape, dtype, op, Category.SCRATCH)


@inside
def row_major_copy(x: SymTensor, op: str) -> Storage | None:
    """The row-major copy of an input that a kernel cannot read in place (layer_norm and upsample kernels)."""
    return None if x.is_contiguous() else _buffer(x.shape, x.dtype, op)


@inside
def convolution_buffers(x: SymTensor, out: SymTensor, weight: SymTensor, channels_last: bool) -> None:
    """The weight in channels_last where the convolution runs so, and cuDNN's workspace (cudnn/Conv_v8.cpp)."""
    in_channels, kernel_height, kernel_width = weight.shape[1:]
    assert isinstance(in_channels, int) and isinstance(kernel_height, int)
    if not tape().gpu(Hardware.runs_cudnn, x.dtype):
        convolution_columns(x, out, weight)
        return
    copied = channels_last and not weight.is_channels_last() and kernel_height != 1 and kernel_width != 1
    weight_copy = _buffer(weight.shape, weight.dtype, "convolution weight") if copied else None
    kind = (
        kernel_height,
        in_channels,
        weight.shape[0],
        out.shape[2:] != x.shape[2:],
        nonnegative_from_one(x.shape[0] - 2),
    )
    workspace = tape().gpu(Hardware.convolution_workspace, x.dtype, channels_last, *kind)
    nbytes = workspace.nbytes(x.shape, out.shape, weight.shape, DTYPE_BYTES[x.dtype])
    _buffer((nbytes,), "uint8", "convolution workspace")
    del weight_copy


def convolution_columns(x: SymTensor, out: SymTensor, weight: SymTensor) -> None:
    """The row-major input, and columns [C R S, P Q] of one image (cuda/ConvolutionMM2d.cu: slow_conv2d).

    Its output is row-major there; the tape keeps the format that it has with cuDNN.
    """
    in_channels, kernel_height, kernel_width = weight.shape[1:]
    copy = row_major_copy(x, "convolution")
    if (kernel_height, kernel_width) != (1, 1):
        shape = (in_channels * kernel_height * kernel_width, out.shape[2] * out.shape[3])
        _buffer(shape, x.dtype, "convolution columns")
    del copy


@inside
def group_norm_coefficients(x: SymTensor) -> None:
    """a, b float32 [N, C] (group_norm_kernel.cu)."""
    a, b = (_buffer(x.shape[:2], "float32", "native_group_norm") for _ in range(2))
    del a, b


@inside
def cublas_workspace() -> None:
    """The workspace of the cuBLAS handle, kept from its first use on (CublasHandlePool.cpp)."""
    tape().keep((tape().gpu(Hardware.cublas_workspace_bytes),), "uint8", "cublas workspace", Category.SCRATCH)


@inside
def cublaslt_workspace() -> None:
    """cuBLASLt's workspace, one call's or kept by torch version (CUDABlas.cpp: gemm_and_bias)."""
    shape = (tape().gpu(Hardware.cublaslt_workspace_bytes),)
    if tape().libraries.follows("kept_cublaslt"):
        tape().keep(shape, "uint8", "cublaslt workspace", Category.SCRATCH)
    else:
        _buffer(shape, "uint8", "cublaslt workspace")


@inside
def efficient_accumulator(query: SymTensor) -> None:
    """output_accum float32 [N, S, heads, D] for half precision and D > 128 (mem_eff_attention/kernel_forward.h)."""
    head_dim = query.shape[3]
    assert isinstance(head_dim, int)
    if query.dtype != "float32" and head_dim > 128:
        _buffer(query.shape, "float32", "efficient_attention")


@inside
def flash_split_buffers(query: SymTensor, key: SymTensor) -> None:
    """Split-KV accumulators float32 [n, N, heads, S] and [n, N, heads, S, D'] (flash_api.cpp).

    n follows ceil(S / 64), which is no polynomial: a symbolic size counts as n = 1. That is exact from
    N heads S >= 102.4 multiprocessors on and leaves out few bytes below.
    """
    sizes = [dim for dim in (*query.shape, key.shape[2]) if isinstance(dim, int)]
    if len(sizes) < 5:
        return
    batch, heads, queries, head_dim, keys = sizes
    splits = tape().gpu(Hardware.num_splits, batch * heads, queries, keys, head_dim)
    if splits > 1:
        rows = (splits, *query.shape[:3])
        logsumexp = _buffer(rows, "float32", "flash_attention split")
        _buffer((*rows, tape().gpu(Hardware.split_head_dim, head_dim)), "float32", "flash_attention split")
        del logsumexp


@inside
def safe_softmax_masks(probs: SymTensor) -> None:
    """isneginf(scores) and its row-wise all, bool, and a zero; where_out writes in place (attention.cpp)."""
    masked = _buffer(probs.shape, "bool", "isneginf")
    rows = _buffer(probs.shape[:-1], "bool", "all")
    zero = _buffer((), probs.dtype, "scalar_tensor")
    del masked, rows, zero
