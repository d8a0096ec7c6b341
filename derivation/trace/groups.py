"""diffusers' group offload without a GPU: ``meta`` is the device, and what is on the CPU no trace counts.

The hooks, their groups and when they move one are the real code (diffusers/hooks/group_offloading.py). A tensor on the
CPU cannot take the data of one on ``meta``, so the two are swapped instead; streams have nothing to wait for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from diffusers.hooks import group_offloading

DEVICES = {"onload_device": torch.device("meta"), "offload_device": torch.device("cpu")}


@contextmanager
def grouped(models: Iterable[tuple[Any, Mapping[str, Any]]]) -> Iterator[None]:
    """Call ``apply_group_offloading`` on models with its arguments: groups go from the CPU to ``meta`` and back."""
    groups: Any = group_offloading.ModuleGroup
    with ExitStack() as scope:
        for owner, name, value in (
            (groups, "_transfer_tensor_to_device", _load),
            (groups, "_offload_to_memory", _unload),
            (groups, "_init_cpu_param_dict", lambda group: {}),
            (groups, "_pinned_memory_tensors", _sources),
            (group_offloading, "TorchDeviceBackend", _Backend),
        ):
            scope.enter_context(patch.object(owner, name, value))
        for model, given in models:
            group_offloading.apply_group_offloading(model, **DEVICES, **given)
        yield


class _Stream:
    def synchronize(self) -> None:
        """Wait for nothing."""


class _Backend:
    """``torch.cuda``'s streams, of ``meta``."""

    Stream = _Stream

    def __init__(self, device: object) -> None:
        self.device = device

    def stream(self, _: _Stream) -> Any:
        """Return a scope of nothing."""
        return nullcontext()

    def current_stream(self) -> _Stream:
        """Return a stream."""
        return _Stream()


class _Self(dict[Any, Any]):
    """The pinned copy of each tensor: itself."""

    def __bool__(self) -> bool:
        return True

    def __missing__(self, tensor: Any) -> Any:
        return tensor


def _sources(_: Any) -> Any:
    return nullcontext(_Self())


def _load(_: Any, tensor: Any, source: Any, default_stream: object) -> None:
    if not tensor.is_meta:
        _swap(tensor, source.to("meta"))


def _unload(group: Any) -> None:
    """Move a group's tensors to the CPU, without values (ModuleGroup._offload_to_memory)."""
    own = (tensor for module in group.modules for tensor in (*module.parameters(), *module.buffers()))
    for tensor in (*own, *group.parameters, *group.buffers):
        if tensor.is_meta:
            _swap(tensor, torch.empty_like(tensor, device="cpu"))


def _swap(tensor: Any, moved: Any) -> None:
    is_parameter = isinstance(tensor, torch.nn.Parameter)
    torch.utils.swap_tensors(tensor, torch.nn.Parameter(moved, requires_grad=False) if is_parameter else moved)
