"""Run ATen ops on ``meta``, each kernel once for arguments that are alike: an output's layout follows from theirs."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_leaves

# calls remembered at a time
LIMIT = 20_000


class Layout(NamedTuple):
    """A tensor's shape, strides in elements, and dtype; sizes may be symbolic."""

    shape: tuple[Any, ...]
    stride: tuple[Any, ...]
    dtype: torch.dtype

    def empty(self) -> torch.Tensor:
        """Return a tensor of this layout on ``meta``, with a storage of its own."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")


class Kernels:
    """Runs ops and remembers the layouts of what they make; symbolic sizes are of one ShapeEnv."""

    def __init__(self, symbolic: bool) -> None:
        self._made: dict[Hashable, tuple[list[Layout], bool] | None] = {}
        self._described = _described if symbolic else _numeric

    def run(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Return ``func(*args, **kwargs)``; the kernel of an op that only makes new ``meta`` tensors runs once."""
        # an operator lives as long as the process, and its own hash is Python code
        key: Hashable = (id(func), self._described(args))
        if kwargs:
            key = (key, *((name, self._described(value)) for name, value in kwargs.items()))
        if (made := self._made.get(key)) is not None:
            layouts, several = made
            out = tuple(layout.empty() for layout in layouts)
            return out if several else out[0]
        out = func(*args, **kwargs)
        if key not in self._made:
            if len(self._made) == LIMIT:
                self._made.clear()
            self._made[key] = None if func._schema.is_mutable else _remembered(out, tree_leaves((args, kwargs)))
        return out


def _described(value: Any) -> Hashable:
    """Return a hashable description of an op's argument: of a tensor its layout."""
    if isinstance(value, torch.Tensor):
        return (_sizes(value.shape), _sizes(value.stride()), value.dtype, value.device)
    if isinstance(value, tuple | list):
        return tuple(map(_described, value))
    symbolic = isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool)
    return value.node.expr if symbolic else (type(value), value)


def _numeric(value: Any) -> Hashable:
    """Return what ``_described`` does, of arguments whose sizes are integers."""
    if isinstance(value, torch.Tensor):
        return (value.shape, value.stride(), value.dtype, value.is_meta)
    if isinstance(value, tuple | list):
        return tuple([_numeric(each) for each in value])
    return (type(value), value)


def _sizes(sizes: Iterable[Any]) -> tuple[Hashable, ...]:
    return tuple(size.node.expr if isinstance(size, torch.SymInt) else size for size in sizes)


def _remembered(out: Any, inputs: list[Any]) -> tuple[list[Layout], bool] | None:
    """Return the outputs' layouts and whether they are a tuple, None where ``out`` cannot be made from them.

    It can where all tensors are on ``meta`` and each output has a storage that no input and no other output has,
    and that is as large as a new one.
    """
    outputs = out if isinstance(out, tuple) else (out,)
    given = [value for value in inputs if isinstance(value, torch.Tensor)]
    if not all(isinstance(value, torch.Tensor) and value.is_meta for value in (*given, *outputs)):
        return None
    layouts = [Layout(tuple(value.shape), value.stride(), value.dtype) for value in outputs]
    known, own = ([value.untyped_storage() for value in values] for values in (given, outputs))
    distinct = {storage._cdata for storage in own} - {storage._cdata for storage in known}
    new = [layout.empty().untyped_storage() for layout in layouts]
    if len(distinct) < len(own) or [s.nbytes() for s in own] != [s.nbytes() for s in new]:
        return None
    return layouts, isinstance(out, tuple)


NUMERIC = Kernels(symbolic=False)


def kernels_for(inputs: Iterable[torch.Tensor]) -> Kernels:
    """Return the memory of all runs, or one of its own for a run with symbolic sizes."""
    return (
        Kernels(symbolic=True)
        if any(isinstance(size, torch.SymInt) for each in inputs for size in each.shape)
        else NUMERIC
    )
