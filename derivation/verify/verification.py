"""A verification run: every component and stage of a checkpoint at one or more sizes."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from typing import Any

from derivation.api import DEFAULT_PROMPT_LENGTH, Derivation, derive
from derivation.verify.compare import Comparison, compare_components, compare_pipeline

VERSIONS = ("torch", "diffusers", "transformers")
SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"


@dataclass(frozen=True, slots=True)
class Size:
    """The sizes of one verified call."""

    height: int = 512
    width: int = 512
    batch_size: int = 1
    prompt_length: int = DEFAULT_PROMPT_LENGTH
    guidance: bool = True

    def values(self) -> tuple[int, int, int, int, bool]:
        """Return the sizes in the order in which comparisons take them."""
        return (self.height, self.width, self.batch_size, self.prompt_length, self.guidance)


@dataclass(frozen=True, slots=True)
class Row:
    """One comparison and what it was made for; ``scope`` is component or stage."""

    model: str
    options: dict[str, object]
    size: Size
    scope: str
    comparison: Comparison

    def as_dict(self) -> dict[str, Any]:
        """Return the row ready for JSON."""
        c, s = self.comparison, self.size
        return {
            "model": self.model,
            **self.options,
            **{name: getattr(s, name) for name in ("height", "width", "batch_size", "prompt_length", "guidance")},
            "scope": self.scope,
            "name": c.name,
            "derived_bytes": c.derived_bytes,
            "traced_bytes": c.traced_bytes,
            "match": c.match,
            "parting": c.parting,
        }


def run_verification(
    model: object, sizes: Sequence[Size] = (Size(),), pipeline: str = "img2img", **options: Any
) -> Iterator[Row]:
    """Yield a row for every component and, of a whole checkpoint, every stage of ``model`` at each size.

    Raises DerivationError as derive does.
    """
    derivation = derive(model, pipeline=pipeline, **options)
    for size in sizes:
        yield from _rows(derivation, size, "component", compare_components(derivation, *size.values()))
        if derivation.checkpoint.whole:
            yield from _rows(derivation, size, "stage", compare_pipeline(derivation, *size.values()))


def _rows(derivation: Derivation, size: Size, scope: str, comparisons: Iterable[Comparison]) -> Iterator[Row]:
    for comparison in comparisons:
        yield Row(derivation.checkpoint.name, derivation.options.as_dict(), size, scope, comparison)


def circumstances() -> dict[str, Any]:
    """Return the date and the versions of a run."""
    return {
        "date": date.today().isoformat(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in VERSIONS},
    }
