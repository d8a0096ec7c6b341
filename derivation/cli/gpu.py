"""measure, calibrate: what a real GPU does, and the profile that follows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from derivation.api import Derivation
from derivation.call import Call
from derivation.cli import output
from derivation.cli.parameters import Json, Model, Revision, expanded, typed
from derivation.config import load
from derivation.errors import unsupported
from derivation.files import check_file
from derivation.options import Options
from derivation.options.named import options_of
from derivation.text import MIB, human
from derivation.walk.subject import WalkedSubject

LIBRARIES = ("torch", "cuda", "cudnn", "diffusers", "transformers")


@expanded
def measure(
    model: Model,
    options: Options,
    output_path: Annotated[Path, typer.Option("--output", help="JSON file to write, and to resume from.")],
    grid: Annotated[str, typer.Option(help="Image sizes: HEIGHTxWIDTH,...; one number is a square.")] = "512,768,1024",
    batch_sizes: Annotated[str, typer.Option(help="Batch sizes, with commas.")] = "1",
    attentions: Annotated[str | None, typer.Option(help="Attention backends, with commas.")] = None,
    dtypes: Annotated[str | None, typer.Option(help="Types, with commas.")] = None,
    guidance_scale: Annotated[float, typer.Option(help="Classifier-free guidance is on above 1.")] = 7.5,
    scratch: Annotated[bool, typer.Option("--scratch", help="Each convolution and attention shape alone.")] = False,
    card: Annotated[str | None, typer.Option(help="With --scratch: ask cuDNN of these cards, without them.")] = None,
    cudnn_version: Annotated[str | None, typer.Option(help="Refuse another cuDNN than this one, as 9.19.0.")] = None,
    history: Annotated[bool, typer.Option("--history", help="Keep the allocator's events.")] = False,
    timeout: Annotated[float, typer.Option(help="Seconds a point may take.")] = 1800,
    revision: Revision = None,
) -> None:
    """Run the real pipeline with random weights on this machine's GPU.

    Each point runs in a process of its own. With --card no GPU is needed: the extra "cudnn" has the library.

    Example: derivation measure sd15 --grid 512,768x512 --batch-sizes 1,2 --output mine.json
    """
    from derivation.measure.grid import parse_integers, parse_list, parse_sizes, points
    from derivation.measure.records import Records
    from derivation.measure.runner import measure as measured
    from derivation.measure.runner import require_cuda

    checkpoint = load(model, revision)
    checkpoint.require_whole("measure")
    options = options_of({"pipeline": checkpoint.task, **typed(options)})
    name = checkpoint.name if checkpoint.source == "bundled" else str(Path(checkpoint.source).resolve())
    found = points(
        name,
        options,
        parse_sizes(grid),
        parse_integers("batch_sizes", batch_sizes),
        parse_list("attentions", attentions or options.attention),
        parse_list("dtypes", dtypes or options.dtype),
        guidance_scale,
    )
    if card is not None or cudnn_version is not None:
        _ask(card, cudnn_version, list(found), output_path, scratch)
        return
    derivation = Derivation(WalkedSubject(checkpoint, options))
    jobs = list(_jobs(derivation, found, "scratch" if scratch else "pipeline", history))
    if timeout <= 0:
        raise unsupported("timeout", timeout, "seconds above 0")
    records = Records.open(output_path)
    require_cuda()
    with output.steps("measuring", sum(not records.done(job.key) for job in jobs)) as advance:
        counts = measured(jobs, records, timeout_s=timeout, report=lambda *_: advance())
    output.line(f"wrote {output_path}: " + ", ".join(f"{count} {status}" for status, count in counts.items() if count))


def _ask(card: str | None, version: str | None, found: Sequence[dict[str, Any]], path: Path, scratch: bool) -> None:
    """Ask cuDNN of the convolutions of every point; raises DerivationError without --card and --scratch."""
    if card is None or not scratch:
        raise unsupported("card", card, "a card of the GPU table, and --scratch with it")
    from derivation.measure.asked import FORMATS, ask, convolutions
    from derivation.measure.grid import parse_list

    check_file("output", path)
    cards, dtypes = parse_list("card", card), list(dict.fromkeys(point["dtype"] for point in found))
    shapes = convolutions(found)
    with output.steps("asking", len(cards) * len(dtypes) * len(FORMATS)) as advance:
        here = {ask(name, shapes, dtypes, path, version, advance) for name in cards}
    output.line(f"wrote {path}: {card}, cuDNN {', '.join(here)}")


def _jobs(derivation: Derivation, points: Iterable[dict[str, Any]], kind: str, history: bool) -> Iterable[Any]:
    """Yield the jobs of ``points``; raises DerivationError for a size that the pipeline rejects."""
    from derivation.measure.grid import key
    from derivation.measure.runner import Job

    for point in points:
        derivation.sizes(Call(point["height"], point["width"], point["batch_size"]))
        yield Job(f"{kind} {key(point)}", {"kind": kind, **point, **({"history": True} if history else {})})


def calibrate(
    file: Annotated[
        Path | None, typer.Argument(help="A file that measure --scratch wrote; without it the evidence.")
    ] = None,
    asked: Annotated[
        bool, typer.Option("--asked", help="Hold the profiles to what cuDNN answered: a file of --scratch --card.")
    ] = False,
    output_path: Annotated[Path | None, typer.Option("--output", help="JSON file to write.")] = None,
    json: Json = False,
) -> None:
    """Fit a scratch profile, multiples of tensors' bytes, to measured convolutions.

    Example: derivation calibrate --json
    """
    from derivation.measure.calibrate import RECORDS
    from derivation.measure.calibrate import calibrate as calibrated
    from derivation.measure.records import write_json

    if output_path is not None:
        check_file("output", output_path)
    found = _agreement(file) if asked else calibrated(file or RECORDS)
    if output_path is not None:
        write_json(output_path, found)
        output.wrote(output_path)
    output.emit(found, json, _show_agreement if asked else _show_profile)


def _agreement(file: Path | None) -> dict[str, Any]:
    from derivation.measure.asked import RECORDS, agreement

    return {"asked": agreement(file or RECORDS)}


def _show_agreement(result: Mapping[str, Any]) -> None:
    rows = [
        (
            f"{row['card']}, {row['dtype']}, {row['memory_format']}, cuDNN {row['cudnn']}",
            row["large"],
            row["within_1_kib"],
            row["within_1_percent"],
            f"{row['largest_difference_bytes'] / MIB:+,.1f} MiB",
            row["of"],
        )
        for row in result["asked"]
    ]
    columns = ("profile against", ">large", ">within 1 KiB", ">within 1 %", ">largest", "input [N, C, H, W] to K")
    output.table("Workspaces as the profiles have them, less what cuDNN asks for", columns, rows)


def _show_profile(result: Mapping[str, Any]) -> None:
    rows = [
        (
            ", ".join([entry["gpu"], *entry["dtypes"], entry["memory_format"]]),
            *(f"{entry['fit']['coefficients'][name]:.3f}" for name in ("input", "output", "weight")),
            entry["fit"]["rows"],
            human(round(entry["fit"]["residuals"]["rms_bytes"])),
            "" if entry["fit"]["separable"] else "shapes too alike to tell the terms apart",
        )
        for entry in islice(result["convolution_workspace"], 1000)
    ]
    columns = ("workspace of", ">input", ">output", ">weight", ">rows", ">rms residual", "")
    output.table("Multiples of bytes", columns, rows)


def validate(
    file: Annotated[Path | None, typer.Argument(help="A file that measure wrote; without it the evidence.")] = None,
    json: Json = False,
) -> None:
    """Predict every call that measure recorded: how far off each counter is.

    Example: derivation validate
    """
    from derivation.measure.records import described
    from derivation.measure.validate import RECORDS, measured_calls, predictions, summary

    records = measured_calls(file or RECORDS)
    rows = list(output.track(predictions(records), len(records), "predicting"))
    versions = sorted({f"{r['versions']['gpu']}, {described(r['versions'], *LIBRARIES)}" for r in records})
    found = {"measured_on": versions, "counters": summary(rows), "rows": [asdict(row) for row in rows]}
    output.emit(found, json, _show_validated)


def _show_validated(result: Mapping[str, Any]) -> None:
    rows = [
        (
            name,
            found["calls"],
            found["equal"],
            found["within_1_kib"],
            f"{found['mean_error']:.4%}",
            f"{found['largest_error']:+.3%}",
            found["largest_error_call"],
        )
        for name, found in result["counters"].items()
    ]
    columns = ("peak", ">calls", ">equal", ">within 1 KiB", ">mean error", ">largest", "of")
    output.table(f"Predicted against measured on {'; '.join(result['measured_on'])}", columns, rows)
