"""One recordable run and its variants: a tape holds where every decision taken on a size holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from derivation.liveness import Evaluator
from derivation.tape import Settings, Tape

MAX_VARIANTS = 256


@dataclass(frozen=True, slots=True)
class Variant:
    """A tape and its evaluator."""

    tape: Tape
    evaluator: Evaluator

    def holds(self, values: Mapping[str, int]) -> bool:
        """Return True if the tape's decisions are those at ``values``."""
        return decides_alike(self.tape, values)


def decides_alike(tape: Tape, values: Mapping[str, int]) -> bool:
    """Return True if a run at ``values`` would take every decision that ``tape`` took."""
    fixed = all(values[name] == value for name, value in tape.fixed.items())
    ones = all(values[name] == 1 for name in tape.ones)
    return fixed and ones and all(guard.holds(values) for guard in tape.guards.values())


class Program:
    """Records ``run`` symbolically, ``fixed`` symbols as numbers, and again for sizes at which it decides otherwise."""

    def __init__(
        self, run: Callable[[], object], settings: Settings, fixed: Mapping[str, int] | None = None
    ) -> None:
        self._run = run
        self._settings = settings
        self._fixed = dict(fixed or {})
        self._variants: list[Variant] = []

    @property
    def generic(self) -> Variant:
        """The variant for sizes where every symbol is above 1 and below every threshold."""
        return self._variants[0] if self._variants else self._record(Tape(self._settings, fixed=self._fixed))

    def at(self, values: Mapping[str, int]) -> Variant:
        """Return the variant that holds at ``values``, recording it first if there is none."""
        for variant in (self.generic, *self._variants[1:]):
            if variant.holds(values):
                return variant
        ones = frozenset(name for name, value in values.items() if value == 1)
        return self._record(Tape(self._settings, hint=dict(values), ones=ones, fixed=self._fixed))

    def _record(self, tape: Tape) -> Variant:
        with tape.running():
            outputs = self._run()
            del outputs
        variant = Variant(tape, Evaluator(tape))
        if len(self._variants) >= MAX_VARIANTS:
            self._variants.pop()
        self._variants.append(variant)
        return variant
