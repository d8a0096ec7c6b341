"""Compare derivations with traces of the real modules: peaks, and the whole streams of allocations and deaths."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

from derivation.api import Derivation
from derivation.call import Call, takes_call
from derivation.config.checkpoint import BUNDLED
from derivation.config.ip_adapter import image_encoder_file
from derivation.errors import DerivationError
from derivation.tape.evaluate import stages
from derivation.trace.runs import trace_component, trace_pipeline
from derivation.trace.switches import switches
from derivation.verify.streams import births_at, naive_peak, naive_peaks, parting
from derivation.walk.pipelines import POSTPROCESS

CONFIG_FILES = {
    "text_encoder": "text_encoder/config.json",
    "text_encoder_2": "text_encoder_2/config.json",
    "vae_encode": "vae/config.json",
    "controlnet": "unet/config.json",
    "unet": "unet/config.json",
    "vae_decode": "vae/config.json",
    "safety_checker": "safety_checker/config.json",
}
T = TypeVar("T")
# cases that a process takes at a time
CHUNK = 4
# trace_component takes latents an eighth of the image's sides.
TRACE_FACTOR = 8
# Slices are recorded once for all that are alike: there the peaks are compared, not the streams.
GROUPING_OPTIONS = ("vae_slicing", "attention_slicing")


@dataclass(frozen=True, slots=True)
class Verified:
    """One component or stage: derived and traced peak bytes, and where the event streams part, if they do."""

    name: str
    derived_bytes: int
    traced_bytes: int
    parting: str | None

    @property
    def match(self) -> bool:
        """Whether both peaks are equal to the byte and no event differs."""
        return self.derived_bytes == self.traced_bytes and self.parting is None


def compare_component(
    derivation: Derivation, name: str, config: Mapping[str, Any], values: Mapping[str, int], guidance: bool
) -> Verified:
    """Compare one component call at the symbols' ``values`` with the real module built from ``config``."""
    variant = derivation.component(name, guidance).at(values)
    [(peak, _)] = variant.evaluator.peaks(values).values()
    factor = derivation.grid.vae_scale_factor if name == "vae_encode" else TRACE_FACTOR
    images = 1 if name in ("text_encoder", "text_encoder_2", "vae_encode") else derivation.options.num_images_per_prompt
    traced = trace_component(
        "text_encoder" if name == "text_encoder_2" else name,
        config,
        dtype=derivation.options.dtype_of(name.partition("_")[0]),
        attention=derivation.options.attention,
        height=factor * values["h0"],
        width=factor * values["w0"],
        batch_size=values["B"] * images,
        prompt_length=values["L"],
        guidance=guidance,
        switches=switches(derivation.options),
    )
    where = None if groups(derivation) else parting(births_at(variant.tape, values), births_at(traced, {}))
    return Verified(name, peak, naive_peak(traced), where)


@takes_call
def compare_components(derivation: Derivation, call: Call) -> list[Verified]:
    """Compare every component call of a checkpoint at one size; raises DerivationError where there is none."""
    if not derivation.calls:
        raise DerivationError(f"{derivation.checkpoint.source}: nothing in it runs on the GPU")
    values = derivation.sizes(call)
    cases = (
        (name, read_config(derivation, name), derivation.equation.chunked(name, values)) for name in derivation.calls
    )
    return [compare_component(derivation, *case, call.guidance) for case in cases]


@takes_call
def compare_pipeline(derivation: Derivation, call: Call) -> list[Verified]:
    """Compare every stage of the whole pipeline call at one size.

    The streams are compared event by event up to the postprocessing of more than one image, whose
    per-image loop is recorded as one group.
    """
    values = derivation.sizes(call)
    variant = derivation.program(call.guidance).at(values)
    tape = trace_pipeline(checkpoint_folder(derivation), derivation.options, call.filled(values["L"]))
    derived, traced = variant.evaluator.peaks(values), naive_peaks(tape)
    ours, theirs = births_at(variant.tape, values), births_at(tape, {})
    if call.batch_size * derivation.options.num_images_per_prompt > 1:
        [end] = [start for stage, start, _ in stages(tape) if stage == POSTPROCESS]
        keep = sum(event > 0 for event in tape.events[:end])
        ours, theirs = ours[:keep], theirs[:keep]
    where = None if groups(derivation) else parting(ours, theirs)
    names = list(dict.fromkeys([*derived, *traced]))
    return [
        Verified(name, derived.get(name, (0, 0))[0], traced.get(name, 0), where if i == 0 else None)
        for i, name in enumerate(names)
    ]


def compared(compare: Callable[[T], list[Verified]], cases: Iterable[T]) -> Iterator[tuple[T, list[Verified]]]:
    """Compare every case, on all processors, and yield them in order; one that raises is no match."""
    listed = list(cases)
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as workers:
        yield from zip(listed, workers.map(partial(_compared, compare), listed, chunksize=CHUNK), strict=True)


def _compared(compare: Callable[[T], list[Verified]], case: T) -> list[Verified]:
    try:
        return compare(case)
    except Exception as error:
        return [Verified("the whole call", 0, 0, f"it raises {type(error).__name__}: {error}")]


def groups(derivation: Derivation) -> bool:
    """Return True if the derivation records one of several slices or tiles that are alike."""
    return any(getattr(derivation.options, name) for name in GROUPING_OPTIONS)


def checkpoint_folder(derivation: Derivation) -> Path:
    """Return the folder of a derivation's checkpoint; raises DerivationError for another source."""
    checkpoint = derivation.checkpoint
    folder = BUNDLED / checkpoint.name if checkpoint.source == "bundled" else Path(checkpoint.source)
    if not folder.is_dir():
        raise DerivationError(f"{checkpoint.name}: verify needs a checkpoint folder or a bundled id")
    return folder


def read_config(derivation: Derivation, name: str) -> dict[str, Any]:
    """Return the config dict of a component of a derivation's checkpoint."""
    checkpoint = derivation.checkpoint
    if name == "image_encoder":
        path = image_encoder_file(derivation.options.ip_adapter)
    elif checkpoint.whole:
        path = checkpoint_folder(derivation) / CONFIG_FILES[name]
    else:
        path = Path(checkpoint.source)
    loaded: dict[str, Any] = json.loads(path.read_text())
    return loaded
