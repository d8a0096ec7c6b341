"""accelerate's CPU offload without a GPU: ``meta`` is the device, and what is on the CPU no trace counts.

The hooks, what they move and when are the real code. accelerate parks an offloaded leaf's parameters on ``meta``,
which is the device here, so they are parked on the CPU instead; ``meta`` has no cache to empty, so it is noted when.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any
from unittest.mock import patch

import torch
from accelerate import cpu_offload, hooks
from diffusers.pipelines import pipeline_utils

DEVICE = torch.device("meta")
ENABLE = {"model": "enable_model_cpu_offload", "sequential": "enable_sequential_cpu_offload"}


def on_cpu(model: torch.nn.Module) -> torch.nn.Module:
    """Return a copy of a model on ``meta`` whose parameters and buffers are on the CPU, without values."""
    return deepcopy(model).to_empty(device="cpu")


def offload_pipeline(pipe: Any, offload: str, hooked: Callable[[], None] = lambda: None) -> None:
    """Call the pipeline's ``enable_..._cpu_offload``; its models are replaced by copies that start on the CPU.

    ``hooked`` puts other hooks onto them first, of which a copy would call the first models.
    """
    for name, model in pipe.components.items():
        if isinstance(model, torch.nn.Module):
            setattr(pipe, name, on_cpu(model))
    hooked()
    with meta_as_gpu():
        getattr(pipe, ENABLE[offload])(device=DEVICE)
    _without_index(pipe)


def offload_model(model: torch.nn.Module) -> torch.nn.Module:
    """Return a copy of ``model`` as ``enable_sequential_cpu_offload`` leaves it."""
    model = on_cpu(model)
    with meta_as_gpu():
        return cpu_offload(model, DEVICE, offload_buffers=len(model._parameters) > 0)


@contextmanager
def meta_as_gpu(emptied: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Let accelerate's hooks take the CPU where they name ``"meta"``, and diffusers empty no cache.

    ``emptied`` is called where accelerate empties it: set_module_tensor_to_device does, after what is not parked.
    """
    place = hooks.set_module_tensor_to_device

    def placed(module: Any, tensor_name: str, device: Any, **kwargs: Any) -> None:
        if isinstance(device, str) and device == "meta":
            device, kwargs = "cpu", {"value": torch.empty_like(getattr(module, tensor_name), device="cpu")}
        place(module, tensor_name, device, **kwargs)
        if device != "cpu":
            emptied()

    with (
        patch.object(hooks, "set_module_tensor_to_device", placed),
        # diffusers before 0.34 has no such function
        patch.object(pipeline_utils, "empty_device_cache", lambda device_type: None, create=True),
    ):
        yield


def _without_index(pipe: Any) -> None:
    """Put ``meta`` in place of ``meta:0``: a hook compares its device with the tensors', which have no index."""
    models = [model for model in pipe.components.values() if isinstance(model, torch.nn.Module)]
    for module in (module for model in models for module in model.modules()):
        hook = getattr(module, "_hf_hook", None)
        for each in getattr(hook, "hooks", [hook]):
            if getattr(each, "execution_device", None) is not None:
                each.execution_device = DEVICE
