"""The Equation: everything in closed form that printers, the report and the commands read, each part made once."""

from __future__ import annotations

from functools import cached_property

from derivation.equation.cases import Case, exact_cases
from derivation.equation.crossover import Crossover, Irrelevant, crossovers, does_not_matter
from derivation.equation.derived import Derived
from derivation.equation.device import STEP, DeviceForm
from derivation.equation.device_bound import Bound, Progress, device_bound
from derivation.equation.device_code import DeviceCode, device_code
from derivation.equation.device_pages import device_form
from derivation.equation.function import Function, Stages, function, stages
from derivation.equation.limits import Limits, limits
from derivation.errors import DerivationError


class Equation(Derived):
    """The closed form of a subject's peak: its headline, its exact cases as code, and what follows from it."""

    def cases(self, guidance: bool = True, apart: bool = False) -> tuple[Case, ...]:
        """Return the cases of the exact peak, or of each stage's where stages are ``apart``, most special first."""
        return self._once(self._cases, guidance, apart)

    def _cases(self, guidance: bool, apart: bool) -> tuple[Case, ...]:
        return exact_cases(self, guidance, apart)

    @cached_property
    def function(self) -> Function:
        """The exact peak as straight-line code."""
        return function(self, {guidance: self.cases(guidance) for guidance in (True, False)})

    @cached_property
    def stage_functions(self) -> Stages:
        """The exact peak of every stage as straight-line code."""
        return stages(self, {guidance: self.cases(guidance, apart=True) for guidance in (True, False)})

    def crossovers(self, guidance: bool = True) -> tuple[Crossover, ...]:
        """Return where the peak moves from one stage to another."""
        return self._once(crossovers, self, guidance)

    def irrelevant(self, guidance: bool = True) -> tuple[Irrelevant, ...]:
        """Return what the peak does not depend on."""
        return self._once(self._irrelevant, guidance)

    def _irrelevant(self, guidance: bool) -> tuple[Irrelevant, ...]:
        return does_not_matter(self, self.crossovers(guidance), guidance)

    @cached_property
    def device(self) -> DeviceForm:
        """What the GPU's allocator and nvidia-smi show under guidance; raises DerivationError without a GPU."""
        return device_form(self)

    def device_bound(self, step: int = STEP, progress: Progress = lambda _: None) -> Bound:
        """Return what is reserved at most where sides are multiples of ``step``; raises as ``device_bound`` does."""
        return device_bound(self.device, step, progress=progress)

    @cached_property
    def device_code(self) -> DeviceCode | None:
        """``device`` as straight-line code, None without a GPU or where it leaves sizes on its grid out."""
        if self.options.gpu is None:
            return None
        try:
            return device_code(self.device)
        except DerivationError:
            return None

    @cached_property
    def limits(self) -> Limits:
        """The sizes up to which 64-bit integers are proven to suffice."""
        return limits(self, self.function)
