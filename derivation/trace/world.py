"""What stands between a pipeline's Python code and the ``meta`` device, patched for the time of a call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from importlib import import_module
from typing import Any
from unittest.mock import patch

import torch
from diffusers.schedulers import scheduling_euler_discrete

from derivation.trace.offload import meta_as_gpu
from derivation.trace.sdpa import SdpaMode


@contextmanager
def meta_world(attention: str, emptied: Callable[[], None]) -> Iterator[None]:
    """Let pipeline code run on ``meta`` as on CUDA, with SDPA's backend ``attention``; the cache is ``emptied``."""
    with ExitStack() as scope:
        for module, name, value in (
            (torch, "tensor", _from_host(torch.tensor)),
            (torch, "as_tensor", _from_host(torch.as_tensor)),
            (torch, "autocast", _Autocast),
            (torch.amp, "autocast", _Autocast),
            (scheduling_euler_discrete, "torch", _TorchOfLists()),
        ):
            scope.enter_context(patch.object(module, name, value))
        with suppress(ImportError):
            intervals = import_module("torchsde._brownian.brownian_interval")
            scope.enter_context(patch.object(intervals, "_randn", _drawn))
        scope.enter_context(meta_as_gpu(emptied))
        scope.enter_context(torch.no_grad())
        scope.enter_context(SdpaMode(attention))
        yield


def _drawn(size: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int) -> torch.Tensor:
    """torchsde's ``_randn`` without its generator, which ``meta`` has none of: DPM++ SDE's tree of noise."""
    return torch.randn(size, dtype=dtype, device=device)


class _Autocast(torch.autocast):
    """``torch.autocast``, which rejects the device ``meta``: there it does nothing."""

    def __new__(cls, device_type: Any = None, *args: Any, **kwargs: Any) -> Any:
        return _Nothing() if str(device_type) == "meta" else super().__new__(cls)


class _Nothing(nullcontext[None]):
    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return function


def _read(value: Any) -> Any:
    """Return numbers in place of ``meta`` tensors in lists."""
    if isinstance(value, torch.Tensor) and value.is_meta:
        return value.item() if value.dim() == 0 else value.tolist()
    return type(value)(map(_read, value)) if isinstance(value, list | tuple) else value


def _from_host(real: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``real`` with data made on the host and copied, as to a GPU."""

    def made(data: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(data, list | tuple):
            data = _read(data)
        if not isinstance(data, torch.Tensor) and str(kwargs.get("device")).startswith("meta"):
            return real(data, *args, **{**kwargs, "device": "cpu"}).to("meta")
        return real(data, *args, **kwargs)

    return made


class _TensorType(type):
    def __instancecheck__(cls, value: object) -> bool:
        return isinstance(value, torch.Tensor)


class _LegacyTensor(metaclass=_TensorType):
    """``torch.Tensor(list)`` of ``meta`` tensors too (EulerDiscreteScheduler with continuous timesteps)."""

    def __new__(cls, data: Any = (), *args: Any) -> Any:
        return torch.Tensor(_read(data), *args)


class _TorchOfLists:
    Tensor = _LegacyTensor

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)
