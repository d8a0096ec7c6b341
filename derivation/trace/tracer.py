"""Watch the storages that a real PyTorch program allocates on the ``meta`` device appear and die."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple, Self

import torch
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from derivation.trace.kernels import kernels_for

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Alloc:
    """A storage of ``nbytes`` bytes appeared: as the output of ``op`` in module ``path``."""

    id: int
    nbytes: int
    op: str
    shape: tuple[int, ...]
    dtype: str
    path: str
    stage: str


@dataclass(frozen=True, slots=True)
class Free:
    """The storage of the alloc event with the same ``id`` died; below 0, a weight known beforehand did."""

    id: int
    nbytes: int
    stage: str


class Witness(NamedTuple):
    """One line of a witness: a tensor alive at the peak."""

    path: str
    op: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int


def ceil512(nbytes: int) -> int:
    """Round up to the CUDA caching allocator's smallest block, 512 bytes."""
    return -(-nbytes // 512) * 512


@dataclass
class Trace:
    """The ordered alloc and free events of one run, and what follows from them."""

    events: list[Alloc | Free] = field(default_factory=list)

    def live_curve(self) -> list[int]:
        """Return the live bytes at each program point: before the first event, then after each one."""
        steps = (ceil512(e.nbytes) * (1 if isinstance(e, Alloc) else -1) for e in self.events)
        return list(accumulate(steps, initial=0))

    def points(self, stage: str | None = None) -> range:
        """Return the program points of ``stage`` (of the run by default), its entry and its exit included."""
        marked = [i for i, event in enumerate(self.events) if stage in (None, event.stage)]
        return range(marked[0], marked[-1] + 2) if marked else range(1)

    def peak_point(self, stage: str | None = None) -> int:
        """Return the first program point of ``stage`` (of the run by default) with the most live bytes."""
        curve = self.live_curve()
        return max(self.points(stage), key=curve.__getitem__)

    @property
    def peak_bytes(self) -> int:
        """The most bytes alive at any program point, each storage rounded up to 512; 0 without events."""
        return max(self.live_curve())

    def stage_peaks(self) -> dict[str, int]:
        """Return each stage's most live bytes, in the order in which the stages run."""
        curve = self.live_curve()
        stages = dict.fromkeys(event.stage for event in self.events)
        return {stage: max(curve[i] for i in self.points(stage)) for stage in stages}

    def alive_at(self, point: int) -> list[Alloc]:
        """Return the alloc events whose storages are alive at a program point, oldest first."""
        alive: dict[int, Alloc] = {}
        for event in self.events[:point]:
            if isinstance(event, Alloc):
                alive[event.id] = event
            else:
                alive.pop(event.id, None)
        return list(alive.values())

    def peak_witness(self, stage: str | None = None) -> list[Witness]:
        """Return the tensors alive at the first peak of ``stage`` (of the run by default), oldest first."""
        alive = self.alive_at(self.peak_point(stage))
        return [Witness(e.path, e.op, e.shape, e.dtype, e.nbytes) for e in alive]


def storages(*owners: torch.nn.Module | torch.Tensor) -> Iterator[torch.UntypedStorage]:
    """Yield the ``meta`` storages of tensors and of modules' parameters and buffers."""
    for owner in owners:
        tensors = [owner] if isinstance(owner, torch.Tensor) else [*owner.parameters(), *owner.buffers()]
        yield from (tensor.untyped_storage() for tensor in tensors if tensor.is_meta)


class Tracer(TorchDispatchMode):
    """Record each new untyped ``meta`` storage and, by a weak reference's callback, its death.

    ``modules`` maps a name to a module: its parameters and buffers are known beforehand, so they and
    their views count nothing, but the death of one (``vae.to(dtype=...)``) lowers the live bytes; its
    submodules' names become the events' paths (``""`` is a name without prefix). ``inputs`` are tensors
    known beforehand. ``stage`` marks the events from now on.
    Reading a value back (``.cpu()``, ``.item()``, ``bool()``) gives zeros on the CPU, which nothing counts.
    The cyclic collector is off while tracing: a storage dies when its last reference is dropped.
    """

    def __init__(
        self,
        modules: Mapping[str, torch.nn.Module] | None = None,
        inputs: Iterable[torch.Tensor] = (),
        *,
        paths: bool = True,
        stage: str = "",
    ) -> None:
        super().__init__()
        modules, inputs = modules or {}, list(inputs)
        self.trace = Trace()
        self.stage = stage
        self._kernels = kernels_for(inputs)
        self._known = {s._cdata for s in storages(*modules.values(), *inputs)}
        self._weights = [
            weakref.ref(s, partial(self._unload, s._cdata, s.nbytes())) for s in storages(*modules.values())
        ]
        self._alive: dict[int, tuple[int, int, weakref.ref[Any]]] = {}
        self._allocs = self._unloads = 0
        self._track_paths = paths
        self._names = {id(m): name for root, top in modules.items() for name, m in _qualified(root, top)}
        self._path = [""]
        self._scope = ExitStack()

    def __enter__(self) -> Self:
        if gc.isenabled():
            gc.disable()
            self._scope.callback(gc.enable)
        if self._track_paths:
            for handle in (
                register_module_forward_pre_hook(self._enter_module),
                register_module_forward_hook(self._leave_module, always_call=True),
            ):
                self._scope.callback(handle.remove)
        super().__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        super().__exit__(*exc)
        self._scope.close()
        self._alive.clear()
        self._weights.clear()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if (read := _READ_BACK.get(func)) and (value := read(*args, **kwargs)) is not NotImplemented:
            return value
        out = self._kernels.run(func, args, kwargs)
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                self._see(tensor, func)
        return out

    def _see(self, tensor: torch.Tensor, func: Any) -> None:
        storage = tensor.untyped_storage()
        key, nbytes = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        seen = self._alive.get(key)
        if nbytes == 0 or (seen and seen[1] == nbytes):
            return
        self._allocs += 1
        self._alive[key] = (self._allocs, nbytes, weakref.ref(storage, partial(self._free, key)))
        dtype = str(tensor.dtype).removeprefix("torch.")
        shape = tuple(tensor.shape)
        self.trace.events.append(
            Alloc(self._allocs, nbytes, str(func), shape, dtype, self._path[-1], self.stage)
        )
        if seen:  # ATen/native/cuda/Resize.cpp: resize_bytes_cuda allocates, copies, then frees
            self.trace.events.append(Free(seen[0], seen[1], self.stage))

    def _free(self, key: int, _: object) -> None:
        if (seen := self._alive.pop(key, None)) is not None:
            self.trace.events.append(Free(seen[0], seen[1], self.stage))

    def _unload(self, key: int, nbytes: int, _: object) -> None:
        if key in self._known:
            self._known.remove(key)
            self._unloads += 1
            self.trace.events.append(Free(-self._unloads, nbytes, self.stage))

    def _enter_module(self, module: torch.nn.Module, _args: object) -> None:
        self._path.append(self._names.get(id(module), self._path[-1]))

    def _leave_module(self, _module: torch.nn.Module, _args: object, _output: object) -> None:
        self._path.pop()


def _qualified(root: str, top: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    for name, module in top.named_modules():
        yield ".".join(filter(None, (root, name))), module


def _item(tensor: torch.Tensor) -> Any:
    return torch.zeros((), dtype=tensor.dtype).item() if tensor.is_meta else NotImplemented


def _to_copy(tensor: torch.Tensor, *, dtype: Any = None, device: Any = None, **_: Any) -> Any:
    if tensor.is_meta and device is not None and device.type == "cpu":
        # an offloaded weight has no values
        like = torch.empty if isinstance(tensor, torch.nn.Parameter) else torch.zeros
        return like(tensor.shape, dtype=dtype or tensor.dtype, device="cpu")
    return NotImplemented


def _copy_(to: torch.Tensor, source: torch.Tensor, *_: Any) -> Any:
    return to.zero_() if source.is_meta and not to.is_meta else NotImplemented


def _equal(left: torch.Tensor, right: torch.Tensor) -> Any:
    return left.shape == right.shape if left.is_meta or right.is_meta else NotImplemented


_READ_BACK: Mapping[Any, Callable[..., Any]] = {
    aten._local_scalar_dense.default: _item,
    aten._to_copy.default: _to_copy,
    aten.copy_.default: _copy_,
    aten.equal.default: _equal,
}
