"""Every pipeline class on small configs: does its call run on ``meta``, and is its closed form exact at other sizes?

The configs are one JSON object a line: "class", "parts" (name -> [library, class, config]) and the "call" with tensors
as {"tensor": shape, "dtype"}, images as {"image": [width, height]}.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from derivation.errors import DerivationError
from derivation.options import Options
from derivation.trace.build import Description, Part
from derivation.trace.interpolate import Parted
from derivation.trace.pipeline import TracedPipeline, lengths, regimes

SECONDS = 90
# Image sides of small configs, in pixels.
SIDES = (64, 512)
# What the sizes of a call give.
SIZED = ("height", "width", "max_sequence_length", "num_frames", "generator")


@dataclass(frozen=True, slots=True)
class Row:
    """One pipeline: whether its call ran, the sizes at which its closed form is exact, or why there is none."""

    pipeline: str
    runs: bool
    covered: tuple[str, ...] = ()
    reason: str = ""

    @property
    def exact(self) -> bool:
        """Whether a closed form equals the traces at sizes that were held out."""
        return bool(self.covered)

    def as_dict(self) -> dict[str, Any]:
        """Return the row as JSON values."""
        return asdict(self)


def read(path: Path) -> list[dict[str, Any]]:
    """Return the documents of a file; raises DerivationError where there is none."""
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise DerivationError(f"{path}: no JSON lines: {error}") from None


def description(document: Mapping[str, Any]) -> Description:
    """Return the pipeline of a document."""
    parts = {name: None if part is None else Part(*part) for name, part in document["parts"].items()}
    return Description(document["class"], parts)


def arguments(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a document's call that do not depend on sizes, tensors and images made."""
    return {name: _value(value) for name, value in document["call"].items() if not _is_sized(name)}


def _is_sized(name: str) -> bool:
    return name in SIZED or name.endswith("prompt")


def _value(value: Any) -> Any:
    if isinstance(value, list):
        return list(map(_value, value))
    if isinstance(value, dict) and "tensor" in value:
        return torch.zeros(value["tensor"], dtype=getattr(torch, value["dtype"].removeprefix("torch.")))
    return Image.new("RGB", tuple(value["image"])) if isinstance(value, dict) and "image" in value else value


def checked(document: Mapping[str, Any]) -> Row:
    """Return the row of one document, of which nothing takes longer than ``SECONDS``; never raises."""
    previous = signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(SECONDS)
    try:
        return _checked(document)
    except TimeoutError as error:
        return Row(document["class"], False, reason=_line(error))
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def _too_long(_signal: int, _frame: object) -> None:
    raise TimeoutError(f"it took longer than {SECONDS} s")


def _checked(document: Mapping[str, Any]) -> Row:
    name = document["class"]
    try:
        traced = TracedPipeline(description(document), Options(dtype="float32"), arguments(document), SIDES)
        tokens = lengths(traced)
    except TimeoutError:
        raise
    except Exception as error:
        return Row(name, False, reason=_line(error))
    try:
        found = list(regimes(traced, True, tokens))
    except Parted as error:
        return Row(name, True, reason=f"its structure depends on {_line(error)}")
    except Exception as error:
        return Row(name, True, reason=_line(error))
    return Row(name, True, tuple(", ".join(f"{n} {r}" for n, r in regime.ranges.items()) for regime in found))


def _line(error: Exception) -> str:
    return " ".join(f"{error or type(error).__name__}".split())[:200]


def survey(documents: Iterable[Mapping[str, Any]], workers: int | None = None) -> Iterator[Row]:
    """Yield the row of each document, in order, on all processors."""
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), max_tasks_per_child=8) as pool:
        yield from pool.map(checked, documents)
