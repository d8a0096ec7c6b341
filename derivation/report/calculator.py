"""The page's calculator: the tapes of the options that people use, the cards, and the form around them."""

from __future__ import annotations

import base64
import json
import shlex
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from typing import Any

from derivation.allocator.memory import context_of
from derivation.api import Derivation
from derivation.call import size_text
from derivation.errors import DerivationError
from derivation.gpu.cards import CLOSE, FOREIGN, NVIDIA_ALONE, Gpu, most_bytes, on_pages, spellings, taken_as
from derivation.options import TABLE
from derivation.options.choices import DTYPES, EAGER, OFFLOADS, PIPELINES, SDPA
from derivation.options.row import flag
from derivation.report.answer import STAGE_TITLES
from derivation.report.kernels import HALVES, Kernel, listed
from derivation.report.tapes import Tapes
from derivation.tape.recorded import RecordedSubject
from derivation.tape.subject import Subject
from derivation.text import GIB
from derivation.verdict import confidence, margin_reason, worst
from derivation.walk.pipelines import SAFETY_CHECKER
from derivation.walk.subject import WalkedSubject

MAX_SIDE, MAX_BATCH = 2048, 16
# The side of a square, in VAE tiles, that has every kind of tile.
TILED_SIDE = 2
# What the form switches: the option or the call's guidance, its label, what it may be.
SWITCHES: Mapping[str, tuple[str, tuple[Any, ...]]] = {
    "pipeline": ("Pipeline", PIPELINES),
    "dtype": ("Precision", DTYPES),
    "attention": ("Attention", (SDPA, EAGER)),
    "offload": ("CPU offload", (None, *OFFLOADS)),
    "num_images_per_prompt": ("Images per prompt", (1, 2, 4)),
    "guidance": ("Guidance", (True, False)),
    "vae_slicing": ("VAE slicing", (False, True)),
    "vae_tiling": ("VAE tiling", (False, True)),
    "safety_checker": ("Safety checker", (True, False)),
}


@dataclass(frozen=True, slots=True)
class Switch:
    """A field of the form with its values, spelled as Python spells them, the report's own first."""

    name: str
    label: str
    values: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Calculator:
    """The form's fields and what its script reads: JSON, and the parts' compressed JSON in base64."""

    size: str
    card: str
    cards: tuple[tuple[str, str], ...]
    switches: tuple[Switch, ...]
    most_batch: int
    data: str
    packed: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Part:
    """Some of the page's calls: their settings, and their tapes as compressed JSON in base64."""

    settings: tuple[str, ...]
    packed: str


def record_part(d: Derivation, kernels: Sequence[Kernel]) -> Part:
    """Return the page's calls of some kernels."""
    held = Tapes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # which card another stands in for is told by the verdict's confidence
        programs = {key: numbers for kernel in kernels for key, numbers in _programs(d, held, kernel)}
    packed = zlib.compress(_json({"tapes": held.document(), "programs": programs}).encode(), 9)
    return Part(tuple(programs), base64.b64encode(packed).decode())


def calculator(d: Derivation, latex: Mapping[str, str], kernels: Sequence[Kernel], parts: Sequence[Part]) -> Calculator:
    """Return the calculator of a report from its kernels' parts; ``latex`` is what the page has to copy, by name."""
    cards = {card.key: _card(card, kernels) for card in listed(d)}
    settings = (key.split("|")[1:] for part in parts for key in part.settings)
    found = list(zip(*settings, strict=True)) or [()] * len(SWITCHES)
    values = {name: tuple(dict.fromkeys([*_own(d, name), *each])) for name, each in zip(SWITCHES, found, strict=True)}
    switches = tuple(Switch(n, SWITCHES[n][0], each) for n, each in values.items() if len(each) > 1)
    data = {
        "model": shlex.quote(d.name),
        "others": _others(d, {switch.name for switch in switches}),
        "own": {name: next(iter(each), "") for name, each in values.items()},
        "switches": list(SWITCHES),
        "cards": cards,
        "several": {text: f"{text} {said}" for text in spellings() if (said := taken_as(text))},
        "spellings": {text: key for text, key in spellings().items() if key in cards},
        "grid": _grid(d),
        "close": CLOSE,
        "foreign": [FOREIGN.pattern, NVIDIA_ALONE],
        "most": {"side": min(MAX_SIDE, d.equation.sides.most), "batch": MAX_BATCH, "memory": most_bytes()},
        "remedies": _remedies({switch.name for switch in switches}),
        "titles": dict(STAGE_TITLES),
        "latex": latex,
    }
    labels = tuple((key, f"{card['name']}, {card['total'] / GIB:.1f} GiB") for key, card in cards.items())
    has_cards = any(len(kernel.kinds) > 1 for kernel in kernels)
    card = d.options.gpu or (on_pages()[0] if has_cards else "24 GiB")
    packed = tuple(part.packed for part in parts if part.settings)
    return Calculator(size_text(*d.default_sides), card, labels, switches, MAX_BATCH, _json(data), packed)


def _json(value: object) -> str:
    """Return JSON that cannot end a script element."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=True).replace("<", "\\u003c").replace("&", "\\u0026")


def _own(d: Derivation, name: str) -> tuple[str, ...]:
    """Return the report's own value of a switch, SDPA's for what it comes to without a GPU; guidance is on."""
    own = getattr(d.options, name, True)
    return () if name == "attention" and own == "efficient" else (str(own),)


def _programs(d: Derivation, held: Tapes, kernel: Kernel) -> Iterator[tuple[str, list[int]]]:
    """Yield the tapes of every setting of a kernel, by the card whose tapes they are and the values of SWITCHES."""
    names = ("pipeline", "offload", "num_images_per_prompt", "guidance", "vae_tiling", "vae_slicing")
    settings = product(dict.fromkeys(kernel.kinds.values()), *(SWITCHES[name][1] for name in names))
    known: dict[tuple[Any, ...], list[int]] = {}
    for gpu, *values in settings:
        chosen = {"attention": kernel.attention, **dict(zip(names, values, strict=True))}
        if not _is_held(d, kernel, gpu, chosen):
            continue
        with suppress(DerivationError):
            changed = {name: value for name, value in chosen.items() if name != "guidance"}
            subject = d.subject.changed(**changed, gpu=gpu, dtype=kernel.dtypes[0])
            if subject.options.pipeline != chosen["pipeline"]:  # a traced class is one pipeline
                continue
            unsliced = (gpu, *values[:-1])
            if chosen["vae_tiling"] and subject.grid.tile is not None:
                numbers = _tilings(d, subject, held, known.get((gpu, *values[:-2], False), []))
            else:
                numbers = _tapes(d, subject, held, known.get(unsliced, [])[1:], chosen["guidance"])
                known.setdefault(unsliced, numbers if chosen["num_images_per_prompt"] == 1 else [])
            for checker, those in _checked(subject, held, numbers):
                for dtype in kernel.shown(gpu):
                    named = {**chosen, "dtype": dtype, "safety_checker": checker}
                    yield "|".join(map(str, (gpu, *(named[name] for name in SWITCHES)))), those


def _is_held(d: Derivation, kernel: Kernel, gpu: str | None, chosen: Mapping[str, Any]) -> bool:
    """Return whether the page holds a setting: VAE tiles, several images a prompt and no guidance for usual ones of the
    report's own pipeline, VAE tiles without a card for others, too.
    """
    images, tiled = chosen["num_images_per_prompt"], chosen["vae_tiling"]
    own = images == d.options.num_images_per_prompt and tiled == d.options.vae_tiling
    usual = kernel.attention == SDPA and kernel.dtypes[0] in HALVES and chosen["offload"] is None
    same = usual and chosen["pipeline"] == d.options.pipeline and isinstance(d.subject, WalkedSubject)
    if not chosen["guidance"]:
        return own and same
    alone = images == 1 and not chosen["vae_slicing"] and (same or gpu is None)
    return own or (usual and alone if tiled else same)


def _tapes(d: Derivation, subject: Subject, held: Tapes, single: list[int], guidance: bool) -> list[int]:
    """Return the numbers of a subject's tapes: for several images, and for one where ``single`` is not known, which a
    sliced VAE does not change.
    """
    weights = held.weights(subject.resident)
    if isinstance(subject, RecordedSubject):
        own = [regime for regime in subject.regimes if regime.guidance] or list(subject.regimes)
        return [held.add(regime.decided().tape, weights, regime.ranges) for regime in own]
    program = subject.program(guidance, {"L": d.prompt_length, **d.fixed})
    tapes = [program.generic.tape]
    if not single:
        least = 2 * d.grid.unit
        tapes.append(program.regime(d.sizes(least, least, 1)).tape)
    return [*(held.add(tape, weights) for tape in tapes), *single]


def _tilings(d: Derivation, subject: Subject, held: Tapes, whole: list[int]) -> list[int]:
    """Return the numbers of the tapes of several images and of one in VAE tiles, and of ``whole`` without any."""
    weights, program = held.weights(subject.resident), subject.program(True, {"L": d.prompt_length, **d.fixed})
    tiled = Derivation(subject, d.fixed)
    assert tiled.grid.tile is not None
    side = tiled.grid.tile.side * tiled.grid.vae_scale_factor
    sides = (TILED_SIDE * side,) if whole else (TILED_SIDE * side, side)
    tapes = (program.regime(tiled.sizes(n, n, batch)).tape for n in sides for batch in (2, 1))
    return [*(held.add(tape, weights) for tape in tapes), *map(held.whole, whole)]


def _checked(subject: Subject, held: Tapes, numbers: list[int]) -> Iterator[tuple[bool, list[int]]]:
    """Yield whether the safety checker runs, and the tapes: without it a call is the call with it but for its part."""
    own = subject.options.safety_checker
    yield own, numbers
    if own and SAFETY_CHECKER in subject.parameters:
        weights = held.weights({n: entries for n, entries in subject.resident.items() if n != SAFETY_CHECKER})
        yield False, [held.without(number, SAFETY_CHECKER, weights) for number in numbers]


def _card(card: Gpu, kernels: Sequence[Kernel]) -> dict[str, Any]:
    """Return what the page knows of a card: bytes, how its figures are known, whose tapes it has by type and attention.

    ``margin`` are the bytes of the worst measured call at that confidence, measured and predicted.
    """
    trusted = confidence(card)
    kinds = {
        f"{dtype}|{kernel.attention}": kernel.kinds[card.key]
        for kernel in kernels
        if card.key in kernel.kinds
        for dtype in kernel.shown(card.key)
    }
    nominal = round((card.nvidia_smi_bytes or card.total_memory_bytes or 0) / GIB)
    figures = {"name": card.name, "total": card.total_memory_bytes, "context": context_of(card)[0], "nominal": nominal}
    return {**figures, "trusted": margin_reason(trusted), "margin": worst(trusted), "kinds": kinds}


def _grid(d: Derivation) -> dict[str, Any]:
    """Return what the symbols of a call follow from: pixels a latent, levels, the VAE's tile, what has one value."""
    grid, tile = d.grid, _tiled(d).grid.tile
    fixed = {"L": d.prompt_length, **d.fixed}
    if grid.frames is not None:
        fixed.setdefault("F", grid.frames.latent(None))
    return {
        "factor": grid.vae_scale_factor,
        "levels": grid.levels,
        "least": max(d.equation.sides.least, 2 * grid.unit if isinstance(d.subject, WalkedSubject) else 1),
        "step": max(d.equation.sides.step, grid.vae_scale_factor),
        "tile": None if tile is None else [tile.side, tile.step],
        "fixed": fixed,
    }


def _tiled(d: Derivation) -> Subject:
    """Return the subject with VAE tiles, where it can have them."""
    with suppress(DerivationError):
        return d.subject.changed(vae_tiling=True)
    return d.subject


def _remedies(switched: set[str]) -> list[dict[str, Any]]:
    """Return what the page can try where a call does not fit, in order of cost, and what it has to leave to others."""
    found = sorted((remedy for row in TABLE.values() for remedy in row.remedies), key=lambda remedy: remedy.rank)
    named = [(remedy, {n: SDPA if v == "efficient" else v for n, v in remedy.change.items()}) for remedy in found]
    return [
        {
            "name": remedy.name,
            "change": {n: str(v) for n, v in change.items()},
            "cost": remedy.cost,
            "call": remedy.call,
        }
        for remedy, change in named
        if change.keys() <= switched
    ]


def _others(d: Derivation, switched: set[str]) -> str:
    """Return the report's options that the form does not switch, as the command line has them."""
    defaults = {"gpu", *SWITCHES} if isinstance(d.subject, RecordedSubject) else {"gpu"}
    names = [name for name in sorted(TABLE) if d.options.chosen(name) and name not in switched | defaults]
    return " ".join(flag(name, getattr(d.options, name)) for name in names)
