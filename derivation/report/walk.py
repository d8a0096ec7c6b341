"""The block-by-block walk through a component: every tensor in the order of its allocation."""

# ruff: noqa: RUF001, RUF002

from __future__ import annotations

from dataclasses import dataclass

from derivation.api import Derivation
from derivation.report.answer import reference_side
from derivation.report.text import shape_text, size_text
from derivation.tape.events import Allocation
from derivation.tape.symbols import evaluate
from derivation.tape.tape import Tape

CONTAINERS = ("encoder", "decoder", "vision_model", "text_model", "down_blocks", "up_blocks", "layers")


@dataclass(frozen=True, slots=True)
class Line:
    """One allocation: its number, module, operator, shape, bytes, and what is alive right after it."""

    number: int
    module: str
    op: str
    shape: str
    dtype: str
    formula: str
    nbytes: int
    alive: str
    live_bytes: int
    is_peak: bool


@dataclass(frozen=True, slots=True)
class Block:
    """The lines of one block, its output's shape, and the most bytes alive inside it."""

    path: str
    output: str
    lines: tuple[Line, ...]
    peak_bytes: int
    has_peak: bool


@dataclass(frozen=True, slots=True)
class Walk:
    """One component call: blocks in order, peak bytes at the reference size, parameters of the model behind it."""

    name: str
    blocks: tuple[Block, ...]
    peak_bytes: int
    tensors: int


def walks(d: Derivation) -> tuple[Walk, ...]:
    """Return the walk through every component call of the pipeline's checkpoint."""
    return tuple(_walk(d, name) for name in d.calls)


def _walk(d: Derivation, name: str) -> Walk:
    side = reference_side(d)
    values = d.sizes(side, side, 1, d.prompt_length)
    variant = d.component(name).generic
    live = variant.evaluator.live_bytes(values)
    peak = int(live.argmax()) - 1
    lines: dict[str, list[Line]] = {}
    alive: dict[int, None] = {}
    passing = _passing(variant.tape)
    for event, entry in enumerate(variant.tape.events):
        if entry < 0:
            del alive[-entry]
            continue
        alive[entry] = None
        if entry in passing and event != peak:
            continue
        allocation = variant.tape.allocations[entry - 1]
        line = _line(entry, allocation, alive, int(live[event + 1]), values, is_peak=event == peak)
        lines.setdefault(_block_path(allocation.path or name), []).append(line)
    blocks = tuple(_block(path, found) for path, found in lines.items())
    return Walk(name, blocks, int(live.max()), len(variant.tape.allocations))


def _passing(tape: Tape) -> set[int]:
    """Return the entries of tensors that live only while a cut VAE tile runs: a whole tile's stand for them."""
    spans = [tape.events[start:end] for start, end, _ in tape.cut]
    return {-entry for span in spans for entry in span if entry < 0 and -entry in span}


def _line(number: int, a: Allocation, alive: dict[int, None], live: int, values: dict[str, int], is_peak: bool) -> Line:
    return Line(
        number=number,
        module=a.path,
        op=a.op,
        shape=shape_text(a.shape) + ("" if a.count == 1 else f" ({size_text(a.count)} of them)"),
        dtype=a.dtype,
        formula=size_text(a.nbytes * a.count),
        nbytes=evaluate(a.nbytes, values) * evaluate(a.count, values),
        alive=ranges(list(alive)),
        live_bytes=live,
        is_peak=is_peak,
    )


def _block(path: str, lines: list[Line]) -> Block:
    largest = max(line.live_bytes for line in lines)
    return Block(path, lines[-1].shape, tuple(lines), largest, any(line.is_peak for line in lines))


def _block_path(path: str) -> str:
    """Return the block that a module belongs to: containers and indices count together with what follows.

    >>> _block_path("unet.down_blocks.0.resnets.1.conv1"), _block_path("unet.conv_in")
    ('unet.down_blocks.0', 'unet.conv_in')
    """
    parts = path.split(".")
    end = 1
    while end < len(parts) and (parts[end] in CONTAINERS or parts[end].isdigit()):
        end += 1
        if parts[end - 1].isdigit():
            return ".".join(parts[:end])
    return ".".join(parts[: end + 1])


def ranges(numbers: list[int]) -> str:
    """Return ascending numbers with runs as ranges.

    >>> ranges([1, 2, 3, 7, 9, 10])
    '1–3, 7, 9–10'
    """
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in runs)
