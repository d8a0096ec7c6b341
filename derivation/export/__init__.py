"""The exact peak as code and data for other programs: one module a target."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial, update_wrapper
from pathlib import Path
from typing import Any

from derivation.config import load
from derivation.equation.record import Equation
from derivation.errors import DerivationError, one_of, unsupported
from derivation.export.arrays import arrays
from derivation.export.c import c
from derivation.export.document import document
from derivation.export.javascript import javascript
from derivation.export.latex import PEAK, latex
from derivation.export.python import python
from derivation.files import write_files
from derivation.options import Options
from derivation.tape.subject import Subject
from derivation.walk.subject import WalkedSubject

__all__ = ["CHECKED_IN", "TARGETS", "CheckedIn", "compiled", "export", "generate", "write", "write_formulas"]


@dataclass(frozen=True, slots=True)
class Target:
    """A format: the file it goes to, and what writes it."""

    file: str
    write: Callable[..., str]


TARGETS: Mapping[str, Target] = {
    "latex": Target("peak_vram.tex", latex),
    "python": Target("peak_vram.py", python),
    "numpy": Target("peak_vram_numpy.py", partial(arrays, library="numpy")),
    "torch": Target("peak_vram_torch.py", partial(arrays, library="torch")),
    "json": Target("peak_vram.json", document),
    "javascript": Target("peak_vram.js", javascript),
    "c": Target("peak_vram.h", c),
}

ALIASES = {"tex": "latex", "py": "python", "js": "javascript"}
# Describes every file of the target "json".
SCHEMA_FILE = Path(__file__).with_name("schema.json")
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


class Compiled:
    """peak_vram(height, width, prompt_length, batch_size, guidance) in bytes, exact at every size; can be pickled.

    ``target`` is "math" (Python integers), "numpy" or "torch" (int64 arrays that broadcast).
    """

    def __init__(self, source: str, target: str) -> None:
        self._source, self._target = source, target
        namespace: dict[str, Any] = {"__name__": f"peak_vram_{target}"}
        exec(compile(source, f"<peak_vram for {target}>", "exec"), namespace)
        self._peak_vram: Callable[..., Any] = namespace["peak_vram"]
        update_wrapper(self, self._peak_vram)

    def __call__(self, *sizes: Any, **named: Any) -> Any:
        """Return the peak's bytes, a pandas Series where a size is one; raises ValueError for sizes that do not do."""
        found = self._peak_vram(*sizes, **named)
        series = [size for size in (*sizes, *named.values()) if hasattr(size, "iloc")]
        if any(not each.index.equals(series[0].index) for each in series):
            raise ValueError("sizes given as Series need one index")
        return type(series[0])(found, index=series[0].index) if series else found

    def __reduce__(self) -> tuple[type[Compiled], tuple[str, str]]:
        return Compiled, (self._source, self._target)


def export(equation: Equation, to: str, notes: bool = False, device: bool = True, which: str = PEAK) -> str:
    """Return the peak as the text of the format ``to``; raises DerivationError.

    LaTeX is of ``which`` ("peak", "terms", "device" or a stage), with its ``notes`` if asked for. With a GPU, code and
    data hold what the ``device`` shows, too, where its form covers its whole grid.
    """
    return _written(_target(to), equation, notes, device, which)


def _written(target: Target, equation: Equation, notes: bool, device: bool, which: str) -> str:
    if target.write is latex:
        return latex(equation, which, notes)
    if notes or which != PEAK:
        raise unsupported("notes" if notes else "which", notes or which, "LaTeX alone")
    code = equation.device_code if device else None
    return target.write(equation) if code is None else target.write(equation, device=code)


def _target(name: str) -> Target:
    one_of("to", found := ALIASES.get(name, name), TARGETS, ALIASES)
    return TARGETS[found]


def compiled(equation: Equation, target: str = "math") -> Compiled:
    """Return the exact peak as a function; raises DerivationError for an unknown ``target``."""
    one_of("target", target, COMPILED)
    source = export(equation, COMPILED[target], device=False)
    try:
        return Compiled(source, target)
    except ImportError as error:
        raise DerivationError(f"target = {target!r} needs {error.name}: pip install {error.name}") from None


def write(
    equation: Equation,
    targets: Iterable[str],
    directory: str | os.PathLike[str],
    notes: bool = False,
    which: str = PEAK,
) -> list[Path]:
    """Write each target's file into ``directory``, whole or not at all, and return their paths.

    Raises DerivationError for an unknown target or a directory that cannot be written.
    """
    found = [_target(target) for target in targets]
    texts = {target.file: _written(target, equation, notes, device=True, which=which) for target in found}
    return write_files(Path(directory), texts)


def generate(models: Iterable[str] | None = None, made: Iterable[Equation] = ()) -> dict[str, str]:
    """Return the checked-in files of ``models``, of all by default: path below formulas/ -> text.

    An equation that was ``made`` before is not derived again.
    """
    known = {_key(each.subject): each for each in made if not each.fixed}
    wanted = None if models is None else set(models)
    found = {} if wanted else {SCHEMA_FILE.name: SCHEMA_FILE.read_text()}
    for entry in CHECKED_IN:
        if wanted is not None and not wanted & {entry.model, entry.model.split("/")[1]}:
            continue
        subject = WalkedSubject(load(entry.model), Options(pipeline=entry.pipeline))
        equation = known.get(_key(subject)) or Equation(subject, {})
        found |= {f"{entry.folder}/{TARGETS[t].file}": export(equation, t) for t in entry.targets}
    return found


def _key(subject: Subject) -> object:
    """Return what a walked subject follows from, None for another."""
    return (subject.checkpoint, subject.options) if isinstance(subject, WalkedSubject) else None


def write_formulas(root: str | os.PathLike[str], texts: Mapping[str, str]) -> list[Path]:
    """Write what ``generate`` returned below ``root``/formulas and return the paths; raises DerivationError."""
    return write_files(Path(root) / "formulas", texts)
