"""Where the peak moves from one stage to another, solved symbolically, and what does not matter to it.

Every headline polynomial depends on the image through its area A = H W, so stages cross at areas, or at
prompt lengths.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from math import ceil, isqrt

import sympy

from derivation.call import DEFAULT_PROMPT_LENGTH
from derivation.equation.derived import Derived
from derivation.peak.headline import Term
from derivation.peak.liveness import Point
from derivation.tape.grid import B, H, L, W
from derivation.tape.symbols import Size, ceil512
from derivation.tape.tiles import IN_PIXELS

LiveSet = frozenset[tuple[Size, Size]]

A = sympy.Symbol("A", integer=True, positive=True)
# The size at which prompt lengths are compared: what Stable Diffusion 1.x was trained on.
REFERENCE_SIDE = 512
NEGLIGIBLE = 0.01
# The longest history of the schedulers is 4 steps; further calls than these repeat.
MOST_STEPS = 8


@dataclass(frozen=True, slots=True)
class Crossover:
    """The peak is ``before``'s up to ``axis`` = ``threshold``, and ``after``'s above.

    ``axis`` is "area" (H W in pixels) or "length" (L in tokens); ``threshold`` is exact in the other symbols,
    and ``at`` its value where they are ``given``.
    """

    before: str
    after: str
    axis: str
    threshold: sympy.Expr
    at: float
    given: Mapping[str, int]

    @property
    def latex(self) -> str:
        """``axis > threshold`` as LaTeX."""
        axis = "H W" if self.axis == "area" else "L"
        return f"{axis} > {sympy.latex(self.threshold)}"

    @property
    def sentence(self) -> str:
        """What happens, in words."""
        given = ", ".join(f"{name} = {number:,}" for name, number in self.given.items())
        if self.axis == "area":
            side = isqrt(int(self.at))
            where = f"images of more than {int(self.at):,} pixels (about {side:,} x {side:,})"
        else:
            where = f"prompts of more than {int(self.at):,} tokens"
        return f"At {given} the peak moves from {self.before} to {self.after} for {where}."


@dataclass(frozen=True, slots=True)
class Irrelevant:
    """A quantity that does not matter to the peak, and why."""

    quantity: str
    sentence: str


def in_area(expression: sympy.Expr) -> sympy.Expr | None:
    """Return an expression with A for H W, or None where it depends on the sides otherwise.

    >>> in_area(3 * B * H * W + L)
    3*A*B + L
    """
    polynomial = sympy.Poly(expression, H, W)
    if expression.free_symbols & set(IN_PIXELS.values()) or any(h != w for h, w in polynomial.monoms()):
        return None
    return sympy.Add(*(c * A**h for (h, _), c in polynomial.terms()))


def crossovers(
    derived: Derived,
    guidance: bool = True,
    prompt_length: int | None = None,
    batch_size: int = 1,
    side: int = REFERENCE_SIDE,
) -> tuple[Crossover, ...]:
    """Return where the peak's stage changes with the area, and at ``side`` x ``side`` with the prompt length."""
    terms = derived.pipeline_stage(guidance).terms
    forms = _forms(terms)
    if any(term.expression.free_symbols & set(IN_PIXELS.values()) for term in terms):
        return ()
    area = _along(forms, A, {"L": prompt_length or derived.prompt_length, "B": batch_size}, derived.grid.unit**2)
    length = _along(forms, L, {"H": side, "W": side, "B": batch_size}, 1)
    return (*area, *length)


def _forms(terms: Sequence[Term]) -> list[tuple[str, sympy.Expr]]:
    forms = [(term.point.stage, in_area(term.expression)) for term in terms]
    return [(stage, form) for stage, form in forms if form is not None]


def _along(
    forms: Sequence[tuple[str, sympy.Expr]], axis: sympy.Symbol, given: Mapping[str, int], start: int
) -> list[Crossover]:
    """Follow the upper envelope of the forms from ``start`` on."""
    at = _substitution(given)
    curves = [sympy.Poly(form.subs(at), axis, domain="QQ") for _, form in forms]
    edges = [float(start), *_crossings(curves, start)]
    probes = [(low + high) / 2 for low, high in pairwise(edges)] + [2 * edges[-1] + 1]
    winners = [max(range(len(curves)), key=lambda i: curves[i].eval(sympy.Rational(probe))) for probe in probes]
    found: list[Crossover] = []
    for edge, (old, new) in zip(edges[1:], pairwise(winners), strict=True):
        if forms[old][0] != forms[new][0]:
            threshold = _threshold(forms[new][1] - forms[old][1], axis, at, edge)
            name = "area" if axis == A else "length"
            found.append(Crossover(forms[old][0], forms[new][0], name, threshold, edge, given))
    return found


def _substitution(given: Mapping[str, int]) -> dict[sympy.Symbol, int]:
    values = {symbol: given[symbol.name] for symbol in (B, L) if symbol.name in given}
    return values | ({A: given["H"] * given["W"]} if "H" in given else {})


def _crossings(curves: Iterable[sympy.Poly], start: int) -> list[float]:
    differences = {(p - q) for p, q in combinations(curves, 2)}
    roots = {float(root) for d in differences if d.degree() > 0 for root in d.real_roots()}
    return sorted(root for root in roots if root > start)


def _threshold(difference: sympy.Expr, axis: sympy.Symbol, at: Mapping[sympy.Symbol, int], edge: float) -> sympy.Expr:
    """Return the exact root that is ``edge`` where the other symbols are ``at``."""
    polynomial = sympy.Poly(difference, axis)
    if polynomial.degree() == 1:
        slope, constant = polynomial.all_coeffs()
        return _ratio(-constant, slope)
    unknown = sympy.Symbol("x")
    roots = sympy.solve(difference.subs(axis, unknown), unknown)
    nearest = min(roots, key=lambda root: abs(complex(root.subs(at)) - edge))
    return sympy.simplify(nearest.subs(A, H * W))


def _ratio(numerator: sympy.Expr, denominator: sympy.Expr) -> sympy.Expr:
    """Return a ratio of polynomials in lowest terms, its numerator in powers of B."""
    above, below = sympy.fraction(sympy.cancel(numerator / denominator))
    content, primitive = sympy.Poly(above, A, B, L).primitive()
    return content / below * sympy.factor_terms(sympy.collect(primitive.as_expr().subs(A, H * W), B))


def does_not_matter(derived: Derived, crossings: Sequence[Crossover], guidance: bool) -> tuple[Irrelevant, ...]:
    """Return what the peak does not depend on, and from which on or up to which of its ``crossings`` that holds."""
    found = [_orientation(derived, guidance), _length(derived, crossings, guidance), _steps(derived, guidance)]
    names = ", ".join(sorted(str(s) for s in derived.peak(guidance).free_symbols))
    values = Irrelevant(
        "seed, prompt text, guidance scale above 1",
        f"The peak depends on {names} alone: no tensor's size depends on what the tensors hold.",
    )
    return (*(x for x in found if x is not None), values)


def _orientation(derived: Derived, guidance: bool) -> Irrelevant | None:
    terms = derived.pipeline_stage(guidance).terms
    if len(_forms(terms)) < len(terms):
        return None
    unit = derived.grid.unit
    if not {H, W} & derived.peak(guidance).free_symbols:
        return Irrelevant("image size", "No tensor at the peak has a size that depends on the image's.")
    return Irrelevant(
        "aspect ratio",
        f"Height and width count through their product only, for sides that are multiples of {unit} pixels.",
    )


def _length(derived: Derived, crossings: Sequence[Crossover], guidance: bool) -> Irrelevant | None:
    at = {A: REFERENCE_SIDE**2, L: DEFAULT_PROMPT_LENGTH, B: 1}
    forms = [form for _, form in _forms(derived.pipeline_stage(guidance).terms)]
    if len(forms) < len(derived.pipeline_stage(guidance).terms):
        return None
    highest = max(forms, key=lambda form: form.subs(at))
    per_token = int(sympy.diff(highest, L).subs(at))
    share = per_token * DEFAULT_PROMPT_LENGTH / (derived.weights_bytes + int(highest.subs(at)))
    if share > NEGLIGIBLE:
        return None
    if per_token == 0:
        sentence = f"At {REFERENCE_SIDE} x {REFERENCE_SIDE} and B = 1 the peak does not depend on it."
        return Irrelevant("prompt length", sentence)
    longer = [c for c in crossings if c.axis == "length" and c.at > DEFAULT_PROMPT_LENGTH]
    most = f"{ceil(share * 1e4) / 1e4:.2%}"
    limit = f" Only a prompt of more than {int(longer[0].at):,} tokens moves the peak." if longer else ""
    return Irrelevant(
        "prompt length",
        f"At {REFERENCE_SIDE} x {REFERENCE_SIDE} and B = 1 a token adds {per_token:,} bytes, and "
        f"{DEFAULT_PROMPT_LENGTH} tokens, to which the pipeline pads, less than {most} of the peak.{limit}",
    )


def _steps(derived: Derived, guidance: bool) -> Irrelevant | None:
    """Find the pass of the denoising loop in which the last surviving live set appears; None if late or there is none.

    Where a pass leaves alive what it found, all further ones are alike.
    """
    record = derived.record(guidance)
    starts = record.tape.iterations
    first: dict[tuple[str, LiveSet], int] = {}
    for point in record.points:
        first.setdefault((point.stage, _rounded(point)), point.event)
    kept = {(p.stage, _rounded(p)) for p in record.pipeline.reduction.kept}
    passes = max(1, *(bisect_right(starts, first[key]) for key in kept if first[key] < starts[-1])) if starts else 0
    steps = max(1, passes - record.tape.repeats)
    if not passes or steps > min(derived.options.num_inference_steps - 1, MOST_STEPS):
        return None
    return Irrelevant(
        "number of denoising steps, strength",
        f"From {steps} UNet calls on, every further one finds the same tensors alive as the one before.",
    )


def _rounded(point: Point) -> LiveSet:
    """Return how many storages of each size are alive, fixed sizes rounded as the allocator rounds them."""
    found: dict[Size, Size] = {}
    for nbytes, count in point.terms:
        blocks = ceil512(nbytes) if isinstance(nbytes, int) else nbytes
        found[blocks] = found.get(blocks, 0) + count
    return frozenset(found.items())
