"""One recordable run and its variants: a tape holds where every decision taken on a size holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from derivation.gpu.profile import Hardware
from derivation.options import Options
from derivation.tape.evaluate import Evaluator
from derivation.tape.tape import Memory, Tape

MAX_VARIANTS = 256


@dataclass(frozen=True, eq=False)
class Variant:
    """A tape and its evaluator."""

    tape: Tape

    @cached_property
    def evaluator(self) -> Evaluator:
        """The tape's evaluator."""
        return Evaluator(self.tape)

    def holds(self, values: Mapping[str, int]) -> bool:
        """Return True if the tape's decisions are those at ``values``."""
        return decides_alike(self.tape, values)


def decides_alike(tape: Tape, values: Mapping[str, int]) -> bool:
    """Return True if a run at ``values`` would take every decision that ``tape`` took."""
    fixed = all(values[name] == value for name, value in tape.fixed.items())
    ones = all(values[name] == 1 for name in tape.ones)
    return fixed and ones and all(guard.holds(values) for guard in tape.guards.values())


class Recordings(Protocol):
    """A run's variants, whoever records them."""

    def __hash__(self) -> int: ...

    @property
    def generic(self) -> Variant:
        """The variant for sizes where every symbol is above 1 and below every threshold."""

    def at(self, values: Mapping[str, int]) -> Variant:
        """Return the variant that holds at ``values``."""

    def regime(self, values: Mapping[str, int]) -> Variant:
        """Return the variant of the decisions at ``values``."""


class Program:
    """Records ``run`` symbolically, ``fixed`` symbols as numbers, and again for sizes at which it decides otherwise.

    What modules recorded is kept in ``memory``, which programs may share.
    """

    def __init__(
        self,
        run: Callable[[], object],
        options: Options,
        fixed: Mapping[str, int] | None = None,
        memory: Memory | None = None,
        hardware: Hardware | None = None,
    ) -> None:
        self._run = run
        self._options, self._hardware = options, hardware
        self._fixed = dict(fixed or {})
        self._memory: Memory = {} if memory is None else memory
        self._variants: list[Variant] = []
        self._walked: list[Variant] = []

    @property
    def generic(self) -> Variant:
        """The variant for sizes where every symbol is above 1 and below every threshold."""
        if self._variants:
            return self._variants[0]
        return self._record(self._tape(), self._variants)

    def at(self, values: Mapping[str, int]) -> Variant:
        """Return the variant that holds at ``values``, every VAE tile walked, recording it first if there is none.

        Values without tile symbols are those of VAE tiles that have no closed form.
        """
        if not self._options.vae_tiling or "E" in values:
            variant = self.regime(values)
            if variant.tape.tile is None:
                return variant
        walked = Tape(self._options, self._hardware, fixed=dict(values), memory=self._memory)
        return self._holding(values, self._walked) or self._record(walked, self._walked)

    def regime(self, values: Mapping[str, int]) -> Variant:
        """Return the variant of the decisions at ``values``, recording it first if there is none."""
        if (variant := self._holding(values, [self.generic, *self._variants[1:]])) is not None:
            return variant
        ones = frozenset(name for name, value in values.items() if value == 1)
        return self._record(self._tape(hint=dict(values), ones=ones), self._variants)

    def _tape(self, hint: Mapping[str, int] | None = None, ones: frozenset[str] = frozenset()) -> Tape:
        return Tape(self._options, self._hardware, hint=hint, ones=ones, fixed=self._fixed, memory=self._memory)

    @staticmethod
    def _holding(values: Mapping[str, int], variants: Iterable[Variant]) -> Variant | None:
        return next((variant for variant in variants if variant.holds(values)), None)

    def _record(self, tape: Tape, variants: list[Variant]) -> Variant:
        with tape.running():
            outputs = self._run()
            del outputs
        variant = Variant(tape)
        if len(variants) >= MAX_VARIANTS:
            variants.pop()
        variants.append(variant)
        return variant
