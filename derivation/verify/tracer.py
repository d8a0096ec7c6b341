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
from torch.nn import functional as F
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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
    """The storage of the alloc event with the same ``id`` died."""

    id: int
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
        sizes = {e.id: ceil512(e.nbytes) for e in self.events if isinstance(e, Alloc)}
        steps = (sizes[e.id] if isinstance(e, Alloc) else -sizes[e.id] for e in self.events)
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
                del alive[event.id]
        return list(alive.values())

    def peak_witness(self, stage: str | None = None) -> list[Witness]:
        """Return the tensors alive at the first peak of ``stage`` (of the run by default), oldest first."""
        alive = self.alive_at(self.peak_point(stage))
        return [Witness(e.path, e.op, e.shape, e.dtype, e.nbytes) for e in alive]


def storages(*owners: torch.nn.Module | torch.Tensor) -> Iterator[torch.UntypedStorage]:
    """Yield the storages of tensors and of modules' parameters and buffers."""
    for owner in owners:
        if isinstance(owner, torch.Tensor):
            yield owner.untyped_storage()
        else:
            yield from (p.untyped_storage() for p in owner.parameters())
            yield from (b.untyped_storage() for b in owner.buffers())


class Tracer(TorchDispatchMode):
    """Record each new untyped ``meta`` storage and, by a weak reference's callback, its death.

    ``modules`` maps a name to a module: its parameters and buffers are known beforehand, so they and
    their views count nothing, and its submodules' names become the events' paths (``""`` is a name
    without prefix). ``inputs`` are tensors known beforehand. ``stage`` marks the events from now on.
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
        modules = modules or {}
        self.trace = Trace()
        self.stage = stage
        self._known = {s._cdata: s for s in storages(*modules.values(), *inputs)}
        self._alive: dict[int, tuple[int, int, weakref.ref[Any]]] = {}
        self._allocs = 0
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

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if (read := _READ_BACK.get(func)) and (value := read(*args, **kwargs)) is not NotImplemented:
            return value
        out = func(*args, **kwargs)
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
            self.trace.events.append(Free(seen[0], self.stage))

    def _free(self, key: int, _: object) -> None:
        if (seen := self._alive.pop(key, None)) is not None:
            self.trace.events.append(Free(seen[0], self.stage))

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
        return torch.zeros(tensor.shape, dtype=dtype or tensor.dtype, device="cpu")
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
    minimum_gemm_alignment, check_last_dim_stride_equals_1_dense. A mask under ``flash`` or
    ``efficient`` raises NotImplementedError: no supported pipeline passes one.
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
        if attn_mask is not None or dropout_p or enable_gqa:
            raise NotImplementedError(f"{self.backend} attention with a mask, dropout or grouped queries")
        if self.backend == "flash" and _flash_can_run(query, key, value):
            return _flash(query, key, value, is_causal, scale)
        if _efficient_can_run(query, key, value):
            return aten._scaled_dot_product_efficient_attention(
                query, key, value, None, False, 0.0, is_causal, scale=scale
            )[0]
        return F.scaled_dot_product_attention(query, key, value, is_causal=is_causal, scale=scale)


def _dense(*qkv: torch.Tensor) -> bool:
    return len({t.shape[-1] for t in qkv}) == 1 and all(t.stride(-1) == 1 for t in qkv)


def _flash_can_run(*qkv: torch.Tensor) -> bool:
    half = qkv[0].dtype in (torch.float16, torch.bfloat16)
    return half and _dense(*qkv) and qkv[0].shape[-1] <= 256


def _efficient_can_run(*qkv: torch.Tensor) -> bool:
    alignment = 4 if qkv[0].dtype == torch.float32 else 8
    return _dense(*qkv) and qkv[0].shape[-1] % alignment == 0


def _flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, is_causal: bool, scale: float | None
) -> Any:
    head_dim = query.shape[-1]
    padding = -head_dim % 8
    if not padding:
        return aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal, scale=scale)[0]
    query, key, value = (F.pad(t, (0, padding)) for t in (query, key, value))
    scale = head_dim**-0.5 if scale is None else scale
    out = aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal, scale=scale)[0]
    return out[..., :head_dim]
