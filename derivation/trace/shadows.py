"""A tracer for whole pipelines: small tensors whose values follow from the call carry them, on the CPU.

Token ids, masks, timesteps and position grids are computed beside their ``meta`` tensors, so that ``.item()``,
``.tolist()``, ``nonzero`` and boolean indexing answer as on a GPU. What no one can know reads as zeros, or as True
in a mask, and is noted with its source line.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map

from derivation.trace.tracer import Tracer, tensors_in

aten = torch.ops.aten

# Elements up to which values are computed: token ids and masks are integers, timesteps and grids are floats.
MOST_INTEGERS, MOST_FLOATS = 1 << 19, 1 << 13
INTEGERS = frozenset({torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64})


def _identities(*operators: Any) -> frozenset[int]:
    """Return the operators by identity: their own hash is Python code."""
    return frozenset(map(id, operators))


_FACTORIES = _identities(
    aten.arange.default,
    aten.arange.start,
    aten.arange.start_step,
    aten.eye.default,
    aten.eye.m,
    aten.full.default,
    aten.linspace.default,
    aten.ones.default,
    aten.scalar_tensor.default,
    aten.tril_indices.default,
    aten.triu_indices.default,
    aten.zeros.default,
)
_READS = _identities(aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default)
# operators whose outputs' shapes depend on values
_BY_VALUE = _identities(
    aten.bincount.default,
    aten.masked_select.default,
    aten.nonzero.default,
    aten.repeat_interleave.Tensor,
    aten._unique2.default,
    aten.unique_consecutive.default,
    aten.unique_dim.default,
)
_MASKS = (torch.bool, torch.uint8)
_LIBRARIES = ("/diffusers/", "/transformers/")


def is_small(tensor: torch.Tensor) -> bool:
    """Return whether a tensor's values are worth computing."""
    return prod(tensor.shape) <= (MOST_INTEGERS if tensor.dtype in INTEGERS else MOST_FLOATS)


class ShadowTracer(Tracer):
    """Record as Tracer does; ``unknown`` counts the source lines that read a value that nobody knows."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.unknown: Counter[str] = Counter()
        self._overwritten: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        given, op = tensors_in(args), id(func)
        if kwargs:
            given += tensors_in(list(kwargs.values()))
        to = getattr(kwargs.get("device"), "type", None)
        if to == "meta" and kwargs.get("generator") is not None:
            kwargs["generator"] = None  # a CPU generator: values matter to nothing
        if to != "meta" and not any(tensor.is_meta for tensor in given):
            return func(*args, **kwargs)
        known = self._all_known(func, given)
        if op in _READS or (func is aten._to_copy.default and to == "cpu"):
            return self._read(func, args, kwargs, known)
        if func is aten.copy_.default and not args[0].is_meta:
            return args[0].copy_(self._values(args[1])) if known else super().__torch_dispatch__(func, types, args)
        if op in _BY_VALUE:
            return self._by_value(func, args, kwargs)
        if func is aten.index.Tensor and any(i is not None and i.dtype in _MASKS for i in args[1]):
            args = (args[0], [index for each in args[1] for index in self._as_indices(each)])
            return self.__torch_dispatch__(func, types, args, kwargs)
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if func is aten.convolution.default:
            shapes = tuple(tuple(map(int, each.shape)) for each in args[:2])
            self.tape.convolutions[len(self.tape.allocations) - 1] = shapes
        if known:
            self._compute(func, args, kwargs, out)
        elif func._schema.is_mutable and given[0].is_meta:
            self._overwritten.add(given[0].untyped_storage()._cdata)
        return out

    def _see(self, tensor: torch.Tensor, func: Any) -> None:
        if (key := tensor.untyped_storage()._cdata) not in self._alive:
            self._overwritten.discard(key)
        super()._see(tensor, func)

    def _all_known(self, func: Any, given: list[torch.Tensor]) -> bool:
        if not given:
            return id(func) in _FACTORIES
        for tensor in given:
            if self._values(tensor) is None or not is_small(tensor):
                return False
        return torch.Tag.nondeterministic_seeded not in func.tags

    def _values(self, tensor: torch.Tensor) -> Any:
        """Return the tensor on the CPU that holds the values of a ``meta`` one, None where nobody knows them."""
        if not tensor.is_meta:
            return tensor
        found = getattr(tensor, "_values_on_cpu", None)
        return None if tensor.untyped_storage()._cdata in self._overwritten else found

    def _on_cpu(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self._values(value)
        return torch.device("cpu") if isinstance(value, torch.device) else value

    def _compute(self, func: Any, args: Any, kwargs: Mapping[str, Any], out: Any) -> None:
        outputs = tensors_in(out)
        if not outputs or not all(map(is_small, outputs)):
            return
        try:
            with _disable_current_modes():
                computed = func(*tree_map(self._on_cpu, list(args)), **tree_map(self._on_cpu, dict(kwargs)))
        except (RuntimeError, NotImplementedError, TypeError, IndexError):
            return
        for output, values in zip(outputs, tensors_in(computed), strict=False):
            if output.is_meta and values.shape == output.shape:
                output._values_on_cpu = values  # type: ignore[attr-defined]

    def _read(self, func: Any, args: Any, kwargs: Mapping[str, Any], known: bool) -> Any:
        if known:
            with _disable_current_modes():
                return func(*tree_map(self._on_cpu, args), **tree_map(self._on_cpu, dict(kwargs)))
        source = args[0]
        if func is not aten._to_copy.default or source.dtype in INTEGERS:
            self._note("value")
        return super().__torch_dispatch__(func, (), args, dict(kwargs))

    def _by_value(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
        """Run an operator on values, on ones where nobody knows them, and return its outputs on ``meta``."""
        with _disable_current_modes():
            out = func(*tree_map(self._assumed, list(args)), **tree_map(self._assumed, dict(kwargs)))
        return tree_map(lambda value: self._placed(value, func) if isinstance(value, torch.Tensor) else value, out)

    def _assumed(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return torch.device("cpu") if isinstance(value, torch.device) else value
        if (values := self._values(value)) is None:
            self._note("shape by value")
            return torch.ones(value.shape, dtype=value.dtype, device="cpu")
        return values

    def _placed(self, values: torch.Tensor, func: Any) -> torch.Tensor:
        with _disable_current_modes():
            placed = torch.empty(values.shape, dtype=values.dtype, device="meta")
        placed._values_on_cpu = values  # type: ignore[attr-defined]
        self._see(placed, func)
        return placed

    def _as_indices(self, index: torch.Tensor | None) -> list[torch.Tensor | None]:
        """Return the integer indices of a mask: columns of one ``nonzero`` (IndexingUtils.h: expandTensors)."""
        if index is None or index.dtype not in _MASKS:
            return [index]
        positions = self._by_value(aten.nonzero.default, (index,), {})
        columns = positions.unbind(1)
        for column, values in zip(columns, positions._values_on_cpu.unbind(1), strict=True):
            column._values_on_cpu = values
        return list(columns)

    def _note(self, what: str) -> None:
        frames = reversed(traceback.extract_stack(limit=60))
        inside = next((f for f in frames if any(name in f.filename for name in _LIBRARIES)), None)
        if inside is not None:
            what = f"{what} at {inside.filename.rsplit('site-packages/', 1)[-1]}:{inside.lineno}: {inside.line}"
        self.unknown[what] += 1
