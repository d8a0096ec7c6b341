"""What a live pipeline says of itself: the options that it runs with, read off its models without importing torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Set
from typing import Any

from derivation.config import LAYERWISE, is_live_traced
from derivation.errors import shown
from derivation.libraries import LIBRARIES
from derivation.options import Options
from derivation.options.live import adapters, readers, traced
from derivation.options.live.foreign import refuse_foreign, refuse_other_weights
from derivation.options.live.modules import MODELS, READERS, Models, called, models_of, unsupported, up_blocks
from derivation.options.named import options_of

__all__ = ["FREEU", "MODELS", "adapters", "live_options", "live_traced_options", "readers", "refuse_other_weights"]

# free_u: what enable_freeu sets on the up blocks of a UNet
FREEU = ("s1", "s2", "b1", "b2")
# Whose layers a quantised model of a traced pipeline has, as its config says.
QUANTISED = frozenset({"bitsandbytes"})
# The hooks of group offload, with streams those of its first call too (hooks/group_offloading.py).
GROUPED = ("group_offloading", "lazy_prefetch_group_offloading", "layer_execution_tracker")
CLIP = ("text_encoder", "text_encoder_2", "image_encoder")


def live_options(pipe: Any, **given: Any) -> Options:
    """Return the options that ``pipe`` runs with, ``given`` ones as they are; raises DerivationError for others."""
    models = models_of(pipe)
    _refuse(pipe, models)
    found = {name: read(pipe, models) for name, read in READERS.items() if name not in given}
    return options_of({**_installed(), **_environment(), **found, **given})


def live_traced_options(pipe: Any, **given: Any) -> dict[str, Any]:
    """Return the options that a live pipeline of a traced class runs with; raises DerivationError for others."""
    models = models_of(pipe)
    _refuse(pipe, models, {LAYERWISE, *GROUPED}, QUANTISED)
    traced.refuse(models)
    readable: dict[str, Callable[[], Any]] = {
        "attention": readers.sdpa_backend,
        "dtype": lambda: traced.dtype(models),
        "offload": lambda: readers.offload(pipe, models),
    }
    found = {name: read() for name, read in readable.items() if name not in given}
    return {**_installed(), **_environment(), **found, **given}


def _environment() -> dict[str, str]:
    """Return how the process configures its allocator (c10/core/AllocatorConfig.cpp: the older name counts last)."""
    conf = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF")
    return {"alloc_conf": conf} if conf else {}


def _installed() -> dict[str, str]:
    """Return the versions of the libraries that are imported: those that a live pipeline runs on."""
    return {name: str(module.__version__) for name in LIBRARIES if (module := sys.modules.get(name)) is not None}


def _refuse(pipe: Any, models: Models, read: Set[str] = frozenset(), libraries: Set[str] = frozenset()) -> None:
    """Raise for what changes the memory of a call and has no option.

    Hooks that are ``read`` otherwise may be there, and layers of other ``libraries``.
    """
    if any(getattr(block, name, None) is not None for block in up_blocks(models) for name in FREEU):
        raise unsupported("enable_freeu", "on", "FreeU off, by pipe.disable_freeu()")
    if (device_map := getattr(pipe, "hf_device_map", None)) is not None:
        raise unsupported("device_map", shown(device_map), "none, by pipe.reset_device_map()")
    for name, model in models.items():
        if hooks := sorted({hook for module in called(model, "modules") for hook in _hooks(module)} - read):
            raise unsupported(f"{name}'s hooks", ", ".join(hooks), "none of diffusers' own")
        backend = getattr(getattr(model, "config", None), "_attn_implementation", None)
        fused = getattr(model, "_supports_sdpa", False) if is_live_traced(pipe) else name in CLIP
        if fused and backend not in (None, "sdpa"):
            raise unsupported(f"{name}'s attn_implementation", shown(backend), "sdpa")
    refuse_foreign(models, libraries)


def _hooks(module: Any) -> tuple[str, ...]:
    """diffusers/hooks: the names of what group offload, layerwise casting and caches register on a module."""
    return tuple(getattr(getattr(module, "_diffusers_hook", None), "hooks", ()))
