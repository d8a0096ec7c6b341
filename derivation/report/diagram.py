"""The architecture at a glance: the pipeline's stages, and the UNet's levels with their shapes."""

# ruff: noqa: RUF001

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from derivation.api import Derivation
from derivation.config import UNet2DConditionConfig
from derivation.report.answer import Answer
from derivation.report.figures import INK, PALETTE, styled
from derivation.report.text import SUBSCRIPTS, human
from derivation.walk.subject import WalkedSubject

BOX_WIDTH, BOX_HEIGHT = 1.9, 0.9
FONT_SIZE = 7.5
# A row of fewer boxes is drawn at the size of this many.
LEAST_STAGES = 5

Spot = tuple[float, float]


def _canvas(width: float, height: float, right: float, top: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, right), ylim=(0, top), aspect="equal")
    axes.set_axis_off()
    return figure, axes


def _box(axes: Axes, x: float, y: float, lines: list[str], color: str, width: float = BOX_WIDTH) -> None:
    """Draw a box around the centre (x, y)."""
    corner = (x - width / 2, y - BOX_HEIGHT / 2)
    style = "round,pad=0,rounding_size=0.08"
    axes.add_patch(FancyBboxPatch(corner, width, BOX_HEIGHT, boxstyle=style, fc=(color, 0.18), ec=color, lw=1.2))
    first, *rest = lines
    step = BOX_HEIGHT / (len(lines) + 0.6)
    top = y + step * (len(lines) - 1) / 2
    axes.text(x, top, first, ha="center", va="center", weight="bold", fontsize=FONT_SIZE + 0.5)
    for i, line in enumerate(rest, 1):
        axes.text(x, top - i * step, line, ha="center", va="center", fontsize=FONT_SIZE)


def _arrow(axes: Axes, start: Spot, end: Spot, style: str = "-", color: str = INK) -> None:
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=9, lw=1, ls=style, color=color))


@styled
def stage_diagram(d: Derivation, found: Answer) -> Figure:
    """Draw the stages in order: what each hands on, and its peak at 512 x 512."""
    pitch = BOX_WIDTH + 0.35
    right = max(len(found.stages), LEAST_STAGES) * pitch
    left = (right - len(found.stages) * pitch) / 2
    figure, axes = _canvas(9, 9 * 1.1 / right, right, 1.1)
    for i, stage in enumerate(found.stages):
        x = left + (i + 0.5) * pitch
        peak = stage.name == found.peak_stages[0]
        lines = [stage.title, _handed_on(d, stage.name), f"peak {human(stage.bytes_at[0])}"]
        _box(axes, x, 0.55, lines, PALETTE[3] if peak else PALETTE[0])
        if i:
            _arrow(axes, (x - pitch + BOX_WIDTH / 2, 0.55), (x - BOX_WIDTH / 2, 0.55))
    return figure


def _handed_on(d: Derivation, stage: str) -> str:
    if not isinstance(d.subject, WalkedSubject):
        return ""
    c, vae = d.checkpoint, d.checkpoint.vae
    latent = f"B×{vae.latent_channels if vae else 4}×h₀×w₀"
    text = c.text_encoder.hidden_size if c.text_encoder else None
    width = c.unet.cross_attention_dim[0] if c.unet else text
    shapes = {
        "text_encoder": f"2B×L×{width}",
        "vae_encode": latent,
        "prepare_latents": latent,
        "unet": latent,
        "vae_decode": "B×3×H×W",
        "safety_checker": "B flags",
        "postprocess": "B×3×H×W",
    }
    return "→ " + shapes.get(stage, "")


@styled
def unet_diagram(config: UNet2DConditionConfig) -> Figure:
    """Draw the UNet's levels as a U: blocks with output shapes under guidance, skip connections dashed."""
    depth = len(config.block_out_channels)
    row, width = BOX_HEIGHT + 0.42, 2.9
    right, top = 10.6, (depth + 1) * row
    figure, axes = _canvas(9, 9 * top / right, right, top)
    left_x, right_x = 1.8, right - 1.8
    for k, channels in enumerate(config.block_out_channels):
        y = top - (k + 0.5) * row
        inset = 0.28 * k
        skips = f"{config.layers_per_block[k] + 1} skip tensors at {_side('h', k)}×{_side('w', k)}"
        down = [f"down_blocks.{k}", config.down_block_types[k], _shape(channels, min(k + 1, depth - 1))]
        i = depth - 1 - k
        up = [f"up_blocks.{i}", config.up_block_types[i], _shape(channels, max(k - 1, 0))]
        _box(axes, left_x + inset, y, down, PALETTE[0], width)
        _box(axes, right_x - inset, y, up, PALETTE[2], width)
        ends = (left_x + inset + width / 2, y), (right_x - inset - width / 2, y)
        _arrow(axes, *ends, "--", PALETTE[7])
        axes.text(right / 2, y + 0.12, skips, ha="center", fontsize=FONT_SIZE - 0.5)
        if k:
            _arrow(axes, (left_x + inset, y + row - BOX_HEIGHT / 2), (left_x + inset, y + BOX_HEIGHT / 2))
            _arrow(axes, (right_x - inset, y + BOX_HEIGHT / 2), (right_x - inset, y + row - BOX_HEIGHT / 2))
    _middle(axes, config, right / 2, row / 2, (left_x + 0.28 * (depth - 1), right_x - 0.28 * (depth - 1)), width)
    return figure


def _middle(
    axes: Axes, config: UNet2DConditionConfig, x: float, y: float, columns: tuple[float, float], width: float
) -> None:
    deepest = len(config.block_out_channels) - 1
    name = config.mid_block_type or "none"
    _box(axes, x, y, ["mid_block", name, _shape(config.block_out_channels[-1], deepest)], PALETTE[1], width)
    above = y + 0.42 + BOX_HEIGHT / 2
    _arrow(axes, (columns[0], above), (x - width / 2, y))
    _arrow(axes, (x + width / 2, y), (columns[1], above))


def _shape(channels: int, level: int) -> str:
    return f"2B×{channels}×{_side('h', level)}×{_side('w', level)}"


def _side(letter: str, level: int) -> str:
    return letter + str(level).translate(SUBSCRIPTS)
