"""The page's calculator: the exported JavaScript of every dtype and attention backend, and the form around it."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from derivation.api import Derivation, derive
from derivation.call import Call
from derivation.config import Checkpoint
from derivation.equation.crossover import Crossover
from derivation.export import export
from derivation.gpu.cards import known, lookup, on_pages
from derivation.options import DTYPES, EAGER, TABLE, Options
from derivation.options.row import flag
from derivation.report.answer import PROMPT_LENGTH, STAGE_TITLES, square_peaks, stage_title
from derivation.tape.grid import Domain, Range, Sides
from derivation.text import GIB, NARROW_SPACE
from derivation.verdict import on_card
from derivation.walk.attention import BACKENDS

BACKENDS_SHOWN = (EAGER, "math", "efficient", "flash")
HEAD_DIMS = (8, 40, 64, 80, 160, 512)
SHARED_DTYPE = {"bfloat16": "float16"}
ATTENTION_SIDES = tuple(range(256, 2049, 128))
MAX_SIDE, MAX_BATCH, MAX_LENGTH = 8192, 32, 1001
SLIDER_SIDE, SLIDER_BATCH, SLIDER_LENGTH = 2048, 16, 308
# The cards and the calls that verdicts are replayed for: height, width, batch; others have none on a page.
REPLAYED_CARDS = on_pages()
DEFAULT_GPU = REPLAYED_CARDS[0]
SQUARES = tuple((side, side, 1) for side in (512, 640, 768, 896, 1024, 1280, 1536, 2048))
OBLONG = ((512, 768, 1), (768, 512, 1), (768, 1024, 1), (1024, 768, 1), (832, 1216, 1), (1216, 832, 1))
BATCHES = tuple((side, side, batch) for side in (512, 768, 1024) for batch in (2, 4))
REPLAYED = (*SQUARES, *OBLONG, *BATCHES)
ABOUT = "One {} call{}."

# The keyword of an export, and the name behind it.
EXPORT = re.compile(r"^export (?=(?:const|function) (\w+))", re.MULTILINE)


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
    """A field with a list of entries; ``free`` text may be typed, too, as its ``hint`` says."""

    name: str
    label: str
    value: str
    options: tuple[Option, ...]
    free: bool = False
    hint: str = ""


@dataclass(frozen=True, slots=True)
class Calculator:
    """The form's fields, and the script that holds the programs."""

    about: str
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
    """What a report needs of one (dtype, attention): its function, totals of squares, where its peak changes hands."""

    javascript: str
    totals: tuple[int, ...]
    crossings: tuple[str, ...]


def backend(checkpoint: Checkpoint, options: Options, dtype: str, attention: str) -> Backend:
    """Derive one combination; the totals are weights + peak bytes of squares with sides ATTENTION_SIDES."""
    chosen: dict[str, Any] = {**options.as_dict(), "dtype": dtype, "attention": attention}
    d = derive(checkpoint, **chosen)
    solved = (dtype, attention) == resolved(checkpoint, options.dtype, EAGER)
    tensors = d if options.gpu is None else derive(checkpoint, **{**chosen, "gpu": None})
    return Backend(
        javascript=export(tensors.equation.within(domain(d)), "javascript"),
        totals=tuple(d.weights_bytes + max(square_peaks(d, side).values()) for side in ATTENTION_SIDES),
        crossings=titled(d.equation.crossovers()) if solved else (),
    )


# Of one call: allocated, reserved and nvidia-smi's bytes, whether it fits, and surely, the verdict in words.
Replay = tuple[int, int, int, bool, bool, str]


def replayed_cards(checkpoint: Checkpoint, options: Options) -> tuple[str, ...]:
    """Return the cards that verdicts are replayed for: of a whole pipeline, that of the options first."""
    own = [] if options.gpu is None else [options.gpu]
    return tuple(dict.fromkeys([*own, *REPLAYED_CARDS])) if checkpoint.whole else ()


def replays(checkpoint: Checkpoint, options: Options, gpu: str) -> dict[str, Replay]:
    """Return what ``estimate`` says of each of REPLAYED on one card, by "HxWxB", where nvidia-smi's bytes are known."""
    chosen: dict[str, Any] = {**options.as_dict(), "gpu": gpu}
    d, found = derive(checkpoint, **chosen), {}
    for height, width, batch in REPLAYED:
        call = Call(height, width, batch, PROMPT_LENGTH)
        memory = d.device_memory(call)
        if memory.device is not None and memory.total is not None:
            verdict = on_card(gpu, memory)
            said = "; ".join(filter(None, (str(verdict).partition(": ")[2], verdict.trust)))
            key = f"{height}x{width}x{batch}"
            found[key] = (memory.allocated, memory.reserved, memory.device, verdict.fits, verdict.sure, said)
    return found


def domain(d: Derivation) -> Domain:
    """Return the calls that the form can ask for: sides from one pixel a side of the deepest level on."""
    others = {"batch_size": Range(1, MAX_BATCH), "prompt_length": Range(1, MAX_LENGTH)}
    return Domain(Sides(d.grid.unit, d.subject.sides.step, MAX_SIDE), others)


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


def calculator(
    d: Derivation, backends: Mapping[tuple[str, str], Backend], replayed: Mapping[str, Mapping[str, Replay]]
) -> Calculator:
    """Return the calculator of a report; ``replayed`` is what ``replays`` found by card."""
    choices = _choices(d.options)
    chosen = [flag(name, getattr(d.options, name)) for name in sorted(TABLE) if d.options.chosen(name)]
    others = [option for option in chosen if option.split()[0] not in ("--pipeline", "--dtype", "--attention", "--gpu")]
    table = {
        f"{dtype.value}/{attention.value}": "/".join(resolved(d.checkpoint, dtype.value, attention.value))
        for dtype in choices[0].options
        for attention in choices[1].options
    }
    data = {
        "aliases": table,
        "cards": _cards(),
        "factor": d.grid.vae_scale_factor,
        "multiple": d.grid.vae_scale_factor if d.options.pipeline == "txt2img" else 1,
        "model": shlex.quote(d.checkpoint.name),
        "options": " ".join([f"--pipeline {d.options.pipeline}", *others]),
        "own": {"prompt_length": PROMPT_LENGTH, "guidance": True, **{c.name: c.value for c in choices if not c.free}},
        "replays": replayed,
        "titles": dict(STAGE_TITLES),
    }
    modules = {"/".join(pair): found.javascript for pair, found in backends.items()}
    about = ABOUT.format(d.options.pipeline, f" with {' '.join(others)}" if others else "")
    return Calculator(about, _numbers(d), choices, _script(data, modules))


def _script(data: Mapping[str, Any], modules: Mapping[str, str]) -> Markup:
    """Return a script, which cannot end its element: JSON, and ES modules as objects of what they export."""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=True).replace("<", "\\u003c").replace("&", "\\u0026")
    objects = "".join(f"{json.dumps(name)}: {_object(module)},\n" for name, module in modules.items())
    return Markup(f"const CALCULATOR = {text};\nconst MODULES = {{\n{objects}}};")


def _object(module: str) -> str:
    """Return an object of a module's exports, its header aside: a page opened from a file cannot import modules."""
    _, code = module.split("*/\n\n", 1)
    names, code = EXPORT.findall(code), EXPORT.sub("", code).replace("</", r"<\/")
    return f"(() => {{\n{code}return {{ {', '.join(names)} }};\n}})()"


def _numbers(d: Derivation) -> tuple[Number, ...]:
    factor, unit = d.grid.vae_scale_factor, d.grid.unit
    step = factor if d.options.pipeline == "txt2img" else 1
    side = f"pixels, {unit} to {MAX_SIDE}"
    sides = (unit, MAX_SIDE, step, unit, SLIDER_SIDE, unit)
    return (
        Number("height", "Height H", side, 512, *sides),
        Number("width", "Width W", side, 512, *sides),
        Number("batch_size", "Batch size B", f"1 to {MAX_BATCH}", 1, 1, MAX_BATCH, 1, 1, SLIDER_BATCH, 1),
        Number(
            "prompt_length",
            "Prompt length L",
            f"tokens; diffusers pads to {PROMPT_LENGTH}",
            PROMPT_LENGTH,
            1,
            MAX_LENGTH,
            1,
            PROMPT_LENGTH,
            SLIDER_LENGTH,
            PROMPT_LENGTH,
        ),
    )


def _choices(options: Options) -> tuple[Choice, ...]:
    backends = tuple(dict.fromkeys([*BACKENDS_SHOWN, options.attention]))
    cards = tuple(Option(key, card["label"]) for key, card in _cards().items())
    return (
        Choice("dtype", "Precision", options.dtype, tuple(Option(name, name) for name in DTYPES)),
        Choice("attention", "Attention", options.attention, tuple(Option(name, name) for name in backends)),
        Choice("gpu", "Card or memory", options.gpu or DEFAULT_GPU, cards, True, "rtx-3060, 12, 12 GiB"),
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
