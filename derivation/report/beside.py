"""What a card needs beside the tensors: for one that many people have, where the report names none."""

# ruff: noqa: RUF001

from __future__ import annotations

import shlex
import warnings
from contextlib import suppress

from derivation.api import Derivation
from derivation.errors import DerivationError
from derivation.gpu.cards import lookup, on_pages
from derivation.options import TABLE
from derivation.options.row import flag
from derivation.report.answer import SIZES
from derivation.report.document import Code, Text, prose
from derivation.report.kernels import as_asked
from derivation.verdict import Verdict
from derivation.walk.subject import WalkedSubject

TENSORS = (
    "That is what PyTorch’s tensors hold. A card needs more beside them: libraries’ scratch memory, what the allocator "
    "reserves and the CUDA context."
)
ON_CARD = " On the {} one {} × {} image {}; {} × {} {}, as nvidia-smi counts. {} says so, of any other card, too."
ELSEWHERE = " {} counts them for a card that is named."
SHOWN = SIZES[0], SIZES[-1]


def beside(d: Derivation) -> Text:
    """Return what the tensors of a report without a GPU leave out, with what nvidia-smi shows on one card."""
    command = _command(d)
    if (found := _common(d)) is None:
        return prose(TENSORS + ELSEWHERE, Code(f"{command} --gpu CARD"))
    key, verdicts = found
    shown = Code(f"{command} --gpu {key} --size {SHOWN[0]}")
    first, last = ((str(side), str(side), str(verdict)) for side, verdict in zip(SHOWN, verdicts, strict=True))
    return prose(TENSORS + ON_CARD, lookup(key).name, *first, *last, shown)


def _common(d: Derivation) -> tuple[str, list[Verdict]] | None:
    """Return the first of the pages' cards that holds the calls, else the last, None where it has no form."""
    found = None
    for key in on_pages() if d.subject.whole else ():
        with suppress(DerivationError), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            on = Derivation(d.subject.changed(gpu=key, attention=as_asked(d.options.attention)), d.fixed)
            found = key, [on.verdict(side, side) for side in SHOWN]
            if all(verdict.fits for verdict in found[1]):
                return found
    return found


def _command(d: Derivation) -> str:
    """Return the command that estimates the report's calls: its pipeline, and each option that is not the default."""
    walked = isinstance(d.subject, WalkedSubject)
    chosen = {name: getattr(d.options, name) for name in sorted(TABLE) if name != "gpu" and d.options.chosen(name)}
    own = {"pipeline": d.options.pipeline, "attention": as_asked(d.options.attention)} if walked else {}
    without = {} if walked else {"pipeline", "dtype"}
    flags = (flag(name, value) for name, value in {**chosen, **own}.items() if name not in without)
    return " ".join(["derivation estimate", shlex.quote(d.name), *flags])
