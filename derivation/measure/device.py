"""What CUDA, the allocator and NVML say about memory, under their own names."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

COUNTERS = ("requested_bytes", "allocated_bytes", "reserved_bytes")


def memory() -> dict[str, Any]:
    """Return the allocator's counters now and at their peaks, its retries, and the device's used bytes."""
    stats = torch.cuda.memory_stats()
    found: dict[str, Any] = {}
    for name in COUNTERS:
        found[name] = stats.get(f"{name}.all.current", 0)
        found[f"peak_{name}"] = stats.get(f"{name}.all.peak", 0)
    free, total = torch.cuda.mem_get_info()
    found["num_alloc_retries"] = stats.get("num_alloc_retries", 0)
    found["total_memory_bytes"] = torch.cuda.get_device_properties(0).total_memory
    found["driver_used_bytes"] = total - free
    return {**found, **nvml_bytes()}


def nvml_bytes() -> dict[str, int | None]:
    """Return nvidia-smi's memory.used and memory.reserved of the current device, None without nvidia-ml-py.

    nvidia-smi reads the second version of NVML's structure; in the first, what the driver reserves is used.
    """
    found: dict[str, int | None] = {"nvml_used_bytes": None, "nvml_reserved_bytes": None}
    try:
        import pynvml
    except ImportError:
        return found
    pynvml.nvmlInit()
    try:
        uuid = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid.encode())
        info = pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2)
        return {"nvml_used_bytes": int(info.used), "nvml_reserved_bytes": int(info.reserved)}
    except (AttributeError, pynvml.NVMLError):
        return found
    finally:
        pynvml.nvmlShutdown()


def versions() -> dict[str, Any]:
    """Return the GPU, its architecture, and the versions of everything that decides memory."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "sm": f"sm{properties.major}{properties.minor}",
        "sm_count": properties.multi_processor_count,
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        **{name: _version(name) for name in ("torch", "diffusers", "transformers")},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def start_history() -> None:
    """Record every allocation and death from now on."""
    torch.cuda.memory._record_memory_history(enabled="all", context=None, stacks="python", max_entries=1_000_000)


def history() -> list[list[Any]]:
    """Return the recorded events as [action, address, bytes], oldest first."""
    traces = torch.cuda.memory._snapshot()["device_traces"]
    return [[e["action"], e.get("addr", 0), e.get("size", 0)] for e in traces[torch.cuda.current_device()]]
