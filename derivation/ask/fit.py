"""The inverse question: the largest image, or the largest batch, that fits into a number of bytes.

Each polynomial of the headline is solved for the image's side, and the exact function polishes the answer.
Every tensor is a polynomial without negative terms in the level sides and the batch, and ceil keeps their
order: the peak grows with each side, so what fits is a prefix of any growing series of images.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from math import isqrt, lcm, sqrt
from typing import Any

import sympy

from derivation.api import Derivation
from derivation.call import Call
from derivation.errors import positive, unsupported
from derivation.tape.grid import B, H, L, W
from derivation.tape.symbols import Size, as_poly
from derivation.verdict import Verdict, room_bytes

ALIGNED = 64
MAX_BATCH = 1 << 20


@dataclass(frozen=True, slots=True)
class Image:
    """An image size with its verdict, its exact peak of weights and tensors in bytes, and the stage that peaks."""

    height: int
    width: int
    batch_size: int
    peak_tensor_bytes: int
    peak_stage: str
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class Fit:
    """What fits on the GPU, or into ``budget_bytes`` of it: None where not even the smallest size does.

    ``image`` has sides that are multiples of the VAE's factor, ``aligned`` of 64; ``solved_side`` is the longer
    side in pixels at which the headline equation equals the budget; ``monotone`` is the proof's outcome.
    """

    budget_bytes: int
    weights_bytes: int
    aspect: tuple[int, int]
    solved_side: float | None
    image: Image | None
    aligned: Image | None
    monotone: bool

    def as_dict(self) -> dict[str, Any]:
        """Return the answer, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Request:
    """A derivation, and the bytes that are free for it: None is all of its GPU.

    Where it is to be ``sure``, a call fits if what is left is at least the verdict's margin. Raises DerivationError for
    neither, and for a GPU whose memory is not known.
    """

    derivation: Derivation
    free_bytes: int | None
    sure: bool = False

    def __post_init__(self) -> None:
        if self.free_bytes is not None:
            positive("budget_bytes", self.free_bytes)
        elif self.derivation.options.gpu is None:
            raise unsupported("budget_bytes", None, "a number of bytes, or a derivation with a gpu")
        self.budget_bytes  # noqa: B018

    @property
    def budget_bytes(self) -> int:
        """What the allocator may reserve; without a GPU, what weights and tensors may take."""
        return room_bytes(str(self.derivation.options.gpu)) if self.free_bytes is None else self.free_bytes

    def verdict(self, call: Call) -> Verdict:
        """Return the verdict on one call."""
        return self.derivation.verdict(call, free_bytes=self.free_bytes)

    def fits(self, call: Call) -> bool:
        """Return whether a call fits."""
        verdict = self.verdict(call)
        return verdict.fits and (verdict.sure or not self.sure)

    def image(self, call: Call) -> Image:
        """Return the verdict on one call with its exact peak."""
        stage, peak = peak_tensor_bytes(self.derivation, call)
        return Image(call.height, call.width, call.batch_size, peak, stage, self.verdict(call))

    def headlines(self, call: Call) -> list[sympy.Expr]:
        """Return the polynomials in H, W and B whose largest, plus the weights, is the peak."""
        terms = self.derivation.equation.pipeline_stage(call.guidance).terms
        return [term.expression.subs(L, call.prompt_length) for term in terms]


def peak_tensor_bytes(derivation: Derivation, call: Call) -> tuple[str, int]:
    """Return the stage that peaks and the exact bytes of weights and tensors then."""
    peaks = derivation.stage_peaks(call)
    stage = max(peaks, key=peaks.__getitem__)
    return stage, derivation.weights_bytes + peaks[stage]


def fit(
    derivation: Derivation,
    budget_bytes: int | None = None,
    aspect: tuple[int, int] = (1, 1),
    batch_size: int = 1,
    prompt_length: int | None = None,
    guidance: bool = True,
) -> Fit:
    """Return the largest image of ``aspect`` (width : height) that fits on the GPU, or into ``budget_bytes``.

    The shorter side is the aspect's, to the nearest multiple. With a GPU the budget is what is free there, None all
    of it; without one it is for weights and tensors. What the allocator reserves does not grow with every step: of
    that the answer is one that fits while its next step does not. Raises DerivationError for a bad argument.
    """
    request = Request(derivation, budget_bytes)
    call, least = _smallest(derivation, aspect, batch_size, prompt_length, guidance)
    side = solved_side(request, aspect, call)
    aligned = _largest(request, aspect, call, lcm(least, ALIGNED), side)
    image = _largest(request, aspect, call, least, side, aligned)
    weights = derivation.weights_bytes
    return Fit(request.budget_bytes, weights, aspect, side, image, aligned, grows(derivation, guidance))


def surely_fits(
    derivation: Derivation,
    budget_bytes: int | None = None,
    aspect: tuple[int, int] = (1, 1),
    batch_size: int = 1,
    prompt_length: int | None = None,
    guidance: bool = True,
) -> Image | None:
    """Return ``fit``'s ``aligned`` image where as much is left as the verdict's margin; None: none, or no GPU."""
    request = Request(derivation, budget_bytes, sure=True)
    call, least = _smallest(derivation, aspect, batch_size, prompt_length, guidance)
    return _largest(request, aspect, call, lcm(least, ALIGNED), solved_side(request, aspect, call))


def _smallest(
    derivation: Derivation, aspect: tuple[int, int], batch_size: int, prompt_length: int | None, guidance: bool
) -> tuple[Call, int]:
    """Return the call with the smallest image, and the step of its sides."""
    for key, value in (("aspect", min(aspect)), ("batch_size", batch_size)):
        positive(key, value)
    factor = derivation.grid.vae_scale_factor
    call = Call(factor, factor, batch_size, prompt_length, guidance).filled(derivation.prompt_length)
    return call, max(factor, derivation.equation.sides.step)


def largest_batch(
    derivation: Derivation,
    budget_bytes: int | None,
    height: int,
    width: int,
    prompt_length: int | None = None,
    guidance: bool = True,
    sure: bool = False,
) -> Image | None:
    """Return the largest batch of this image size that fits on the GPU, or into ``budget_bytes``, None if none does.

    Where it is to be ``sure`` as much is left as the verdict's margin.
    """
    request = Request(derivation, budget_bytes, sure)
    call = Call(height, width, 1, prompt_length, guidance).filled(derivation.prompt_length)
    guess = _solved_batch(request, call)
    batch = last_that_fits(lambda n: request.fits(replace(call, batch_size=n)), guess, MAX_BATCH)
    return request.image(replace(call, batch_size=batch)) if batch else None


def _largest(
    request: Request, aspect: tuple[int, int], call: Call, step: int, side: float | None, known: Image | None = None
) -> Image | None:
    """Return the largest image in steps of ``step`` pixels, at least as large as one that is known to fit."""

    def sized(n: int) -> Call:
        height, width = sides(aspect, step, n)
        return replace(call, height=height, width=width)

    accepted = request.derivation.equation.sides

    def too_small(n: int) -> bool:
        return min(sized(n).height, sized(n).width) < accepted.least

    def fits(n: int) -> bool:
        return n <= least or too_small(n) or request.fits(sized(n))

    least = 0
    if known is not None and fits(longer := max(known.height, known.width) // step):
        least = longer
    n = last_that_fits(fits, int((side or step) / step), accepted.most // step)
    return request.image(sized(n)) if n and not too_small(n) else None


def sides(aspect: tuple[int, int], step: int, n: int) -> tuple[int, int]:
    """Return (height, width) of the image whose longer side is ``n`` steps, the other to the nearest step.

    >>> sides((16, 9), 8, 160), sides((9, 16), 64, 20)
    ((720, 1280), (1280, 704))
    """
    shorter, longer = sorted(aspect)
    other = max(1, (2 * n * shorter + longer) // (2 * longer)) * step
    return (other, n * step) if aspect[0] > aspect[1] else (n * step, other)


def last_that_fits(fits: Callable[[int], bool], guess: int, limit: int) -> int:
    """Return the largest n in 1..limit with ``fits(n)``, 0 if none; where n fits, so does every smaller one.

    Doubling steps from ``guess`` bracket the answer, halves narrow it.
    """
    low, high, step = 0, limit + 1, 1
    probe = min(max(guess, 1), limit)
    while high - low > 1:
        if fits(probe):
            low, probe = probe, probe + step
        else:
            high, probe = probe, probe - step
        step *= 2
        if not low < probe < high or (low > 0 and high <= limit):
            probe = (low + high) // 2
    return low


def solved_side(request: Request, aspect: tuple[int, int], call: Call) -> float | None:
    """Return the longer side in pixels at which the headline equals the budget, 0 where it always exceeds it.

    Each polynomial is a x^4 + b x^2 + c in the side x; None where one is not, as with VAE tiles, or does not grow.
    """
    if request.derivation.options.vae_tiling:
        return None
    x = sympy.Symbol("x", positive=True)
    longer = max(aspect)
    along = {H: x * sympy.Rational(aspect[1], longer), W: x * sympy.Rational(aspect[0], longer), B: call.batch_size}
    spare = request.budget_bytes - request.derivation.weights_bytes
    found: list[float] = []
    for expression in request.headlines(call):
        terms = {m[0]: c for m, c in sympy.Poly(expression.subs(along), x).terms()}
        a, b, c = (terms.pop(power, 0) for power in (4, 2, 0))
        if terms or any(sympy.sympify(term).free_symbols for term in (a, b, c)) or min(a, b) < 0:
            return None
        if a + b > 0:
            found.append(_positive_root(Fraction(str(a)), Fraction(str(b)), spare - Fraction(str(c))))
    return min(found, default=None)


def _positive_root(a: Fraction, b: Fraction, spare: Fraction) -> float:
    """Return x >= 0 with a x^4 + b x^2 = spare, without cancellation: x^2 = 2 s / (b + sqrt(b^2 + 4 a s))."""
    if spare <= 0:
        return 0.0
    discriminant = b * b + 4 * a * spare
    return sqrt(2 * spare / (b + Fraction(isqrt(int(discriminant * 10**12)), 10**6)))


def _solved_batch(request: Request, call: Call) -> int:
    """Return the batch at which the headline, linear in B, equals the budget; 1 with VAE tiles."""
    if request.derivation.options.vae_tiling:
        return 1
    spare = request.budget_bytes - request.derivation.weights_bytes
    found: list[int] = []
    for headline in request.headlines(call):
        expression = request.derivation.grid.explicit(headline).subs({H: call.height, W: call.width})
        terms = {m[0]: c for m, c in sympy.Poly(expression, B).terms()}
        if slope := terms.get(1, 0):
            found.append(int((spare - terms.get(0, 0)) / slope))
    return min(found, default=1)


def grows(derivation: Derivation, guidance: bool = True) -> bool:
    """Return whether the peak is proven to grow with every symbol.

    Theorem: a polynomial whose non-constant coefficients are all >= 0 grows with each symbol >= 1; so do ceil
    of it, sums, products with a count of the same kind, and the maximum.
    """
    allocations = derivation.program(guidance).generic.tape.allocations
    return all(_growing(size) for a in allocations for size in (a.nbytes, a.count))


def _growing(size: Size) -> bool:
    return all(coefficient >= 0 for monomial, coefficient in as_poly(size).items() if any(monomial))


def parse_aspect(text: str) -> tuple[int, int]:
    """Return width : height in lowest terms.

    >>> parse_aspect("16:9"), parse_aspect("1.5:1"), parse_aspect("1024x512")
    ((16, 9), (3, 2), (2, 1))
    """
    found = re.fullmatch(r"([0-9]{1,6}(?:\.[0-9]{1,6})?)[:x/]([0-9]{1,6}(?:\.[0-9]{1,6})?)", text)
    if found is None or not (Fraction(found[1]) and Fraction(found[2])):
        raise unsupported("aspect", text, "width:height, such as 16:9")
    ratio = Fraction(found[1]) / Fraction(found[2])
    return ratio.numerator, ratio.denominator
