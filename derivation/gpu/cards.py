"""The GPU table: what each card is, how much memory torch and nvidia-smi see, and where that is written."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from derivation.errors import DerivationError

TABLE = Path(__file__).with_name("gpus.json")
_FIGURES = ("compute_capability", "sm_count", "total_memory_bytes", "nvidia_smi_bytes", "context_bytes")


@dataclass(frozen=True, slots=True)
class Gpu:
    """One card, or one architecture without sizes; None is unknown, `sources` names each figure's origin.

    `total_memory_bytes` is torch.cuda.get_device_properties().total_memory, `nvidia_smi_bytes` is
    nvidia-smi's memory.total, `context_bytes` what the process holds beside torch's reserved memory.
    """

    key: str
    name: str
    architecture: str
    compute_capability: tuple[int, int]
    sm_count: int | None
    total_memory_bytes: int | None
    nvidia_smi_bytes: int | None
    context_bytes: int | None
    context_nearest: str | None
    sources: Mapping[str, str]

    @property
    def sm(self) -> str:
        """The compute capability as nvcc and the scratch profiles write it, such as sm89."""
        return "sm{}{}".format(*self.compute_capability)

    @property
    def is_architecture(self) -> bool:
        """Whether this stands for every card of an architecture."""
        return self.key == self.sm

    def nearest_context(self) -> tuple[int, "Gpu"] | None:
        """Context bytes of this card, else of the nearest card with a documented figure, and that card."""
        source = self if self.context_nearest is None else lookup(self.context_nearest)
        return None if source.context_bytes is None else (source.context_bytes, source)


def lookup(name: str) -> Gpu:
    """Find a card or architecture by name, ignoring case, spaces, dashes and underscores.

    >>> lookup("NVIDIA GeForce RTX 4090").key, lookup("rtx4090").sm, lookup("sm_89").total_memory_bytes
    ('rtx-4090', 'sm89', None)
    """
    found = _by_alias().get(_squeeze(name))
    if found is None:
        raise DerivationError(f"unknown GPU {name!r}; known: {', '.join(known())}")
    return found


def known() -> tuple[str, ...]:
    """Keys of the table: cards first, then architectures."""
    return tuple(gpu.key for gpu in _table())


def _squeeze(name: str) -> str:
    return re.sub(r"[\s_\-]|nvidia|geforce|tesla|generation", "", name.lower())


@cache
def _by_alias() -> dict[str, Gpu]:
    aliases: dict[str, Gpu] = {}
    for gpu in _table():
        for alias in {_squeeze(text) for text in (gpu.key, gpu.name, *_entries()[gpu.key]["aliases"])}:
            if aliases.setdefault(alias, gpu) is not gpu:
                raise DerivationError(f"{TABLE.name}: {alias!r} names both {aliases[alias].key} and {gpu.key}")
    return aliases


@cache
def _table() -> tuple[Gpu, ...]:
    return tuple(_gpu(key, entry) for key, entry in _entries().items())


@cache
def _entries() -> dict[str, dict[str, Any]]:
    raw = json.loads(TABLE.read_text(encoding="utf-8"))
    return {**raw["gpus"], **raw["architectures"]}


def _gpu(key: str, entry: Mapping[str, Any]) -> Gpu:
    figures = {name: entry[name] for name in _FIGURES}
    for name, figure in figures.items():
        if figure is not None and not figure.get("source"):
            raise DerivationError(f"{TABLE.name}: {key}.{name} has no source")
    major, minor = figures["compute_capability"]["value"]
    value = {name: figure and figure["value"] for name, figure in figures.items()}
    return Gpu(
        key=key,
        name=entry["name"],
        architecture=entry["architecture"],
        compute_capability=(major, minor),
        sm_count=value["sm_count"],
        total_memory_bytes=value["total_memory_bytes"],
        nvidia_smi_bytes=value["nvidia_smi_bytes"],
        context_bytes=value["context_bytes"],
        context_nearest=entry["context_nearest"],
        sources={name: figure["source"] for name, figure in figures.items() if figure is not None},
    )
