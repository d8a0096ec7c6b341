"""fit, recommend, compare: what fits on a GPU, what to switch on, and where two derivations differ."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Annotated, Any, get_type_hints

import typer

from derivation.ask.compare import SIZES, Pair
from derivation.call import parse_size
from derivation.cli import output
from derivation.cli.parameters import Json, Model, Prompt, Revision, Size, call_of, derivation_of, expanded, value_of
from derivation.errors import DerivationError, meant, unsupported
from derivation.gpu.cards import lookup, memory_bytes
from derivation.options import Options
from derivation.text import human
from derivation.verdict import Verdict

Vram = Annotated[
    str | None, typer.Option(help="Bytes that the pipeline may take, as --memory without a GPU: 12GiB, 7500MiB.")
]


@expanded
def fit(
    model: Model,
    size: Size,
    prompt: Prompt,
    options: Options,
    vram: Vram = None,
    aspect: Annotated[str, typer.Option(help="width:height of the image looked for.")] = "1:1",
    revision: Revision = None,
    json: Json = False,
) -> None:
    """The largest image that fits, or the largest batch of the image given.

    Example: derivation fit sd15 --memory 8 --aspect 16:9
    """
    from derivation.ask.fit import fit as fitted
    from derivation.ask.fit import largest_batch, parse_aspect, surely_fits

    ratio, given = parse_aspect(aspect), size.given
    budget, said = _budget(vram, options)
    derivation = derivation_of(model, options, revision)
    on_card, asked = derivation.options.gpu is not None, (prompt.prompt_length, prompt.guidance)
    if given == (None, None):
        of_batch = derivation, budget, ratio, prompt.batch_size, *asked
        answer = fitted(*of_batch).as_dict()
        found = {"sure": surely_fits(*of_batch)} if on_card else {}
    else:
        sides = size.sides(derivation.default_sides)
        answer = {"weights_bytes": derivation.weights_bytes}
        found = {"largest_batch": largest_batch(derivation, budget, *sides, *asked)}
        found |= {"sure": largest_batch(derivation, budget, *sides, *asked, sure=True)} if on_card else {}
    answer |= {name: None if image is None else asdict(image) for name, image in found.items()}
    result = {"model": derivation.name, **derivation.options.as_dict(), **asdict(prompt), **answer, "counted": said}
    output.emit(result, json, _show_fit)
    if not (answer.get("image") or answer.get("largest_batch")):
        raise typer.Exit(1)


def _show_fit(result: Mapping[str, Any]) -> None:
    names = {"image": "any size", "aligned": "multiples of 64", "largest_batch": "largest batch"}
    names["sure"] = "with the margin"
    rows = []
    for key in (key for key in names if key in result):
        if (image := result[key]) is None:
            rows.append((names[key], "nothing fits", "", "", "", "", ""))
            continue
        verdict = image["verdict"]
        sizes = (human(verdict[name]) for name in ("needs_bytes", "left_bytes"))
        size = f"{image['height']} x {image['width']}"
        rows.append((names[key], size, image["batch_size"], *sizes, verdict["verdict"], image["peak_stage"]))
    columns = ("", "height x width", ">batch", ">needs", ">left", "verdict", "largest stage")
    output.table(f"{result['model']}: what fits", columns, rows)
    weights = result["weights_bytes"]
    best = next((result[key] for key in ("aligned", "largest_batch", "image") if result.get(key)), None)
    if best is not None and (verdict := Verdict(**best["verdict"])).trust:
        output.line(f"{best['height']} x {best['width']}, {verdict.trust}")
    output.line(f"weights that stay on the GPU: {human(weights)} ({weights:,} bytes)")
    output.line(result["counted"])


@expanded
def recommend(
    model: Model,
    size: Size,
    prompt: Prompt,
    options: Options,
    vram: Vram = None,
    revision: Revision = None,
    json: Json = False,
) -> None:
    """What to switch on so that this size fits, cheapest first, and what each saves.

    Example: derivation recommend sd15 --memory 4 --size 768 --dtype fp32
    """
    from derivation.ask.recommend import recommend as recommended

    budget, said = _budget(vram, options)
    derivation = derivation_of(model, options, revision)
    call = call_of(size, prompt, derivation.default_sides)
    found = recommended(derivation, budget, call)
    sides = {"height": call.height, "width": call.width}
    result = {"model": derivation.name, **derivation.options.as_dict(), **sides, **asdict(prompt), **found.as_dict()}
    output.emit({**result, "fits": found.fits, "counted": said}, json, _show_recommendation)
    if not found.fits:
        raise typer.Exit(1)


def _show_recommendation(result: Mapping[str, Any]) -> None:
    from derivation.ask.recommend import EXPANDABLE

    asked, final = (Verdict.read(result[name]["verdict"]) for name in ("as_asked", "with_needed"))
    output.line(f"as asked: {asked}", style="bold")
    rows = [
        ("needed" if s["needed"] else "", s["name"], *(_size(s[key]) for key in SAVINGS), s["cost"])
        for s in result["steps"]
    ]
    if asked is not None and asked.fits:
        output.line("nothing is needed")
    if rows:
        columns = ("", "option", ">saves alone", ">saves on top", ">peak then", "cost")
        output.table("What helps, cheapest first", columns, rows)
    for step in (step for step in result["steps"] if step["needed"]):
        output.line(f"{step['name']}: {step['call']}")
    for name, verdict in result["quantized"].items():
        output.line(f"with quantised weights, {name}: {Verdict.read(verdict)}")
    for size in result["cheaper_sizes"]:
        less = f"the allocator reserves {human(size['saves_bytes'])} less, {human(size['reserved_bytes'])}"
        output.line(f"{size['height']} x {size['width']} is larger and needs less: {less}")
    if (expandable := Verdict.read(result["expandable"] or {})) is not None:
        output.line(f"with {EXPANDABLE.call}: {expandable}")
    output.line(result["counted"])
    if final is not None:
        output.verdict_lines("" if final == asked else "with what is needed: ", final)


BESIDES = "what cuDNN, cuBLAS and attention kernels take for themselves, the allocator's rounding, the CUDA context"
SAVINGS = ("saves_bytes", "adds_bytes", "peak_tensor_bytes")


def _size(nbytes: int | None) -> str:
    return "" if nbytes is None else human(nbytes)


@expanded
def compare(
    model_a: Model,
    size: Size,
    prompt: Prompt,
    options: Options,
    model_b: Annotated[str | None, typer.Argument(help="The other model; the same one where it is left out.")] = None,
    with_: Annotated[
        list[str] | None, typer.Option("--with", help="An option of the second side alone, as KEY=VALUE; repeatable.")
    ] = None,
    revision: Revision = None,
    json: Json = False,
) -> None:
    """Where two models, or two sets of options, differ.

    Weights, each stage's polynomials (a video's at its own frames), numbers at one size, at three where none is given.

    Example: derivation compare sd15 --with attention=eager --with dtype=float32
    """
    from derivation.ask.compare import compare as compared

    a = derivation_of(model_a, options, revision)
    b = derivation_of(model_b or model_a, options, None if model_b else revision, **changes(with_ or []))
    sizes = SIZES if size.given == (None, None) else (size.sides(a.default_sides),)
    found = compared(a, b, sizes, prompt.batch_size, prompt.prompt_length, prompt.guidance, prompt.num_frames)
    output.emit(found.as_dict(), json, _show_comparison)


def changes(given: list[str]) -> dict[str, Any]:
    """Return ``["dtype=float32", ...]`` by option; raises DerivationError for an unknown key or a bad value."""
    hints = get_type_hints(Options)
    found: dict[str, Any] = {}
    for text in given:
        name, separator, value = text.partition("=")
        key = name.strip().replace("-", "_")
        if not separator or key not in hints:
            supported = ", ".join(field.name for field in fields(Options))
            raise unsupported("with", text, f"KEY=VALUE with {supported}{meant(key, hints)}")
        found[key] = value_of(key, hints[key], value)
    return found


def _show_comparison(result: Mapping[str, Any]) -> None:
    output.line(f"A: {result['a']}", style="bold")
    output.line(f"B: {result['b']}", style="bold")
    if result["options"]:
        output.table("Options", ("option", "A", "B"), ((p["name"], p["a"], p["b"]) for p in result["options"]))
    _show_pairs("Weights, bytes", result["weights_bytes"])
    output.line("H, W: the image's height and width in pixels; B: prompts in one call; L: tokens of a prompt")
    for stage in result["stages"]:
        if stage["only_a"] or stage["only_b"]:
            rows = [
                *(("both", text) for text in stage["common"]),
                *(("A", text) for text in stage["only_a"]),
                *(("B", text) for text in stage["only_b"]),
            ]
            output.table(f"{stage['name']}: Max of", ("", "bytes"), rows)
            changed = [(change["monomial"], change["a"], change["b"]) for change in stage["changes"]]
            if changed:
                size = max(result["numbers_bytes"], key=lambda size: math.prod(parse_size(size)))
                output.line(f"{stage['name']}, term by term, of the polynomials that win at {size}")
                output.table("", ("term", ">A", ">B"), changed)
        else:
            output.line(f"{stage['name']}: the same")
    for size, pairs in result["numbers_bytes"].items():
        verdicts = [result["verdicts"][size]] if size in result["verdicts"] else []
        _show_pairs(f"{size}, bytes (height x width)", [*pairs, *verdicts])


def _show_pairs(title: str, pairs: list[dict[str, Any]]) -> None:
    rows = ((p["name"], p["a"], p["b"], Pair(**p).difference) for p in pairs)
    output.table(title, ("", ">A", ">B", ">B - A"), rows)


def _budget(vram: str | None, options: Options) -> tuple[int | None, str]:
    """Return the bytes that are free, None for all of a GPU, and what they are; raises DerivationError without any."""
    if vram is None and options.gpu is None:
        raise DerivationError("memory and gpu are missing (supported: --memory 8GiB, or --gpu rtx-3060)")
    free = None if vram is None else memory_bytes(vram, "vram")
    bytes_free = "" if free is None else f"memory {str(vram).strip()} is {human(free)} ({free:,} bytes)"
    if options.gpu is None:
        return free, f"{bytes_free}; counted: weights, tensors; not counted: {BESIDES}"
    card = lookup(options.gpu)
    if free is not None:
        if 0 < (most := card.total_memory_bytes or 0) < free:
            raise unsupported("vram", vram, f"up to {human(most)} on {card.key}")
        return free, f"{bytes_free}, free on the {card.name}"
    return None, f"{card.name}: {human(card.total_memory_bytes or 0)}"
