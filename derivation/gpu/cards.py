"""The GPU table: what each card is, how much memory torch and nvidia-smi see, and where that is written."""

from __future__ import annotations

import difflib
import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from derivation.errors import DerivationError, UnsupportedConfig, positive, shown, unsupported
from derivation.text import GIB, human, parse_bytes

TABLE = Path(__file__).with_name("gpus.json")
_FIGURES = ("compute_capability", "sm_count", "total_memory_bytes", "nvidia_smi_bytes", "context_bytes")
# Devices of torch whose libraries and allocators are not modelled, by how their names begin.
FOREIGN = re.compile(r"amd|radeon|instinct|mi\d{2,3}|rx\d|rocm|mps|apple|m\d(pro|max|ultra)?$|xpu|intel|arc|gaudi|tpu")
NVIDIA_ALONE = "NVIDIA cards: other vendors' libraries and allocators are not modelled"
# How alike, as difflib counts it, what was typed and a card's name are at least where that card was meant.
CLOSE = 0.75
_WORDS = re.compile(r"nvidia|geforce|tesla|generation|graphics|gpu|card|[\s_\-()]")
_CAPACITY = re.compile(r"(.+?)[\s_\-]+(([0-9.]+)\s*([kmgt]?i?b?))(\s+free)?", re.IGNORECASE)
_CARD_KEYS = ("name", "compute_capability", "sm_count", "total_memory_bytes", "nvidia_smi_bytes", "context_bytes")


@dataclass(frozen=True, slots=True)
class Gpu:
    """One card, or one architecture without sizes; None is unknown, `sources` names each figure's origin.

    `total_memory_bytes` is torch.cuda.get_device_properties().total_memory, `nvidia_smi_bytes` is
    nvidia-smi's memory.total, `context_bytes` what the process holds beside torch's reserved memory.
    `estimated` says that the total was not read on the card but follows from nvidia-smi's (``_estimated``).
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
    estimated: bool = False

    @property
    def sm(self) -> str:
        """The compute capability as nvcc and the scratch profiles write it, such as sm89."""
        return "sm{}{}".format(*self.compute_capability)

    @property
    def is_architecture(self) -> bool:
        """Whether this stands for every card of an architecture."""
        return self.key == self.sm

    def nearest_context(self) -> tuple[int, Gpu] | None:
        """Context bytes of this card, else of the nearest card with a documented figure, and that card."""
        source = self if self.context_nearest is None else lookup(self.context_nearest)
        return None if source.context_bytes is None else (source.context_bytes, source)


def lookup(name: str) -> Gpu:
    """Find a card or architecture by a name as people write it, or in a JSON file; a capacity may follow.

    The capacity is nvidia-smi's memory.total: a whole number of gigabytes that the card has anyway is the card
    itself. With "free" behind it, it is what the process may still reserve, its CUDA context being there.
    Raises DerivationError for an unknown card, with the one that was meant where a name is close.

    >>> lookup("NVIDIA GeForce RTX 4090").key, lookup("4070 laptop").key, lookup("rtx 3060 12gb").key
    ('rtx-4090', 'rtx-4070-laptop', 'rtx-3060')
    >>> lookup("sm_89").total_memory_bytes, lookup("rtx 3060 8GiB").total_memory_bytes
    (None, 8213495808)
    """
    if (card := _named(name)) is not None:
        return card
    found = _CAPACITY.fullmatch(re.sub(r"[()]", " ", name).strip())
    if found is not None and (found[5] or _named(found[1]) is not None):
        return _sized(lookup(found[1]), found)
    raise _unknown(name)


def known() -> tuple[str, ...]:
    """Keys of the table: cards first, then architectures."""
    return tuple(_table())


def on_pages() -> tuple[str, ...]:
    """Keys of the cards that a report page names for their kinds, the first by default."""
    return tuple(_file()["pages"])


def spellings() -> dict[str, str]:
    """Return the key of every card and architecture by its names as ``lookup`` compares them: see _WORDS."""
    return {text: card.key for text, card in _by_alias().items()}


class SeveralCards(UserWarning):
    """A name that cards of several capacities have."""


def variants(name: str) -> tuple[Gpu, ...]:
    """Return the card that a name without a capacity is taken as, then the others that the capacity tells apart.

    >>> [card.key for card in variants("A100")], variants("a100 40gb"), variants("rtx 3060")
    (['a100-80gb', 'a100-40gb'], (), ())
    """
    short, aliases = _squeeze(name), _by_alias()
    sized = [card for text, card in aliases.items() if re.fullmatch(rf"{re.escape(short)}\d+gb", text)]
    taken = aliases.get(short)
    found = () if taken is None else tuple(dict.fromkeys(card.key for card in (taken, *sized)))
    return tuple(_table()[key] for key in found) if len(found) > 1 else ()


def tell_variants(name: object, memory: object = None) -> None:
    """Warn SeveralCards where a GPU's name lacks the capacity that tells which card is meant, and ``memory``, too."""
    if isinstance(name, str) and memory is None and (said := taken_as(name)):
        warnings.warn(f"gpu = {shown(name)} {said}", SeveralCards, 3)


def taken_as(name: str) -> str:
    """Return which card a name of several is taken as, and which others there are; "" for another name."""
    taken, *others = (f"{card.key}, {human(_size(card))}" for card in variants(name)) if variants(name) else [""]
    return f"is taken as {taken}; there is {' and '.join(others)}" if others else ""


def of_device(name: str, total_bytes: int) -> str:
    """Return the name of the card that torch calls so, and whose total memory is nearest; raises DerivationError."""
    if not (found := variants(name)):
        return lookup(name).key
    near = min(found, key=lambda card: abs(_size(card) - total_bytes))
    return f"{near.key} {round(_size(near) / GIB)}GB"


def _size(card: Gpu) -> int:
    return card.total_memory_bytes or card.nvidia_smi_bytes or 0


def memory_bytes(text: str, key: str = "memory") -> int:
    """Return the bytes of a capacity; raises DerivationError for a bare number that is more GiB than any card has."""
    nbytes, most = parse_bytes(text, key), most_bytes()
    if nbytes > most and text.strip().replace(".", "").isdecimal():
        units = f"a bare number is GiB, of a card up to {human(most)}"
        raise unsupported(key, text, f"{units}; did you mean {text.strip()}MiB or {text.strip()}GiB?")
    return nbytes


def most_bytes() -> int:
    """Return nvidia-smi's memory.total of the largest card."""
    return max(card.nvidia_smi_bytes or 0 for card in _table().values())


def with_memory(gpu: str | None, memory: str, free: bool = False) -> str:
    """Return the name of ``gpu`` with another capacity, such as "12GiB", or with so much of it free.

    Raises DerivationError without a GPU.
    """
    memory_bytes(memory)
    if gpu is None:
        raise DerivationError(f"memory = {shown(memory)} needs a card that gpu names (fit and recommend take it alone)")
    return f"{gpu} {memory.strip()}" + " free" * free


def _named(name: str) -> Gpu | None:
    if name.endswith(".json"):
        return _from_file(Path(name))
    return _by_alias().get(_squeeze(name))


def _sized(card: Gpu, capacity: re.Match[str]) -> Gpu:
    nbytes = memory_bytes(capacity[2])
    if capacity[5]:
        given = dict.fromkeys(("total_memory_bytes", "context_bytes"), "as given: free memory, the context being there")
        here = replace(card, key=f"{card.key} {capacity[2]} free", sources={**card.sources, **given})
        return replace(here, total_memory_bytes=nbytes, context_bytes=0, context_nearest=None, estimated=False)
    if capacity[4].lower() in ("", "g", "gb", "gib"):
        nominal = card.nvidia_smi_bytes or card.total_memory_bytes or 0
        own = card if float(capacity[3]) == round(nominal / GIB) else _named(f"{card.key} {capacity[3]}gb")
        if own is not None:
            return own
    key = f"{card.key} {capacity[2]}"
    sources = {**card.sources, "nvidia_smi_bytes": "as given"}
    other = replace(card, key=key, nvidia_smi_bytes=nbytes, total_memory_bytes=None, sources=sources)
    return _estimated(replace(other, context_bytes=None, context_nearest=card.context_nearest or card.key))


def _unknown(name: str) -> DerivationError:
    text = _squeeze(name)
    if FOREIGN.match(text):
        return unsupported("gpu", name, NVIDIA_ALONE)
    if re.fullmatch(r"[0-9.]+\s*[kmgt]i?b?", name.strip(), re.IGNORECASE):
        raise unsupported("gpu", name, "a card's name; fit and recommend take memory without a card")
    close = difflib.get_close_matches(text, _by_alias(), n=1, cutoff=CLOSE)
    if close:
        return DerivationError(f"gpu = {shown(name)} is not supported (did you mean {_by_alias()[close[0]].key}?)")
    return unsupported("gpu", name, f"{', '.join(known())}, or a JSON file with {', '.join(_CARD_KEYS)}")


def _squeeze(name: str) -> str:
    return re.sub(r"(\d)gib$", r"\1gb", _WORDS.sub("", name.lower()))


@cache
def _by_alias() -> dict[str, Gpu]:
    """Return every spelling: keys, names and aliases, each also without "rtx" or "gtx" before a figure."""
    aliases: dict[str, Gpu] = {}
    for gpu in _table().values():
        full = [_squeeze(text) for text in (gpu.key, gpu.name, *_entries()[gpu.key]["aliases"])]
        for alias in (*full, *(re.sub(r"^[rg]tx(?=a?\d)", "", text) for text in full)):
            if aliases.setdefault(alias, gpu) is not gpu:
                raise DerivationError(f"{TABLE.name}: {alias!r} names both {aliases[alias].key} and {gpu.key}")
    return aliases


@cache
def _table() -> dict[str, Gpu]:
    read = {key: _gpu(key, entry) for key, entry in _entries().items()}
    return {key: _estimated(gpu, tuple(read.values())) for key, gpu in read.items()}


@cache
def _file() -> dict[str, Any]:
    read: dict[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))
    return read


def _entries() -> dict[str, dict[str, Any]]:
    return {**_file()["gpus"], **_file()["architectures"]}


def _gpu(key: str, entry: Mapping[str, Any]) -> Gpu:
    figures = {name: entry[name] for name in _FIGURES}
    for name, figure in figures.items():
        if figure is not None and not figure.get("source"):
            raise DerivationError(f"{TABLE.name}: {key}.{name} has no source")
    value = {name: figure and figure["value"] for name, figure in figures.items()}
    value["compute_capability"] = tuple(value["compute_capability"])
    return Gpu(
        key=key,
        name=entry["name"],
        architecture=entry["architecture"],
        **value,
        context_nearest=entry["context_nearest"],
        sources={name: figure["source"] for name, figure in figures.items() if figure is not None},
    )


def _estimated(card: Gpu, table: tuple[Gpu, ...] = ()) -> Gpu:
    """Return the card with a total: nvidia-smi's, less the share that the driver keeps of the nearest card.

    Nearest is the card of the same compute capability whose nvidia-smi total is nearest, of two such the one that the
    driver keeps more of; where it keeps nothing the total was read on Windows.
    """
    smi, others = card.nvidia_smi_bytes, table or tuple(_table().values())
    alike = [gpu for gpu in others if gpu.compute_capability == card.compute_capability and not gpu.estimated]
    pairs = [(gpu.nvidia_smi_bytes, gpu.total_memory_bytes, gpu) for gpu in alike]
    both = [(s, t, gpu) for s, t, gpu in pairs if s and t and t < s]
    if card.total_memory_bytes is not None or smi is None or not both:
        return card
    near_smi, near_total, near = min(both, key=lambda pair: (abs(pair[0] - smi), pair[1] / pair[0]))
    source = f"estimated: {human(smi)} by the ratio of torch's to nvidia-smi's total of {near.name}"
    sources = {**card.sources, "total_memory_bytes": source}
    return replace(card, total_memory_bytes=smi * near_total // near_smi, estimated=True, sources=sources)


def _from_file(path: Path) -> Gpu:
    """Return the card of a JSON file: a compute capability, nvidia-smi's or torch's total, and what else is known."""
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DerivationError(f"gpu = {str(path)!r} cannot be read: {error}") from None
    if not isinstance(entry, dict) or (unknown := [key for key in entry if key not in _CARD_KEYS]):
        key = unknown[0] if isinstance(entry, dict) else "the document"
        raise UnsupportedConfig(path.name, key, None, f"an object with {', '.join(_CARD_KEYS)}")
    sm = "sm" + "".join(map(str, entry.get("compute_capability") or ()))
    near = _table().get(sm)
    if near is None:
        listed = ", ".join(str(list(gpu.compute_capability)) for gpu in _table().values() if gpu.is_architecture)
        raise UnsupportedConfig(path.name, "compute_capability", entry.get("compute_capability"), listed)
    given: dict[str, Any] = {key: positive(key, entry[key]) for key in _FIGURES[1:] if entry.get(key) is not None}
    if not given.keys() & {"total_memory_bytes", "nvidia_smi_bytes"}:
        raise UnsupportedConfig(path.name, "nvidia_smi_bytes", None, "bytes of nvidia-smi's memory.total, or torch's")
    if "context_bytes" in given:
        given["context_nearest"] = None
    sources = dict.fromkeys(entry, path.name)
    return _estimated(replace(near, key=str(path), name=str(entry.get("name", path.stem)), sources=sources, **given))
