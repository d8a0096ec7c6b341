"""PyTorch's arithmetic on symbolic tensors, so that a scheduler's formulas read as diffusers writes them.

Evaluating the same expression in the same order allocates and frees the same temporaries. A scalar on the
CPU takes part in every operator; a result is on the device where an operand is.
"""

from __future__ import annotations

from collections.abc import Sequence

from derivation.tape.events import Category
from derivation.tape.symbols import Size
from derivation.tape.tensor import SymTensor
from derivation.walk.ops import dense_strides, empty

Operand = SymTensor | float


class Value(SymTensor):
    """A tensor with operators; ``on_device`` is False for what lives on the CPU, which allocates nothing."""

    __slots__ = ("on_device",)

    def __init__(self, tensor: SymTensor, on_device: bool = True) -> None:
        super().__init__(tensor.storage, tensor.shape, tensor.dtype, tensor._strides)
        self.on_device = on_device

    def __add__(self, other: Operand) -> Value:
        return pointwise("add", self, other)

    __radd__ = __add__

    def __sub__(self, other: Operand) -> Value:
        return pointwise("sub", self, other)

    def __rsub__(self, other: float) -> Value:
        return pointwise("rsub", self)

    def __mul__(self, other: Operand) -> Value:
        return pointwise("mul", self, other)

    __rmul__ = __mul__

    def __truediv__(self, other: Operand) -> Value:
        return pointwise("div", self, other)

    def __rtruediv__(self, other: float) -> Value:
        # torch/_tensor.py: Tensor.__rdiv__ is self.reciprocal() * other
        return pointwise("reciprocal", self) * other

    def __pow__(self, exponent: float) -> Value:
        return pointwise("pow", self)

    def __neg__(self) -> Value:
        return pointwise("neg", self)

    def apply(self, op: str) -> Value:
        """``torch.<op>(self)`` for an element-wise operator."""
        return pointwise(op, self)

    def to(self, dtype: str) -> Value:
        """``self.to(dtype)``: itself where nothing changes."""
        return self if dtype == self.dtype else pointwise("_to_copy", self, dtype=dtype)

    def to_device(self, dtype: str | None = None) -> Value:
        """``self.to(device, dtype)``: itself where nothing changes."""
        if self.on_device:
            return self.to(dtype or self.dtype)
        return on_device(self.shape, dtype or self.dtype, "_to_copy")

    def entry(self) -> Value:
        """``self[i]``: a view without the first dimension."""
        return Value(self.select(0), self.on_device)

    def entries(self, count: Size) -> Value:
        """``self[[i, ...]]`` for ``count`` indices of a 1-D tensor."""
        return on_device((count,), self.dtype, "index") if self.on_device else on_cpu((count,), self.dtype)

    def columns(self, ndim: int) -> Value:
        """``self.flatten()`` with trailing dimensions of size 1, ``ndim`` in all: a view."""
        return Value(self.view(self.numel(), *[1] * (ndim - 1)), self.on_device)


def on_device(shape: Sequence[Size], dtype: str, op: str, strides: tuple[Size, ...] | None = None) -> Value:
    """Allocate a tensor."""
    return Value(empty(shape, dtype, op, Category.PIPELINE, strides))


def on_cpu(shape: Sequence[Size], dtype: str) -> Value:
    """Return a tensor that lives on the CPU."""
    return Value(SymTensor(None, tuple(shape), dtype), False)


def pointwise(op: str, *operands: Operand, dtype: str | None = None) -> Value:
    """Allocate the result of an element-wise operator on broadcast operands, in the largest one's stride order."""
    tensors = [x if isinstance(x, Value) else Value(x) for x in operands if isinstance(x, SymTensor)]
    dtype = dtype or result_type(tensors)
    present = [x for x in tensors if x.on_device]
    if not present:
        return on_cpu(broadcast([x.shape for x in tensors]), dtype)
    shape = broadcast([x.shape for x in present])
    whole = next((x for x in present if x.shape == shape), None)
    return on_device(shape, dtype, op, None if whole is None else dense_strides(whole))


def result_type(tensors: Sequence[SymTensor]) -> str:
    """``torch.result_type`` of floating-point tensors: scalars count only among themselves.

    >>> result_type([SymTensor(None, (), "float32"), SymTensor(None, (2, 3), "float16")])
    'float16'
    """
    dtypes = {x.dtype for x in tensors if x.ndim} or {x.dtype for x in tensors}
    return dtypes.pop() if len(dtypes) == 1 else "float32"


def broadcast(shapes: Sequence[tuple[Size, ...]]) -> tuple[Size, ...]:
    """Return the shape that ``shapes`` broadcast to.

    >>> broadcast([(), (3, 1, 5), (4, 1)])
    (3, 4, 5)
    """
    if len(set(shapes)) == 1:
        return shapes[0]
    ndim = max(len(shape) for shape in shapes)
    padded = [(1,) * (ndim - len(shape)) + shape for shape in shapes]
    return tuple(next((dim for dim in dims if dim != 1), 1) for dims in zip(*padded, strict=True))
