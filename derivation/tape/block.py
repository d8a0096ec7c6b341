"""Modules: a call whose inputs and decisions have been seen before is copied, not run again.

Theorem: what a module records follows from its arguments' layouts, the options that it obeys, whether there is a GPU,
the libraries, the model and the answers to the questions that it asks of the tape and the GPU, as long as it frees
nothing that was alive before, which ``block`` sees to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

from derivation.options import Options
from derivation.tape.events import Allocation
from derivation.tape.tape import Question, Storage, Tape, tape
from derivation.tape.tensor import SymTensor

P = ParamSpec("P")
R = TypeVar("R")


def leaf(forward: Callable[P, R]) -> Callable[Concatenate[str, P], R]:
    """Make ``forward`` a module: the first argument of a call is its name, and, as in ``nn.Module.__call__``,
    the caller's arguments stay referenced until it returns.
    """

    @wraps(forward)
    def call(name: str, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with tape().scope(name):
            return forward(*args, **kwargs)

    return call


def block(forward: Callable[P, R]) -> Callable[Concatenate[str, P], R]:
    """Make ``forward`` a ``leaf`` whose calls the tape's memory holds: equal ones are copied."""
    run = leaf(forward)

    @wraps(forward)
    def call(name: str, /, *args: P.args, **kwargs: P.kwargs) -> R:
        here = tape()
        if here.memory is None:
            return run(name, *args, **kwargs)
        inputs = list(_tensors((args, *kwargs.values())))
        model = here.path[0] if here.path else name
        adapted = here.adapters.inside([*here.path, name]), here.adapters.freeze([model])
        known = (
            _obeyed(here.options),
            here.hardware is None,
            here.libraries,
            model,
            _dtypes(here, model),
            frozenset(here.kept),
            adapted,
        )
        key = (forward, known, _form((args, *kwargs.items())), _aliases(inputs))
        try:
            recordings: list[Recording] = here.memory.setdefault(key, [])
        except TypeError:  # a list that the module appends to
            return run(name, *args, **kwargs)
        for recording in recordings:
            if all(question.holds_on(here) for question in recording.asked):
                result: R = recording.copied(here, name, inputs)
                return result
        before = Before.on(here, name)
        result = run(name, *args, **kwargs)
        recordings += before.recorded(result, inputs)
        return result

    return call


# What pipelines read and no block does; the VAE is called slice by slice, of a GPU a block sees answers alone.
AROUND_BLOCKS = ("pipeline", "safety_checker", "vae_slicing", "gpu")


@lru_cache(maxsize=4096)
def _obeyed(options: Options) -> Options:
    """Return options with those that no block obeys at their defaults: model offload moves weights between calls."""
    defaults = Options()
    unread = {name: getattr(defaults, name) for name in AROUND_BLOCKS}
    return replace(options, **unread, offload=options.offload if options.offload == "sequential" else None)


def _dtypes(here: Tape, model: str) -> tuple[str, ...]:
    return tuple(dtype for module, dtype in here.dtypes.items() if module.split(".")[0] == model)


@dataclass(frozen=True, slots=True)
class Left:
    """A tensor of a result: over allocation ``born`` of the module, or over input ``given``."""

    tensor: SymTensor
    born: int | None = None
    given: int | None = None


@dataclass(frozen=True, slots=True)
class Before:
    """Where a tape stood before a module ran."""

    tape: Tape
    path: str
    event: int
    allocation: int
    emptied: int
    asked: int
    kept: int
    others: tuple[object, ...]

    @classmethod
    def on(cls, here: Tape, name: str) -> Before:
        """Return where ``here`` stands before its module ``name`` runs."""
        lengths = len(here.events), len(here.allocations), len(here.emptied), len(here.asked), len(here.kept)
        return cls(here, ".".join([*here.path, name]), *lengths, cls._others(here))

    @staticmethod
    def _others(here: Tape) -> tuple[object, ...]:
        """Return what a module that may be copied leaves alone."""
        return (len(here.marks), len(here.loops), len(here.cut), here.tile)

    def recorded(self, result: object, inputs: Sequence[SymTensor]) -> tuple[Recording, ...]:
        """Return what the module recorded, nothing where that cannot be copied."""
        here, first = self.tape, self.allocation
        events = here.events[self.event :]
        left = {e - 1 for e in events if e > 0 and e - 1 in here.alive}
        owners = {id(x.storage): i for i, x in reversed(list(enumerate(inputs))) if x.storage is not None}
        returned = _left(result, first, owners)
        reached = {x.born + first for x in _flat(returned) if x.born is not None}
        owned = dict(list(here.kept.items())[self.kept :])
        reached.update(index for index in owned.values() if index is not None)
        unowned = any(x.born is None and x.given is None for x in _flat(returned))
        if unowned or reached != left or self._others(here) != self.others or any(-first <= e < 0 for e in events):
            return ()
        recording = Recording(
            self.path,
            here.allocations[first:],
            [e - first if e > 0 else e + first for e in events],
            [done - self.event for done in here.emptied[self.emptied :]],
            tuple(dict.fromkeys(here.asked[self.asked :])),
            returned,
            {op: None if index is None else index - first for op, index in owned.items()},
            tuple(sorted(index - first for index in left)),
        )
        return (recording,)


@dataclass(frozen=True, slots=True)
class Recording:
    """What a module recorded, counted from its first event and allocation, and the questions that it asked.

    ``kept`` holds the allocations that libraries never free.
    """

    path: str
    allocations: Sequence[Allocation]
    events: Sequence[int]
    emptied: Sequence[int]
    asked: tuple[Question, ...]
    result: object
    kept: Mapping[str, int | None]
    left: tuple[int, ...]
    elsewhere: dict[str, list[Allocation]] = field(default_factory=dict)

    def copied(self, here: Tape, name: str, inputs: Sequence[SymTensor]) -> Any:
        """Put the recording on ``here`` for its module ``name`` and return the module's result."""
        first = len(here.allocations)
        path = ".".join([*here.path, name])
        here.ask(self.asked)
        here.emptied += [done + len(here.events) for done in self.emptied]
        allocations = self.allocations if path == self.path else self._moved(path)
        here.copies.append((first, allocations))
        here.allocations += allocations
        here.events += [e + first if e > 0 else e - first for e in self.events]
        here.alive.update(index + first for index in self.left)
        here.kept |= {op: None if index is None else index + first for op, index in self.kept.items()}
        owned = [index for index in self.left if index not in self.kept.values()]
        storages = {index: Storage(here, index + first) for index in owned}
        return _result(self.result, storages, inputs)

    def _moved(self, path: str) -> list[Allocation]:
        if path not in self.elsewhere:
            self.elsewhere[path] = [a.moved(path + a.path[len(self.path) :]) for a in self.allocations]
        return self.elsewhere[path]


def _left(result: object, first: int, owners: Mapping[int, int]) -> object:
    """Return a result with what each tensor is left with in its place."""
    if isinstance(result, tuple):
        return _made(result, (_left(entry, first, owners) for entry in result))
    if result is None:
        return None
    if not isinstance(result, SymTensor):
        raise TypeError(f"a module returned {type(result).__name__}: neither a tensor, None nor a tuple of them")
    bare = result.over(None)
    if result.storage is None:
        return Left(bare)
    given = owners.get(id(result.storage))
    return Left(bare, result.storage.index - first) if given is None else Left(bare, given=given)


def _result(left: object, storages: Mapping[int, Storage], inputs: Sequence[SymTensor]) -> object:
    """Return the result that ``left`` stands for."""
    if isinstance(left, tuple):
        return _made(left, (_result(entry, storages, inputs) for entry in left))
    if not isinstance(left, Left):
        return left
    if left.given is not None:
        return left.tensor.over(inputs[left.given].storage)
    return left.tensor.over(None if left.born is None else storages[left.born])


def _made(like: tuple[object, ...], entries: Iterable[object]) -> tuple[object, ...]:
    """Return a tuple, or a named one, of the same class."""
    make: Callable[[Iterable[object]], tuple[object, ...]] = getattr(like, "_make", tuple)
    return make(entries)


def _flat(value: object) -> Iterator[Left]:
    if isinstance(value, Left):
        yield value
    elif isinstance(value, tuple):
        for entry in value:
            yield from _flat(entry)


def _tensors(value: object) -> Iterator[SymTensor]:
    """Yield the tensors in nested tuples, in order."""
    if isinstance(value, SymTensor):
        yield value
    elif isinstance(value, tuple):
        for entry in value:
            yield from _tensors(entry)


def _form(value: object) -> object:
    """Return nested tuples with each tensor's layout in its place."""
    if isinstance(value, SymTensor):
        return value.form
    if isinstance(value, tuple):
        return (type(value), *map(_form, value))
    return value


def _aliases(inputs: Iterable[SymTensor]) -> tuple[int, ...]:
    """Return which inputs share a storage: the number of each one's storage, where it has none its own."""
    numbers: dict[int, int] = {}
    return tuple(numbers.setdefault(id(x.storage or x), len(numbers)) for x in inputs)
