"""Watch the storages that a real PyTorch program allocates on the ``meta`` device appear and die."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from typing import Any, NamedTuple, Self

import torch
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode

from derivation.options import Options
from derivation.tape.events import Allocation, Category
from derivation.tape.symbols import Size
from derivation.tape.tape import Tape
from derivation.trace.kernels import kernels_for

aten = torch.ops.aten


@contextmanager
def without_collector() -> Iterator[None]:
    """Keep the cyclic collector off."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Onto(NamedTuple):
    """Where a tracer records: a tape, and how a size (an int or a SymInt) is written on it."""

    tape: Tape
    size: Callable[[Any], Size]


def category(op: str, shape: tuple[Size, ...]) -> Category:
    """Return what an operator's output is for, as far as its name and rank tell."""
    if "attention" in op or op in ("bmm", "baddbmm", "_softmax", "_safe_softmax"):
        return Category.ATTENTION
    if op == "native_group_norm" and len(shape) == 2:
        return Category.STATISTICS
    return Category.STATISTICS if op == "native_layer_norm" and shape[-1] == 1 else Category.ACTIVATION


def tensors_in(value: Any) -> list[torch.Tensor]:
    """Return the tensors in an operator's argument or output: nested lists and tuples."""
    if isinstance(value, torch.Tensor):
        return [value]
    found: list[torch.Tensor] = []
    if isinstance(value, list | tuple):
        for each in value:
            if isinstance(each, torch.Tensor):
                found.append(each)
            elif isinstance(each, list | tuple):
                found += tensors_in(each)
    return found


def _tensors(owner: torch.nn.Module | torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a ``meta`` tensor, or a module's parameters and buffers, by name."""
    named = [("", owner)] if isinstance(owner, torch.Tensor) else [*owner.named_parameters(), *owner.named_buffers()]
    yield from ((name, tensor) for name, tensor in named if tensor.is_meta)


def storages(*owners: torch.nn.Module | torch.Tensor) -> Iterator[torch.UntypedStorage]:
    """Yield the ``meta`` storages of tensors and of modules' parameters and buffers."""
    yield from (tensor.untyped_storage() for owner in owners for _, tensor in _tensors(owner))


class Tracer(TorchDispatchMode):
    """Record each new untyped ``meta`` storage and, by a weak reference's callback, its death on a tape.

    ``modules`` maps a name to a module: its parameters and buffers are known beforehand, so they and
    their views count nothing, but the death of one (``vae.to(dtype=...)``) lowers the live bytes; its
    submodules' names become the events' paths (``""`` is a name without prefix). ``inputs`` are tensors
    known beforehand. ``stage`` marks the events from now on. It records ``onto`` a new tape of integers by default.
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
        onto: Onto | None = None,
    ) -> None:
        super().__init__()
        modules, inputs = modules or {}, list(inputs)
        self.tape, self._size = onto or Onto(Tape(Options()), int)
        self.stage = stage
        self._kernels = kernels_for(inputs)
        self._known = {s._cdata for s in storages(*modules.values(), *inputs)}
        self._weights = list(self._watched(modules))
        self._alive: dict[int, tuple[int, int, weakref.ref[Any]]] = {}
        self._track_paths = paths
        self._names = {id(m): name for root, top in modules.items() for name, m in _qualified(root, top)}
        self._path = [""]
        self._scope = ExitStack()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Return False: nothing is compiled here, and the wrapper that keeps Dynamo out takes its time at every op."""
        return False

    def __enter__(self) -> Self:
        self._scope.enter_context(without_collector())
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
        if (read := _READ_BACK.get(id(func))) and (value := read(*args, **kwargs)) is not NotImplemented:
            return value
        out = self._kernels.run(func, args, kwargs)
        for tensor in tensors_in(out):
            if tensor.is_meta:
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
        shape, op = tuple(map(self._size, tensor.shape)), func._schema.name.split("::")[1]
        dtype, path = str(tensor.dtype).removeprefix("torch."), self._path[-1]
        allocation = Allocation(path, op, shape, dtype, self._size(nbytes), category(op, shape))
        self._alive[key] = (self._begin(allocation), nbytes, weakref.ref(storage, partial(self._free, key)))
        self.tape.events.append(len(self.tape.allocations))
        if seen:  # ATen/native/cuda/Resize.cpp: resize_bytes_cuda allocates, copies, then frees
            self.tape.events.append(-seen[0] - 1)

    def _begin(self, allocation: Allocation) -> int:
        """Put an allocation on the tape, in the present stage, and return its index."""
        self._mark()
        self.tape.allocations.append(allocation)
        return len(self.tape.allocations) - 1

    def _mark(self) -> None:
        if self.stage != (self.tape.marks[-1].stage if self.tape.marks else ""):
            self.tape.mark(self.stage)

    def _free(self, key: int, _: object) -> None:
        if (seen := self._alive.pop(key, None)) is not None:
            self._mark()
            self.tape.events.append(-seen[0] - 1)

    def _watched(self, modules: Mapping[str, torch.nn.Module]) -> Iterator[weakref.ref[Any]]:
        """Yield a reference to every weight's storage, whose death is an event."""
        named = ((root, name, tensor) for root, top in modules.items() for name, tensor in _tensors(top))
        for root, name, tensor in named:
            storage, dtype = tensor.untyped_storage(), str(tensor.dtype).removeprefix("torch.")
            path, shape = ".".join(filter(None, (root, name))), tuple(tensor.shape)
            weight = Allocation(path, "load", shape, dtype, storage.nbytes(), Category.WEIGHT, loaded=True)
            yield weakref.ref(storage, partial(self._unload, storage._cdata, weight))

    def _unload(self, key: int, weight: Allocation, _: object) -> None:
        if key in self._known:
            self._known.remove(key)
            self.tape.events.append(-self._begin(weight) - 1)

    def _enter_module(self, module: torch.nn.Module, _args: object) -> None:
        self._path.append(self._names.get(id(module), self._path[-1]))

    def _leave_module(self, _module: torch.nn.Module, _args: object, _output: object) -> None:
        self._path.pop()


def marked(
    owner: Any, name: str, tracer: Tracer, during: str, after: str, outermost: bool = False
) -> Callable[[], None]:
    """Make ``owner.name`` a stage ``during`` with ``after`` behind it; returns what undoes it.

    ``outermost`` leaves a call alone that begins in another stage than ``after``.
    """
    method, own = getattr(owner, name), owner.__dict__.get(name)

    @wraps(method)  # pipelines read the signature (SVD: whether the VAE takes num_frames)
    def staged(*args: Any, **kwargs: Any) -> Any:
        if outermost and tracer.stage != after:
            return method(*args, **kwargs)
        tracer.stage = during
        output = method(*args, **kwargs)
        del args, kwargs  # the arguments die inside the stage, as in the unwrapped call
        tracer.stage = after
        return output

    def restore() -> None:
        del owner.__dict__[name]
        if own is not None:
            owner.__dict__[name] = own

    owner.__dict__[name] = staged
    return restore


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


# By identity: an operator's own hash is Python code.
_READ_BACK: Mapping[int, Callable[..., Any]] = {
    id(aten._local_scalar_dense.default): _item,
    id(aten._to_copy.default): _to_copy,
    id(aten.copy_.default): _copy_,
    id(aten.equal.default): _equal,
}
