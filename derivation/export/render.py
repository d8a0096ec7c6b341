"""What every generated file says about itself, and its text."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

from derivation.equation.record import Equation
from derivation.export.templates import environment
from derivation.options import TABLE, Options
from derivation.tape.recorded import RecordedSubject
from derivation.version import __version__

# Where the models are during a call, by Options.offload.
PLACES = {
    None: "all models stay on the GPU, in one process, under torch.no_grad()",
    "model": "models wait on the CPU, each moved to the GPU whole when it is called; under torch.no_grad()",
    "sequential": "parameters wait on the CPU, each layer's moved to the GPU while it runs; under torch.no_grad()",
}
ASSUMPTIONS = (
    "one call of the pipeline with the options above, the default output and no callback",
    "each tensor takes its size rounded up to the CUDA allocator's 512-byte block",
    "a prompt longer than the text encoder's positions comes as prompt_embeds",
)
EXCLUSIONS = (
    "CUDA context and kernels' images",
    "what the caching allocator reserves beyond live tensors",
    "gradients, optimizer state",
)
LIBRARY_SCRATCH = "scratch memory of cuDNN, cuBLAS and the attention kernels"
# diffusers' retrieve_timesteps puts them on the GPU, where a card's answer counts them.
TIMESTEPS = "the scheduler's timesteps, at most 8 bytes a step"
EXACT = "exact for every size that the pipeline accepts"
INTERPOLATED = "equal at the sizes that were traced and checked; between them interpolated, others are refused"
# What is told of a traced pipeline, whose other options are those that it was traced with, where they are chosen.
EVERYWHERE = ("dtype", "attention", "gpu")


@dataclass(frozen=True, slots=True)
class Facts:
    """What the header of a generated file says."""

    title: str
    generator: str
    units: str
    options: tuple[str, ...]
    versions: tuple[str, ...]
    assumptions: tuple[str, ...]
    exclusions: tuple[str, ...]


def facts(equation: Equation) -> Facts:
    """Return the header of an equation's files."""
    d, subject = equation, equation.subject
    kind, units, told = d.options.pipeline, EXACT, d.options.told()
    if isinstance(subject, RecordedSubject):
        kind, units = subject.class_name, INTERPOLATED
        told = {name: value for name, value in told.items() if name in EVERYWHERE or _is_told(d.options, name)}
    without = () if d.options.gpu else (LIBRARY_SCRATCH, *((TIMESTEPS,) if subject.method == "walk" else ()))
    return Facts(
        title=f"Peak GPU memory of {printable(d.name)} ({kind}), in bytes.",
        generator=f"diffusion-vram-derivation {__version__}, from the checkpoint's config files",
        units=f"bytes, {units}",
        options=tuple(f"{key}={printable(str(value))}" for key, value in told.items()),
        versions=tuple(f"{name} {version}" for name, version in asdict(d.options.libraries).items()),
        assumptions=(*assumptions(d.options), *subject.remarks),
        exclusions=(*without, *exclusions(d.options)),
    )


def _is_told(options: Options, name: str) -> bool:
    """Return whether a traced class's header tells an option: a class is one pipeline."""
    return name != "pipeline" and options.chosen(name)


def assumptions(options: Options) -> tuple[str, ...]:
    """Return what the options take for granted, in words."""
    told = (row.assumed for name, row in TABLE.items() if row.assumed and options.chosen(name))
    return (PLACES[options.offload], *ASSUMPTIONS, *told)


def exclusions(options: Options) -> tuple[str, ...]:
    """Return what is not part of the bytes, in words: of what a pipeline may have on top, what is switched off."""
    there = {row.absent for name, row in TABLE.items() if options.chosen(name)}
    absent = dict.fromkeys(row.absent for row in TABLE.values() if row.absent and row.absent not in there)
    return (*EXCLUSIONS, *([", ".join(absent)] if absent else []))


def printable(text: str) -> str:
    """Return ``text`` fit for a comment or a string of any target.

    >>> printable('a/b-1.5 */ \\n\"\"\"')
    'a/b-1.5 _/ ____'
    """
    return re.sub(r"[^A-Za-z0-9 ._/,=-]", "_", text)


def render(template: str, equation: Equation, **values: Any) -> str:
    """Return a template's text, given the equation, its facts and ``values``."""
    chosen = environment().get_template(f"formulas/{template}")
    return chosen.render(equation=equation, facts=facts(equation), **values)
