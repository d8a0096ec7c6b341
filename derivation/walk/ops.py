"""PyTorch's operators: shapes in, shapes and allocations out.

Capitalised functions are ``torch.nn`` modules and take their name first. Layout rules are those of
ATen/TensorIterator.cpp (element-wise), ATen/native/LinearAlgebra.cpp (matmul) and, where ``gpu`` is None,
torch/_meta_registrations.py. What CUDA allocates inside an operator is in ``scratch.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from derivation.errors import DerivationError
from derivation.tape.block import leaf
from derivation.tape.events import Category
from derivation.tape.symbols import SYMBOLS, Size, floor_div, nonnegative_from_one
from derivation.tape.tape import EXCLUDED_FROM_CPU_OFFLOAD, tape
from derivation.tape.tensor import SymTensor, packed_strides
from derivation.walk import scratch as kernels

# the models that the option channels_last converts
CHANNELS_LAST_MODELS = ("unet", "vae")
# the modules of a peft layer that hold A and B
LORA_FACTORS = ("lora_A", "lora_B")


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


def parameter(name: str, shape: Sequence[int], dtype: str | None = None, runs: bool = True) -> SymTensor:
    """Register a parameter, or with ``dtype`` a buffer, of the current module and return it.

    Under sequential offload a parameter is on the GPU while its module ``runs`` (accelerate/hooks.py:
    AlignDevicesHook).
    """
    here = tape()
    model = here.path[0]
    if dtype is None:
        dtype = here.weights_dtype()
        if runs and here.options.offload == "sequential" and model not in EXCLUDED_FROM_CPU_OFFLOAD:
            here.load_leaf(name, tuple(shape), dtype)
    here.parameters[".".join([*here.path, name])] = (tuple(shape), dtype)
    return given(shape, dtype)


def half_up(dim: Size) -> Size:
    """Return ceil(dim / 2): the next level's symbol where ``dim`` is a level's symbol.

    >>> half_up(5)
    3
    """
    if isinstance(dim, int):
        return -(-dim // 2)
    if not any(coefficient % 2 for coefficient in dim.values()):
        return dim.quo_ground(2)
    name = SYMBOLS[next(i for i, power in enumerate(dim.leading_expv()) if power)].name
    if dim != dim.ring(1) * tape().size(name) or name[0] not in "hw":
        raise ValueError(f"ceil({dim} / 2) has no symbol")
    return tape().size(f"{name[0]}{int(name[1:]) + 1}")


def conv_size(dim: Size, kernel: int, stride: int, padding: int) -> Size:
    """Return floor((dim + 2 padding - kernel) / stride) + 1 (torch.nn.Conv2d).

    Raises DerivationError where the kernel is larger than the padded side, as ``aten::convolution`` does.
    """
    if isinstance(dim, int) and dim + 2 * padding < kernel:
        raise DerivationError(
            f"{'.'.join(tape().path)}: a kernel of {kernel} x {kernel} does not fit in {dim + 2 * padding} pixels "
            "(supported: image and VAE tiles of at least one latent)"
        )
    if (kernel, stride, padding) == (3, 2, 1):
        return half_up(dim)
    return floor_div(dim + (2 * padding - kernel), stride) + 1


def larger_first(a: Size, b: Size) -> bool:
    """Return whether ``a`` >= ``b`` for all sizes."""
    return nonnegative_from_one(a - b)


def dense_strides(x: SymTensor, *others: SymTensor) -> tuple[Size, ...] | None:
    """Return the strides of an element-wise result: dense, dimensions in ``x``'s stride order.

    Tensors that are all in channels_last have a result in it, whatever the stride of a single image is; a scalar
    beside one tensor rules that out (TensorIterator.cpp: compute_fast_setup_type).
    """
    if x.is_contiguous():
        return None
    operands = (x, *others)
    if x.ndim == 4 and others and all(o.shape == x.shape and o.permute(0, 2, 3, 1).is_contiguous() for o in operands):
        return format_strides(x.shape, True)
    order: list[int] = []
    for dim in range(x.ndim):
        place = len(order)
        while place and not _slower(x, order[place - 1], dim):
            place -= 1
        order.insert(place, dim)
    packed = packed_strides(tuple(x.shape[dim] for dim in order))
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
    return empty(x.shape, dtype or x.dtype, op, category, dense_strides(x, *others), count)


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
    """``torch.cat``: shapes agree except along ``dim``; channels_last where every tensor is (TensorShape.cpp)."""
    first = tensors[0]
    total: Size = sum((tensor.shape[dim] for tensor in tensors[1:]), start=first.shape[dim])
    shape = (*first.shape[:dim], total, *first.shape[dim + 1 :])
    channels_last = all(tensor.is_channels_last() for tensor in tensors)
    return empty(shape, first.dtype, "cat", strides=format_strides(shape, channels_last))


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
    return (packed_strides(shape)[0], 1, width * channels, channels)


def pad(x: SymTensor, right: int, bottom: int) -> SymTensor:
    """``F.pad(x, (0, right, 0, bottom))`` in ``x``'s memory format (PadNd.cpp: constant_pad_nd)."""
    *lead, height, width = x.shape
    shape = (*lead, height + bottom, width + right)
    return empty(shape, x.dtype, "constant_pad_nd", strides=format_strides(shape, x.is_channels_last()))


def pad_last(x: SymTensor, right: int) -> SymTensor:
    """``F.pad(x, (0, right))``."""
    return empty((*x.shape[:-1], x.shape[-1] + right), x.dtype, "constant_pad_nd")


@leaf
def Conv2d(
    x: SymTensor, out_channels: int, kernel: int, *, stride: int = 1, padding: int = 0, bias: bool = True
) -> SymTensor:
    """``torch.nn.Conv2d``: [N, C, H, W] -> [N, out_channels, H', W'], and the LoRAs that are on it."""
    return _adapted(
        x,
        (out_channels, x.shape[1], kernel, kernel),
        lambda x: _conv2d(x, out_channels, kernel, stride, padding, bias),
        lambda x, rank: _conv2d(x, rank, kernel, stride, padding, bias=False),
        lambda x: _conv2d(x, out_channels, 1, 1, 0, bias=False),
    )


def _conv2d(x: SymTensor, out_channels: int, kernel: int, stride: int, padding: int, bias: bool) -> SymTensor:
    batch, in_channels, height, width = x.shape
    assert isinstance(in_channels, int)
    weight = parameter("weight", (out_channels, in_channels, kernel, kernel))
    weight = weight.view_as(weight.shape, format_strides(weight.shape, _weights_channels_last()))
    if bias:
        parameter("bias", (out_channels,))
    sides = (conv_size(side, kernel, stride, padding) for side in (height, width))
    return convolution(x, weight, (batch, out_channels, *sides))


def convolution(x: SymTensor, weight: SymTensor, shape: tuple[Size, ...]) -> SymTensor:
    """``aten::convolution``: row-major on meta for any weight (_meta_registrations.py: meta_conv).

    On CUDA it runs in channels_last where the input or the weight is, and the input is copied to that format
    (ConvUtils.h: cudnn_conv_suggest_memory_format).
    """
    if tape().hardware is None:
        return empty(shape, x.dtype, "convolution")
    channels_last = x.is_channels_last() or _weights_channels_last()
    x = _in_format(x, channels_last)
    out = empty(shape, x.dtype, "convolution", strides=format_strides(shape, channels_last))
    kernels.convolution_buffers(x, out, weight, channels_last)
    return out


def _weights_channels_last() -> bool:
    """Return whether ``Module.to(memory_format=torch.channels_last)`` was called on the current model."""
    here = tape()
    return here.options.channels_last and bool(here.path) and here.path[0] in CHANNELS_LAST_MODELS


def _in_format(x: SymTensor, channels_last: bool) -> SymTensor:
    """``x.contiguous(memory_format=...)``; with one channel or one pixel both formats are the same."""
    if not channels_last:
        return contiguous(x)
    if x.is_channels_last() or x.permute(0, 2, 3, 1).is_contiguous():
        return x
    return empty(x.shape, x.dtype, "clone", strides=format_strides(x.shape, True))


@leaf
def Linear(x: SymTensor, out_features: int, *, bias: bool = True) -> SymTensor:
    """``torch.nn.Linear``: [*, C] -> [*, out_features], and the LoRAs that are on it."""
    return _adapted(
        x,
        (out_features, x.shape[-1]),
        lambda x: _linear(x, out_features, bias),
        lambda x, rank: _linear(x, rank, bias=False),
        lambda x: _linear(x, out_features, bias=False),
    )


def _linear(x: SymTensor, out_features: int, bias: bool) -> SymTensor:
    """``torch.nn.functional.linear`` on new parameters.

    A biased call on a row-major input is one addmm. Otherwise the input is folded to 2-D, a copy where no
    view exists, unless the weight is frozen (requires no grad) and a fold would copy: then it is one bmm
    (LinearAlgebra.cpp: should_fold). The bias is added in place on CUDA, out of place under any dispatch mode
    (Linear.cpp, TensorSubclassLikeUtils.h).
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
    if _frozen() and not _folds(x):
        out = empty((*lead, out_features), x.dtype, "bmm")
        kernels.cublas_workspace()
    else:
        out = _matrix(reshape(x, rows, in_features), rows, out_features, "mm").view(*lead, out_features)
    return add(out, out) if bias and tape().hardware is None else out


def _folds(x: SymTensor) -> bool:
    """Return whether the leading dimensions are one evenly strided block: stride[i] = stride[i+1] * shape[i+1]."""
    return all(x.strides[i] == x.strides[i + 1] * x.shape[i + 1] for i in range(x.ndim - 2))


def _frozen() -> bool:
    """Return whether the current layer's weight requires no grad: in a model with LoRAs theirs alone do.

    lora/model.py: _mark_only_adapters_as_trainable.
    """
    path = tape().path
    return tape().adapters.freeze(path) and not path[-1].startswith(LORA_FACTORS)


def _adapted(
    x: SymTensor,
    shape: tuple[Size, ...],
    base: Callable[[SymTensor], SymTensor],
    down: Callable[[SymTensor, int], SymTensor],
    up: Callable[[SymTensor], SymTensor],
) -> SymTensor:
    """peft's ``lora.Linear`` and ``lora.Conv2d`` (tuners/lora/layer.py): base_layer(x), + lora_B(lora_A(x)) * scaling.

    A and B have the base layer's dtype (tuners_utils.py: _move_adapter_to_device_of_base_layer). ``fuse_lora``
    merges them into the base layer, which then runs alone, and keeps them until ``unload_lora_weights``.
    ``shape`` is the base layer's weight's.
    """
    ranks = tape().adapters.of(tape().path)
    if not ranks:
        return base(x)
    result = _submodule("base_layer", base, x)
    for name, rank in ranks:
        if tape().options.lora_fused:
            for factor, factor_shape in zip(LORA_FACTORS, lora_shapes(shape, rank), strict=True):
                parameter(f"{factor}.{name}.weight", factor_shape, runs=False)
        else:
            result = add(result, mul(_submodule(f"lora_B.{name}", up, _submodule(f"lora_A.{name}", down, x, rank))))
    return result


def lora_shapes(shape: Sequence[Size], rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of A [r, in, *kernel] and B [out, r, *ones] beside a weight [out, in, *kernel].

    >>> lora_shapes((320, 4, 3, 3), 8)
    ((8, 4, 3, 3), (320, 8, 1, 1))
    """
    rows, columns, *kernel = (side for side in shape if isinstance(side, int))
    return (rank, columns, *kernel), (rows, rank, *(1 for _ in kernel))


@leaf
def _submodule(run: Callable[..., SymTensor], *inputs: SymTensor | int) -> SymTensor:
    return run(*inputs)


def _matrix(x: SymTensor, rows: Size, columns: int, op: str) -> SymTensor:
    out = empty((rows, columns), x.dtype, op)
    kernels.cublas_workspace()
    return out


@leaf
def GroupNorm(x: SymTensor, groups: int) -> SymTensor:
    """``torch.nn.GroupNorm``: a row-major copy where needed, the result, mean and rstd [N, groups]."""
    channels = x.shape[1]
    assert isinstance(channels, int)
    parameter("weight", (channels,))
    parameter("bias", (channels,))
    x = contiguous(x)
    out = empty(x.shape, x.dtype, "native_group_norm")
    mean, rstd = (empty((x.shape[0], groups), x.dtype, "native_group_norm", Category.STATISTICS) for _ in range(2))
    kernels.group_norm_coefficients(x)
    del mean, rstd
    return out


@leaf
def LayerNorm(x: SymTensor) -> SymTensor:
    """``torch.nn.LayerNorm`` over the last dimension: the result, mean and rstd float32 [*, 1]."""
    channels = x.shape[-1]
    assert isinstance(channels, int)
    parameter("weight", (channels,))
    parameter("bias", (channels,))
    row_major = kernels.row_major_copy(x, "native_layer_norm")
    out = empty(x.shape, x.dtype, "native_layer_norm")
    mean, rstd = (empty((*x.shape[:-1], 1), "float32", "native_layer_norm", Category.STATISTICS) for _ in range(2))
    del mean, rstd, row_major
    return out


@leaf
def Embedding(indices: SymTensor, entries: int, dim: int) -> SymTensor:
    """``torch.nn.Embedding``: [*] -> [*, dim]."""
    weight = parameter("weight", (entries, dim))
    return empty((*indices.shape, dim), weight.dtype, "embedding")
