"""LaTeX: what nvidia-smi shows on one card, segment by segment, for a column of 229 pt."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import sympy

from derivation.allocator.report import LARGE_PAGE_BYTES, ROUND_LARGE_BYTES
from derivation.equation.device import LEAST_SIDE, MOST_SIDE, STEP, DeviceForm
from derivation.equation.device_pages import PagesForm
from derivation.equation.device_regime import Part, Regime
from derivation.equation.record import Equation
from derivation.errors import unsupported
from derivation.export.render import render
from derivation.export.tex import monomial, rows, text
from derivation.tape.grid import H, W
from derivation.text import grouped

SEGMENT = sympy.Function("s")
# The most intervals of H W that are listed with what is counted there; where there are more, that has a bound.
MOST_INTERVALS = 16
# The bound grows by an integer for so many pixels.
SLOPE_PIXELS = 2**16


def device(equation: Equation, label: str) -> str:
    """Return the bytes that nvidia-smi shows as labelled equations in H and W, the regime of most sizes first.

    Raises DerivationError without a GPU whose context is documented, or where no closed form holds.
    """
    form = equation.device
    if form.context_bytes is None:
        raise unsupported("gpu", form.card.name, "a card whose CUDA context is documented")
    last, *others = reversed(form.reserved_regimes)
    pages = isinstance(form, PagesForm)
    return render(
        "device.tex.j2",
        equation,
        label=f"{label}:{form.card.key}",
        card=form.card.name,
        context=grouped(form.context_bytes, "{,}"),
        usual=[_pages(last)] if pages else _rows(last),
        pages=pages,
        others=[{"rows": _rows(r), "conditions": [relation(c) for c in r.conditions]} for r in reversed(others)],
        counted=_counted(form),
        call=_call(form),
        varies=form.replayed is None,
        text=text,
    )


def _call(form: DeviceForm) -> dict[str, str]:
    """Return the sizes and the other arguments for which a form holds."""
    values, (height, width) = form.points.values[0], next(iter(form.index))
    several = rf"multiples of ${STEP}$ from ${LEAST_SIDE}$ to ${MOST_SIDE}$"
    sizes = several if form.replayed is None else f"$H = {height}$ and $W = {width}$"
    given = (f"${name} = {values[name]}$" for name in ("B", "L") if name in values)
    guidance = "" if form.guidance else ", without guidance"
    return {"sizes": sizes, "others": " and ".join(given) + guidance}


def _counted(form: DeviceForm) -> str:
    """Return what n is, by the image's pixels, or at most: at sizes that the card has room for, if there are any."""
    held = {size: point for size, point in form.index.items() if form.covers(*size)} or form.index
    found = sorted({(height * width, int(form.counted[i])) for (height, width), i in held.items()})
    starts = [i for i, (_, n) in enumerate(found) if i == 0 or n != found[i - 1][1]]
    if len(starts) == 1:
        return f"${found[0][1]}$"
    if len(starts) > MOST_INTERVALS or len(dict(found)) < len(found):
        return bound(found)
    ends = [*(i - 1 for i in starts[1:]), len(found) - 1]
    each = [f"${found[i][1]}$ up to ${grouped(found[i][0], '{,}')}$" for i in ends[:-1]]
    return f"by $H W$: {', '.join(each)}, and ${found[-1][1]}$ beyond"


def bound(found: Sequence[tuple[int, int]]) -> str:
    """Return the line above all (pixels, number) that is nearest to them on average, of an integer slope."""
    pixels, numbers = np.array(found).T

    def above(slope: int) -> tuple[int, float]:
        start = int(np.max(np.ceil(numbers - slope * pixels / SLOPE_PIXELS)))
        return start, float(np.mean(start + slope * pixels / SLOPE_PIXELS - numbers))

    slope = min(range(1 + int(SLOPE_PIXELS * np.max(numbers / pixels))), key=lambda slope: above(slope)[1])
    start = above(slope)[0]
    most = f"{slope}\\,H W / 2^{{16}}"
    line = f"{start} + {most}" if start >= 0 else f"{most} - {-start}"
    return f"from ${numbers.min()}$ to ${grouped(int(numbers.max()), '{,}')}$ by size, and at most ${line}$"


def _rows(regime: Regime) -> list[str]:
    """Return the number of 2 MiB in segments, in rows."""
    counts = [(len(part.tensors), part.bytes / ROUND_LARGE_BYTES, _segment(part)) for part in regime.parts]
    fixed = sum(count * size for count, size, _ in counts if size.is_number)
    constant = grouped(int(regime.constant_bytes // ROUND_LARGE_BYTES + fixed), "{,}")
    own = ((count, s) for count, size, s in counts if not size.is_number)
    return rows([f"{constant} + n", *(f"+ {count}\\,{s}" if count > 1 else f"+ {s}" for count, s in own)])


def _pages(regime: Regime) -> str:
    """Return the number of 2 MiB in pages up to an address."""
    [address] = (each.args[0] for each in regime.bytes.atoms(sympy.ceiling))
    sizes = _sum(sympy.expand(address * LARGE_PAGE_BYTES))
    per_page = LARGE_PAGE_BYTES // ROUND_LARGE_BYTES
    return rf"{per_page} \left\lceil \frac{{{sizes}}}{{{per_page} \cdot 2^{{21}}}} \right\rceil + n"


def _segment(part: Part) -> str:
    """Return s of a request's bytes; below 10 MiB a Piecewise says that the segment is shared."""
    return _sum(part.bytes.replace(sympy.ceiling, _bytes) / ROUND_LARGE_BYTES)


def relation(condition: sympy.Basic) -> str:
    """Return a comparison of two requests as the allocator makes it, no term subtracted, segments in bytes."""
    left, right = (side.replace(sympy.Piecewise, lambda *cases: cases[-1].expr) for side in condition.args)
    terms = sympy.Add.make_args(sympy.expand((left - right).replace(sympy.ceiling, _bytes)))
    more = sympy.Add(*(term for term in terms if not term.could_extract_minus_sign()))
    less = sympy.Add(*(-term for term in terms if term.could_extract_minus_sign()))
    return (" < " if isinstance(condition, sympy.StrictLessThan) else r" \le ").join((_sum(more), _sum(less)))


def _bytes(blocks: sympy.Expr) -> sympy.Expr:
    return SEGMENT(sympy.expand(blocks * ROUND_LARGE_BYTES))


def _sum(expression: sympy.Expr) -> str:
    """Return a polynomial of H, W and segments, digits in groups; where it is in bytes 2^21 stands before a segment."""
    letters = {"H": H, "W": W}
    for each in sorted(expression.atoms(SEGMENT), key=str):
        in_bytes = expression.coeff(each) % ROUND_LARGE_BYTES == 0
        letters[("2^{21} " if in_bytes else "") + f"s({_sum(each.args[0])})"] = each
        expression = expression.subs(each, each / ROUND_LARGE_BYTES) if in_bytes else expression
    terms = sympy.Poly(expression, *letters.values()).terms()
    return " + ".join(monomial(c, zip(letters, p, strict=True)) for p, c in terms).replace("+ -", "- ")
