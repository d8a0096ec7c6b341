"""The page's calculator: live sets as data, for every dtype and attention backend, that JavaScript sums up.

A program is a list of live sets a stage; the page evaluates the size of every storage at the entered sizes,
rounds it up to 512 bytes, and takes the largest sum. Integers stay below 2^53, so JavaScript's numbers are exact.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from derivation.api import Derivation, derive
from derivation.attention import BACKENDS, EAGER
from derivation.config import Checkpoint
from derivation.crossover import Crossover, crossovers
from derivation.hardware.gpus import known, lookup
from derivation.liveness import Point, local_maxima
from derivation.options import DTYPES, Options
from derivation.report.answer import PROMPT_LENGTH, STAGE_TITLES, square_peaks, stage_title
from derivation.report.text import GIB, NARROW_SPACE
from derivation.symbols import SYMBOLS, Size, as_poly
from derivation.tape import Tape

BACKENDS_SHOWN = (EAGER, "math", "efficient", "flash")
HEAD_DIMS = (8, 40, 64, 80, 160, 512)
SHARED_DTYPE = {"bfloat16": "float16"}
ATTENTION_SIDES = tuple(range(256, 2049, 128))
MAX_SIDE, MAX_BATCH, MAX_LENGTH = 8192, 32, 1001
SLIDER_SIDE, SLIDER_BATCH, SLIDER_LENGTH = 2048, 16, 308
DEFAULT_GPU = "rtx-3060"
# Below this much left a verdict says "tight": a CUDA context and cuBLAS workspaces alone take some hundred MiB.
TIGHT_BYTES = GIB

Live = dict[tuple[Size, Size], int]


@dataclass(frozen=True, slots=True)
class Number:
    """A field for an integer with its slider."""

    name: str
    label: str
    hint: str
    value: int
    minimum: int
    maximum: int
    step: int
    slider_min: int
    slider_max: int
    slider_step: int


@dataclass(frozen=True, slots=True)
class Option:
    """One entry of a list."""

    value: str
    label: str


@dataclass(frozen=True, slots=True)
class Choice:
    """A field with a list of entries."""

    name: str
    label: str
    value: str
    options: tuple[Option, ...]


@dataclass(frozen=True, slots=True)
class Calculator:
    """The form's fields, and the script that holds the programs."""

    numbers: tuple[Number, ...]
    choices: tuple[Choice, ...]
    script: Markup


def combinations(checkpoint: Checkpoint, options: Options) -> tuple[tuple[str, str], ...]:
    """Return the (dtype, attention) pairs that have a program of their own."""
    wanted = ((dtype, attention) for dtype in DTYPES for attention in BACKENDS_SHOWN)
    own = [resolved(checkpoint, dtype, attention) for dtype, attention in wanted]
    return tuple(dict.fromkeys([*own, resolved(checkpoint, options.dtype, options.attention)]))


def resolved(checkpoint: Checkpoint, dtype: str, attention: str) -> tuple[str, str]:
    """Return the pair whose program serves: half types alike, a backend that can never run by its fallback.

    pipeline_stable_diffusion_xl.py upcasts a VAE of float16 alone (needs_upcasting), so there they differ.
    """
    if not (checkpoint.whole and checkpoint.pipeline_class.startswith("StableDiffusionXL")):
        dtype = SHARED_DTYPE.get(dtype, dtype)
    while attention in BACKENDS and not any(BACKENDS[attention].usable(dim, dtype) for dim in HEAD_DIMS):
        attention = BACKENDS[attention].fallback or "math"
    return dtype, attention


@dataclass(frozen=True, slots=True)
class Backend:
    """What a report needs of one (dtype, attention): its program, totals of squares, where its peak changes hands."""

    program: dict[str, Any]
    totals: tuple[int, ...]
    crossings: tuple[str, ...]


def backend(checkpoint: Checkpoint, options: Options, dtype: str, attention: str) -> Backend:
    """Derive one combination; the totals are weights + peak bytes of squares with sides ATTENTION_SIDES."""
    chosen: dict[str, Any] = {**options.as_dict(), "dtype": dtype, "attention": attention}
    d = derive(checkpoint, **chosen)
    solved = (dtype, attention) == resolved(checkpoint, options.dtype, EAGER)
    tensors = d if options.gpu is None else derive(checkpoint, **{**chosen, "gpu": None})
    return Backend(
        program=_program(tensors),
        totals=tuple(d.weights_bytes + max(square_peaks(d, side).values()) for side in ATTENTION_SIDES),
        crossings=titled(crossovers(d)) if solved else (),
    )


def titled(found: Sequence[Crossover]) -> tuple[str, ...]:
    """Return the sentences of crossovers with the stages' titles."""
    return tuple(typeset(c.sentence.replace(f"from {c.before} to {c.after}", _move(c))) for c in found)


def typeset(text: str) -> str:
    """Return a sentence with the report's digit groups and multiplication signs.

    >>> ascii(typeset("6,093 pixels (about 78 x 78)").replace(NARROW_SPACE, "_"))
    "'6_093 pixels (about 78 \\\\xd7 78)'"
    """
    return re.sub(r"(?<=\d),(?=\d{3})", NARROW_SPACE, re.sub(r"(?<=\d) x (?=\d)", " \N{MULTIPLICATION SIGN} ", text))


def _move(c: Crossover) -> str:
    return f"from “{stage_title(c.before)}” to “{stage_title(c.after)}”"


def _program(d: Derivation) -> dict[str, Any]:
    """Return a program as JSON data: weights, and live sets with and without guidance, for B = 1 and above."""
    one_image = _one_image(d)
    modes = {}
    for guidance in (True, False):
        one = d.program(guidance).regime(one_image).tape
        many = d.program(guidance).generic.tape
        modes[str(guidance).lower()] = {"one": _live_sets(one), "many": _live_sets(many)}
    return {"weights": d.weights_bytes, "modes": modes}


def _one_image(d: Derivation) -> dict[str, int]:
    """Return a size at which nothing but B is 1; an image that a tiled VAE cuts, as the generic program's is."""
    tile = d.grid.tile
    side = 4 * d.grid.unit if tile is None else max(4 * d.grid.unit, 2 * tile.side * d.grid.vae_scale_factor)
    values = d.sizes(side, side, 1, PROMPT_LENGTH)
    return {name: value if name == "B" else max(value, 2) for name, value in values.items()}


def _live_sets(tape: Tape) -> dict[str, Any]:
    points = local_maxima(tape)
    names = dict.fromkeys(point.stage for point in points)
    atoms: dict[tuple[Size, Size], int] = {}
    stages = []
    for name in names:
        own = [point for point in points if point.stage == name]
        lives = _maximal([_live(point) for point in own])
        stages.append({"name": name, "limit": own[0].max_length, "points": [_numbered(x, atoms) for x in lives]})
    return {"atoms": [[_polynomial(n), _polynomial(c)] for n, c in atoms], "stages": stages}


def _live(point: Point) -> Live:
    """Return how often each (nbytes, count) occurs; integer counts become multiplicities."""
    found: Live = {}
    for nbytes, count in point.terms:
        key, times = ((nbytes, 1), count) if isinstance(count, int) else ((nbytes, count), 1)
        found[key] = found.get(key, 0) + times
    return found


def _maximal(lives: Sequence[Live]) -> list[Live]:
    """Drop each live set that another contains: it holds at most as many bytes at every size."""
    columns = {key: i for i, key in enumerate(dict.fromkeys(key for live in lives for key in live))}
    table = np.zeros((len(lives), len(columns)), dtype=np.int64)
    for row, live in enumerate(lives):
        for key, times in live.items():
            table[row, columns[key]] = times
    kept: list[int] = []
    for row in np.argsort(-table.sum(axis=1), kind="stable"):
        if not (table[kept] >= table[row]).all(axis=1).any():
            kept.append(int(row))
    return [lives[row] for row in sorted(kept)]


def _numbered(live: Live, atoms: dict[tuple[Size, Size], int]) -> list[int]:
    """Return a live set as atom, times, atom, times, ..."""
    return [n for key, times in live.items() for n in (atoms.setdefault(key, len(atoms)), times)]


def _polynomial(size: Size) -> list[list[int]]:
    """Return a polynomial as [coefficient, symbol, symbol, ...] rows, a symbol once a power."""
    return [
        [int(c), *(i for i, power in enumerate(monomial) for _ in range(power))]
        for monomial, c in as_poly(size).items()
    ]


def calculator(d: Derivation, backends: Mapping[tuple[str, str], Backend]) -> Calculator:
    """Return the calculator of a report."""
    choices = _choices(d.options)
    table = {
        f"{dtype.value}/{attention.value}": "/".join(resolved(d.checkpoint, dtype.value, attention.value))
        for dtype in choices[0].options
        for attention in choices[1].options
    }
    data = {
        "programs": {"/".join(key): value.program for key, value in backends.items()},
        "aliases": table,
        "cards": _cards(),
        "factor": d.grid.vae_scale_factor,
        "levels": d.grid.levels,
        "tile": d.grid.tile,
        "symbols": [s.name for s in SYMBOLS],
        "multiple": d.grid.vae_scale_factor if d.options.pipeline == "txt2img" else 1,
        "reserve": TIGHT_BYTES,
        "titles": dict(STAGE_TITLES),
    }
    return Calculator(_numbers(d), choices, _script(data))


def _script(data: Mapping[str, Any]) -> Markup:
    """Return JSON that cannot end a script element."""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=True)
    return Markup("const CALCULATOR = " + text.replace("<", "\\u003c").replace("&", "\\u0026") + ";")


def _numbers(d: Derivation) -> tuple[Number, ...]:
    least = 2 * d.grid.unit
    step = d.grid.vae_scale_factor if d.options.pipeline == "txt2img" else 1
    side = f"pixels, {least} to {MAX_SIDE}"
    sides = (least, MAX_SIDE, step, least, SLIDER_SIDE, d.grid.unit)
    return (
        Number("height", "Height H", side, 512, *sides),
        Number("width", "Width W", side, 512, *sides),
        Number("batch_size", "Batch size B", f"1 to {MAX_BATCH}", 1, 1, MAX_BATCH, 1, 1, SLIDER_BATCH, 1),
        Number(
            "prompt_length",
            "Prompt length L",
            f"tokens; diffusers pads to {PROMPT_LENGTH}",
            PROMPT_LENGTH,
            2,
            MAX_LENGTH,
            1,
            PROMPT_LENGTH,
            SLIDER_LENGTH,
            PROMPT_LENGTH,
        ),
    )


def _choices(options: Options) -> tuple[Choice, ...]:
    backends = tuple(dict.fromkeys([*BACKENDS_SHOWN, options.attention]))
    return (
        Choice("dtype", "Precision", options.dtype, tuple(Option(name, name) for name in DTYPES)),
        Choice("attention", "Attention", options.attention, tuple(Option(name, name) for name in backends)),
        Choice("gpu", "GPU", DEFAULT_GPU, tuple(Option(key, card["label"]) for key, card in _cards().items())),
    )


def _cards() -> dict[str, dict[str, Any]]:
    """Return the cards with a known memory, the smallest first; torch's figure where there is one."""
    cards: dict[str, dict[str, Any]] = {}
    for key in known():
        gpu = lookup(key)
        nbytes = gpu.total_memory_bytes or gpu.nvidia_smi_bytes
        if nbytes and not gpu.is_architecture:
            cards[key] = {"name": gpu.name, "label": f"{gpu.name}, {nbytes / GIB:.1f} GiB", "bytes": nbytes}
    return dict(sorted(cards.items(), key=lambda item: item[1]["bytes"]))
