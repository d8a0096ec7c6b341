"""Every bundled checkpoint x pipeline x option at several sizes, whole pipeline calls against the real ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from derivation.api import derive
from derivation.call import Call
from derivation.config import bundled, load
from derivation.options import TABLE
from derivation.options.choices import PIPELINES
from derivation.options.named import options_of
from derivation.options.row import flag
from derivation.verify.compare import Verified, compare_pipeline, compared
from derivation.walk.pipelines import Pipeline

# the checkpoints that not every pipeline takes
TASKS: Mapping[str, tuple[str, ...]] = {
    "runwayml/stable-diffusion-inpainting": ("inpaint",),
    "stabilityai/stable-diffusion-xl-refiner-1.0": ("img2img", "inpaint"),
}
# what every call has, so that few steps run
STEPS = {"num_inference_steps": 4, "strength": 0.5}
# one with latents that no level divides, one with a batch, one without guidance
CALLS = (Call(256, 256), Call(72, 136, 2), Call(264, 56, guidance=False))
TILED_CALLS = (Call(1032, 536), Call(520, 1200, 2, guidance=False))
LONG_PROMPT = Call(72, 88, prompt_length=154)

OPTION_SETS: tuple[Mapping[str, Any], ...] = ({}, *(chosen for row in TABLE.values() for chosen in row.matrix))


@dataclass(frozen=True, slots=True)
class Entry:
    """One whole pipeline call of a bundled checkpoint."""

    model: str
    options: Mapping[str, Any]
    call: Call

    def __str__(self) -> str:
        """Return the arguments of ``python -m derivation verify`` that make this call."""
        call = self.call.as_dict()
        guidance = {} if call.pop("guidance") else {"guidance_scale": 1.0}
        given = {**self.options, **call, **guidance}
        return f"{self.model} {' '.join(flag(*item) for item in given.items())}"

    def compare(self) -> list[Verified]:
        """Derive and trace the call: one comparison a stage."""
        return compare_pipeline(derive(self.model, **self.options), self.call)


def matrix(models: tuple[str, ...] | None = None) -> Iterator[Entry]:
    """Yield every call of the bundled checkpoints, or of ``models``."""
    for model in models or bundled():
        for task in TASKS.get(model, PIPELINES):
            for chosen in OPTION_SETS:
                if changes(model, task, chosen):
                    options = {"pipeline": task, **STEPS, **chosen}
                    yield from (Entry(model, options, call) for call in calls(chosen))


def calls(chosen: Mapping[str, Any]) -> tuple[Call, ...]:
    """Return the calls by which an option set is verified."""
    if "vae_tiling" in chosen:
        return TILED_CALLS
    return CALLS if chosen else (*CALLS, LONG_PROMPT)


def changes(model: str, task: str, chosen: Mapping[str, Any]) -> bool:
    """Return False for an option that this checkpoint and task have no use for."""
    if "vae_dtype" in chosen:
        return Pipeline(load(model), options_of({"pipeline": task}), True).casts_vae
    return "safety_checker" not in chosen or load(model).safety_checker is not None


def run_matrix(models: tuple[str, ...] | None = None) -> Iterator[tuple[Entry, list[Verified]]]:
    """Derive and trace every call, on all processors, and yield them in order."""
    return compared(Entry.compare, matrix(models))
