"""estimate, export, verify, models, report: what is derived, and the checks on it."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from derivation.call import parse_size
from derivation.cli import output
from derivation.cli.parameters import (
    DEFAULT_GUIDANCE_SCALE,
    USUAL_MODEL,
    Json,
    Model,
    Prompt,
    Revision,
    Size,
    call_of,
    completing,
    derivation_of,
    expanded,
    reported,
    typed,
)
from derivation.config import bundled, bundled_traced, load, traced_folder
from derivation.errors import DerivationError, shown
from derivation.export.latex import PEAK
from derivation.files import check_file, check_folder, write_file
from derivation.options import Options
from derivation.text import human
from derivation.verdict import Verdict

# The newest that torch/utils/viz/MemoryViz.js reads.
PICKLE_PROTOCOL = 4
KNOWN = {
    "model",
    "guidance",
    "weights_bytes",
    "model_weights_bytes",
    "components_bytes",
    "stages_bytes",
    "peak_stage",
    "peak_tensor_bytes",
    "figure",
    "then",
}
VERIFY_EXTRA = "pip install 'diffusion-vram-derivation[verify]'"


@expanded
def estimate(
    model: Model,
    size: Size,
    prompt: Prompt,
    options: Options,
    snapshot: Annotated[
        Path | None, typer.Option(help="With --gpu: file for the replay as PyTorch's memory snapshot (memory_viz).")
    ] = None,
    then: Annotated[
        list[str] | None, typer.Option(help="With --gpu: size of a further call in the same process; repeatable.")
    ] = None,
    empty_cache: Annotated[
        bool, typer.Option("--empty-cache", help="The program calls torch.cuda.empty_cache() after each call.")
    ] = False,
    revision: Revision = None,
    json: Json = False,
) -> None:
    """The peak memory of one call, stage by stage, and what is alive at the peak.

    Example: derivation estimate sd15 --size 512x768 --gpu rtx-3060
    """
    from derivation.ask.sequence import sequence

    if snapshot is not None:
        check_file("snapshot", snapshot)
        if options.gpu is None:
            raise DerivationError(f"snapshot = {shown(str(snapshot))} needs --gpu: a replay is on a card")
    derivation = derivation_of(model, options, revision)
    call = call_of(size, prompt, derivation.default_sides)
    if snapshot is not None:
        output.wrote(write_file(snapshot, pickle.dumps(derivation.snapshot(call), protocol=PICKLE_PROTOCOL)))
    found = derivation.estimate(call)
    result = {**found, "guidance_scale": prompt.guidance_scale}
    if then:
        sizes = (parse_size(size) for size in then)
        calls = (call, *(replace(call, height=height, width=width) for height, width in sizes))
        result["then"] = [turn.as_dict() for turn in sequence(derivation, calls, empty_cache)[1:]]
    output.emit(result, json, lambda result: show_estimate(result, derivation.options))
    if any(turn.get("failed") for turn in (result, *result.get("then", ()))):
        raise typer.Exit(1)


def show_estimate(result: Mapping[str, Any], options: Options) -> None:
    """Print an estimate as tables; keys that a GPU adds come after the ones of every estimate."""
    chosen, usual = options.as_dict(), Options().as_dict()
    asked = {**chosen, "guidance_scale": result["guidance_scale"]}
    said = [name for name in asked if name in MAIN or chosen[name] != usual[name]]
    if result.get("method") == "trace" and result["guidance_scale"] == DEFAULT_GUIDANCE_SCALE:
        said.remove("guidance_scale")  # each pipeline class has its own
    if verdict := Verdict.read(result):
        output.verdict_lines("", verdict)
    output.line(f"{result['model']}, {result['height']} x {result['width']} pixels (height x width)", style="bold")
    output.line(", ".join(f"{name}={asked[name]}" for name in said))
    output.line("")
    output.bytes_table("Weights", "model", {**result["model_weights_bytes"], "all": result["weights_bytes"]})
    output.bytes_table("Components, each called alone", "component", result["components_bytes"])
    if result["stages_bytes"] != result["components_bytes"]:
        title = "Stages of the pipeline, beyond the weights"
        output.bytes_table(title, "stage", result["stages_bytes"], result["peak_stage"])
    _show_witness(result["witness"])
    _show_more({key: result[key] for key in result if key not in KNOWN | asked.keys() | _CALL})
    peak = result["peak_tensor_bytes"]
    output.line(f"Peak: {human(peak)} ({peak:,} bytes) in {result['peak_stage']}", style="bold")
    if verdict:
        output.line(str(verdict), style="bold")
    for turn in result.get("then", ()):
        cached = f"{human(turn['cached_before_bytes'])} cached before, {human(turn['cached_after_bytes'])} after"
        output.line(f"then {turn['height']} x {turn['width']}: {Verdict.read(turn)}; {cached}", style="bold")


MAIN = ("pipeline", "dtype", "attention", "guidance_scale")
_CALL = {"height", "width", "batch_size", "prompt_length", "num_frames", "witness"}


def _show_witness(witness: Mapping[str, Any]) -> None:
    rows = (
        (t["module"] or "pipeline", t["op"], " x ".join(map(str, t["shape"])), t["dtype"], t["count"], t["size_bytes"])
        for t in witness["tensors"]
    )
    title = f"Alive at the peak, {witness['op']} of {witness['module'] or 'the pipeline'}, oldest first"
    output.table(title, ("module", "op", "shape", "dtype", ">count", ">bytes each"), rows)


def _show_more(more: Mapping[str, Any]) -> None:
    rows = [(key, human(value) if _is_bytes(value) else "", value) for key, value in more.items()]
    if rows:
        output.table("On this GPU", ("figure", ">size", ">value"), rows)


def _is_bytes(value: object) -> bool:
    return type(value) is int and abs(value) >= 1 << 10


def _targets() -> Iterable[str]:
    from derivation.export import TARGETS

    return TARGETS


To = typer.Option(
    "--to",
    help="latex (tex), python (py), numpy, torch, json, javascript (js) or c.",
    autocompletion=completing(_targets),
)


@expanded
def export(
    model: Model,
    options: Options,
    to: Annotated[str, To] = "python",
    notes: Annotated[bool, typer.Option("--notes", help="With LaTeX: assumptions, every stage, crossovers.")] = False,
    which: Annotated[str, typer.Option(help="With LaTeX: tensors, device (nvidia-smi), terms or a stage.")] = PEAK,
    output_path: Annotated[Path | None, typer.Option("--output", help="Folder to write into, else stdout.")] = None,
    revision: Revision = None,
) -> None:
    """The equation as LaTeX, Python, NumPy, PyTorch, JSON, JavaScript or C.

    Example: derivation export sd15 --to tex --pipeline txt2img
    """
    from derivation.export import export as exported
    from derivation.export import write

    if output_path is not None:
        check_folder(output_path)
    equation = derivation_of(model, options, revision).equation
    if output_path is None:
        print(exported(equation, to, notes, which=which), end="")
        return
    for path in write(equation, [to], output_path, notes, which):
        output.line(f"wrote {path}")


@expanded
def verify(
    size: Size,
    prompt: Prompt,
    options: Options,
    model: Model = USUAL_MODEL,
    everything: Annotated[bool, typer.Option("--all", help="Compare every bundled checkpoint and option.")] = False,
    fuzz: Annotated[int, typer.Option(help="Compare this many seeded random cases instead.", min=0)] = 0,
    seed: Annotated[int, typer.Option(help="First seed of --fuzz.", min=0)] = 0,
    versions: Annotated[
        Path | None, typer.Option(help="Compare under every verified pair of versions; keep their environments here.")
    ] = None,
    pipelines: Annotated[
        Path | None, typer.Option(help="Trace and interpolate every small pipeline of this file (JSON lines) instead.")
    ] = None,
    revision: Revision = None,
    json: Json = False,
) -> None:
    """Compare with the real modules, traced on the meta device (extra: verify).

    The exit code is 1 on a mismatch.

    Example: derivation verify sd15 --size 520x392 --attention eager
    """
    checkpoint = load(model, revision)
    try:
        from derivation.verify.fuzz import run_fuzz
        from derivation.verify.matrix import matrix, run_matrix
        from derivation.verify.verification import circumstances, run_verification
    except ImportError as error:
        raise DerivationError(f"verify needs {error.name or error}: {VERIFY_EXTRA}") from None
    if versions is not None:
        _verify_versions(versions, json)
        return
    if pipelines is not None:
        _survey(pipelines, json)
        return
    if fuzz or everything:
        found = run_fuzz(fuzz, seed) if fuzz else run_matrix()
        failed, calls = _compared(found, fuzz or len(list(matrix())))
        result = {"match": not failed, **circumstances(), "count": len(calls), "failed": failed}
        result |= {"seed": seed} if fuzz else {"calls": calls}
        output.emit(result, json, _show_compared)
        if failed:
            raise typer.Exit(1)
        return
    call = call_of(size, prompt, checkpoint.default_sides)
    rows = [row.as_dict() for row in run_verification(checkpoint, [call], **typed(options))]
    matches = all(row["match"] for row in rows)
    output.emit({"match": matches, **circumstances(), "rows": rows}, json, _show_verified)
    if not matches:
        raise typer.Exit(1)


def _verify_versions(folder: Path, json: bool) -> None:
    """Compare under every pair of versions; raises typer.Exit(1) for a mismatch."""
    from derivation.libraries import PAIRS
    from derivation.verify.versions import run_versions

    pairs = list(output.track(run_versions(folder), len(PAIRS), "comparing"))
    matches = not any(pair["failed"] for pair in pairs)
    output.emit({"match": matches, "pairs": pairs}, json, _show_versions)
    if not matches:
        raise typer.Exit(1)


def _show_versions(result: Mapping[str, Any]) -> None:
    rows = [
        (*pair["versions"].values(), pair["calls"], len(pair["failed"]), len(pair["untraced"]))
        for pair in result["pairs"]
    ]
    columns = ("torch", "diffusers", "transformers", ">calls", ">mismatches", ">not traced")
    output.table("Whole calls under each pair of versions", columns, rows)


def _survey(path: Path, json: bool) -> None:
    """Say of every small pipeline whether its call runs on meta and has a closed form."""
    from derivation.evidence.survey import counts
    from derivation.verify.pipelines import read, survey
    from derivation.verify.verification import circumstances

    documents = read(path)
    found = list(output.track(survey(documents), len(documents), "tracing"))
    rows = [row.as_dict() for row in found]
    output.emit({**circumstances(), **counts(rows), "pipelines": rows}, json, _show_survey)


def _show_survey(result: Mapping[str, Any]) -> None:
    rows = [(row["pipeline"], row["runs"], row["covered"] or row["reason"]) for row in result["pipelines"]]
    output.table("Small pipelines on meta", ("pipeline", "runs", "closed form, or why there is none"), rows)
    output.line(f"{result['classes']} classes: {result['run']} run, {result['exact']} have a closed form")


def _compared(cases: Iterable[tuple[object, Sequence[Any]]], count: int) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Return each mismatch with the line that reproduces it, and the largest traced peak of every case."""
    failed, peaks = [], {}
    for case, comparisons in output.track(cases, count, "comparing"):
        peaks[str(case)] = max(c.traced_bytes for c in comparisons)
        failed += [{"reproduce": str(case), **asdict(c)} for c in comparisons if not c.match]
    return failed, peaks


def _show_compared(result: Mapping[str, Any]) -> None:
    for case in result["failed"]:
        output.line(f"MISMATCH in {case['name']}: derived {case['derived_bytes']}, traced {case['traced_bytes']}")
        output.line(f"  {case['parting']}")
        output.line(f"  reproduce: python -m derivation verify {case['reproduce']}")
    output.line(f"{result['count']} cases, {len(result['failed'])} mismatches")


def _show_verified(result: Mapping[str, Any]) -> None:
    rows = [
        (r["scope"], r["name"], r["derived_bytes"], r["traced_bytes"], "match" if r["match"] else "MISMATCH")
        for r in result["rows"]
    ]
    output.table("Peak bytes, derived and traced", ("scope", "name", ">derived", ">traced", ""), rows)
    for row in result["rows"]:
        if row["parting"]:
            output.line(f"{row['scope']} {row['name']} parts at {row['parting']}")


def models(json: Json = False) -> None:
    """The bundled checkpoints.

    Example: derivation models
    """
    walked = {name: load(name).pipeline_class for name in bundled()}
    found = walked | {name: folder.class_name for name in bundled_traced() if (folder := traced_folder(name))}
    output.emit(found, json, lambda found: output.table("Bundled", ("id", "pipeline class"), found.items()))


@expanded
def report(
    options: Options,
    model: Annotated[
        list[str] | None, typer.Argument(help="Bundled ids, folders or Hub ids; else SD 1.5's img2img.")
    ] = None,
    output_path: Annotated[Path, typer.Option("--output", help="Folder to write.")] = Path("report"),
    revision: Revision = None,
) -> None:
    """Write the derivation notes, with figures, as HTML, Markdown and LaTeX.

    Example: derivation report sd15 --output report/
    """
    from derivation.report import build

    asked = [name for name in sys.argv[1:] if name.isprintable()]
    models, chosen = reported(model, typed(options))
    with output.telling("report") as progress:
        command = " ".join(["derivation", *asked])
        paths = build(models, output_path, command, progress, revision=revision, **chosen)
    for path in paths:
        output.line(f"wrote {path}")
