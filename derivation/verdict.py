"""Does a call fit: what it needs, of what, what is left or short, and how far that can be trusted.

Nothing else in the package says so: every output shows this answer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from derivation.allocator.memory import DeviceMemory, context_of
from derivation.errors import unsupported
from derivation.gpu.cards import Gpu, lookup, with_memory
from derivation.gpu.profile import asked_of, documented
from derivation.text import human

MARGINS = Path(__file__).parent / "gpu" / "margins.json"
FITS, RELEASED, SLOWER, NO_FIT = (
    "fits",
    "fits after cached blocks are released",
    "fits with slower convolutions",
    "does not fit",
)
# Tensors and weights alone, no GPU named: less than any card needs, so only the "no" is a verdict on the call.
TENSORS_FIT = "the tensors fit"
NO_CARD = "no verdict: the architecture names no card"
MEASURED = "calls measured on this card"
DOCUMENTED = "cuDNN as published for its architecture"
NEAREST = "cuDNN as on another architecture"
ASKED = "asked of cuDNN {} without the card"
TENSORS = "tensors only"


@dataclass(frozen=True, slots=True)
class Verdict:
    """Bytes that a call ``needs`` ``of`` those there are, and what follows.

    On a card these are nvidia-smi's used and torch's total memory; of free memory what the allocator reserves; where
    no GPU is named, weights and tensors. Where the call runs out of memory ``needs_bytes`` is what it had reached,
    ``short_bytes`` what the request that failed lacked, ``failed`` that request. ``margin_bytes`` is how much more a
    measured call needed at most than was predicted, at the ``confidence`` that the card has; None: not known.
    """

    needs_bytes: int | None
    of_bytes: int | None
    left_bytes: int | None
    short_bytes: int
    verdict: str
    confidence: str
    margin_bytes: int | None
    failed: Mapping[str, Any] | None = None

    @classmethod
    def read(cls, found: Mapping[str, Any]) -> Verdict | None:
        """Return the verdict that is part of an estimate, None where there is none."""
        return cls(**{field.name: found[field.name] for field in fields(cls)}) if "of_bytes" in found else None

    @property
    def fits(self) -> bool:
        """Whether the call runs; where no GPU is named, whether its tensors are within the bytes given."""
        return self.verdict in (FITS, RELEASED, SLOWER, TENSORS_FIT)

    @property
    def sure(self) -> bool:
        """Whether what is left is at least the margin."""
        return self.left_bytes is not None and self.margin_bytes is not None and self.left_bytes >= self.margin_bytes

    @property
    def needs_more(self) -> bool:
        """Whether the call ran out of memory at ``needs_bytes``, which is then less than it needs."""
        return self.failed is not None

    def beats(self, other: Verdict) -> bool:
        """Return whether a call runs with less trouble than by another verdict on a card."""
        ease = (FITS, RELEASED, SLOWER, NO_FIT)
        return {self.verdict, other.verdict} <= {*ease} and ease.index(self.verdict) < ease.index(other.verdict)

    def as_dict(self) -> dict[str, Any]:
        """Return the fields by name, ready for JSON."""
        return {**asdict(self), "fits": self.fits, "sure": self.sure, "needs_more": self.needs_more}

    def __str__(self) -> str:
        """Return the verdict in one line."""
        if self.of_bytes is None or self.needs_bytes is None:
            return self.verdict
        more = "needs more than" if self.needs_more else "needs"
        said = f"{more} {human(self.needs_bytes)} of {human(self.of_bytes)}: {self.verdict}"
        return f"{said}, {_out_of_memory(self.failed)}" if self.failed else said

    @property
    def trust(self) -> str:
        """What is left against the margin, in one line; "" where there is none."""
        if self.left_bytes is None or self.margin_bytes is None:
            return ""
        than = "at least" if self.sure else "less than"
        margin = f"{than} the margin of {human(self.margin_bytes)} ({margin_reason(self.confidence)})"
        return f"left: {human(self.left_bytes)}, {margin}"


def on_card(gpu: str, memory: DeviceMemory) -> Verdict:
    """Return the verdict on a call that was replayed on a card, or in the memory that is free there."""
    card = lookup(gpu)
    trusted = confidence(card)
    margin = None if memory.device is None else margin_bytes(memory.device, trusted)
    if memory.total is None or memory.device is None:
        return Verdict(memory.device, None, None, 0, NO_CARD, trusted, margin)
    if (failed := memory.failed) is not None:
        short = int(failed["short_bytes"])
        return Verdict(memory.device, memory.total, None, short, NO_FIT, trusted, margin, failed)
    said = SLOWER if memory.slower_convolutions else RELEASED if memory.num_alloc_retries else FITS
    return _left(memory.device, memory.total, said, trusted)


def in_room(gpu: str, reserved_bytes: int) -> Verdict | None:
    """Return the verdict on a call that reserves so much where nothing limits it, None where a card has less.

    Raises DerivationError for an unknown GPU.
    """
    card = lookup(gpu)
    context, total = context_of(card)[0], card.total_memory_bytes
    if context is None or total is None or reserved_bytes + context > total:
        return None
    return _left(reserved_bytes + context, total, FITS, confidence(card))


def free_on(gpu: str, free_bytes: int | None) -> str:
    """Return the name of a card with so many bytes free, None: all of it."""
    return gpu if free_bytes is None else with_memory(gpu, f"{max(free_bytes, 1)}B", free=True)


def _left(needs_bytes: int, of_bytes: int, said: str, trusted: str) -> Verdict:
    return Verdict(needs_bytes, of_bytes, of_bytes - needs_bytes, 0, said, trusted, margin_bytes(needs_bytes, trusted))


def of_tensors(needs_bytes: int, of_bytes: int) -> Verdict:
    """Return the verdict where no GPU is named: on weights and tensors, of a number of bytes."""
    left = of_bytes - needs_bytes
    said = TENSORS_FIT if left >= 0 else NO_FIT
    return Verdict(needs_bytes, of_bytes, left if left >= 0 else None, max(-left, 0), said, TENSORS, None)


def confidence(card: Gpu) -> str:
    """Return whether calls were measured on the card, its architecture is documented, cuDNN was asked, or none."""
    measured = {lookup(key).name for key in _margins()[MEASURED]["cards"]}
    if card.name in measured and not card.estimated:
        return MEASURED
    if (version := asked_of(card)) is not None:
        return ASKED.format(version)
    return DOCUMENTED if documented(card) else NEAREST


def margin_bytes(needs_bytes: int, trusted: str) -> int:
    """Return how much more than predicted a call may need, as the worst row of the evidence did, in proportion."""
    measured, predicted = worst(trusted)
    return -(-needs_bytes * (measured - predicted) // predicted)


def margin_reason(trusted: str) -> str:
    """Return in words what the margin of a confidence is, and the confidence."""
    measured, predicted = worst(trusted)
    return f"the worst measured call needed {100 * measured / predicted - 100:.1f} % more than predicted; {trusted}"


def worst(trusted: str) -> tuple[int, int]:
    """Return the bytes, measured and predicted, of the worst row of the evidence at a confidence."""
    row = _margins()[trusted]
    return int(row["measured_bytes"]), int(row["predicted_bytes"])


def room_bytes(gpu: str) -> int:
    """Return what the allocator may reserve on a card: its total less the CUDA context.

    Raises DerivationError for a card whose memory is not known.
    """
    card = lookup(gpu)
    if card.total_memory_bytes is None:
        raise unsupported("gpu", gpu, "a card, or its memory as well: its memory size is not known")
    context = card.nearest_context()
    return card.total_memory_bytes - (context[0] if context else 0)


def _out_of_memory(failed: Mapping[str, Any]) -> str:
    asked = human(failed["requested_bytes"]) + (f" for {failed['shape']}" if failed["shape"] else "")
    room = f"{human(failed['free_bytes'])} free, {human(failed['short_bytes'])} short"
    return f"out of memory at {failed['module']}: {asked}, {room}"


@cache
def _margins() -> Mapping[str, Any]:
    margins: dict[str, Any] = json.loads(MARGINS.read_text(encoding="utf-8"))
    return margins
