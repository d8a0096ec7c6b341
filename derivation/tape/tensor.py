"""Tensors with symbolic shapes and strides, and their views, as PyTorch makes them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from derivation.tape.symbols import Size, nonnegative_from_one, product
from derivation.tape.tape import Storage, tape


def contiguous_strides(shape: Sequence[Size]) -> tuple[Size, ...]:
    """Return the row-major strides of ``shape``, in elements.

    >>> contiguous_strides((2, 3, 5))
    (15, 5, 1)
    """
    strides: list[Size] = []
    step: Size = 1
    for dim in reversed(shape):
        strides.append(step)
        step = step * dim
    return tuple(reversed(strides))


# contiguous_strides of shapes that can be hashed, as torch's SymInt cannot
packed_strides = lru_cache(maxsize=65536)(contiguous_strides)


class SymTensor:
    """A tensor with symbolic shape and strides (in elements) over a storage; None strides are row-major."""

    __slots__ = ("_strides", "dtype", "shape", "storage")

    def __init__(
        self,
        storage: Storage | None,
        shape: tuple[Size, ...],
        dtype: str,
        strides: tuple[Size, ...] | None = None,
    ) -> None:
        self.storage = storage
        self.shape = shape
        self.dtype = dtype
        self._strides = strides

    @property
    def strides(self) -> tuple[Size, ...]:
        """Strides in elements."""
        return packed_strides(self.shape) if self._strides is None else self._strides

    @property
    def layout(self) -> tuple[str, tuple[Size, ...], tuple[Size, ...]]:
        """dtype, shape and strides."""
        return self.dtype, self.shape, self.strides

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def is_on_cpu(self) -> bool:
        """Whether this is a scalar whose storage is not the call's."""
        return not self.shape and self.storage is None

    @property
    def form(self) -> tuple[str, tuple[Size, ...], tuple[Size, ...] | None, bool]:
        """All that operators read: dtype, shape, strides (None: row-major by definition), ``is_on_cpu``."""
        return self.dtype, self.shape, self._strides, self.is_on_cpu

    def over(self, storage: Storage | None) -> SymTensor:
        """Return a tensor of the same layout over another storage, None for one that keeps no memory alive."""
        return SymTensor(storage, self.shape, self.dtype, self._strides)

    def numel(self) -> Size:
        """Number of elements."""
        return product(self.shape)

    def is_contiguous(self) -> bool:
        """Return whether the tensor is row-major, dimensions of size 1 aside (c10/core/Contiguity.h)."""
        if self._strides is None:
            return True
        expected = packed_strides(self.shape)
        odd = [d for d, s, e in zip(self.shape, self._strides, expected, strict=True) if s != e]
        return not any(is_many(dim) for dim in sorted(odd, key=lambda dim: not isinstance(dim, int)))

    def is_channels_last(self) -> bool:
        """Return ``suggest_memory_format() == channels_last`` of a 4-D tensor (c10/core/MemoryFormat.h).

        A single image is not where its batch stride is small, as that of a transposed [1, S, C] view is.
        """
        if self.ndim != 4 or self.is_contiguous():
            return False
        least: Size = 0
        for dim in (1, 3, 2, 0):
            size, stride = self.shape[dim], self.strides[dim]
            if not nonnegative_from_one(stride - least) or (dim == 0 and least == self.strides[1]):
                return False
            least = stride * size
        return True

    def permute(self, *order: int) -> SymTensor:
        """Return a view with reordered dimensions."""
        strides = self.strides
        return self.view_as(tuple(self.shape[i] for i in order), tuple(strides[i] for i in order))

    def transpose(self, first: int, second: int) -> SymTensor:
        """Return a view with two dimensions swapped."""
        order = list(range(self.ndim))
        order[first], order[second] = order[second], order[first]
        return self.permute(*order)

    def unsqueeze(self, dim: int) -> SymTensor:
        """Return a view with a dimension of size 1 at ``dim`` (at most ``ndim``)."""
        strides = self.strides
        step: Size = 1 if dim == self.ndim else self.shape[dim] * strides[dim]
        return self.view_as((*self.shape[:dim], 1, *self.shape[dim:]), (*strides[:dim], step, *strides[dim:]))

    def narrow(self, dim: int, length: Size) -> SymTensor:
        """Return a view of ``length`` entries along ``dim``."""
        shape = (*self.shape[:dim], length, *self.shape[dim + 1 :])
        return self.view_as(shape, self.strides)

    def select(self, dim: int) -> SymTensor:
        """Return a view of one entry along ``dim``, without that dimension."""
        strides = self.strides
        return self.view_as(self.shape[:dim] + self.shape[dim + 1 :], strides[:dim] + strides[dim + 1 :])

    def chunk(self, chunks: int, dim: int) -> tuple[SymTensor, ...]:
        """Return ``chunks`` equal views along ``dim``, whose size must be a multiple of ``chunks``."""
        length = self.shape[dim] // chunks
        return tuple(self.narrow(dim, length) for _ in range(chunks))

    def expand(self, *shape: Size) -> SymTensor:
        """Return a view broadcast to ``shape``: expanded dimensions have stride 0."""
        lead = len(shape) - self.ndim
        own = ((0,) * lead + self.strides, (1,) * lead + self.shape)
        strides = tuple(0 if old != new else stride for stride, old, new in zip(*own, shape, strict=True))
        return self.view_as(tuple(shape), strides)

    def view_as(self, shape: tuple[Size, ...], strides: tuple[Size, ...] | None) -> SymTensor:
        """Return a tensor over the same storage."""
        return SymTensor(self.storage, shape, self.dtype, strides)

    def viewed(self, *shape: Size) -> SymTensor | None:
        """Return a view with ``shape``, or None where only a copy can have it (ATen/TensorUtils.cpp)."""
        if self._strides is None or self.is_contiguous():
            return self.view_as(tuple(shape), None)
        strides = _view_strides(self.shape, self._strides, shape)
        return None if strides is None else self.view_as(tuple(shape), strides)

    def view(self, *shape: Size) -> SymTensor:
        """Return a view with ``shape``; raises ValueError where PyTorch would."""
        result = self.viewed(*shape)
        if result is None:
            raise ValueError(f"no view of {self.shape} with strides {self.strides} has shape {shape}")
        return result


def is_many(dim: Size) -> bool:
    """Return whether a dimension is larger than 1, recording the decision on the tape."""
    return tape().exceeds(dim, 1)


def _view_strides(shape: Sequence[Size], strides: Sequence[Size], new_shape: Sequence[Size]) -> tuple[Size, ...] | None:
    """Return the strides of ``new_shape``, or None.

    Each maximal run of dimensions that is one evenly strided block (stride[i] = stride[i+1] * shape[i+1])
    must be the product of a run of new dimensions.
    """
    result: list[Size] = []
    position = len(new_shape) - 1
    for block_numel, step in _strided_blocks(shape, strides):
        covered: Size = 1
        while position >= 0 and (covered != block_numel or new_shape[position] == 1):
            result.append(step * covered)
            covered = covered * new_shape[position]
            position -= 1
        if covered != block_numel:
            return None
    while position >= 0 and new_shape[position] == 1:
        result.append(1)
        position -= 1
    return tuple(reversed(result)) if position < 0 else None


def _strided_blocks(shape: Sequence[Size], strides: Sequence[Size]) -> list[tuple[Size, Size]]:
    """Return (elements, innermost stride) of each evenly strided block, last dimension first."""
    blocks: list[tuple[Size, Size]] = []
    for dim, stride in zip(reversed(shape), reversed(strides), strict=True):
        if blocks and stride == blocks[-1][0] * blocks[-1][1]:
            blocks[-1] = (blocks[-1][0] * dim, blocks[-1][1])
        elif is_many(dim):
            blocks.append((dim, stride))
    return blocks
