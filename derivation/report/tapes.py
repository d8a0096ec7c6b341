"""Tapes as data for a page, whose script evaluates and replays a call at any size that they hold for.

A tape is a list of chunks, each a run of events that tapes share; in a chunk an event is one number, n // 4 of

- 0 a tensor appears: by how much its kind's number is above the last one's, in zigzag
- 1 a tensor dies: how many are alive that are younger, or have been in this chunk
- 2 a weight that was there before the call dies: its kind, as for 0
- 3 torch.cuda.empty_cache()
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from derivation.allocator.memory import weight_bytes
from derivation.allocator.simulate import WORKSPACE
from derivation.errors import DerivationError
from derivation.tape.events import Allocation, Category, Tiled
from derivation.tape.grid import Range
from derivation.tape.subject import Parameters
from derivation.tape.symbols import Size, as_terms
from derivation.tape.tape import Tape

K = TypeVar("K", bound=Hashable)
Integers = NDArray[np.int64]
BIRTH, DEATH, WEIGHT_DIES, EMPTY_CACHE = range(4)
TENSOR, SCRATCH, OPTIONAL, WEIGHT = range(4)
LAYERS = {Category.SCRATCH: SCRATCH, Category.WEIGHT: WEIGHT}


class Table(Generic[K]):
    """Values by number, each once, in the order in which they came."""

    def __init__(self) -> None:
        self.rows: list[K] = []
        self._numbers: dict[K, int] = {}

    def __call__(self, value: K) -> int:
        """Return a value's number."""
        number = self._numbers.setdefault(value, len(self.rows))
        if number == len(self.rows):
            self.rows.append(value)
        return number


class Tapes:
    """Tapes with the tables that they share: sizes, names, kinds of tensors, chunks of events, lists of weights."""

    def __init__(self) -> None:
        self._size, self._name = Table[Size](), Table[str]()
        self._row, self._chunk, self._list = Table[tuple[int, ...]](), Table[bytes](), Table[tuple[int, ...]]()
        self._tape, self._made = Table[str](), list[dict[str, Any]]()
        self._thin: dict[tuple[int, str], int] = {}
        self._numbers: dict[int, int] = {}
        self._seen: list[Allocation] = []
        self._copies: dict[int, tuple[Sequence[Allocation], Integers]] = {}
        self._listed: dict[tuple[tuple[str, int], ...], tuple[Parameters, int]] = {}
        self._owned: dict[str, NDArray[np.bool_]] = {}

    def add(self, tape: Tape, weights: int, ranges: Mapping[str, Range] | None = None) -> int:
        """Return the number of a tape on top of a list of weights; equal ones have one number.

        It holds where its decisions do and, of a recorded one, within ``ranges``.
        """
        tiles = {edge for tiled in tape.tilings for run in tiled.runs for edge in (tiled.start, tiled.end, *run)}
        edges = sorted({*tape.edges, *tiles})
        chunks = [self._chunk(tokens.tobytes()) for tokens in self._tokens(tape, edges)]
        place = {edge: i for i, edge in enumerate(edges)}
        return self._numbered(
            {
                "chunks": chunks,
                "stages": [[place[mark.event], self._name(mark.stage)] for mark in tape.marks],
                "loops": [[place[start], place[end], times] for start, end, times in tape.loops],
                "guards": [[self._size(g.size), g.bound, int(g.answer)] for g in tape.guards.values()],
                "tilings": [self._tiled(tape, tiled, chunks, place) for tiled in tape.tilings],
                "ones": sorted(tape.ones),
                "fixed": {name: value for name, value in tape.fixed.items() if value > 1},
                "ranges": {name: [r.first, r.last, r.step] for name, r in (ranges or {}).items()},
                "weights": weights,
            }
        )

    def _tiled(self, tape: Tape, tiled: Tiled, chunks: list[int], place: Mapping[int, int]) -> dict[str, Any]:
        """Return a call in tiles: its chunks, one tile's of each kind, and the kinds of lines, rows and the result.

        Raises DerivationError where a tile leaves more than its result.
        """
        if any(sum(1 if event > 0 else -1 for event in tape.events[a:b]) != 1 for a, b in tiled.runs):
            raise DerivationError("vae_tiling: the first tile differs from the others")
        births = (tape.allocations[event - 1] for event in tape.events[tiled.runs[-1][1] : tiled.end] if event > 0)
        *rows, joined = [a for a in births if a.op == "cat"]
        return {
            "span": [place[tiled.start], place[tiled.end]],
            "tiles": [chunks[place[start]] for start, _ in tiled.runs],
            "lines": [[self._kind(a) for a in line] for line in tiled.lines],
            "rows": [self._kind(row) for row in rows],
            "joined": self._kind(joined),
            "unit": tiled.unit,
            "extent": tiled.extent,
        }

    def whole(self, number: int) -> int:
        """Return the number of a tape that holds where a VAE does not work in tiles alone."""
        made = self._made[number]
        return self._numbered({**made, "ones": sorted({*made["ones"], "E"})})

    def _numbered(self, made: dict[str, Any]) -> int:
        number = self._tape(repr(made))
        if number == len(self._made):
            self._made.append(made)
        return number

    def without(self, number: int, model: str, weights: int) -> int:
        """Return the number of a tape that leaves out the stage called as a model, and that model's weights."""
        made, total = self._made[number], len(self._made[number]["chunks"])
        starts = [start for start, _ in made["stages"]]
        spans = zip(starts, [*starts[1:], total], made["stages"], strict=True)
        out = {i for start, end, (_, name) in spans if self._name.rows[name] == model for i in range(start, end)}
        place = [sum(j not in out for j in range(i)) for i in range(total + 1)]
        changed = {
            "tilings": [{**tiled, "span": [place[edge] for edge in tiled["span"]]} for tiled in made["tilings"]],
            "chunks": [self._thinned(chunk, model) for i, chunk in enumerate(made["chunks"]) if i not in out],
            "stages": [[place[start], name] for start, name in made["stages"] if start not in out],
            "loops": [[place[start], place[end], times] for start, end, times in made["loops"]],
            "weights": weights,
        }
        return self._numbered({**made, **changed})

    def _thinned(self, chunk: int, model: str) -> int:
        """Return the number of a chunk without the tensors whose module is part of a model."""
        if (chunk, model) not in self._thin:
            tokens = np.frombuffer(self._chunk.rows[chunk], dtype=np.int64)
            named = (tokens % 4 == BIRTH) | (tokens % 4 == WEIGHT_DIES)
            steps = tokens[named] // 4
            kinds = np.cumsum(np.where(steps % 2, -(steps + 1) // 2, steps // 2))
            out = self._belongs(model)[kinds]
            self._thin[chunk, model] = self._chunk(_left(tokens, kinds, out).tobytes()) if out.any() else chunk
        return self._thin[chunk, model]

    def _belongs(self, model: str) -> NDArray[np.bool_]:
        """Return for each kind whether its module is part of a model."""
        known = self._owned.get(model, np.zeros(0, dtype=bool))
        if len(known) < len(self._row.rows):
            names = (self._name.rows[name] for name, *_ in self._row.rows[len(known) :])
            self._owned[model] = np.append(known, [name.startswith(f"{model}.") for name in names])
        return self._owned[model]

    def document(self) -> dict[str, Any]:
        """Return the tables as JSON values."""
        return {
            "sizes": [as_terms(size) for size in self._size.rows],
            "names": self._name.rows,
            "kinds": [list(kind) for kind in self._row.rows],
            "chunks": [np.frombuffer(tokens, dtype=np.int64).tolist() for tokens in self._chunk.rows],
            "weights": [list(entries) for entries in self._list.rows],
            "tapes": self._made,
        }

    def _kind(self, a: Allocation) -> int:
        """Return the number of an allocation's kind, known by the object from now on: blocks' copies are one."""
        layer = LAYERS.get(a.category, TENSOR) if a.op != WORKSPACE else OPTIONAL
        kind = (self._name(a.path), self._name(a.op), self._size(a.nbytes), self._size(a.count), layer)
        self._seen.append(a)
        return self._numbers.setdefault(id(a), self._row((*kind, *map(self._size, a.shape))))

    def weights(self, resident: Parameters) -> int:
        """Return the number of a list of weights, bytes and names by turns, as ``pipe.to("cuda")`` moves them."""
        key = tuple((model, id(entries)) for model, entries in resident.items())
        if key not in self._listed:
            entries = ((nbytes, self._name(path)) for path, nbytes in weight_bytes(resident).items())
            self._listed[key] = resident, self._list(tuple(value for entry in entries for value in entry))
        return self._listed[key][1]

    def _tokens(self, tape: Tape, edges: list[int]) -> Iterator[Integers]:
        """Yield the events of each chunk as numbers."""
        events = np.array(tape.events, dtype=np.int64)
        index, born = np.abs(events) - 1, events > 0
        kinds = self._kinds(tape)
        order = np.full(len(kinds), -1, dtype=np.int64)  # of what was there before the call
        order[index[born]] = np.arange(int(born.sum()))
        dead = ~born & (order[index] >= 0)
        starts = np.repeat(edges[:-1], np.diff(edges))
        tokens = np.zeros(len(events), dtype=np.int64)
        tokens[dead] = 4 * _younger(order[index[dead]], np.flatnonzero(dead), born, starts[dead]) + DEATH
        named = np.flatnonzero(~dead)
        kind, first = kinds[index[named]], np.diff(starts[named], prepend=-1) > 0
        steps = kind - np.where(first, 0, np.roll(kind, 1))
        tokens[named] = 4 * _zigzag(steps) + WEIGHT_DIES * ~born[named]
        emptied = np.array(tape.emptied, dtype=np.int64)
        for start, end in pairwise(edges):
            here = emptied[(emptied > start) & (emptied <= end)] if start else emptied[emptied <= end]
            yield np.insert(tokens[start:end], here - start, EMPTY_CACHE) if len(here) else tokens[start:end]

    def _kinds(self, tape: Tape) -> Integers:
        """Return the number of each allocation's kind; of what tapes copy, looked up once."""
        found, last = [], 0
        for first, copied in tape.copies:
            found.append(self._kinds_of(tape.allocations[last:first]))
            if id(copied) not in self._copies:
                self._copies[id(copied)] = copied, self._kinds_of(copied)
            found.append(self._copies[id(copied)][1])
            last = first + len(copied)
        return np.concatenate([*found, self._kinds_of(tape.allocations[last:])])

    def _kinds_of(self, allocations: Sequence[Allocation]) -> Integers:
        known = self._numbers
        return np.array([known[id(a)] if id(a) in known else self._kind(a) for a in allocations], dtype=np.int64)


def _zigzag(steps: Integers) -> Integers:
    """Return steps as numbers from 0: 0, -1, 1, -2, 2 are 0, 1, 2, 3, 4."""
    return np.where(steps < 0, -2 * steps - 1, 2 * steps)


def _left(tokens: Integers, kinds: Integers, out: NDArray[np.bool_]) -> Integers:
    """Return a chunk without some of its named events, which have ``kinds``: without what they bring, and its death."""
    named, members, found = zip(kinds.tolist(), out.tolist(), strict=True), list[bool](), list[int]()
    last = 0
    for token in tokens.tolist():
        value, sort = divmod(token, 4)
        if sort in (BIRTH, WEIGHT_DIES):
            kind, is_out = next(named)
            members += [is_out] if sort == BIRTH else []
            if not is_out:
                step, last = kind - last, kind
                found.append(4 * (2 * step if step >= 0 else -2 * step - 1) + sort)
        elif sort == EMPTY_CACHE:
            found.append(token)
        elif value >= len(members):
            found.append(token - 4 * sum(members))
        elif not members[~value]:
            found.append(token - 4 * sum(members[len(members) - value :]))
    return np.array(found, dtype=np.int64)


def _younger(own: Integers, dies: Integers, born: NDArray[np.bool_], starts: Integers) -> Integers:
    """Return how many tensors stand behind those that die: born in the chunk, or alive when it began.

    ``own`` are their places among all births, ``dies`` the events at which they die, ``starts`` the first events of
    those events' chunks.
    """
    births = np.concatenate([[0], np.cumsum(born)])
    ends = np.full(births[-1], len(born), dtype=np.int64)
    ends[own] = dies
    found: Integers = births[dies] - own - 1
    old = own < births[starts]
    for start in np.unique(starts[old]):
        here, before = old & (starts == start), int(births[start])
        older = np.flatnonzero(ends[:before] >= start)
        found[here] += own[here] + len(older) - before - np.searchsorted(older, own[here])
    return found
