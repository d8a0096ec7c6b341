"""The witness of a peak: the program point and every tensor alive there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from derivation.peak.liveness import alive_at
from derivation.tape.events import Allocation, Category
from derivation.tape.symbols import DTYPE_BYTES, Size, evaluate
from derivation.tape.tape import Tape


@dataclass(frozen=True, slots=True)
class WitnessTensor:
    """One tensor alive at a peak: where it was made, its shape and its bytes (sizes are symbolic or int)."""

    module: str
    op: str
    shape: tuple[Size, ...]
    dtype: str
    nbytes: Size
    count: Size
    category: str

    @classmethod
    def of(cls, allocation: Allocation) -> WitnessTensor:
        """Return the witness entry of an allocation."""
        a = allocation
        return cls(a.path, a.op, a.shape, a.dtype, a.nbytes, a.count, a.category.value)

    def at(self, values: Mapping[str, int]) -> dict[str, Any]:
        """Return the entry at integer sizes."""
        return {
            "module": self.module,
            "op": self.op,
            "shape": [evaluate(dim, values) for dim in self.shape],
            "dtype": self.dtype,
            "size_bytes": evaluate(self.nbytes, values),
            "count": evaluate(self.count, values),
            "category": self.category,
        }


@dataclass(frozen=True, slots=True)
class Witness:
    """The program point of a peak: stage, module path, operator, and every tensor alive, oldest first.

    Before them stand the weights that the call has moved or freed, one entry a model and dtype.
    """

    stage: str
    module: str
    op: str
    tensors: tuple[WitnessTensor, ...]

    def at(self, values: Mapping[str, int]) -> dict[str, Any]:
        """Return the witness at integer sizes, ready for JSON."""
        tensors = [tensor.at(values) for tensor in self.tensors]
        return {"stage": self.stage, "module": self.module, "op": self.op, "tensors": tensors}


def witness_at(stage: str, tape: Tape, event: int) -> Witness:
    """Return the witness of ``stage`` after event ``event`` of ``tape``."""
    alive = alive_at(tape, event)
    newest = alive[-1] if alive else None
    module, op = (newest.path, newest.op) if newest else ("", "")
    tensors = [WitnessTensor.of(a) for a in alive if a.category is not Category.WEIGHT]
    return Witness(stage, module, op, (*_weights(a for a in alive if a.category is Category.WEIGHT), *tensors))


def _weights(alive: Iterable[Allocation]) -> Iterator[WitnessTensor]:
    """Yield a model's weights of one dtype as one flat tensor."""
    groups: dict[tuple[str, str, Size], list[Allocation]] = {}
    for a in alive:
        groups.setdefault((a.path.split(".")[0], a.dtype, a.count), []).append(a)
    for (model, dtype, count), weights in groups.items():
        nbytes = [evaluate(a.nbytes, {}) for a in weights]
        shape = (sum(nbytes) // DTYPE_BYTES[dtype],)
        op, category = weights[0].op, weights[0].category.value
        yield WitnessTensor(model, op, shape, dtype, sum(nbytes), count, category)
