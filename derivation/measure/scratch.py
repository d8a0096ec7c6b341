"""What one convolution or attention call allocates beside its output, for each distinct shape of a model."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from derivation.api import Derivation
from derivation.config import load
from derivation.measure.device import memory
from derivation.measure.pipeline import backend
from derivation.options import Options
from derivation.verify import compare
from derivation.walk.subject import WalkedSubject

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
Shape = dict[str, Any]


def measure_scratch(job: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row for every distinct convolution, in both memory formats, and attention of the model's calls.

    A shape that does not fit has ``scratch_bytes`` None.
    """
    dtype = getattr(torch, job["dtype"])
    rows = [{**shape, **_measured(_call(shape, dtype, job["attention"]))} for shape in shapes(job)]
    return {"rows": rows, **memory()}


def shapes(job: Mapping[str, Any]) -> list[Shape]:
    """Return the distinct shapes of one run at ``job``'s size, traced on the meta device."""
    # the math path alone leaves F.scaled_dot_product_attention to an outer mode
    derivation = Derivation(WalkedSubject(load(job["model"]), Options(dtype=job["dtype"], attention="math")))
    found: dict[str, Shape] = {}

    def seen(shape: Shape) -> None:
        found.setdefault(repr(shape), shape)

    handle = register_module_forward_pre_hook(lambda module, inputs: _see_convolution(module, inputs, seen))
    try:
        with _AttentionShapes(seen):
            sizes = (job["height"], job["width"], job["batch_size"])
            compare.compare_components(derivation, *sizes, guidance=job["guidance_scale"] > 1)
    finally:
        handle.remove()
    return list(found.values())


def _see_convolution(module: torch.nn.Module, inputs: tuple[Any, ...], seen: Callable[[Shape], None]) -> None:
    if not isinstance(module, torch.nn.Conv2d):
        return
    for memory_format in FORMATS:
        seen(
            {
                "op": "convolution",
                "input": list(inputs[0].shape),
                "weight": list(module.weight.shape),
                "stride": list(module.stride),
                "padding": list(module.padding),
                "memory_format": memory_format,
            }
        )


class _AttentionShapes(TorchFunctionMode):
    """Report the shapes of every F.scaled_dot_product_attention call."""

    def __init__(self, seen: Callable[[Shape], None]) -> None:
        super().__init__()
        self._seen = seen

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            named = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
            shape = {name: list(named[name].shape) for name in ("query", "key")}
            self._seen({"op": "attention", **shape, "is_causal": bool(named.get("is_causal"))})
        return func(*args, **(kwargs or {}))


def _call(shape: Shape, dtype: torch.dtype, attention: str) -> Iterator[Callable[[], torch.Tensor]]:
    """Yield the call of one shape, its inputs alive on the GPU."""
    with torch.no_grad():
        if shape["op"] == "convolution":
            memory_format = FORMATS[shape["memory_format"]]
            x, weight = (
                torch.zeros(shape[name], dtype=dtype, device="cuda").to(memory_format=memory_format)
                for name in ("input", "weight")
            )
            yield lambda: F.conv2d(x, weight, stride=shape["stride"], padding=shape["padding"])
        else:
            query = _heads(shape["query"], dtype)
            key, value = (_heads(shape["key"], dtype) for _ in range(2))
            with backend(attention):
                yield lambda: F.scaled_dot_product_attention(query, key, value, is_causal=shape["is_causal"])


def _heads(shape: list[int], dtype: torch.dtype) -> torch.Tensor:
    """Return zeros [N, heads, S, D] in diffusers' layout, [N, S, heads, D]."""
    batch, heads, tokens, head_dim = shape
    return torch.zeros(batch, tokens, heads, head_dim, dtype=dtype, device="cuda").transpose(1, 2)


def _measured(calls: Iterator[Callable[[], torch.Tensor]]) -> dict[str, int | None]:
    """Return the requested bytes of one call: its output's, and its scratch on the first and on a later run."""
    found: dict[str, int | None] = {"output_bytes": None, "first_scratch_bytes": None, "scratch_bytes": None}
    try:
        for call in calls:
            output_bytes, found["first_scratch_bytes"] = _scratch(call)
            found["output_bytes"], found["scratch_bytes"] = output_bytes, _scratch(call)[1]
    except torch.OutOfMemoryError:
        pass
    gc.collect()
    torch.cuda.empty_cache()
    return found


def _scratch(call: Callable[[], torch.Tensor]) -> tuple[int, int]:
    """Return (bytes of the output's storage, requested bytes at the peak beyond it)."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats().get("requested_bytes.all.current", 0)
    output = call()
    torch.cuda.synchronize()
    peak = torch.cuda.memory_stats()["requested_bytes.all.peak"]
    nbytes = output.untyped_storage().nbytes()
    return nbytes, peak - before - nbytes
