"""From measured convolutions to a profile entry: multiples of bytes(input), bytes(output), bytes(weight)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from derivation.errors import DerivationError, shown
from derivation.gpu.profile import POINTWISE, SPATIAL, UNALIGNED, convolution_kind
from derivation.measure.records import Records, described
from derivation.tape.symbols import DTYPE_BYTES

RECORDS = Path(__file__).parent.parent / "evidence" / "gpu-scratch.json"
TERMS = ("input", "output", "weight")
Group = tuple[str, str, str]


def calibrate(path: Path = RECORDS) -> dict[str, Any]:
    """Return profile entries fitted to the scratch records of ``path``, one a GPU, dtype and memory format.

    The entries have the form of ``gpu/profiles.json``. Raises DerivationError for a file without such
    records, or with a record that lacks a figure.
    """
    groups: dict[Group, list[dict[str, Any]]] = {}
    for key, record in Records.open(path, must_exist=True).records.items():
        if record.get("kind") == "scratch" and record.get("status") == "ok":
            for group, row in _convolutions(record, f"{path}: {key}"):
                groups.setdefault(group, []).append(row)
    if not groups:
        raise DerivationError(f"{path}: no scratch records (supported: a file that measure --scratch wrote)")
    return {"convolution_workspace": [_entry(group, rows, path) for group, rows in sorted(groups.items())]}


def _convolutions(record: Mapping[str, Any], where: str) -> Iterator[tuple[Group, dict[str, Any]]]:
    try:
        versions, item = record["versions"], DTYPE_BYTES[record["dtype"]]
        for row in record["rows"]:
            if row["op"] != "convolution" or row["scratch_bytes"] is None:
                continue
            entry = {
                "input": prod(row["input"]) * item,
                "output": int(row["output_bytes"]),
                "weight": prod(row["weight"]) * item,
                "scratch": int(row["scratch_bytes"]),
                "kind": convolution_kind(int(row["weight"][-1]), int(row["weight"][1])),
                "shape": f"input {row['input']} weight {row['weight']} stride {row['stride']}",
                "versions": described(versions, "torch", "cuda", "cudnn", "diffusers"),
                "date": str(record.get("date", "")),
            }
            yield (str(versions["gpu"]), str(record["dtype"]), str(row["memory_format"])), entry
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DerivationError(f"{where}: not a scratch record ({type(error).__name__} {shown(str(error))})") from None


def _entry(group: Group, rows: Sequence[Mapping[str, Any]], path: Path) -> dict[str, Any]:
    gpu, dtype, memory_format = group
    kinds = {kind: [row for row in rows if row["kind"] == kind] for kind in (SPATIAL, POINTWISE, UNALIGNED)}
    fits = {kind: _fit(found) for kind, found in kinds.items() if found}
    general = fits.pop(SPATIAL, None) or _fit(rows)
    return {
        "gpu": gpu,
        "architectures": [architecture(gpu)],
        "dtypes": [dtype],
        "memory_format": memory_format,
        "coefficients": _rounded(general),
        **{kind: _rounded(fit) for kind, fit in fits.items()},
        "fitted_on": [path.name],
        "source": f"measured with derivation measure --scratch on {gpu}",
        "versions": "; ".join(sorted({row["versions"] for row in rows})),
        "date": max(row["date"] for row in rows)[:10],
        "fit": general,
        "fits": fits,
    }


def _fit(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    features = np.array([[row[name] for name in TERMS] for row in rows], dtype=np.float64)
    scratch = np.array([row["scratch"] for row in rows], dtype=np.float64)
    fitted, rank = least_squares(features, scratch)
    return {
        "rows": len(rows),
        "rank": rank,
        "separable": rank == len(TERMS),
        "coefficients": dict(zip(TERMS, map(float, fitted), strict=True)),
        "residuals": _residuals(rows, scratch - features @ fitted),
        "residuals_rounded": _residuals(rows, scratch - features @ np.rint(fitted)),
    }


def _rounded(fit: Mapping[str, Any]) -> dict[str, int]:
    return {name: round(value) for name, value in fit["coefficients"].items()}


def least_squares(features: NDArray[np.float64], values: NDArray[np.float64]) -> tuple[NDArray[np.float64], int]:
    """Return non-negative coefficients that fit ``values``, and the rank of ``features``.

    A coefficient that comes out negative is left out, the most negative first, and the others fitted again.
    """
    used = list(range(features.shape[1]))
    scale = features.max(axis=0)
    scale[scale == 0] = 1
    rank = int(np.linalg.matrix_rank(features / scale))
    found = np.zeros(features.shape[1])
    while used:
        solution, *_ = np.linalg.lstsq(features[:, used] / scale[used], values, rcond=None)
        if solution.min() >= 0:
            found[used] = solution / scale[used]
            break
        del used[int(np.argmin(solution))]
    return found, rank


def _residuals(rows: Sequence[Mapping[str, Any]], residuals: NDArray[np.float64]) -> dict[str, Any]:
    worst = int(np.argmax(np.abs(residuals)))
    return {
        "rms_bytes": float(np.sqrt(np.mean(residuals**2))),
        "max_bytes": float(residuals[worst]),
        "worst": rows[worst]["shape"],
        "within_5_percent": _share(rows, residuals),
    }


def _share(rows: Iterable[Mapping[str, Any]], residuals: NDArray[np.float64]) -> float:
    limits = [max(0.05 * row["scratch"], 512) for row in rows]
    return float(np.mean(np.abs(residuals) <= limits))


def architecture(gpu: str) -> str:
    """Return the architecture of a GPU's name, the name itself where the table does not have it."""
    from derivation.gpu.cards import lookup

    try:
        return lookup(gpu).architecture
    except DerivationError:
        return gpu
