"""The report's figures with their captions, drawn from a derivation."""

# ruff: noqa: RUF001

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from numpy.typing import NDArray

from derivation.api import Derivation
from derivation.report import figures
from derivation.report.answer import (
    SIZES,
    STAGE_TITLES,
    Answer,
    PolynomialRow,
    reference_side,
    square_peaks,
)
from derivation.report.diagram import stage_diagram, unet_diagram
from derivation.report.document import Picture
from derivation.report.text import human, values_at
from derivation.tape.evaluate import stages
from derivation.text import GIB
from derivation.walk.subject import WalkedSubject

SIDE_STEP = 64
LARGEST_SIDE = 4096
SEGMENTS = 3


def picture(
    name: str,
    title: str,
    caption: str,
    figure: Figure,
    data: Iterable[Sequence[str | int]] = (),
    column: Figure | None = None,
) -> Picture:
    """Render a figure; ``data`` are the titles of its columns and its rows, ``column`` is it as an article has it."""
    source, rows = figures.svg(figure), tuple(map(tuple, data))
    inline = Markup(figures.inline_svg(source, name))
    return Picture(name, title, caption, source, figures.pdf(column or figure), inline, rows, column is not None)


def pictures(d: Derivation, found: Answer) -> dict[str, Picture]:
    """Return the figures by name."""
    sides = _sides(d)
    drawn = [
        _stage_picture(d, found),
        _live(d),
        _composition(d, found),
        _curves(d, sides),
        _map(d, found, sides[-1]),
    ]
    walked = d.subject if isinstance(d.subject, WalkedSubject) else None
    if walked is not None and walked.checkpoint.unet is not None:
        drawn.append(
            picture(
                "unet",
                "The UNet's levels",
                "Left, the down path; right, the up path; dashed, the skip connections, whose tensors stay alive until "
                "their level returns. Shapes are those of each block's output under guidance (2B rows: the prompt's "
                "and the negative prompt's).",
                unet_diagram(walked.checkpoint.unet),
                [
                    ("Level", "channels"),
                    *((str(k), c) for k, c in enumerate(walked.checkpoint.unet.block_out_channels)),
                ],
            )
        )
    return {p.name: p for p in drawn}


def _sides(d: Derivation) -> list[int]:
    """Return square sides up to where the largest card is full, on the printed polynomials' grid."""
    step = max(d.grid.unit, SIDE_STEP)
    sides = [256]
    while sides[-1] < LARGEST_SIDE and (sides[-1] < 1024 or _total(d, sides[-1]) < 1.25 * figures.CARDS_GIB[-1] * GIB):
        sides.append(sides[-1] + step)
    return sides


def _total(d: Derivation, side: int) -> int:
    return d.weights_bytes + max(square_peaks(d, side).values())


def _stage_picture(d: Derivation, found: Answer) -> Picture:
    return picture(
        "stages",
        f"The stages of {d.options.pipeline}" if d.subject.whole else "The component's calls",
        f"What each stage hands on, and its peak beyond the weights at 512 × 512 (B = 1, L = {d.prompt_length}).",
        stage_diagram(d, found),
        [("Stage", f"{SIZES[0]} × {SIZES[0]}, bytes"), *((row.title, row.bytes_at[0]) for row in found.stages)],
    )


def _live(d: Derivation) -> Picture:
    side = reference_side(d)
    values = d.sizes(side, side, 1, d.prompt_length)
    variant = d.program().at(values)
    live = variant.evaluator.live_bytes(values)
    return picture(
        "live",
        "Live bytes over the program",
        f"{side} × {side}, B = 1, L = {d.prompt_length}, guidance on; weights excluded. The peak is "
        f"{human(int(live.max()))}.",
        figures.live_bytes(live, spans := stages(variant.tape), STAGE_TITLES),
        [
            ("Stage", "first event", "events", "most live bytes"),
            *((STAGE_TITLES.get(n, n), a, b - a, int(live[a : b + 1].max())) for n, a, b in spans),
        ],
    )


def _composition(d: Derivation, found: Answer) -> Picture:
    winners = [_winner(found, i) for i in range(len(SIZES))]
    segments = [figures.Segment(f"weights: {w.model}", (w.nbytes,) * len(SIZES)) for w in found.weights]
    parts = [_parts(row, i) for i, row in enumerate(winners)]
    for label in dict.fromkeys(label for part in parts for label in part):
        segments.append(figures.Segment(label, tuple(part.get(label, 0) for part in parts)))
    squares = [f"{side} × {side}" for side in SIZES]
    return picture(
        "composition",
        "What the peak is made of",
        "Weights, then the tensors alive at the peak: the largest by operator and module, the rest together.",
        figures.composition(squares, segments, "peak (GiB)"),
        [("Bytes of", *squares), *(_row(s.label, s.nbytes) for s in segments)],
    )


def _winner(found: Answer, index: int) -> PolynomialRow:
    return max(found.polynomials, key=lambda row: row.bytes_at[index])


def _parts(row: PolynomialRow, index: int) -> dict[str, int]:
    """Return the largest tensors of a witness and the rest, as label -> bytes at SIZES[index]."""
    parts: dict[str, int] = {}
    for tensor in (t for t in row.witness.tensors if t.loaded):
        label = f"weights while needed: {tensor.model}"
        parts[label] = parts.get(label, 0) + tensor.bytes_at[index]
    computed = [t for t in row.witness.tensors if not t.loaded]
    largest = sorted(computed, key=lambda t: -t.bytes_at[index])[:SEGMENTS]
    for tensor in largest:
        label = f"{tensor.op}, {'.'.join(tensor.module.split('.')[-3:])}"
        parts[label] = parts.get(label, 0) + tensor.bytes_at[index]
    parts["all other tensors alive"] = row.witness.bytes_at[index] - sum(parts.values())
    return parts


def _curves(d: Derivation, sides: Sequence[int]) -> Picture:
    peaks = [square_peaks(d, side) for side in sides]
    by_stage = {STAGE_TITLES.get(name, name): [p[name] for p in peaks] for name in peaks[0]}
    crossings = _crossings(sides, peaks)
    note = " Circles mark where the largest stage changes." if crossings else ""
    return picture(
        "curves",
        "Peak of each stage against image size",
        f"Square images, B = 1, L = {d.prompt_length}, guidance on. Dashed: what a card leaves once the weights "
        f"({human(d.weights_bytes)}) are on it, before scratch memory and the CUDA context.{note}",
        figures.stage_curves(sides, by_stage, d.weights_bytes, crossings),
        _by_side(sides, by_stage),
        figures.stage_curves(sides, by_stage, d.weights_bytes, crossings, figures.COLUMN),
    )


def _by_side(sides: Sequence[int], named: Mapping[str, Sequence[int]]) -> list[tuple[str | int, ...]]:
    """Return bytes at each side as titles and rows."""
    return [
        ("Side, pixels", *named),
        *(_row(side, [each[i] for each in named.values()]) for i, side in enumerate(sides)),
    ]


def _row(name: object, values: Iterable[int]) -> tuple[str | int, ...]:
    return (str(name), *map(int, values))


def _crossings(sides: Sequence[int], peaks: Sequence[Mapping[str, int]]) -> list[tuple[float, float, str]]:
    """Return the side just before which the largest stage changes, as (side, bytes, label)."""
    largest = [max(p, key=lambda name: p[name]) for p in peaks]
    changes = [i for i in range(1, len(sides)) if largest[i] != largest[i - 1]]
    return [
        (sides[i], peaks[i][largest[i]], f"{STAGE_TITLES.get(largest[i], largest[i])} from {sides[i]} px")
        for i in changes
    ]


def _map(d: Derivation, found: Answer, largest: int) -> Picture:
    some = np.arange(512, largest + 1, 512, dtype=np.int64)
    sides = np.arange(256, largest + 1, max(d.grid.unit, largest // 48 // d.grid.unit * d.grid.unit), dtype=np.int64)
    return picture(
        "map",
        "Weights and tensors against cards’ memory",
        "Weights and peak tensors for one image, height against width; a card needs some memory more for what is "
        "not counted. 1 GiB = 2³⁰ bytes; cards are named by their nominal memory.",
        figures.fits_map(sides, _totals(d, found, sides)),
        [
            ("Height \\ width, pixels", *map(str, some)),
            *map(_row, some, _totals(d, found, some)),
        ],
    )


def _totals(d: Derivation, found: Answer, sides: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the printed equation over height and width, for one image."""
    sizes = [[values_at(d.grid, int(h), int(w), d.prompt_length, 1) for w in sides] for h in sides]
    values = np.moveaxis(np.array(sizes, dtype=float), -1, 0)
    totals = []
    for row in found.polynomials:
        monomials = ((c, [v**p for v, p in zip(values, key, strict=True) if p]) for key, c in row.terms.items())
        totals.append(sum(float(c) * np.prod(powers, axis=0) for c, powers in monomials))
    highest = np.maximum.reduce(np.broadcast_arrays(values[0], *totals)[1:])
    totals_bytes: NDArray[np.int64] = found.weights_bytes + highest.astype(np.int64)
    return totals_bytes


def attention_picture(sides: Sequence[int], totals: Mapping[str, Sequence[int]]) -> Picture:
    """Draw the peak on every attention backend."""
    return picture(
        "attention",
        "Eager against fused attention",
        "Weights and peak tensors of the whole pipeline for square images. Eager and math attention hold the full "
        "score matrix, which grows with the square of the image area; fused kernels never store it. Backends "
        "within 0.1 % of each other share a line.",
        figures.attention_curves(sides, totals),
        _by_side(sides, totals),
    )
