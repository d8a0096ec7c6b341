"""The points of a measurement: sizes x batches x attention backends x dtypes, each with a key of its own."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from itertools import product
from typing import Any

from derivation.call import parse_size
from derivation.errors import DerivationError, positive, unsupported
from derivation.options import Options

MAX_POINTS = 10_000


def parse_sizes(text: str) -> list[tuple[int, int]]:
    """Return (height, width) of each of ``HEIGHTxWIDTH,...``; one number is a square.

    >>> parse_sizes("512,768x512")
    [(512, 512), (768, 512)]
    """
    return [parse_size(part, "grid") for part in text.split(",")]


def parse_list(key: str, text: str) -> list[str]:
    """Return the comma-separated values of ``text``; raises DerivationError for an empty one."""
    values = [part.strip() for part in text.split(",")]
    if not all(values):
        raise unsupported(key, text, "values separated by commas")
    return values


def parse_integers(key: str, text: str) -> list[int]:
    """Return the comma-separated integers >= 1 of ``text``."""
    values = parse_list(key, text)
    if not all(re.fullmatch(r"[0-9]{1,6}", value) for value in values):
        raise unsupported(key, text, "integers from 1, with commas")
    return [positive(key, int(value)) for value in values]


def points(
    model: str,
    options: Options,
    sizes: Sequence[tuple[int, int]],
    batch_sizes: Sequence[int],
    attentions: Sequence[str],
    dtypes: Sequence[str],
    guidance_scale: float = 7.5,
) -> Iterator[dict[str, Any]]:
    """Yield each point: the options of its run, its sizes, and its model; every option is checked."""
    count = len(sizes) * len(batch_sizes) * len(attentions) * len(dtypes)
    if count > MAX_POINTS:
        raise DerivationError(f"grid = {count} points is not supported (supported: up to {MAX_POINTS})")
    for dtype, attention, batch_size, (height, width) in product(dtypes, attentions, batch_sizes, sizes):
        chosen = replace(options, dtype=dtype, attention=attention)
        yield {
            "model": model,
            **asdict(chosen),
            "height": height,
            "width": width,
            "batch_size": batch_size,
            "guidance_scale": guidance_scale,
        }


def key(point: dict[str, Any]) -> str:
    """Return the text that tells one point from every other."""
    return " ".join(f"{name}={value}" for name, value in point.items())
