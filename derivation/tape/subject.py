"""What a derivation is of: something that records its calls on a tape, whoever runs it."""

from __future__ import annotations

from collections.abc import Container, Mapping
from math import prod
from typing import Any, Protocol

from derivation.call import Call
from derivation.options import Options
from derivation.tape.grid import Grid, Range, Sides
from derivation.tape.program import Recordings
from derivation.tape.symbols import DTYPE_BYTES, ceil512

# Parameters and buffers of each model: path -> (shape, dtype).
Parameters = Mapping[str, Mapping[str, tuple[tuple[int, ...], str]]]


class Subject(Protocol):
    """A pipeline, or one component: walked by our own blocks, or traced from the real modules.

    ``name`` is the model's, ``method`` "walk" or "trace"; ``whole`` says whether it is a pipeline; ``grid`` maps image
    sides to level sides, of ``sides`` that are accepted; ``calls`` names the component calls in order, ``guided`` those
    that depend on guidance.
    """

    @property
    def name(self) -> str: ...
    @property
    def method(self) -> str: ...
    @property
    def whole(self) -> bool: ...
    @property
    def options(self) -> Options: ...
    @property
    def prompt_length(self) -> int:
        """The prompt length in tokens of a call that says none."""

    @property
    def default_sides(self) -> tuple[int, int]:
        """The height and width in pixels of a call that says none."""

    @property
    def grid(self) -> Grid: ...
    @property
    def sides(self) -> Sides: ...
    @property
    def bounds(self) -> Mapping[str, Range]:
        """The values that batch_size and prompt_length may have, where those are fewer than all."""

    @property
    def remarks(self) -> tuple[str, ...]:
        """What holds of this subject alone, in words, beside what its options take for granted."""

    @property
    def calls(self) -> tuple[str, ...]: ...
    @property
    def guided(self) -> Container[str]: ...
    @property
    def parameters(self) -> Parameters: ...
    @property
    def resident(self) -> Parameters:
        """Parameters and buffers that are on the GPU throughout a call: all, or what offload leaves there."""

    @property
    def parameter_counts(self) -> Mapping[str, int]: ...

    def program(self, guidance: bool, fixed: Mapping[str, int]) -> Recordings:
        """Return the whole call as a recordable run, ``fixed`` symbols as numbers."""

    def component(self, name: str, guidance: bool, fixed: Mapping[str, int]) -> Recordings:
        """Return the component call ``name`` as a recordable run."""

    def check(self, call: Call) -> None:
        """Raise DerivationError for a call that the pipeline rejects for another reason than its sides."""

    def longest_prompt(self, name: str) -> int | None:
        """Return how many tokens one call of component ``name`` takes, None where there is no limit."""

    def changed(self, **options: Any) -> Subject:
        """Return the same model under other options; raises DerivationError for one that is not supported."""

    def document(self) -> dict[str, Any]:
        """Return what the subject is made from as JSON values."""


def weights_bytes(entries: Mapping[str, tuple[tuple[int, ...], str]]) -> int:
    """Return the bytes of parameters and buffers, each in 512-byte blocks."""
    return sum(ceil512(prod(shape) * DTYPE_BYTES[dtype]) for shape, dtype in entries.values())
