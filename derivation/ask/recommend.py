"""What to switch on so that one image size fits: remedies in order of what they cost, with what each saves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from derivation.api import Derivation, derive
from derivation.ask.fit import Image, Request, peak_tensor_bytes
from derivation.ask.nearby import Nearby, cheaper_sizes
from derivation.call import Call
from derivation.config.traced import quantized
from derivation.errors import DerivationError
from derivation.gpu.profile import lacks_fused_attention
from derivation.options import TABLE, Options
from derivation.options.row import Remedy
from derivation.verdict import FITS, Verdict

# How the allocator is configured where a process is started: what is reserved may change, tensors do not.
EXPANDABLE = Remedy(
    "expandable segments",
    {"alloc_conf": "expandable_segments:True"},
    "none; on Linux",
    "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True, before the process starts",
    0,
)
# In order of cost.
REMEDIES = tuple(sorted((remedy for row in TABLE.values() for remedy in row.remedies), key=lambda r: r.rank))


@dataclass(frozen=True, slots=True)
class Saving:
    """One remedy: ``saves_bytes`` by itself, and whether the size needs it.

    ``adds_bytes`` is what it saves on top of the needed remedies before it, and ``peak_tensor_bytes`` the peak with
    it and them; both None where it is not needed.
    """

    name: str
    change: Mapping[str, object]
    cost: str
    call: str
    saves_bytes: int
    needed: bool
    adds_bytes: int | None
    peak_tensor_bytes: int | None


@dataclass(frozen=True, slots=True)
class Recommendation:
    """The verdict as asked, which remedies are needed, the verdict with them, and larger images that need less.

    ``expandable`` is the verdict as asked where the allocator's segments are expandable, if that is a better one;
    ``quantized`` are the verdicts of bundled checkpoints of the model with quantised weights, of those that fit.
    """

    budget_bytes: int
    as_asked: Image
    with_needed: Image
    steps: tuple[Saving, ...]
    cheaper_sizes: tuple[Nearby, ...] = ()
    expandable: Verdict | None = None
    quantized: Mapping[str, Verdict] = field(default_factory=dict)

    @property
    def fits(self) -> bool:
        """Whether the size fits with the remedies that are needed."""
        return self.with_needed.verdict.fits

    @property
    def needed(self) -> tuple[Saving, ...]:
        """The remedies to apply, cheapest first."""
        return tuple(step for step in self.steps if step.needed)

    def as_dict(self) -> dict[str, Any]:
        """Return the recommendation, ready for JSON."""
        return asdict(self)


class _Peaks:
    """One call under changed options, each set of options derived, and replayed, at most once."""

    def __init__(self, derivation: Derivation, call: Call, budget_bytes: int | None) -> None:
        self._call, self._budget_bytes, self._options = call, budget_bytes, derivation.options
        self._subject = derivation.subject
        self._derived: dict[Options, Derivation] = {derivation.options: derivation}
        self._peaks: dict[Options, int] = {}
        self._images: dict[Options, Image] = {}

    def __getitem__(self, remedies: Sequence[Remedy]) -> int:
        """Return the exact bytes of weights and tensors with some remedies."""
        changed = self._changed(remedies)
        if changed not in self._peaks:
            self._peaks[changed] = peak_tensor_bytes(self._derived[changed], self._call)[1]
        return self._peaks[changed]

    def fits(self, remedies: Sequence[Remedy]) -> bool:
        """Return whether the call fits with some remedies."""
        return self.image(remedies).verdict.fits

    def image(self, remedies: Sequence[Remedy]) -> Image:
        """Return the call's peak and verdict with some remedies."""
        changed = self._changed(remedies)
        if changed not in self._images:
            self._images[changed] = Request(self._derived[changed], self._budget_bytes).image(self._call)
        return self._images[changed]

    def _changed(self, remedies: Sequence[Remedy]) -> Options:
        changed = self._options
        for remedy in remedies:
            changed = replace(changed, **remedy.change)  # type: ignore[arg-type]
        if changed not in self._derived:
            self._derived[changed] = Derivation(self._subject.changed(**changed.as_dict()))
        return changed


def recommend(derivation: Derivation, budget_bytes: int | None, call: Call) -> Recommendation:
    """Return the remedies, in order of cost, that ``call`` needs to fit on the GPU, or into ``budget_bytes`` of it.

    Cheap remedies are added until the call fits; then each that turned out needless is taken back, the
    costliest first. Without a GPU the budget is for weights and tensors. Raises DerivationError for a size that
    the pipeline rejects.
    """
    budget = Request(derivation, budget_bytes).budget_bytes
    peaks = _Peaks(derivation, call, budget_bytes)
    alone = _savings(peaks, derivation.options)
    chosen = _minimal(peaks, list(alone))
    steps = (_step(peaks, remedy, saves, chosen) for remedy, saves in alone.items())
    kept = tuple(step for step in steps if step.needed or step.saves_bytes > 0)
    expandable, cheaper = _expandable(peaks, derivation.options), cheaper_sizes(derivation, call)
    smaller = {} if peaks.fits(()) else _quantized(derivation, budget_bytes, call)
    return Recommendation(budget, peaks.image(()), peaks.image(chosen), kept, cheaper, expandable, smaller)


def _quantized(derivation: Derivation, budget_bytes: int | None, call: Call) -> dict[str, Verdict]:
    options, own = derivation.options, ("pipeline", "dtype", "attention")
    given = {name: getattr(options, name) for name in TABLE if name not in own and options.chosen(name)}
    found: dict[str, Verdict] = {}
    for name in quantized(derivation.name):
        with suppress(DerivationError):  # an option that quantised weights do not take
            verdict = Request(derive(name, **given), budget_bytes).verdict(call)
            found |= {name: verdict} if verdict.fits else {}
    return found


def _expandable(peaks: _Peaks, options: Options) -> Verdict | None:
    asked = peaks.image(()).verdict
    if options.gpu is None or options.alloc_conf is not None or asked.verdict == FITS:
        return None
    with suppress(DerivationError):  # a traced pipeline has no such option
        found = peaks.image((EXPANDABLE,)).verdict
        return found if found.beats(asked) else None
    return None


def _step(peaks: _Peaks, remedy: Remedy, saves_bytes: int, chosen: Sequence[Remedy]) -> Saving:
    needed, after, adds = remedy in chosen, None, None
    if needed:
        before = chosen[: chosen.index(remedy)]
        after = peaks[[*before, remedy]]
        adds = peaks[before] - after
    return Saving(remedy.name, dict(remedy.change), remedy.cost, remedy.call, saves_bytes, needed, adds, after)


def _savings(peaks: _Peaks, options: Options) -> dict[Remedy, int]:
    """Return the bytes that each remedy saves alone, for those that change these options and can be derived."""
    found: dict[Remedy, int] = {}
    for remedy in REMEDIES:
        if _improves(options, remedy):
            with suppress(DerivationError):
                found[remedy] = peaks[()] - peaks[[remedy]]
    return found


def _improves(options: Options, remedy: Remedy) -> bool:
    """Return False for no change, for a half type in place of another, and for a fused backend likewise."""
    change = remedy.change
    if all(getattr(options, name) == value for name, value in change.items()):
        return False
    fused = change.get("attention") == "efficient"
    slow = options.attention in ("eager", "math")
    wide = options.dtype == "float32" or lacks_fused_attention(options.gpu, options.dtype)
    return (not fused or slow) and ("dtype" not in change or wide)


def _minimal(peaks: _Peaks, remedies: Sequence[Remedy]) -> list[Remedy]:
    """Return the cheapest prefix that fits, without its needless members; all that help where none fits."""
    chosen: list[Remedy] = []
    for remedy in remedies:
        if peaks.fits(chosen):
            break
        if peaks[[*chosen, remedy]] < peaks[chosen]:
            chosen.append(remedy)
    fit, least = peaks.fits(chosen), peaks[chosen]
    for remedy in reversed(chosen[:]):
        rest = [other for other in chosen if other is not remedy]
        if peaks.fits(rest) if fit else peaks[rest] <= least:
            chosen = rest
    return chosen
