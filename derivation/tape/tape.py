"""Symbolic tensors and the tape that records when their storages appear and die.

A storage dies when CPython drops the last reference to it, exactly as a PyTorch storage does, so a block
that keeps its local variables as diffusers' ``forward()`` does has diffusers' memory behaviour.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import lru_cache
from typing import Any

from derivation.gpu.profile import Hardware
from derivation.tape.symbols import DTYPE_BYTES, Size, as_whole_tile, evaluate, nonnegative_from_one, product, symbol
from derivation.tape.tiles import TILE_OVERLAP_FACTOR, Tile

# _exclude_from_cpu_offload of diffusers' pipelines
EXCLUDED_FROM_CPU_OFFLOAD = ("safety_checker",)


class Category(Enum):
    """What an allocation is for."""

    ACTIVATION = "activation"
    ATTENTION = "attention"
    STATISTICS = "statistics"
    PIPELINE = "pipeline"
    SCRATCH = "scratch"
    WEIGHT = "weight"


@dataclass(frozen=True, slots=True)
class Allocation:
    """One storage, or ``count`` alike: its module path, operator, shape and size in bytes.

    ``loaded`` marks a weight that existed before the run: its death alone is an event, and lowers the live
    bytes, so that "weights + live bytes" stays the memory in use.
    """

    path: str
    op: str
    shape: tuple[Size, ...]
    dtype: str
    nbytes: Size
    category: Category
    count: Size = 1
    loaded: bool = False

    def moved(self, path: str) -> Allocation:
        """Return the same allocation at another module path."""
        a = self
        return Allocation(path, a.op, a.shape, a.dtype, a.nbytes, a.category, a.count, a.loaded)


@dataclass(frozen=True, slots=True)
class Settings:
    """What a run assumes: the dtype of weights and activations, the attention backend, and the GPU.

    Without ``hardware`` operators allocate what PyTorch dispatches on the meta device, and nothing else.
    """

    dtype: str
    attention: str
    hardware: Hardware | None = None
    vae_slicing: bool = False
    vae_tiling: bool = False
    tile_sample_min_size: int | None = None
    tile_overlap_factor: float = TILE_OVERLAP_FACTOR
    attention_slicing: str | int | None = None
    channels_last: bool = False
    offload: str | None = None
    lora_rank: int | None = None
    lora_fused: bool = False
    ip_adapter_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Guard:
    """A decision the program took on a size: ``size > bound`` was answered with ``answer``."""

    size: Size
    bound: int
    answer: bool

    def holds(self, values: Mapping[str, int]) -> bool:
        """Return True if the same decision would be taken at ``values``."""
        return (evaluate(self.size, values) > self.bound) == self.answer

    def holds_on(self, tape: Tape) -> bool:
        """Return True if ``tape`` answers alike."""
        return tape.decides(self)


@dataclass(slots=True)
class Mark:
    """An event index at which a stage begins."""

    event: int
    stage: str


@dataclass(frozen=True, slots=True)
class Sized:
    """What ``size`` answered for a symbol."""

    name: str
    answer: Size

    def holds_on(self, tape: Tape) -> bool:
        """Return True if ``tape`` answers alike."""
        return tape.size(self.name) == self.answer


Question = Guard | Sized
# What modules have recorded, by all that it follows from but the answers of a tape (derivation.tape.block).
Memory = dict[Hashable, list[Any]]


@dataclass(slots=True)
class Tape:
    """The record of one symbolic run.

    ``settings`` is what modules read their dtype and attention backend from; ``hint`` holds the sizes that
    decide guards, ``ones`` the symbols that are 1 in this run, ``fixed`` those with another value;
    ``events`` holds i + 1 where allocation i appears and -(i + 1) where it dies; ``parameters`` maps a
    parameter's or buffer's module path to its shape and dtype; ``loops`` holds event ranges (start, end, times)
    that the real program runs ``times`` times in all; ``dtypes`` maps a model to its parameters' dtype where that
    was changed; ``leaves`` holds, for each open scope, the parameters that are on the GPU until it is left;
    ``tile`` is set where the run stands for every number of VAE tiles, and ``cut`` holds event ranges (start, end,
    symbols) that belong to cut tiles: they do not occur where a symbol is 0; ``emptied`` holds how many events
    precede each torch.cuda.empty_cache(); ``asked`` holds the answers that decide what a module does, in order, and
    ``memory`` what modules have recorded, on this tape or others (``derivation.tape.block``), None for no memory.
    """

    settings: Settings
    hint: Mapping[str, int] | None = None
    ones: frozenset[str] = frozenset()
    fixed: Mapping[str, int] = field(default_factory=dict)
    allocations: list[Allocation] = field(default_factory=list)
    events: list[int] = field(default_factory=list)
    parameters: dict[str, tuple[tuple[int, ...], str]] = field(default_factory=dict)
    guards: dict[tuple[Size, int], Guard] = field(default_factory=dict)
    marks: list[Mark] = field(default_factory=list)
    loops: list[tuple[int, int, int]] = field(default_factory=list)
    path: list[str] = field(default_factory=list)
    kept: set[str] = field(default_factory=set)
    alive: set[int] = field(default_factory=set)
    dtypes: dict[str, str] = field(default_factory=dict)
    leaves: list[list[Storage | None]] = field(default_factory=list)
    tile: Tile | None = None
    cut: list[tuple[int, int, frozenset[str]]] = field(default_factory=list)
    emptied: list[int] = field(default_factory=list)
    asked: list[Question] = field(default_factory=list)
    memory: Memory | None = None

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
        """Return the symbol called ``name``, or its value where this run specialises it."""
        found = 1 if name in self.ones else self.fixed.get(name, symbol(name))
        self.asked.append(Sized(name, found))
        return found

    def allocate(
        self, shape: tuple[Size, ...], dtype: str, op: str, category: Category, count: Size = 1
    ) -> Storage | None:
        """Record a new storage, or ``count`` alike; returns None where there are no elements."""
        return self._allocate(".".join(self.path), shape, dtype, op, category, count)

    def load(self, path: str, shape: tuple[int, ...], dtype: str) -> Storage | None:
        """Record a weight that is moved to the GPU."""
        return self._allocate(path, shape, dtype, "load", Category.WEIGHT)

    def load_leaf(self, name: str, shape: tuple[int, ...], dtype: str) -> None:
        """Record a parameter of the current module that is on the GPU until the module returns.

        accelerate/utils/modeling.py (set_module_tensor_to_device) empties the cache after each.
        """
        self.leaves[-1].append(self.load(".".join([*self.path, name]), shape, dtype))
        self.empty_cache()

    def empty_cache(self) -> None:
        """Record a call of torch.cuda.empty_cache()."""
        self.emptied.append(len(self.events))

    def _allocate(
        self, path: str, shape: tuple[Size, ...], dtype: str, op: str, category: Category, count: Size = 1
    ) -> Storage | None:
        nbytes = product((DTYPE_BYTES[dtype], *shape))
        if nbytes == 0 or count == 0:
            return None
        index = len(self.allocations)
        self.allocations.append(Allocation(path, op, shape, dtype, nbytes, category, count))
        self.alive.add(index)
        self.events.append(index + 1)
        return Storage(self, index)

    def keep(self, shape: tuple[Size, ...], dtype: str, op: str, category: Category) -> None:
        """Record what a library allocates at its first use and never frees, once a tape."""
        if op in self.kept:
            return
        self.kept.add(op)
        storage = self.allocate(shape, dtype, op, category)
        if storage is not None:
            storage.disown()

    def unload(self, path: str, shape: tuple[Size, ...], dtype: str) -> None:
        """Record the death of a weight that existed before the run."""
        nbytes = product((DTYPE_BYTES[dtype], *shape))
        index = len(self.allocations)
        self.allocations.append(Allocation(path, "load", shape, dtype, nbytes, Category.WEIGHT, loaded=True))
        self.release(index)

    def release(self, index: int) -> None:
        """Record the death of allocation ``index``."""
        self.alive.discard(index)
        self.events.append(-index - 1)

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
    def setting(self, **changes: object) -> Iterator[None]:
        """Change the settings until the block's end."""
        settings = self.settings
        self.settings = replace(settings, **changes)  # type: ignore[arg-type]
        try:
            yield
        finally:
            self.settings = settings

    @contextmanager
    def running(self) -> Iterator[Tape]:
        """Make this the tape that operators record on."""
        _ACTIVE.append(self)
        try:
            yield self
        finally:
            _ACTIVE.pop()


_ACTIVE: list[Tape] = []


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


def contiguous_strides(shape: Sequence[Size]) -> tuple[Size, ...]:
    """Return the row-major strides of ``shape``, in elements.

    >>> contiguous_strides((2, 3, 5))
    (15, 5, 1)
    """
    strides: list[Size] = []
    step: Size = 1
    for dim in reversed(shape):
        strides.append(step)
        step = step * dim
    return tuple(reversed(strides))


# contiguous_strides of shapes that can be hashed, as torch's SymInt cannot
packed_strides = lru_cache(maxsize=65536)(contiguous_strides)


class SymTensor:
    """A tensor with symbolic shape and strides (in elements) over a storage; None strides are row-major."""

    __slots__ = ("_strides", "dtype", "shape", "storage")

    def __init__(
        self,
        storage: Storage | None,
        shape: tuple[Size, ...],
        dtype: str,
        strides: tuple[Size, ...] | None = None,
    ) -> None:
        self.storage = storage
        self.shape = shape
        self.dtype = dtype
        self._strides = strides

    @property
    def strides(self) -> tuple[Size, ...]:
        """Strides in elements."""
        return packed_strides(self.shape) if self._strides is None else self._strides

    @property
    def layout(self) -> tuple[str, tuple[Size, ...], tuple[Size, ...]]:
        """dtype, shape and strides."""
        return self.dtype, self.shape, self.strides

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def is_on_cpu(self) -> bool:
        """Whether this is a scalar whose storage is not the call's."""
        return not self.shape and self.storage is None

    @property
    def form(self) -> tuple[str, tuple[Size, ...], tuple[Size, ...] | None, bool]:
        """All that operators read: dtype, shape, strides (None: row-major by definition), ``is_on_cpu``."""
        return self.dtype, self.shape, self._strides, self.is_on_cpu

    def over(self, storage: Storage | None) -> SymTensor:
        """Return a tensor of the same layout over another storage, None for one that keeps no memory alive."""
        return SymTensor(storage, self.shape, self.dtype, self._strides)

    def numel(self) -> Size:
        """Number of elements."""
        return product(self.shape)

    def is_contiguous(self) -> bool:
        """Return whether the tensor is row-major, dimensions of size 1 aside (c10/core/Contiguity.h)."""
        if self._strides is None:
            return True
        expected = packed_strides(self.shape)
        odd = [d for d, s, e in zip(self.shape, self._strides, expected, strict=True) if s != e]
        return not any(is_many(dim) for dim in sorted(odd, key=lambda dim: not isinstance(dim, int)))

    def is_channels_last(self) -> bool:
        """Return ``suggest_memory_format() == channels_last`` of a 4-D tensor (c10/core/MemoryFormat.h).

        A single image is not where its batch stride is small, as that of a transposed [1, S, C] view is.
        """
        if self.ndim != 4 or self.is_contiguous():
            return False
        least: Size = 0
        for dim in (1, 3, 2, 0):
            size, stride = self.shape[dim], self.strides[dim]
            if not nonnegative_from_one(stride - least) or (dim == 0 and least == self.strides[1]):
                return False
            least = stride * size
        return True

    def permute(self, *order: int) -> SymTensor:
        """Return a view with reordered dimensions."""
        strides = self.strides
        return self.view_as(tuple(self.shape[i] for i in order), tuple(strides[i] for i in order))

    def transpose(self, first: int, second: int) -> SymTensor:
        """Return a view with two dimensions swapped."""
        order = list(range(self.ndim))
        order[first], order[second] = order[second], order[first]
        return self.permute(*order)

    def unsqueeze(self, dim: int) -> SymTensor:
        """Return a view with a dimension of size 1 at ``dim`` (at most ``ndim``)."""
        strides = self.strides
        step: Size = 1 if dim == self.ndim else self.shape[dim] * strides[dim]
        return self.view_as(
            (*self.shape[:dim], 1, *self.shape[dim:]), (*strides[:dim], step, *strides[dim:])
        )

    def narrow(self, dim: int, length: Size) -> SymTensor:
        """Return a view of ``length`` entries along ``dim``."""
        shape = (*self.shape[:dim], length, *self.shape[dim + 1 :])
        return self.view_as(shape, self.strides)

    def select(self, dim: int) -> SymTensor:
        """Return a view of one entry along ``dim``, without that dimension."""
        strides = self.strides
        return self.view_as(
            self.shape[:dim] + self.shape[dim + 1 :], strides[:dim] + strides[dim + 1 :]
        )

    def chunk(self, chunks: int, dim: int) -> tuple[SymTensor, ...]:
        """Return ``chunks`` equal views along ``dim``, whose size must be a multiple of ``chunks``."""
        length = self.shape[dim] // chunks
        return tuple(self.narrow(dim, length) for _ in range(chunks))

    def expand(self, *shape: Size) -> SymTensor:
        """Return a view broadcast to ``shape``: expanded dimensions have stride 0."""
        lead = len(shape) - self.ndim
        own = ((0,) * lead + self.strides, (1,) * lead + self.shape)
        strides = tuple(
            0 if old != new else stride for stride, old, new in zip(*own, shape, strict=True)
        )
        return self.view_as(tuple(shape), strides)

    def view_as(self, shape: tuple[Size, ...], strides: tuple[Size, ...] | None) -> SymTensor:
        """Return a tensor over the same storage."""
        return SymTensor(self.storage, shape, self.dtype, strides)

    def viewed(self, *shape: Size) -> SymTensor | None:
        """Return a view with ``shape``, or None where only a copy can have it (ATen/TensorUtils.cpp)."""
        if self._strides is None or self.is_contiguous():
            return self.view_as(tuple(shape), None)
        strides = _view_strides(self.shape, self._strides, shape)
        return None if strides is None else self.view_as(tuple(shape), strides)

    def view(self, *shape: Size) -> SymTensor:
        """Return a view with ``shape``; raises ValueError where PyTorch would."""
        result = self.viewed(*shape)
        if result is None:
            raise ValueError(f"no view of {self.shape} with strides {self.strides} has shape {shape}")
        return result


def is_many(dim: Size) -> bool:
    """Return whether a dimension is larger than 1, recording the decision on the tape."""
    return tape().exceeds(dim, 1)


def _view_strides(
    shape: Sequence[Size], strides: Sequence[Size], new_shape: Sequence[Size]
) -> tuple[Size, ...] | None:
    """Return the strides of ``new_shape``, or None.

    Each maximal run of dimensions that is one evenly strided block (stride[i] = stride[i+1] * shape[i+1])
    must be the product of a run of new dimensions.
    """
    result: list[Size] = []
    position = len(new_shape) - 1
    for block_numel, step in _strided_blocks(shape, strides):
        covered: Size = 1
        while position >= 0 and (covered != block_numel or new_shape[position] == 1):
            result.append(step * covered)
            covered = covered * new_shape[position]
            position -= 1
        if covered != block_numel:
            return None
    while position >= 0 and new_shape[position] == 1:
        result.append(1)
        position -= 1
    return tuple(reversed(result)) if position < 0 else None


def _strided_blocks(shape: Sequence[Size], strides: Sequence[Size]) -> list[tuple[Size, Size]]:
    """Return (elements, innermost stride) of each evenly strided block, last dimension first."""
    blocks: list[tuple[Size, Size]] = []
    for dim, stride in zip(reversed(shape), reversed(strides), strict=True):
        if blocks and stride == blocks[-1][0] * blocks[-1][1]:
            blocks[-1] = (blocks[-1][0] * dim, blocks[-1][1])
        elif is_many(dim):
            blocks.append((dim, stride))
    return blocks
