"""What nvidia-smi shows, to be added up: the context, the weights' segments, and each that a call opens."""

# ruff: noqa: RUF001

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field

from derivation.allocator.report import MIN_LARGE_BYTES
from derivation.api import Derivation
from derivation.equation.device import DeviceForm
from derivation.equation.device_pages import PagesForm
from derivation.errors import DerivationError
from derivation.report.answer import ORIGINS_SHOWN, PIPELINE, place
from derivation.report.document import Column, Lines, Mark, Math, Row, Table, Text, prose
from derivation.report.mathml import THIN, number, polynomial
from derivation.report.text import as_pixel_terms, pixel_terms
from derivation.tape.grid import H, W
from derivation.tape.symbols import Size
from derivation.text import NARROW_SPACE, grouped

SEGMENTS = (
    "Bytes on {} when the caching allocator has reserved most (*B* = 1). A request of 10 MiB or more for which there "
    "is no room opens a segment of its own, of whole 2 MiB; smaller ones share segments of 20 MiB, those of at most "
    "1 MiB segments of 2 MiB. All other tensors lie in these."
)
PAGES = (
    "Bytes on {} when the caching allocator has reserved most (*B* = 1). Its segments are expandable: for a request "
    "for which there is no room pages of 20 MiB are mapped, of 2 MiB where it is of at most 1 MiB."
)


@dataclass(slots=True)
class Share:
    """A part of the sum: how many times how many bytes at each size, and what it was first asked for by."""

    title: Text
    counts: list[tuple[int, int]]
    tensors: dict[tuple[str, str], None] = field(default_factory=dict)


def segments_table(d: Derivation, sides: tuple[int, ...]) -> Table | None:
    """Return the sum at square images, None without a GPU, and where there is no form or no room for one of them."""
    if d.options.gpu is None:
        return None
    with suppress(DerivationError):
        form = d.equation.device
        if form.context_bytes is not None and all(form.covers(side, side) for side in sides):
            return _table(form, shares(form, d, [form.index[side, side] for side in sides]), sides)
    return None


def usual_equation(form: DeviceForm) -> Math:
    """Return context + weights and small blocks + what grows with the pixels + r, in the regime of most sizes."""
    context = form.context_bytes or 0
    found = polynomial(as_pixel_terms(form.per_pixel * H * W + form.beside_pixels.least))
    beside = f"{number(context)}<mo>+</mo>", rf"{grouped(context, THIN)} + "
    mathml, latex = beside if context else ("", "")
    shown = "<msub><mi>M</mi><mtext>nvidia-smi</mtext></msub><mo>=</mo>", r"M_{\text{nvidia-smi}} = "
    return Math(
        f"<mrow>{shown[0]}{mathml}{found.mathml}<mo>+</mo><mi>r</mi></mrow>", f"{shown[1]}{latex}{found.latex} + r"
    )


def shares(form: DeviceForm, d: Derivation, points: list[int]) -> list[Share]:
    """Return the parts of what nvidia-smi shows at some of a form's sizes."""
    units = "pages" if isinstance(form, PagesForm) else "segments"
    context, large, small = form.context_bytes or 0, form.large.loaded_bytes, form.small.loaded_bytes
    fixed = {"the CUDA context": context, f"the weights’ {units}": large, "and those of 2 MiB": small}
    found = [Share(title, [(1, nbytes)] * len(points)) for title, nbytes in fixed.items()]
    found += _opened(form, d, points)
    called = [(1, sum(nbytes for _, nbytes in form.small.at(point))) for point in points]
    return [*found, Share(f"the call’s {units} of 2 MiB", called)]


def _opened(form: DeviceForm, d: Derivation, points: list[int]) -> list[Share]:
    """Return what the large pool opens in a call: by request, and in one for those that share, or ask for pages."""
    found: dict[Size, Share] = {}
    is_pages = isinstance(form, PagesForm)
    for i, point in enumerate(points):
        for tensor, nbytes in form.large.at(point):
            a = form.requests.tape.allocations[tensor]
            is_own = not is_pages and int(form.points.plain(a.nbytes)[point]) >= MIN_LARGE_BYTES
            title: Text = "the call’s pages of 20 MiB" if is_pages else "requests below 10 MiB"
            if is_own:
                title = polynomial(pixel_terms(a.nbytes, d.grid))
            share = found.setdefault(a.nbytes if is_own else 0, Share(title, [(0, 0)] * len(points)))
            n, before = share.counts[i]
            share.counts[i] = (1, before + nbytes) if is_pages else (n + 1, nbytes)
            share.tensors[a.op, a.path or PIPELINE] = None
    return list(found.values())


def _table(form: DeviceForm, found: list[Share], sides: tuple[int, ...]) -> Table:
    sums = [sum(n * nbytes for n, nbytes in (share.counts[i] for share in found)) for i in range(len(sides))]
    total = Row(("what nvidia-smi shows", *(Mark("strong", grouped(nbytes)) for nbytes in sums), ""), "total")
    sizes = (Column(f"{side}{NARROW_SPACE}×{NARROW_SPACE}{side}", True) for side in sides)
    columns = (Column("Bytes of"), *sizes, Column("First asked for by", printed="no"))
    caption = prose(PAGES if isinstance(form, PagesForm) else SEGMENTS, form.card.name)
    return Table("What nvidia-smi shows", columns, (*map(_row, found), total), caption, "terms")


def _row(share: Share) -> Row:
    cells = (f"{n} × {grouped(nbytes)}" if n > 1 else grouped(n * nbytes) for n, nbytes in share.counts)
    names, more = list(share.tensors), len(share.tensors) - ORIGINS_SHOWN
    shown: list[Text] = [place(op, where) for op, where in names[:ORIGINS_SHOWN]]
    return Row((share.title, *cells, Lines((*shown, *([Mark("dim", f"and {more} more")] if more > 0 else [])))))
