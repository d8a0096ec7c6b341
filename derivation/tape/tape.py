"""The tape: it records when the storages of symbolic tensors appear and die.

A storage dies when CPython drops the last reference to it, exactly as a PyTorch storage does, so a block
that keeps its local variables as diffusers' ``forward()`` does has diffusers' memory behaviour.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from threading import RLock
from typing import Any, Concatenate, ParamSpec, TypeVar

from derivation.gpu.profile import Hardware
from derivation.libraries import Libraries
from derivation.options import Options
from derivation.tape.adapters import NO_ADAPTERS, Adapters
from derivation.tape.events import Allocation, Category, Guard, Mark, Tiled
from derivation.tape.symbols import DTYPE_BYTES, Size, as_whole_tile, evaluate, nonnegative_from_one, product, symbol
from derivation.tape.tiles import Tile

P = ParamSpec("P")
R = TypeVar("R")

# _exclude_from_cpu_offload of diffusers' pipelines
EXCLUDED_FROM_CPU_OFFLOAD = ("safety_checker",)


@dataclass(frozen=True, slots=True)
class Sized:
    """What ``size`` answered for a symbol."""

    name: str
    answer: Size

    def holds_on(self, tape: Tape) -> bool:
        """Return True if ``tape`` answers alike."""
        found = tape.value(self.name)
        return found is self.answer or found == self.answer


@dataclass(frozen=True, slots=True)
class Answered:
    """What the GPU answered when a kernel asked."""

    ask: Callable[..., object]
    arguments: tuple[object, ...]
    answer: object

    def holds_on(self, tape: Tape) -> bool:
        """Return True if the GPU of ``tape`` answers alike."""
        return bool(tape.answer(self.ask, self.arguments) == self.answer)


Question = Guard | Sized | Answered
# The shapes of some tensors.
Shapes = tuple[tuple[Size, ...], ...]
# What modules have recorded, by all that it follows from but the answers of a tape (derivation.tape.block).
Memory = dict[Hashable, list[Any]]


@dataclass(slots=True)
class Tape:
    """The record of one symbolic run.

    ``options`` are what modules obey; without ``hardware`` operators allocate what PyTorch dispatches on the meta
    device, and nothing else; ``hint`` holds the sizes that decide guards, ``ones`` the symbols that are 1 in this
    run, ``fixed`` those with another value; ``events`` holds i + 1 where allocation i appears and -(i + 1) where it
    dies; ``parameters`` maps a parameter's or buffer's module path to its shape and dtype; ``loops`` holds event
    ranges (start, end, times) that the real program runs ``times`` times in all; ``iterations`` holds the event at
    which each recorded pass of the denoising loop begins, ``repeats`` how many timesteps a scheduler has beyond its
    steps; ``dtypes`` maps a model, then parts of it, to their parameters' dtype where that was changed; ``leaves``
    holds, for each open scope, the parameters that are on the GPU until it is left; ``tile`` is set where the run
    stands for every number of VAE tiles, and ``cut`` holds event ranges (start, end, symbols) that belong to cut
    tiles: they do not occur where a symbol is 0; ``tilings`` holds the VAE's calls in tiles; ``emptied`` holds how
    many events precede each torch.cuda.empty_cache(); ``convolutions`` holds, of traced ones, the shapes of input and
    weight by the output's allocation; ``asked`` holds the answers that decide what a module does, in order,
    ``answers`` the GPU's, ``adapters`` the LoRAs on the models' layers, and ``memory`` what modules have recorded, on
    this tape or others (``derivation.tape.block``), None for no memory.
    ``longest`` holds the largest prompt length at which a stage occurs, of those that have one; ``copies`` the
    allocations that modules have copied, by the first one's place.
    """

    options: Options
    hardware: Hardware | None = None
    hint: Mapping[str, int] | None = None
    ones: frozenset[str] = frozenset()
    fixed: Mapping[str, int] = field(default_factory=dict)
    allocations: list[Allocation] = field(default_factory=list)
    events: list[int] = field(default_factory=list)
    parameters: dict[str, tuple[tuple[int, ...], str]] = field(default_factory=dict)
    guards: dict[tuple[Size, int], Guard] = field(default_factory=dict)
    marks: list[Mark] = field(default_factory=list)
    loops: list[tuple[int, int, int]] = field(default_factory=list)
    iterations: list[int] = field(default_factory=list)
    repeats: int = 0
    path: list[str] = field(default_factory=list)
    kept: dict[str, int | None] = field(default_factory=dict)
    alive: set[int] = field(default_factory=set)
    dtypes: dict[str, str] = field(default_factory=dict)
    leaves: list[list[Storage | None]] = field(default_factory=list)
    tile: Tile | None = None
    cut: list[tuple[int, int, frozenset[str]]] = field(default_factory=list)
    tilings: list[Tiled] = field(default_factory=list)
    emptied: list[int] = field(default_factory=list)
    longest: dict[str, int] = field(default_factory=dict)
    convolutions: dict[int, Shapes] = field(default_factory=dict)
    asked: list[Question] = field(default_factory=list)
    answers: dict[tuple[Callable[..., object], tuple[object, ...]], object] = field(default_factory=dict)
    adapters: Adapters = NO_ADAPTERS
    memory: Memory | None = None
    copies: list[tuple[int, Sequence[Allocation]]] = field(default_factory=list)

    def weights_dtype(self) -> str:
        """Return the dtype of the current module's parameters."""
        inside = ".".join([*self.path, ""])
        found = [dtype for module, dtype in self.dtypes.items() if inside.startswith(f"{module}.")]
        return found[-1] if found else self.options.dtype_of(inside.split(".")[0])

    @property
    def libraries(self) -> Libraries:
        """The versions whose allocations are recorded."""
        if self.hardware is not None:
            return self.hardware.libraries
        return self.options.libraries

    def exceeds(self, size: Size, bound: int) -> bool:
        """Return whether ``size`` > ``bound``, recording the decision where it depends on a symbol.

        Without a hint a size is taken to be above 1 and below every other bound. Cut VAE tiles decide as whole
        ones, which are never smaller and hence peak higher.
        """
        size = as_whole_tile(size)
        if nonnegative_from_one(size - bound - 1):
            return True
        if isinstance(size, int):
            return False
        guard = self.guards.get((size, bound)) or Guard(size, bound, self._answer(size, bound))
        self.ask([guard])
        return guard.answer

    def outgrows(self, stage: str, length: Size, most: int) -> bool:
        """Return whether a prompt is longer than ``most`` tokens, above which ``stage`` does not occur."""
        longer = self.exceeds(length, most)
        if not longer and not isinstance(length, int):
            self.longest[stage] = most
        return longer

    def _answer(self, size: Size, bound: int) -> bool:
        return bound == 1 if self.hint is None else evaluate(size, self.hint) > bound

    def decides(self, guard: Guard) -> bool:
        """Return whether this run answers as ``guard`` says."""
        known = self.guards.get((guard.size, guard.bound))
        return guard.answer == (self._answer(guard.size, guard.bound) if known is None else known.answer)

    def ask(self, questions: Iterable[Question]) -> None:
        """Record answers."""
        for question in questions:
            self.asked.append(question)
            if isinstance(question, Guard):
                self.guards.setdefault((question.size, question.bound), question)

    def size(self, name: str) -> Size:
        """Return the symbol called ``name``, or its value where this run specialises it, recording it."""
        found = self.value(name)
        self.asked.append(Sized(name, found))
        return found

    def value(self, name: str) -> Size:
        """Return the symbol called ``name``, or its value where this run specialises it."""
        return 1 if name in self.ones else self.fixed.get(name, symbol(name))

    def gpu(self, ask: Callable[Concatenate[Hardware, P], R], *arguments: P.args, **none: P.kwargs) -> R:
        """Return what the run's GPU answers, recording it."""
        found: R = self.answer(ask, arguments)
        self.asked.append(Answered(ask, arguments, found))
        return found

    def answer(self, ask: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        """Return what the run's GPU answers."""
        if (ask, arguments) not in self.answers:
            assert self.hardware is not None
            self.answers[ask, arguments] = ask(self.hardware, *arguments)
        return self.answers[ask, arguments]

    def allocate(
        self, shape: tuple[Size, ...], dtype: str, op: str, category: Category, count: Size = 1
    ) -> Storage | None:
        """Record a new storage, or ``count`` alike; returns None where there are no elements."""
        made = allocation(".".join(self.path), op, shape, dtype, category, count)
        return None if made is None else self._appears(made)

    def load(self, path: str, shape: tuple[int, ...], dtype: str) -> Storage | None:
        """Record a weight that is moved to the GPU."""
        return self._appears(weight(path, shape, dtype))

    def load_leaf(self, name: str, shape: tuple[int, ...], dtype: str) -> None:
        """Record a parameter of the current module that is on the GPU until the module returns.

        accelerate/utils/modeling.py (set_module_tensor_to_device) empties the cache after each.
        """
        self.leaves[-1].append(self.load(".".join([*self.path, name]), shape, dtype))
        self.empty_cache()

    def empty_cache(self) -> None:
        """Record a call of torch.cuda.empty_cache()."""
        self.emptied.append(len(self.events))

    def _appears(self, allocation: Allocation) -> Storage:
        index = len(self.allocations)
        self.allocations.append(allocation)
        self.alive.add(index)
        self.events.append(index + 1)
        return Storage(self, index)

    def keep(self, shape: tuple[Size, ...], dtype: str, op: str, category: Category) -> None:
        """Record what a library allocates at its first use and never frees, once a tape."""
        if op in self.kept:
            return
        storage = self.allocate(shape, dtype, op, category)
        self.kept[op] = None if storage is None else storage.index
        if storage is not None:
            storage.disown()

    def unload(self, path: str, shape: tuple[Size, ...], dtype: str) -> None:
        """Record the death of a weight that existed before the run."""
        index = len(self.allocations)
        self.allocations.append(weight(path, shape, dtype, loaded=True))
        self.release(index)

    def release(self, index: int) -> None:
        """Record the death of allocation ``index``."""
        self.alive.discard(index)
        self.events.append(-index - 1)

    @property
    def edges(self) -> list[int]:
        """Where stages, loops and passes of the denoising loop begin and end, in order, with the tape's own ends."""
        around = {edge for start, end, _ in self.loops for edge in (start, end)}
        return sorted({0, len(self.events), *(mark.event for mark in self.marks), *self.iterations, *around})

    def mark(self, stage: str) -> None:
        """Begin the stage called ``stage`` at this event."""
        self.marks.append(Mark(len(self.events), stage))

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Enter the submodule called ``name``."""
        self.path.append(name)
        self.leaves.append([])
        try:
            yield
        finally:
            self.path.pop()
            self.leaves.pop()

    @contextmanager
    def choosing(self, **changes: object) -> Iterator[None]:
        """Change the options until the block's end."""
        options = self.options
        self.options = replace(options, **changes)  # type: ignore[arg-type]
        try:
            yield
        finally:
            self.options = options

    @contextmanager
    def adapted(self, adapters: Adapters) -> Iterator[None]:
        """Have LoRAs on the models' layers until the block's end."""
        before, self.adapters = self.adapters, adapters
        try:
            yield
        finally:
            self.adapters = before

    @contextmanager
    def running(self) -> Iterator[Tape]:
        """Make this the tape that operators record on; other threads wait for their turn."""
        with _TURN:
            _ACTIVE.append(self)
            try:
                yield self
            finally:
                _ACTIVE.pop()


@lru_cache(maxsize=65536)
def allocation(
    path: str, op: str, shape: tuple[Size, ...], dtype: str, category: Category, count: Size
) -> Allocation | None:
    """Return an allocation, None where there are no elements: tapes share it."""
    nbytes = product((DTYPE_BYTES[dtype], *shape))
    return None if nbytes == 0 or count == 0 else Allocation(path, op, shape, dtype, nbytes, category, count)


@lru_cache(maxsize=65536)
def weight(path: str, shape: tuple[int, ...], dtype: str, loaded: bool = False) -> Allocation:
    """Return the allocation of a weight: tapes share it."""
    nbytes = product((DTYPE_BYTES[dtype], *shape))
    return Allocation(path, "load", shape, dtype, nbytes, Category.WEIGHT, loaded=loaded)


_ACTIVE: list[Tape] = []
_TURN = RLock()


def tape() -> Tape:
    """Return the tape that operators record on."""
    return _ACTIVE[-1]


class Storage:
    """The memory behind one or more tensors; its death is recorded on the tape."""

    __slots__ = ("_tape", "index")

    def __init__(self, owner: Tape, index: int) -> None:
        self._tape: Tape | None = owner
        self.index = index

    def disown(self) -> None:
        """Leave the memory allocated for good."""
        self._tape = None

    def __del__(self) -> None:
        if self._tape is not None:
            self._tape.release(self.index)
