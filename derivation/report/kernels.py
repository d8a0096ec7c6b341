"""What a page's calculator holds: the types, the attention and the kinds of card whose calls it records."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from derivation.allocator.memory import context_of
from derivation.api import Derivation
from derivation.errors import DerivationError
from derivation.gpu.cards import Gpu, known, lookup, on_pages
from derivation.gpu.profile import Hardware, hardware, lacks_fused_attention
from derivation.libraries import LIBRARIES
from derivation.options.choices import EAGER, SDPA
from derivation.tape.tape import Answered
from derivation.walk.subject import WalkedSubject

HALVES = ("float16", "bfloat16")
# Each has tables of its own: a page with more of them is larger.
SHARES = 2
# A kind of card that fewer of the table are is left out, but for the report's own.
LEAST_CARDS = 3


@dataclass(frozen=True, slots=True)
class Kernel:
    """Types and an attention that run alike, and the kinds of card: the card whose tapes each card has, by key.

    A card that is None stands for no GPU: tensors alone.
    """

    dtypes: tuple[str, ...]
    attention: str
    kinds: Mapping[str | None, str | None]

    def shown(self, gpu: str | None) -> tuple[str, ...]:
        """Return the types that a card's tapes are those of: bfloat16 is float16 where fused kernels take it."""
        return tuple(dtype for dtype in self.dtypes if not lacks_fused_attention(gpu, dtype))


def as_asked(attention: str) -> str:
    """Return the attention to ask for on a card: SDPA for what it comes to without one."""
    return SDPA if attention == "efficient" else attention


def kernels_of(d: Derivation) -> tuple[Kernel, ...]:
    """Return what the page holds: half precision with SDPA on each kind of card and on none, others on the first."""
    own, walked = d.options, isinstance(d.subject, WalkedSubject)
    if not d.subject.whole or own.alloc_conf is not None:
        return (Kernel((own.dtype,), own.attention, {None: None}),)
    if not walked:
        return (Kernel((own.dtype,), own.attention, {None: None, **_kinds(d, own.dtype, own.attention)}),)
    half = own.dtype if own.dtype in HALVES else HALVES[0]
    upcasts = d.checkpoint.pipeline_class.startswith("StableDiffusionXL")  # a VAE of float16 alone: needs_upcasting
    dtypes = (half,) if upcasts else tuple(dict.fromkeys([half, *HALVES]))
    found = [Kernel(dtypes, SDPA, {None: None, **_kinds(d, half, SDPA)})]
    rarer = () if own.vae_tiling else ((dtypes, EAGER), (("float32",), SDPA), (("float32",), EAGER))
    found += [Kernel(types, name, _kinds(d, types[0], name, 1)) for types, name in rarer]
    known_already = [(dtype, kernel.attention) for kernel in found for dtype in kernel.dtypes]
    if (own.dtype, as_asked(own.attention)) not in known_already:
        found.append(Kernel((own.dtype,), own.attention, {None: None, **_kinds(d, own.dtype, own.attention, 1)}))
    return tuple(found)


def shares(kernels: Sequence[Kernel]) -> list[list[Kernel]]:
    """Return the kernels' kinds of card in SHARES, which take about as long to record."""
    alone = [
        replace(kernel, kinds={card: first for card, first in kernel.kinds.items() if first == kind})
        for kernel in kernels
        for kind in dict.fromkeys(kernel.kinds.values())
    ]
    edges = [len(alone) * i // SHARES for i in range(SHARES + 1)]
    return [alone[start:end] for start, end in pairwise(edges)]


def _kinds(d: Derivation, dtype: str, attention: str, most: int | None = None) -> dict[str | None, str | None]:
    """Return the cards, by key, with the first of their kind; of the ``most`` common kinds, and the report's own."""
    asked = _asked(d) if isinstance(d.subject, WalkedSubject) and attention == SDPA and dtype in HALVES else []
    alike: dict[Any, list[str]] = {}
    for card in sorted(listed(d), key=lambda card: card.key not in on_pages()):
        with suppress(DerivationError):
            behaviour = _hardware(d, card.key).behaviour(dtype, attention != EAGER, asked)
            alike.setdefault(behaviour, []).append(card.key)
    common = sorted(alike.values(), key=len, reverse=True)[:most]
    own = d.options.gpu and lookup(d.options.gpu).key
    kept = [keys for keys in alike.values() if own in keys or (keys in common and len(keys) >= LEAST_CARDS)]
    return {key: keys[0] for keys in kept for key in keys}


def _asked(d: Derivation) -> list[tuple[Any, ...]]:
    """Return the calls of flash attention whose sizes are numbers where one image is made."""
    subject = d.subject.changed(gpu=on_pages()[0], attention=SDPA)
    least = 2 * d.grid.unit
    tape = subject.program(True, {"L": d.prompt_length}).regime(d.sizes(least, least, 1)).tape
    asked = (q.arguments for q in tape.asked if isinstance(q, Answered) and q.ask is Hardware.num_splits)
    return list(dict.fromkeys(asked))


def _hardware(d: Derivation, gpu: str) -> Hardware:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        versions = {name: getattr(d.options, name) for name in LIBRARIES}
        return hardware(gpu, **versions, scratch=d.options.scratch)


def listed(d: Derivation) -> list[Gpu]:
    """Return the cards whose memory and CUDA context are known, the smallest first, the report's own among them."""
    own = [] if d.options.gpu is None else [lookup(d.options.gpu)]
    cards = {card.key: card for card in (*map(lookup, known()), *own) if not card.is_architecture}
    usable = [card for card in cards.values() if card.total_memory_bytes and context_of(card)[0] is not None]
    return sorted(usable, key=lambda card: card.total_memory_bytes or 0)
