"""A verification run: every component and stage of a checkpoint at one or more sizes."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from typing import Any

from derivation.api import Derivation, derive
from derivation.call import Call
from derivation.libraries import LIBRARIES
from derivation.verify.compare import Verified, compare_components, compare_pipeline

SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"


@dataclass(frozen=True, slots=True)
class Row:
    """One comparison and what it was made for; ``scope`` is component or stage."""

    model: str
    options: dict[str, object]
    call: Call
    scope: str
    comparison: Verified

    def as_dict(self) -> dict[str, Any]:
        """Return the row ready for JSON."""
        c = self.comparison
        return {
            "model": self.model,
            **self.options,
            **self.call.as_dict(),
            "scope": self.scope,
            "name": c.name,
            "derived_bytes": c.derived_bytes,
            "traced_bytes": c.traced_bytes,
            "match": c.match,
            "parting": c.parting,
        }


def run_verification(model: object, calls: Sequence[Call] = (Call(512, 512),), **options: Any) -> Iterator[Row]:
    """Yield a row for every component and, of a whole checkpoint, every stage of ``model`` at each size.

    Raises DerivationError as derive does.
    """
    derivation = derive(model, **{**options, **installed()})
    for call in calls:
        yield from _rows(derivation, call, "component", compare_components(derivation, call))
        if derivation.checkpoint.whole:
            yield from _rows(derivation, call, "stage", compare_pipeline(derivation, call))


def _rows(derivation: Derivation, call: Call, scope: str, comparisons: Iterable[Verified]) -> Iterator[Row]:
    for comparison in comparisons:
        yield Row(derivation.checkpoint.name, derivation.options.as_dict(), call, scope, comparison)


def circumstances() -> dict[str, Any]:
    """Return the date and the versions of a run."""
    return {
        "date": date.today().isoformat(),
        "python": platform.python_version(),
        "versions": installed(),
    }


def installed() -> dict[str, str]:
    """Return the versions that run here, which are those that a trace follows."""
    return {name: version(name) for name in LIBRARIES}
