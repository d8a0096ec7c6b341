"""PyTorch's operators: shapes in, shapes and allocations out.

Capitalised functions are ``torch.nn`` modules and take their name first. Layout rules are those of
ATen/TensorIterator.cpp (element-wise), ATen/native/LinearAlgebra.cpp (matmul) and, where ``gpu`` is None,
torch/_meta_registrations.py. What CUDA allocates inside an operator is in ``hardware/kernels.py``.
"""

from __future__ import annotations

from collections.abc import Sequence

from derivation.hardware import kernels
from derivation.symbols import SYMBOLS, Size, nonnegative_from_one
from derivation.tape import Category, SymTensor, block, contiguous_strides, tape


def empty(
    shape: Sequence[Size],
    dtype: str,
    op: str,
    category: Category = Category.ACTIVATION,
    strides: tuple[Size, ...] | None = None,
    count: Size = 1,
) -> SymTensor:
    """Allocate a tensor, or ``count`` alike; ``strides`` None means row-major."""
    storage = tape().allocate(tuple(shape), dtype, op, category, count)
    return SymTensor(storage, tuple(shape), dtype, strides)


def given(shape: Sequence[Size], dtype: str) -> SymTensor:
    """Return a tensor whose storage exists before the call: an input, not memory of the call."""
    return SymTensor(None, tuple(shape), dtype)


def parameter(name: str, shape: Sequence[int], dtype: str | None = None) -> SymTensor:
    """Register a parameter or buffer of the current module and return it."""
    here = tape()
    dtype = dtype or here.settings.dtype
    here.parameters[".".join([*here.path, name])] = (tuple(shape), dtype)
    return given(shape, dtype)


def half_up(dim: Size) -> Size:
    """Return ceil(dim / 2): the next level's symbol where ``dim`` is a level's symbol.

    >>> half_up(5)
    3
    """
    if isinstance(dim, int):
        return -(-dim // 2)
    name = SYMBOLS[next(i for i, power in enumerate(dim.leading_expv()) if power)].name
    if dim != dim.ring(1) * tape().size(name) or name[0] not in "hw":
        raise ValueError(f"ceil({dim} / 2) has no symbol")
    return tape().size(f"{name[0]}{int(name[1:]) + 1}")


def floor_div(numerator: Size, divisor: int) -> Size:
    """Return floor(numerator / divisor); raises ValueError where that is not a polynomial."""
    if isinstance(numerator, int) or divisor == 1:
        return numerator // divisor
    zero = numerator.ring.zero_monom
    constant = int(numerator.get(zero, 0))
    rest = numerator - constant
    if any(coefficient % divisor for coefficient in rest.values()):
        raise ValueError(f"floor({numerator} / {divisor}) is not a polynomial")
    return rest.quo_ground(divisor) + constant // divisor


def conv_size(dim: Size, kernel: int, stride: int, padding: int) -> Size:
    """Return floor((dim + 2 padding - kernel) / stride) + 1 (torch.nn.Conv2d)."""
    if (kernel, stride, padding) == (3, 2, 1):
        return half_up(dim)
    return floor_div(dim + (2 * padding - kernel), stride) + 1


def larger_first(a: Size, b: Size) -> bool:
    """Return whether ``a`` >= ``b`` for all sizes."""
    return nonnegative_from_one(a - b)


def dense_strides(x: SymTensor) -> tuple[Size, ...] | None:
    """Return the strides of an element-wise result: dense, dimensions in ``x``'s stride order."""
    if x.is_contiguous():
        return None
    order: list[int] = []
    for dim in range(x.ndim):
        place = len(order)
        while place and not _slower(x, order[place - 1], dim):
            place -= 1
        order.insert(place, dim)
    packed = contiguous_strides([x.shape[dim] for dim in order])
    return tuple(packed[order.index(dim)] for dim in range(x.ndim))


def _slower(x: SymTensor, a: int, b: int) -> bool:
    """Return whether dimension ``a`` moves slower than ``b``; of equal strides, the larger dimension's does."""
    if x.strides[a] == x.strides[b]:
        return larger_first(x.shape[a], x.shape[b])
    return larger_first(x.strides[a], x.strides[b])


def elementwise(
    op: str,
    x: SymTensor,
    *others: SymTensor,
    dtype: str | None = None,
    category: Category = Category.ACTIVATION,
    count: Size = 1,
) -> SymTensor:
    """Allocate the result of an element-wise operator with the shape and stride order of ``x``."""
    return empty(x.shape, dtype or x.dtype, op, category, dense_strides(x), count)


def add(a: SymTensor, b: SymTensor) -> SymTensor:
    """``a + b`` with ``b`` broadcast to ``a``."""
    return elementwise("add", a, b)


def sub(a: SymTensor, b: SymTensor) -> SymTensor:
    """``a - b`` with ``b`` broadcast to ``a``."""
    return elementwise("sub", a, b)


def mul(a: SymTensor, *others: SymTensor) -> SymTensor:
    """``a * b`` or ``a * scalar``."""
    return elementwise("mul", a, *others)


def div(a: SymTensor) -> SymTensor:
    """``a / scalar``."""
    return elementwise("div", a)


def to(x: SymTensor, dtype: str, category: Category = Category.ACTIVATION) -> SymTensor:
    """``x.to(dtype)``: ``x`` itself where nothing changes, else a copy in ``x``'s stride order."""
    if x.dtype == dtype:
        return x
    return elementwise("_to_copy", x, dtype=dtype, category=category)


def contiguous(x: SymTensor) -> SymTensor:
    """``x.contiguous()``: ``x`` itself where it is row-major, else a copy."""
    return x if x.is_contiguous() else clone(x)


def clone(x: SymTensor, category: Category = Category.ACTIVATION) -> SymTensor:
    """``x.clone(memory_format=torch.contiguous_format)``."""
    return empty(x.shape, x.dtype, "clone", category)


def reshape(x: SymTensor, *shape: Size) -> SymTensor:
    """``x.reshape(shape)``: a view where one exists, else a view of a row-major copy."""
    view = x.viewed(*shape)
    return clone(x).view(*shape) if view is None else view


def cat(tensors: Sequence[SymTensor], dim: int) -> SymTensor:
    """``torch.cat``: shapes agree except along ``dim``."""
    first = tensors[0]
    total: Size = sum((tensor.shape[dim] for tensor in tensors[1:]), start=first.shape[dim])
    return empty((*first.shape[:dim], total, *first.shape[dim + 1 :]), first.dtype, "cat")


def repeat(x: SymTensor, *times: Size) -> SymTensor:
    """``x.repeat(times)``."""
    return empty([dim * n for dim, n in zip(x.shape, times, strict=True)], x.dtype, "repeat")


def softmax(x: SymTensor, op: str = "_softmax") -> SymTensor:
    """``x.softmax(-1)``."""
    return empty(x.shape, x.dtype, op, Category.ATTENTION)


def bmm(a: SymTensor, b: SymTensor, category: Category = Category.ATTENTION) -> SymTensor:
    """``torch.bmm``: [N, n, m] x [N, m, p] -> [N, n, p]."""
    out = empty((*a.shape[:2], b.shape[2]), a.dtype, "bmm", category)
    kernels.cublas_workspace()
    return out


def matmul(a: SymTensor, b: SymTensor) -> SymTensor:
    """``torch.matmul`` of 4-D tensors: operands expanded, folded to 3-D (copied where no view exists), bmm."""
    *lead, n, m = a.shape
    p = b.shape[-1]
    batch = lead[0] * lead[1]
    out = bmm(reshape(a, batch, n, m), reshape(b, batch, m, p))
    return out.view(*lead, n, p)


def upsample_nearest2d(x: SymTensor, size: tuple[Size, Size]) -> SymTensor:
    """``F.interpolate(mode="nearest")`` to ``size``, in ``x``'s memory format."""
    shape = (*x.shape[:2], *size)
    out = empty(shape, x.dtype, "upsample_nearest2d", strides=format_strides(shape, x.is_channels_last()))
    if not x.is_channels_last():
        kernels.row_major_copy(x, "upsample_nearest2d")
    return out


def format_strides(shape: tuple[Size, ...], channels_last: bool) -> tuple[Size, ...] | None:
    """Return the strides of [N, C, H, W] in channels_last, or None for row-major."""
    if not channels_last:
        return None
    _, channels, _, width = shape
    return (contiguous_strides(shape)[0], 1, width * channels, channels)


def pad(x: SymTensor, right: int, bottom: int) -> SymTensor:
    """``F.pad(x, (0, right, 0, bottom))``."""
    *lead, height, width = x.shape
    return empty((*lead, height + bottom, width + right), x.dtype, "constant_pad_nd")


def pad_last(x: SymTensor, right: int) -> SymTensor:
    """``F.pad(x, (0, right))``."""
    return empty((*x.shape[:-1], x.shape[-1] + right), x.dtype, "constant_pad_nd")


@block
def Conv2d(
    x: SymTensor, out_channels: int, kernel: int, *, stride: int = 1, padding: int = 0, bias: bool = True
) -> SymTensor:
    """``torch.nn.Conv2d``: [N, C, H, W] -> [N, out_channels, H', W']."""
    batch, in_channels, height, width = x.shape
    assert isinstance(in_channels, int)
    weight = parameter("weight", (out_channels, in_channels, kernel, kernel))
    if bias:
        parameter("bias", (out_channels,))
    sides = (conv_size(side, kernel, stride, padding) for side in (height, width))
    return convolution(x, weight, (batch, out_channels, *sides))


def convolution(x: SymTensor, weight: SymTensor, shape: tuple[Size, ...]) -> SymTensor:
    """``aten::convolution``: always row-major on meta (meta_conv), in ``x``'s format on CUDA (ConvUtils.h)."""
    if tape().settings.hardware is None:
        return empty(shape, x.dtype, "convolution")
    channels_last = x.is_channels_last()
    x = x if channels_last else contiguous(x)
    out = empty(shape, x.dtype, "convolution", strides=format_strides(shape, channels_last))
    kernels.convolution_buffers(x, out, weight, channels_last)
    return out


@block
def Linear(x: SymTensor, out_features: int, *, bias: bool = True) -> SymTensor:
    """``torch.nn.Linear``: [*, C] -> [*, out_features].

    A biased call on a row-major input is one addmm. Otherwise the input is folded to 2-D (a copy where no
    view exists: the weight requires grad, so LinearAlgebra.cpp should_fold is true), and the bias is added
    in place on CUDA, out of place under any dispatch mode (Linear.cpp, TensorSubclassLikeUtils.h).
    """
    *lead, in_features = x.shape
    assert isinstance(in_features, int)
    parameter("weight", (out_features, in_features))
    if bias:
        parameter("bias", (out_features,))
    rows: Size = 1
    for dim in lead:
        rows = rows * dim
    if bias and (x.ndim == 2 or x.is_contiguous()):
        out = _matrix(x, rows, out_features, "addmm").view(*lead, out_features)
        kernels.cublaslt_workspace()
        return out
    out = _matrix(reshape(x, rows, in_features), rows, out_features, "mm").view(*lead, out_features)
    return add(out, out) if bias and tape().settings.hardware is None else out


def _matrix(x: SymTensor, rows: Size, columns: int, op: str) -> SymTensor:
    out = empty((rows, columns), x.dtype, op)
    kernels.cublas_workspace()
    return out


@block
def GroupNorm(x: SymTensor, groups: int) -> SymTensor:
    """``torch.nn.GroupNorm``: a row-major copy where needed, the result, mean and rstd [N, groups]."""
    channels = x.shape[1]
    assert isinstance(channels, int)
    parameter("weight", (channels,))
    parameter("bias", (channels,))
    x = contiguous(x)
    out = empty(x.shape, x.dtype, "native_group_norm")
    mean, rstd = (
        empty((x.shape[0], groups), x.dtype, "native_group_norm", Category.STATISTICS) for _ in range(2)
    )
    kernels.group_norm_coefficients(x)
    del mean, rstd
    return out


@block
def LayerNorm(x: SymTensor) -> SymTensor:
    """``torch.nn.LayerNorm`` over the last dimension: the result, mean and rstd float32 [*, 1]."""
    channels = x.shape[-1]
    assert isinstance(channels, int)
    parameter("weight", (channels,))
    parameter("bias", (channels,))
    row_major = kernels.row_major_copy(x, "native_layer_norm")
    out = empty(x.shape, x.dtype, "native_layer_norm")
    mean, rstd = (
        empty((*x.shape[:-1], 1), "float32", "native_layer_norm", Category.STATISTICS) for _ in range(2)
    )
    del mean, rstd, row_major
    return out


@block
def Embedding(indices: SymTensor, entries: int, dim: int) -> SymTensor:
    """``torch.nn.Embedding``: [*] -> [*, dim]."""
    weight = parameter("weight", (entries, dim))
    return empty((*indices.shape, dim), weight.dtype, "embedding")
