"""Verdicts in microseconds: what the closed form of reserved bytes says where it is exact and nothing is full."""

from __future__ import annotations

from functools import cache

from derivation.api import Derivation
from derivation.call import Call
from derivation.equation.device_pages import device_form
from derivation.errors import DerivationError
from derivation.verdict import Verdict, free_on, in_room

# Bytes that a call reserves without a limit, by (height, width).
Reserved = dict[tuple[int, int], int]


class Quick:
    """The verdicts of a derivation's calls at the sizes of ``DeviceForm``; worked out for all of them at the first.

    Each batch size, prompt length and guidance has its own closed form.
    """

    def __init__(self, derivation: Derivation) -> None:
        self.derivation = derivation
        self._reserved = cache(self._reserved_of)

    def verdict(self, call: Call, free_bytes: int | None = None) -> Verdict | None:
        """Return what ``Derivation.verdict`` says, None where only a replay can: other sizes, or a full GPU.

        Theorem: an allocator that may reserve what it reserves without a limit makes the same decisions.
        """
        call = call.filled(self.derivation.prompt_length)
        known = self._reserved(call.batch_size, call.prompt_length, call.guidance)
        reserved, gpu = known.get((call.height, call.width)), self.derivation.options.gpu
        return None if reserved is None or gpu is None else in_room(free_on(gpu, free_bytes), reserved)

    def _reserved_of(self, batch_size: int, prompt_length: int, guidance: bool) -> Reserved:
        try:
            fixed = self.derivation.at(batch_size=batch_size, prompt_length=prompt_length)
            form = device_form(fixed.equation, guidance)
            return dict(zip(form.index, form.reserved_bytes.tolist(), strict=True)) if form.replayed is None else {}
        except DerivationError:
            return {}
