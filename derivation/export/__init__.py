"""The exact peak as code and data for other programs: one module a target.

>>> from derivation import derive
>>> peak_vram = compiled(derive("stable-diffusion-v1-5/stable-diffusion-v1-5"), "math")
>>> peak_vram(512, 512)
3143891456
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from derivation.api import Derivation, derive
from derivation.equation.function import Function, function
from derivation.errors import DerivationError
from derivation.export.arrays import arrays
from derivation.export.c import c
from derivation.export.document import document
from derivation.export.javascript import javascript
from derivation.export.latex import latex
from derivation.export.python import python
from derivation.files import write_files

__all__ = ["CHECKED_IN", "TARGETS", "CheckedIn", "compiled", "export", "generate", "write", "write_formulas"]


@dataclass(frozen=True, slots=True)
class Target:
    """A format: the file it goes to, and what writes it."""

    file: str
    write: Callable[[Function], str]


TARGETS: Mapping[str, Target] = {
    "latex": Target("peak_vram.tex", latex),
    "python": Target("peak_vram.py", python),
    "numpy": Target("peak_vram_numpy.py", lambda function: arrays(function, "numpy")),
    "torch": Target("peak_vram_torch.py", lambda function: arrays(function, "torch")),
    "json": Target("peak_vram.json", document),
    "javascript": Target("peak_vram.js", javascript),
    "c": Target("peak_vram.h", c),
}

# What lambdify calls its targets.
COMPILED = {"math": "python", "numpy": "numpy", "torch": "torch"}


@dataclass(frozen=True, slots=True)
class CheckedIn:
    """A folder of formulas/: the model, its pipeline and the targets."""

    folder: str
    model: str
    pipeline: str = "img2img"
    targets: tuple[str, ...] = ("latex", "python", "numpy", "json", "javascript", "c")


CHECKED_IN = (
    CheckedIn("stable_diffusion_v1_5", "stable-diffusion-v1-5/stable-diffusion-v1-5"),
    CheckedIn("stable_diffusion_inpainting", "runwayml/stable-diffusion-inpainting", "inpaint"),
    CheckedIn("stable_diffusion_2_1", "stabilityai/stable-diffusion-2-1"),
    CheckedIn("stable_diffusion_2_1_base", "stabilityai/stable-diffusion-2-1-base"),
    CheckedIn("stable_diffusion_xl_base_1_0", "stabilityai/stable-diffusion-xl-base-1.0"),
    CheckedIn("stable_diffusion_xl_refiner_1_0", "stabilityai/stable-diffusion-xl-refiner-1.0"),
)

_functions: WeakKeyDictionary[Derivation, Function] = WeakKeyDictionary()


def export(derivation: Derivation, target: str) -> str:
    """Return the derivation's exact peak as the text of ``target``; raises DerivationError for an unknown one."""
    text: str = _one_of(target, TARGETS).write(_function(derivation))
    return text


def compiled(derivation: Derivation, target: str = "math") -> Callable[..., Any]:
    """Return peak_vram(height, width, prompt_length, batch_size, guidance) in bytes.

    ``target`` is "math" (Python integers), "numpy" or "torch" (int64 arrays that broadcast); raises
    DerivationError for another.
    """
    source = export(derivation, _one_of(target, COMPILED))
    namespace: dict[str, Any] = {"__name__": f"peak_vram_{target}"}
    exec(compile(source, f"<peak_vram for {target}>", "exec"), namespace)
    result: Callable[..., Any] = namespace["peak_vram"]
    return result


def write(derivation: Derivation, targets: Iterable[str], directory: str | os.PathLike[str]) -> list[Path]:
    """Write each target's file into ``directory``, whole or not at all, and return their paths.

    Raises DerivationError for an unknown target or a directory that cannot be written.
    """
    texts = {_one_of(target, TARGETS).file: export(derivation, target) for target in targets}
    return write_files(Path(directory), texts)


def generate(models: Iterable[str] | None = None) -> dict[str, str]:
    """Return the checked-in files of ``models``, of all by default: path below formulas/ -> text."""
    wanted = None if models is None else set(models)
    found: dict[str, str] = {}
    for entry in CHECKED_IN:
        if wanted is not None and not wanted & {entry.model, entry.model.split("/")[1]}:
            continue
        derivation = derive(entry.model, pipeline=entry.pipeline)
        found |= {f"{entry.folder}/{TARGETS[t].file}": export(derivation, t) for t in entry.targets}
    return found


def write_formulas(root: str | os.PathLike[str], texts: Mapping[str, str]) -> list[Path]:
    """Write what ``generate`` returned below ``root``/formulas and return the paths; raises DerivationError."""
    return write_files(Path(root) / "formulas", texts)


def _function(derivation: Derivation) -> Function:
    if derivation not in _functions:
        _functions[derivation] = function(derivation)
    return _functions[derivation]


def _one_of(target: str, supported: Mapping[str, Any]) -> Any:
    if target not in supported:
        raise DerivationError(f"target = {target!r} is not supported (supported: {', '.join(supported)})")
    return supported[target]
