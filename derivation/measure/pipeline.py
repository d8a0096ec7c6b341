"""The real ``__call__`` of a real pipeline with random weights on CUDA."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from derivation.config import load
from derivation.config.checkpoint import BUNDLED
from derivation.measure import device
from derivation.options import Options
from derivation.trace.inputs import arguments
from derivation.trace.modules import modules_of, pipeline_of
from derivation.trace.offload import ENABLE

# What F.scaled_dot_product_attention may choose from, in this order; others fall through as in PyTorch
BACKENDS = {
    "flash": [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
    "efficient": [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
    "math": [SDPBackend.MATH],
    "eager": [SDPBackend.MATH],
}
ALL_BACKENDS = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
    SDPBackend.CUDNN_ATTENTION,
]


def backend(attention: str) -> AbstractContextManager[None]:
    """Return the context in which SDPA takes ``attention``; an unknown one leaves the choice to PyTorch."""
    chosen: AbstractContextManager[None] = sdpa_kernel(BACKENDS.get(attention, ALL_BACKENDS))
    return chosen


def measure_pipeline(job: Mapping[str, Any]) -> dict[str, Any]:
    """Return the memory before, after loading, and at the peaks of one call; raises torch.OutOfMemoryError."""
    torch.cuda.init()
    empty = device.memory()
    pipe = loaded(job)
    torch.cuda.synchronize()
    ready = device.memory()
    torch.cuda.reset_peak_memory_stats()
    if job.get("history"):
        device.start_history()
    with torch.no_grad(), backend(job["attention"]):
        pipe(**call(pipe, job))
    torch.cuda.synchronize()
    found = {"before": empty, "loaded": ready, "run": device.memory()}
    return {**found, "history": device.history()} if job.get("history") else found


def loaded(job: Mapping[str, Any], to: str = "cuda") -> Any:
    """Return the pipeline on the device ``to``: built on the CPU, moved as a user does, then given random weights.

    Under an ``offload`` its models stay on the CPU, from where accelerate moves them.
    """
    options = chosen(job)
    pipe = pipeline_of(folder(job["model"]), replace(options, offload=None))
    for module in modules_of(pipe).values():
        module.to_empty(device="cpu")
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    if options.offload is None:
        pipe.to(to)
    for module in modules_of(pipe).values():
        randomize(module)
    if options.offload is not None:
        getattr(pipe, ENABLE[options.offload])(device=to)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def chosen(job: Mapping[str, Any]) -> Options:
    """Return the options of a job; raises DerivationError for a bad one."""
    return Options(**{field.name: job[field.name] for field in fields(Options) if field.name in job})


def folder(model: str) -> Path:
    """Return the folder of a bundled id or of a checkpoint."""
    checkpoint = load(model)
    return BUNDLED / checkpoint.name if checkpoint.source == "bundled" else Path(checkpoint.source)


def call(pipe: Any, job: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of the job's ``__call__``."""
    sizes = {name: job[name] for name in ("height", "width", "batch_size", "guidance_scale")}
    return arguments(pipe, chosen(job).as_dict(), **sizes)


def randomize(module: torch.nn.Module) -> None:
    """Fill parameters in place with small random numbers, position ids with their positions, other buffers with 0."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.uniform_(-0.02, 0.02)
        for name, buffer in module.named_buffers():
            if name.endswith("position_ids"):
                for i in range(buffer.shape[-1]):
                    buffer[..., i] = i
            else:
                buffer.zero_()
