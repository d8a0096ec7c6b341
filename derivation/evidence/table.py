"""Public measurements against what the derivation and the allocator replay predict for them.

Every row names the rows that its coefficients came from; none is judged with a coefficient fitted to it.
"""

from __future__ import annotations

import csv
import json
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from derivation.allocator.replay import ReplayResult
from derivation.config import load
from derivation.errors import DerivationError
from derivation.evidence.bench import PIPELINE_ORDER, Bench
from derivation.evidence.thumb import Call, rules_of_thumb
from derivation.gpu.cards import lookup
from derivation.gpu.profile import fitted_rows, hardware
from derivation.options import Options
from derivation.tape.grid import Grid

MEASUREMENTS = Path(__file__).with_name("measurements.csv")
PREDICTIONS = Path(__file__).with_name("predictions.json")
CHECKPOINT = "stable-diffusion-v1-5/stable-diffusion-v1-5"
UNITS = {"bytes": 1, "MiB": 1 << 20, "GiB": 1 << 30}
TOKENS = 77
STEPS = {"img2img": 50, "txt2img": 12}
MEASURED = ("txt2img", "img2img")
# The origin's four img2img runs, (height, width) in order.
FOUR_RUNS = ((380, 396), (2048, 2048), (534, 800), (1200, 1800))


@dataclass(frozen=True, slots=True)
class Measurement:
    """One row of measurements.csv; ``value`` in bytes, ``tolerance`` the relative error aimed at (None: none)."""

    id: str
    source: str
    what: str
    height: int
    width: int
    batch: int
    dtype: str
    gpu: str
    torch: str
    diffusers: str
    metric: str
    value: float
    tolerance: float | None
    notes: str


@dataclass(frozen=True, slots=True)
class Prediction:
    """A measurement, the prediction in bytes, and the rows its coefficients were fitted on."""

    measurement: Measurement
    predicted: int
    fitted_on: tuple[str, ...]
    rules_of_thumb: Mapping[str, int]

    @property
    def error(self) -> float:
        """predicted / measured - 1."""
        return self.predicted / self.measurement.value - 1

    @property
    def judged(self) -> bool:
        """Whether the row had no part in its own prediction."""
        return self.measurement.id not in self.fitted_on

    @property
    def within(self) -> bool | None:
        """Whether the error is within the tolerance; None where there is none or the row is not judged."""
        tolerance = self.measurement.tolerance
        return abs(self.error) <= tolerance if tolerance is not None and self.judged else None


@cache
def measurements() -> tuple[Measurement, ...]:
    """Return every row of measurements.csv."""
    with MEASUREMENTS.open(encoding="utf-8", newline="") as file:
        return tuple(_measurement(row) for row in csv.DictReader(file))


def _measurement(row: dict[str, str]) -> Measurement:
    return Measurement(
        id=row["id"],
        source=row["source"],
        what=row["what"],
        height=int(row["height"] or 0),
        width=int(row["width"] or 0),
        batch=int(row["batch"]),
        dtype=row["dtype"],
        gpu=row["gpu"],
        torch=row["torch"],
        diffusers=row["diffusers"],
        metric=row["metric"],
        value=float(row["value"]) * UNITS[row["unit"]],
        tolerance=float(row["tolerance"]) if row["tolerance"] else None,
        notes=row["notes"],
    )


def measured_vs_predicted() -> tuple[Prediction, ...]:
    """Return every measurement with its prediction, replayed now."""
    return tuple(compare(row) for row in measurements())


def recorded() -> tuple[Prediction, ...]:
    """Return every measurement with its prediction as predictions.json has it, which a test holds to the replays."""
    found = json.loads(PREDICTIONS.read_text(encoding="utf-8"))
    return tuple(
        Prediction(row, found[row.id]["predicted"], fitted_rows(row.dtype), found[row.id]["rules_of_thumb"])
        for row in measurements()
    )


def document(predictions: Iterable[Prediction]) -> str:
    """Return the text of predictions.json."""
    entries = {
        p.measurement.id: {"predicted": p.predicted, "rules_of_thumb": dict(p.rules_of_thumb)} for p in predictions
    }
    return json.dumps(entries, indent=1) + "\n"


def compare(row: Measurement) -> Prediction:
    """Predict one measurement the way it was taken."""
    bench = _bench(row)
    if row.metric == "device":
        predicted = _device(bench, row)
    elif row.what in MEASURED:
        predicted = _pipeline(bench, row)
    else:
        predicted = _component(bench, row)
    return Prediction(row, predicted, fitted_rows(row.dtype), _rules_of_thumb(bench, row))


def _bench(row: Measurement) -> Bench:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gpu = hardware(row.gpu, torch=row.torch, diffusers=row.diffusers)
    pipeline = row.what if row.what in MEASURED else "img2img"
    options = Options(
        pipeline=pipeline,
        dtype=row.dtype,
        num_inference_steps=STEPS[pipeline],
        num_images_per_prompt=row.batch if row.what in MEASURED else 1,
        safety_checker=pipeline == "img2img",
    )
    capacity = None
    if row.metric == "device":
        total = lookup(row.gpu).total_memory_bytes
        capacity = None if total is None else total - _context_bytes(row.gpu)
    return Bench(load(CHECKPOINT), options, gpu, capacity_bytes=capacity)


def _values(height: int, width: int, batch: int) -> dict[str, int]:
    """Symbols of a call; the pipelines floor sides to multiples of 8."""
    return {"B": batch, "L": TOKENS, **Grid(8, 4).sizes(height, width)}


def _component(bench: Bench, row: Measurement) -> int:
    """A call after a warm-up and empty_cache, as every source of component rows took it."""
    run, load_inputs = _CALLS[row.what]
    load_inputs(bench, row)
    call, values = run(bench, row), _values(row.height, row.width, row.batch)
    bench.call(call, values)
    bench.allocator.empty_cache()
    allocated, reserved = bench.allocator.allocated_bytes.current, bench.allocator.reserved_bytes.current
    result = bench.call(call, values)
    return {
        "allocated": result.allocated_bytes.nbytes,
        "allocated_delta": result.allocated_bytes.nbytes - allocated,
        "reserved_delta": result.reserved_bytes.nbytes - reserved,
    }[row.metric]


def _vae_inputs(bench: Bench, row: Measurement) -> None:
    bench.load("vae")
    if row.what == "vae_encode":
        bench.hold((row.batch, 3, row.height, row.width), row.dtype)
    else:
        bench.hold((row.batch, 4, row.height // 8, row.width // 8), row.dtype)


def _unet_inputs(bench: Bench, row: Measurement) -> None:
    """open-muse benchmark/muse_perf.py: a float32 text encoder stays resident; timesteps in the model's dtype."""
    bench.load("unet")
    bench.load("text_encoder", dtype="float32")
    bench.hold((1, TOKENS), "int64")
    bench.hold((row.batch, TOKENS, 768), row.dtype)
    bench.hold((row.batch, 4, row.height // 8, row.width // 8), row.dtype)
    bench.hold((row.batch,), row.dtype)


Run = Callable[[Bench, Measurement], Callable[[], object]]
_CALLS: dict[str, tuple[Run, Callable[[Bench, Measurement], None]]] = {
    "vae_encode": (lambda bench, row: bench.component("vae_encode"), _vae_inputs),
    "vae_decode": (lambda bench, row: bench.component("vae_decode"), _vae_inputs),
    "vae_decode_scaled": (lambda bench, row: bench.scaled_decode, _vae_inputs),
    "vae_decode_tiled": (lambda bench, row: bench.tiled_decode(row.height, row.width), _vae_inputs),
    "unet": (lambda bench, row: bench.component("unet"), _unet_inputs),
}


def _pipeline(bench: Bench, row: Measurement) -> int:
    """max_memory_allocated of one ``__call__``; open-muse resets it after a warm-up and empty_cache."""
    _load_pipeline(bench)
    values = _values(row.height, row.width, 1)
    if row.what == "txt2img":
        bench.call(bench.pipeline(), values)
        bench.allocator.empty_cache()
    return bench.call(bench.pipeline(), values).allocated_bytes.nbytes


def _load_pipeline(bench: Bench) -> None:
    names = PIPELINE_ORDER if bench.options.safety_checker else PIPELINE_ORDER[:-1]
    bench.load(*names)


def _device(bench: Bench, row: Measurement) -> int:
    """nvidia-smi: reserved and the context."""
    _load_pipeline(bench)
    if row.what.startswith("four_runs"):
        four_runs(bench, released=row.what == "four_runs_released")
    return bench.allocator.reserved_bytes.current + _context_bytes(row.gpu)


def four_runs(bench: Bench, released: bool = False) -> list[ReplayResult]:
    """Run the origin's four calls in order; cached blocks stay, unless ``released`` before the last."""
    results = []
    for height, width in FOUR_RUNS:
        if released and (height, width) == FOUR_RUNS[-1]:
            bench.allocator.empty_cache()
        result = bench.call(bench.pipeline(), _values(height, width, 1))
        if result.out_of_memory is not None:
            raise DerivationError(f"{height}x{width}: {result.out_of_memory.message}")
        results.append(result)
    return results


def _rules_of_thumb(bench: Bench, row: Measurement) -> Mapping[str, int]:
    """Return what public rules of thumb give, with the weights where the row counts them."""
    if row.metric in ("device", "reserved_delta"):
        return {}
    call = Call(row.what, row.height, row.width, row.batch, row.dtype, TOKENS)
    return rules_of_thumb(call, bench.checkpoint, bench.options, with_weights=row.metric == "allocated")


def _context_bytes(gpu: str) -> int:
    """Return the documented CUDA context of a card; raises DerivationError where there is none."""
    context = lookup(gpu).context_bytes
    if context is None:
        raise DerivationError(f"no CUDA context is documented for {gpu}")
    return context
