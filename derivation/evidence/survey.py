"""Which pipeline classes of diffusers run on ``meta``, and which have a closed form: what the survey recorded."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

SURVEY = Path(__file__).parent / "pipelines.json"


def recorded() -> dict[str, Any]:
    """Return the document of ``verify --pipelines``: circumstances and one row a small pipeline."""
    found: dict[str, Any] = json.loads(SURVEY.read_text())
    return found


def by_class(rows: Iterable[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Return the best row of each class, sorted: one with a closed form, else one that runs."""
    found: dict[str, Mapping[str, Any]] = {}
    for row in rows:
        known = found.get(row["pipeline"])
        if known is None or _rank(row) > _rank(known):
            found[row["pipeline"]] = row
    return dict(sorted(found.items()))


def _rank(row: Mapping[str, Any]) -> tuple[bool, bool]:
    return bool(row["covered"]), row["runs"]


def counts(rows: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Return how many classes there are, how many run, and how many have a closed form."""
    best = by_class(rows).values()
    return {"classes": len(best), "run": sum(r["runs"] for r in best), "exact": sum(bool(r["covered"]) for r in best)}


def markdown(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return the counts as a table, and every class without a closed form with its reason, folded."""
    rows = list(rows)
    found, lacking = counts(rows), [r for r in by_class(rows).values() if not r["covered"]]
    table = (
        "| pipeline classes | run on `meta` | closed form equal at held-out sizes |\n|--:|--:|--:|\n"
        f"| {found['classes']} | {found['run']} | {found['exact']} |\n\n"
    )
    reasons = "".join(f"- {r['pipeline']}{' (runs)' if r['runs'] else ''}: `{_plain(r['reason'])}`\n" for r in lacking)
    return f"{table}<details><summary>The other {len(lacking)}, and why</summary>\n\n{reasons}\n</details>\n"


def _plain(reason: str) -> str:
    return reason.replace("`", "'")
