"""The report's figures: data in, matplotlib figure out; colours are Okabe and Ito's, safe for colour-blind readers."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from itertools import pairwise
from typing import Any, ParamSpec

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from numpy.typing import NDArray

P = ParamSpec("P")
GIB, MIB = 1 << 30, 1 << 20
# Okabe & Ito 2008, https://jfly.uni-koeln.de/color/; black left to the text
PALETTE = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#8c6d31", "#999999")
# What tells the colours apart where they come round again.
HATCHES = ("", "///")
# Markers that ``inline_svg`` turns into the page's own colours.
INK, RULE, PAPER = "#1a1b1c", "#d3d4d5", "#fdfefe"
CARDS_GIB = (6, 8, 12, 16, 24)
# Contours of the cards, dark on the light shades and light on the dark ones.
ON_SHADES = ("black", "black", "black", "white", "white")
MAX_STEPS = 1500
# Stage names above a curve: rows to choose from, and a letter's width as a share of the axis.
LABEL_ROWS, LABEL_WIDTH = 4, 0.0098
# Inches and points of letters: on a page, and in a column of two of LaTeX's article (229 pt of 72.27 an inch).
WIDE, COLUMN = (9, 5, 10), (3.17, 3.8, 7.5)
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "derivation",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "figure.facecolor": PAPER,
    "legend.frameon": False,
}


@dataclass(frozen=True, slots=True)
class Segment:
    """One part of a stacked bar: a label and its bytes in every bar."""

    label: str
    nbytes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Measured:
    """A measured row beside the derived number, in bytes; ``error`` is the measurement's own uncertainty.

    ``judged`` is False where a coefficient of the derived number was fitted on the row itself.
    """

    label: str
    derived: float
    measured: float
    error: float
    judged: bool


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Run a drawing function in the report's style."""

    @wraps(draw)
    def run(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with mpl.rc_context(STYLE):
            return draw(*args, **kwargs)

    return run


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def svg(figure: Figure) -> str:
    """Return a figure as a standalone SVG file, the same bytes for the same data."""
    buffer = io.StringIO()
    with mpl.rc_context(STYLE):
        if (engine := figure.get_layout_engine()) is not None:
            engine.execute(figure)
            figure.set_layout_engine(None)  # a figure with one is drawn twice each time that it is saved
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def pdf(figure: Figure) -> bytes:
    """Return a figure as a PDF file for LaTeX, the same bytes for the same data."""
    buffer = io.BytesIO()
    with mpl.rc_context(STYLE):
        figure.savefig(buffer, format="pdf", metadata={"CreationDate": None, "Producer": None, "Creator": None})
    return buffer.getvalue()


def inline_svg(source: str, prefix: str) -> str:
    """Return an SVG for embedding in a page: the page's colours, unique ids, no prolog and no fixed size."""
    body = source[source.index("<svg") :]
    body = body.replace(INK, "currentColor").replace(RULE, "var(--rule)").replace(PAPER, "none")
    body = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{prefix}-", body)
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.S)
    size = re.compile(r'(<svg[^>]*?) width="([\d.]+)pt" height="[\d.]+pt"')
    return size.sub(r'\1 style="max-width: calc(\2px * 1.4)"', body, count=1)


@styled
def live_bytes(live: NDArray[np.int64], stages: Sequence[tuple[str, int, int]], titles: Mapping[str, str]) -> Figure:
    """Draw the live bytes over the program's events, the stages behind, the peak marked."""
    figure, axes = _axes(9, 3.6)
    peak = int(live.argmax())
    kept = _decimated(live, peak)
    axes.fill_between(kept, live[kept] / MIB, step="post", color=PALETTE[0], alpha=0.25, linewidth=0)
    axes.step(kept, live[kept] / MIB, where="post", color=PALETTE[0], linewidth=1)
    axes.plot([peak], [live[peak] / MIB], "o", color=PALETTE[3], markersize=6)
    side = "right" if peak > 0.8 * len(live) else "left" if peak < 0.2 * len(live) else "center"
    axes.annotate(
        f"peak {live[peak] / MIB:,.1f} MiB",
        (peak, live[peak] / MIB),
        xytext=(0, 7),
        textcoords="offset points",
        ha=side,
        color=INK,
    )
    _stage_bands(axes, stages, titles, len(live))
    axes.set(xlim=(0, len(live)), ylim=(0, 1.16 * live[peak] / MIB))
    axes.set_xlabel("program point (allocation or release of a tensor)")
    axes.set_ylabel("live tensors beyond the weights (MiB)")
    return figure


def _decimated(live: NDArray[np.int64], peak: int) -> NDArray[np.int64]:
    """Return the events to draw: the lowest and the highest of each of MAX_STEPS bins."""
    if len(live) <= MAX_STEPS:
        return np.arange(len(live))
    edges = np.linspace(0, len(live), MAX_STEPS // 2, dtype=np.int64)
    bins = [range(a, b) for a, b in pairwise(edges) if b > a]
    ends = [i for r in bins for i in (r[0] + int(live[r].argmin()), r[0] + int(live[r].argmax()))]
    return np.unique(np.array([0, *ends, peak, len(live) - 1]))


def _stage_bands(axes: Axes, stages: Sequence[tuple[str, int, int]], titles: Mapping[str, str], end: int) -> None:
    rows = [0.0] * LABEL_ROWS
    for i, (name, start, stop) in enumerate(stages):
        if i % 2:
            axes.axvspan(start, stop, color=PALETTE[7], alpha=0.16, linewidth=0)
        title = titles.get(name, name)
        half = LABEL_WIDTH * len(title) / 2
        middle = min(max((start + stop) / 2 / end, half), 1 - half)
        row = next((r for r in range(LABEL_ROWS) if rows[r] <= middle - half), LABEL_ROWS - 1)
        rows[row] = middle + half
        axes.text(middle, 1.03 + 0.075 * row, title, transform=axes.transAxes, ha="center", fontsize=9)


@styled
def composition(bars: Sequence[str], segments: Sequence[Segment], total_label: str) -> Figure:
    """Draw the composition of the peak: one stacked bar an image size."""
    figure, axes = _axes(9, 1.2 + 0.62 * len(bars))
    left = np.zeros(len(bars))
    for i, segment in enumerate(segments):
        widths = np.array(segment.nbytes) / GIB
        color, hatch = PALETTE[i % len(PALETTE)], HATCHES[i // len(PALETTE) % len(HATCHES)]
        axes.barh(bars, widths, left=left, color=color, edgecolor=PAPER, hatch=hatch, label=segment.label)
        left += widths
    for y, total in enumerate(left):
        axes.annotate(f"{total:.2f} GiB", (total, y), xytext=(5, 0), textcoords="offset points", va="center")
    axes.set(xlabel=total_label, xlim=(0, max(left) * 1.12))
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    figure.legend(loc="outside lower center", ncols=3, fontsize=9)
    return figure


@styled
def stage_curves(
    sides: Sequence[int],
    stages: Mapping[str, Sequence[int]],
    weights_bytes: int,
    crossings: Sequence[tuple[float, float, str]],
    size: tuple[float, float, float] = WIDE,
) -> Figure:
    """Draw each stage's bytes against the side of a square image, what cards leave after the weights as lines.

    ``size`` is width and height in inches, and the letters' points, of which labels in the figure have one less.
    """
    width, height, points = size
    figure, axes = _axes(width, height)
    axes.tick_params(labelsize=points - 1)
    for i, (title, values) in enumerate(stages.items()):
        axes.plot(sides, np.array(values) / GIB, color=PALETTE[i % len(PALETTE)], linewidth=1.8, label=title)
    top = max(max(values) for values in stages.values()) / GIB
    for side, nbytes, label in crossings:
        axes.plot([side], [nbytes / GIB], "o", markersize=8, markerfacecolor="none", markeredgecolor=INK)
        axes.annotate(label, (side, nbytes / GIB), xytext=(8, -12), textcoords="offset points", fontsize=points - 1)
    for card in CARDS_GIB:
        room = card - weights_bytes / GIB
        if 0 < room < 4 * top:
            _card_line(axes, sides[-1], room, f"{card} GiB card", points - 1)
    axes.set(yscale="log", xlim=(sides[0], sides[-1]))
    axes.set_xlabel("side of a square image (pixels)", fontsize=points)
    axes.set_ylabel("tensors beyond the weights (GiB)", fontsize=points)
    _gib_ticks(axes)
    figure.legend(loc="outside lower center", ncols=3 if size == WIDE else 2, fontsize=points - 1)
    return figure


def _gib_ticks(axes: Axes) -> None:
    """Label a logarithmic axis in plain numbers."""
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _card_line(axes: Axes, x: float, y: float, label: str, points: float = 8.5) -> None:
    axes.axhline(y, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.annotate(label, (x, y), xytext=(5, 0), textcoords="offset points", va="center", fontsize=points)


@styled
def fits_map(sides: NDArray[np.int64], total_bytes: NDArray[np.int64]) -> Figure:
    """Draw which card an image's tensors fit on, over height and width; ``total_bytes[row, column]``."""
    figure, axes = _axes(6, 6)
    nbytes = total_bytes / GIB
    edges = [0, *CARDS_GIB, max(CARDS_GIB[-1], float(nbytes.max())) + 1]
    shades = [mpl.colormaps["cividis"](x) for x in np.linspace(0.95, 0.05, len(edges) - 1)]
    axes.contourf(sides, sides, nbytes, levels=edges, colors=shades)
    lines = axes.contour(sides, sides, nbytes, levels=CARDS_GIB, colors=ON_SHADES, linewidths=1.2)
    axes.clabel(lines, fmt=lambda level: f"{level:g} GiB", fontsize=9, colors=ON_SHADES)
    names = [*(f"below {card} GiB" for card in CARDS_GIB), f"more than {CARDS_GIB[-1]} GiB"]
    handles = [Patch(fc=shades[i], label=names[i]) for i in np.unique(np.digitize(nbytes, CARDS_GIB, right=True))]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=9)
    axes.set(xlabel="width (pixels)", ylabel="height (pixels)")
    axes.grid(visible=False)
    return figure


@styled
def attention_curves(sides: Sequence[int], totals: Mapping[str, Sequence[int]]) -> Figure:
    """Draw the whole pipeline's peak against the side of a square image, one line an attention backend."""
    figure, axes = _axes(9, 4)
    styles = ("-", (0, (6, 2)), (0, (2, 2)), (0, (6, 2, 1, 2)))
    for i, (values, names) in enumerate(_alike(totals).items()):
        name = ", ".join(names)
        axes.plot(sides, np.array(values) / GIB, color=PALETTE[i], linestyle=styles[i % 4], linewidth=2, label=name)
    low, high = min(map(min, totals.values())) / GIB, min(max(map(max, totals.values())) / GIB, 2 * CARDS_GIB[-1])
    for card in CARDS_GIB:
        if low < card < high:
            _card_line(axes, sides[-1], card, f"{card} GiB")
    axes.set(yscale="log", xlim=(sides[0], sides[-1]), ylim=(0.9 * low, high))
    axes.set_xlabel("side of a square image (pixels)")
    axes.set_ylabel("peak tensors with weights (GiB)")
    _gib_ticks(axes)
    axes.legend()
    return figure


def _alike(totals: Mapping[str, Sequence[int]]) -> dict[tuple[int, ...], list[str]]:
    """Return the curves with the names that share each, to within a thousandth."""
    found: dict[tuple[int, ...], list[str]] = {}
    for name, values in totals.items():
        key = next((k for k in found if np.allclose(k, values, rtol=1e-3)), tuple(values))
        found.setdefault(key, []).append(name)
    return found


@styled
def measured_ratio(rows: Sequence[Measured]) -> Figure:
    """Draw derived over measured, one row a measurement, with the measurement's uncertainty."""
    figure, axes = _axes(9, 1 + 0.32 * len(rows))
    y = range(len(rows))
    for judged, fill, label in ((True, PALETTE[0], "not used in any fit"), (False, PAPER, "used in a fit")):
        kept = [i for i in y if rows[i].judged == judged]
        ratio = [100 * (rows[i].derived / rows[i].measured - 1) for i in kept]
        error = [100 * rows[i].error / rows[i].measured for i in kept]
        dots: Any = {"color": PALETTE[0], "markerfacecolor": fill, "ecolor": INK, "capsize": 3}
        axes.errorbar(ratio, kept, xerr=error, fmt="o", label=label, **dots)
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_xscale("symlog", linthresh=0.1, linscale=1.5)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:+g}" if value else "0"))
    axes.set_yticks(y, [row.label for row in rows])
    axes.set(xlabel="derived minus measured (% of measured)", ylim=(len(rows) - 0.5, -0.5), xlim=(-60, 60))
    axes.legend(loc="upper right", fontsize=9)
    return figure


@styled
def rule_errors(names: Sequence[str], percent: Sequence[float], ours: int) -> Figure:
    """Draw the mean relative error of rules of thumb, ``ours`` (an index) in another colour."""
    figure, axes = _axes(9, 1 + 0.34 * len(names))
    axes.barh(names, percent, color=[PALETTE[3] if i == ours else PALETTE[0] for i in range(len(names))])
    for y, value in enumerate(percent):
        axes.annotate(f"{value:.3g} %", (value, y), xytext=(5, 0), textcoords="offset points", va="center")
    axes.set(xlabel="mean relative error on the measured rows (%)", xlim=(0, max(percent) * 1.15))
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    return figure
