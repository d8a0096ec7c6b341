"""Command parameters from dataclasses: one command line option a field, so that a new option needs no line here."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from functools import wraps
from typing import Annotated, Any, get_args, get_type_hints

import typer

from derivation.api import Derivation, derive
from derivation.call import Call, parse_size
from derivation.cli.output import checked_number, telling
from derivation.config import bundled
from derivation.errors import DerivationError, shown, unsupported
from derivation.gpu.cards import known, memory_bytes, with_memory
from derivation.options import TABLE, Options

DEFAULT_GUIDANCE_SCALE = 7.5
# What is derived where no model is named.
USUAL_MODEL, USUAL_PIPELINE = "stable-diffusion-v1-5/stable-diffusion-v1-5", "img2img"

# Of a call; an option's own is in its row.
HELP = {
    "size": "Image as HEIGHTxWIDTH in pixels, such as 512x768; one number is a square; else the pipeline's own.",
    "height": "Image height in pixels; the pipeline's own by default.",
    "width": "Image width in pixels; the pipeline's own by default.",
    "batch_size": "Prompts in one call.",
    "num_frames": "Frames of a video; the pipeline's own number by default.",
    "prompt_length": "Prompt length in tokens; the pipeline's own (77 for Stable Diffusion) by default.",
    "guidance_scale": "Classifier-free guidance is on above 1.",
}


def values_of(name: str) -> Callable[[], tuple[str, ...]] | None:
    """Return what lists the values of an option, None where there is no list."""
    if name == "gpu":
        return known
    row = TABLE.get(name)
    return None if row is None else row.choices or ((lambda: row.words) if row.words else None)


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a call is besides its image size."""

    batch_size: int = 1
    prompt_length: int | None = None
    num_frames: int | None = None
    guidance_scale: float = DEFAULT_GUIDANCE_SCALE

    @property
    def guidance(self) -> bool:
        """diffusers' ``do_classifier_free_guidance``."""
        return self.guidance_scale > 1


@dataclass(frozen=True, slots=True)
class Size:
    """An image size in pixels: ``size`` as "HxW", or its sides; raises DerivationError for both."""

    size: str | None = None
    height: int | None = None
    width: int | None = None

    @property
    def given(self) -> tuple[int | None, int | None]:
        """(height, width), None for a side that is not given."""
        if self.size is None:
            return self.height, self.width
        if (self.height, self.width) != (None, None):
            raise unsupported("size", self.size, "size, or height and width, not both")
        return parse_size(self.size)

    def sides(self, usual: tuple[int, int]) -> tuple[int, int]:
        """Return (height, width), a side that is not given from ``usual``."""
        height, width = (side if own is None else own for own, side in zip(self.given, usual, strict=True))
        return height, width


def _complete_model(incomplete: str) -> list[str]:
    return [name for name in bundled() if name.startswith(incomplete)]


Model = Annotated[
    str,
    typer.Argument(
        help="A bundled model (sd15, sd2.1, sdxl, or any part that one id alone has), a folder in diffusers' "
        "format, one component's config file, or a Hugging Face Hub id (org/name, org/name@revision).",
        autocompletion=_complete_model,
    ),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hugging Face Hub id.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


_CONTEXT = inspect.Parameter("_context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
# The options that are on the command line.
# What a model says for itself where nobody types it.
SHOWN_DEFAULTS = {"pipeline": "the class in model_index.json"}
_SAID: ContextVar[frozenset[str]] = ContextVar("_SAID", default=frozenset())


def expanded(command: Callable[..., None]) -> Callable[..., None]:
    """Return ``command`` with each dataclass parameter replaced by one command line option a field.

    A field with the name of another parameter of the command is left out and keeps its default. Beside the options
    there is ``--memory``, which becomes part of ``gpu``; without one it is the ``vram`` of a command that has it.
    """
    parameters = inspect.signature(command, eval_str=True).parameters.values()
    groups: dict[str, Any] = {p.name: p.annotation for p in parameters if is_dataclass(p.annotation)}
    found = [p for p in parameters if p.name not in groups]
    own = {p.name for p in found}
    members = {name: [f for f in fields(group) if f.name not in own] for name, group in groups.items()}
    hints = {name: get_type_hints(group) for name, group in groups.items()}

    @wraps(command)
    def run(_context: typer.Context, **values: Any) -> None:
        sources = {name: _context.get_parameter_source(name) for name in values}
        _SAID.set(frozenset(name for name, source in sources.items() if source and source.name == "COMMANDLINE"))
        given = {name: _checked(name, value) for name, value in values.items()}
        if (memory := given.pop("memory", None)) is not None and "vram" in given and given["gpu"] is None:
            if given["vram"] is not None:
                raise unsupported("memory", memory, "one of vram and memory, which say the same")
            memory_bytes(memory)
            given["vram"] = memory
        elif memory is not None:
            given["gpu"] = with_memory(given["gpu"], memory)
        built = {
            name: group(**{f.name: value_of(f.name, hints[name][f.name], given.pop(f.name)) for f in members[name]})
            for name, group in groups.items()
        }
        command(**given, **built)

    found += [_parameter(field, hints[name][field.name]) for name in groups for field in members[name]]
    found += [MEMORY] if Options in groups.values() else []
    found = [_CONTEXT, *(p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in found)]
    run.__signature__ = inspect.Signature(found)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in found}
    return run


_CAPACITY = Annotated[str | None, typer.Option(help="Memory (of the GPU, if named): 12, 12G or 12GiB; bare is GiB.")]
MEMORY = inspect.Parameter("memory", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_CAPACITY)


def help_of(name: str) -> str:
    """Return what a field's option says of itself; a text without a full stop lists its values."""
    text = TABLE[name].help if name in TABLE else HELP.get(name, name.replace("_", " ").capitalize() + ".")
    values = values_of(name)
    return text if text.endswith(".") or values is None else f"{text}: {', '.join(values())}."


def _parameter(field: Field[Any], hint: Any) -> inspect.Parameter:
    values = values_of(field.name)
    option = typer.Option(
        help=help_of(field.name),
        autocompletion=completing(values) if values else None,
        show_default=SHOWN_DEFAULTS.get(field.name, True),
    )
    default = inspect.Parameter.empty if field.default is MISSING else field.default
    kind = hint if len(_kinds(hint)) == 1 else str | None
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option]
    )


def _kinds(hint: Any) -> set[type]:
    """Return the types that ``hint`` allows besides None."""
    return set(get_args(hint) or (hint,)) - {type(None)}


def value_of(key: str, hint: Any, value: Any) -> Any:
    """Return text as a value of type ``hint``, other values as they are; raises DerivationError for bad text."""
    kinds = _kinds(hint)
    if not isinstance(value, str) or kinds == {str}:
        return value
    for kind, convert in _CONVERT.items():
        if kind in kinds:
            try:
                converted = convert(value)
            except (ValueError, KeyError):
                continue
            return _checked(key, converted)
    if str in kinds:
        return value
    raise DerivationError(f"{key} = {shown(value)} is not a value of this option")


_CONVERT: dict[type, Callable[[str], Any]] = {
    bool: {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}.__getitem__,
    int: int,
    float: float,
}


def completing(values: Callable[[], Iterable[str]]) -> Callable[[str], list[str]]:
    """Return how the shell completes the beginning of one of ``values``."""

    def complete(incomplete: str) -> list[str]:
        return [value for value in values() if value.startswith(incomplete)]

    return complete


def _checked(key: str, value: Any) -> Any:
    """Return ``value``; raises DerivationError for a number that is not finite or has no sensible size."""
    if isinstance(value, float) and not math.isfinite(value):
        raise unsupported(key, value, "finite numbers")
    return checked_number(key, value) if isinstance(value, int) else value


def derivation_of(model: str, options: Options, revision: str | None = None, **changes: Any) -> Derivation:
    """Return the derivation of what a MODEL argument names; options that nobody typed are the model's own."""
    with telling("tracing") as progress:
        return derive(model, revision=revision, progress=progress, **{**typed(options), **changes})


def typed(options: Options) -> dict[str, Any]:
    """Return the options that somebody typed."""
    usual = Options().as_dict()
    return {name: value for name, value in options.as_dict().items() if value != usual[name] or name in _SAID.get()}


def reported(models: Sequence[str] | None, options: Mapping[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """Return the models of a report and their options: as typed, where no model is named USUAL_MODEL's img2img."""
    return (list(models), {**options}) if models else ([USUAL_MODEL], {"pipeline": USUAL_PIPELINE, **options})


def call_of(size: Size, prompt: Prompt, usual: tuple[int, int]) -> Call:
    """Return the call that is asked about, of ``usual`` sides where none are given; raises DerivationError."""
    height, width = size.sides(usual)
    return Call(height, width, prompt.batch_size, prompt.prompt_length, prompt.guidance, prompt.num_frames)
