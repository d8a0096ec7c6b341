"""Recorded pipelines against plain traces of the real call, at sizes that took no part in their closed forms.

``python -m derivation.verify.traced [ID...]`` prints one JSON object a call.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from derivation.config.traced import bundled_traced, traced_folder
from derivation.errors import unsupported
from derivation.options import Options
from derivation.tape.evaluate import Evaluator
from derivation.tape.regime import Regime
from derivation.tape.symbols import evaluate
from derivation.tape.tape import Tape
from derivation.trace.build import Description
from derivation.trace.interpolate import Values, parting
from derivation.trace.regimes import prepared
from derivation.trace.store import DEFAULTS, RECORDED, read
from derivation.verify.streams import naive_peaks

CALLS, SEED = 5, 11


def held_out(model: str, count: int = CALLS, seed: int = SEED) -> Iterator[dict[str, Any]]:
    """Yield, for ``count`` calls, whether all is as in a plain trace; raises DerivationError."""
    folder = traced_folder(model)
    found = None if folder is None else read(folder.path / RECORDED)
    if folder is None or found is None:
        raise unsupported("model", model, "pipelines that are recorded")
    traced = prepared(Description.of(folder.path), Options(**DEFAULTS, pipeline=folder.task))
    traced.arguments = replace(traced.arguments, steps=found.passes)
    rng = random.Random(seed)
    for i in range(count):
        regime = found.regimes[i % len(found.regimes)]
        values = _other(regime, rng, odd=i < len(found.regimes))
        plain = traced.at(regime.guidance, values)
        row = {"model": folder.name, "guidance": regime.guidance, **values, "events": len(plain.events)}
        yield {**row, "peak_bytes": max(naive_peaks(plain).values()), "equal": equal(regime.tape, plain, values)}


def _other(regime: Regime, rng: random.Random, odd: bool) -> Values:
    """Return sizes that a regime covers and at which it was neither fitted nor checked, where there are any.

    ``odd`` ones are odd multiples of every step.
    """
    known = [*regime.fitted, *regime.checked]
    several = {n: [v for v in r if not odd or v // r.step % 2] or list(r) for n, r in regime.ranges.items()}
    for _ in range(100):
        values = {name: rng.choice(each) for name, each in several.items()}
        if values not in known:
            break
    return values


def equal(closed: Tape, plain: Tape, values: Values) -> bool:
    """Return whether a tape of polynomials is a plain one: events, each allocation's bytes, each stage's peak."""
    if parting(closed, plain) is not None:
        return False
    pairs = zip(closed.allocations, plain.allocations, strict=True)
    if any(evaluate(ours.nbytes, values) != theirs.nbytes for ours, theirs in pairs):
        return False
    return {stage: peak for stage, (peak, _) in Evaluator(closed).peaks(values).items()} == naive_peaks(plain)


def main() -> None:
    """Compare the pipelines of the command line, or all that are recorded."""
    recorded = [m for m in bundled_traced() if (f := traced_folder(m)) is not None and (f.path / RECORDED).is_file()]
    for model in sys.argv[1:] or recorded:
        for row in held_out(model):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
