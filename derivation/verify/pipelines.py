"""Every pipeline class on small configs: does its call run on ``meta``, and is its closed form exact at other sizes?

The configs are one JSON object a line: "class", "parts" (name -> [library, class, config]) and the "call" with tensors
as {"tensor": shape, "dtype"}, images as {"image": [width, height]}; "arguments" of the pipeline's class and "sides" of
images in pixels where they are not the usual.
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
from derivation.trace.arguments import PROMPTS
from derivation.trace.build import Description, Part
from derivation.trace.interpolate import Parted
from derivation.trace.pipeline import TracedPipeline
from derivation.trace.regimes import lengths, regimes

SECONDS = 120
# Image sides of small configs, in pixels.
SIDES = (64, 512)
# What the sizes of a call give.
SIZED = ("generator", *PROMPTS)


@dataclass(frozen=True, slots=True)
class Row:
    """One pipeline: whether its call ran, the sizes of its first regime, equal where held out, or why there is none."""

    pipeline: str
    runs: bool
    covered: str = ""
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
    return Description(document["class"], parts, document.get("arguments", {}))


def arguments(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a document's call that do not depend on sizes, tensors and images made."""
    return {n: _value(value, "mask" in n) for n, value in document["call"].items() if n not in SIZED}


def _value(value: Any, is_mask: bool) -> Any:
    if isinstance(value, list):
        return [_value(each, is_mask) for each in value]
    if isinstance(value, dict) and "tensor" in value:
        return torch.zeros(value["tensor"], dtype=getattr(torch, value["dtype"].removeprefix("torch.")))
    if isinstance(value, dict) and "image" in value:
        return Image.new("RGB", tuple(value["image"]), "white" if is_mask else "black")
    return value


def checked(document: Mapping[str, Any]) -> Row:
    """Return the row of one document, for which no more than ``SECONDS`` of the processor are taken; never raises."""
    previous = signal.signal(signal.SIGPROF, _too_long)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        return _checked(document)
    except TimeoutError as error:
        return Row(document["class"], False, reason=_line(error))
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, previous)


def _too_long(_signal: int, _frame: object) -> None:
    raise TimeoutError(f"it took more than {SECONDS} s of the processor")


def _checked(document: Mapping[str, Any]) -> Row:
    name = document["class"]
    try:
        sides = document.get("sides", SIDES)
        traced = TracedPipeline(description(document), Options(dtype="float32"), arguments(document), sides)
        tokens = lengths(traced)
    except TimeoutError:
        raise
    except Exception as error:
        return Row(name, False, reason=_line(error))
    try:
        regime = next(regimes(traced, True, tokens))
    except Parted as error:
        return Row(name, True, reason=f"its structure depends on {_line(error)}")
    except Exception as error:
        return Row(name, True, reason=_line(error))
    return Row(name, True, ", ".join(f"{n} {r}" for n, r in regime.ranges.items()))


def _line(error: Exception) -> str:
    return " ".join(f"{error or type(error).__name__}".split())[:200]


def survey(documents: Iterable[Mapping[str, Any]], workers: int | None = None) -> Iterator[Row]:
    """Yield the row of each document, in order, on all processors."""
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), max_tasks_per_child=32) as pool:
        yield from pool.map(checked, documents)
