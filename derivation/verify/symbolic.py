"""The second derivation: the real modules run with the ring's symbols as tensor sizes, recorded on a tape.

They run on plain ``meta`` tensors whose sizes are SymInts of a ShapeEnv, so the storages are those that the
numeric trace watches. Not under FakeTensorMode: without Python's dispatcher its kernels specialise the sizes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from operator import mul
from typing import Any

import torch
import torch.nn.functional as F
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._sympy.functions import FloorDiv

from derivation.errors import DerivationError
from derivation.symbols import MAX_LEVELS, SYMBOLS, Size, as_poly, evaluate, symbol
from derivation.tape import Allocation, Category, Guard, Settings, Tape
from derivation.verify.polynomials import RELATIONS, Translation, compared
from derivation.verify.runs import trace_component
from derivation.verify.tracer import Alloc, Trace

aten = torch.ops.aten

# Distinct primes: every level's sides are odd somewhere and no two sizes are equal by accident.
GENERIC: Mapping[str, int] = {"B": 3, "L": 89, "h0": 37, "w0": 53}
IMAGE_FACTOR = 8


@dataclass(frozen=True, slots=True)
class SymbolicTrace:
    """A tape recorded from the real module, and in words the decisions that no guard of a tape can state."""

    tape: Tape
    conditions: tuple[str, ...]


def symbolic_trace(
    component: str,
    config: Mapping[str, Any],
    *,
    dtype: str = "float16",
    attention: str = "efficient",
    guidance: bool = True,
) -> SymbolicTrace:
    """Trace ``vae_encode``, ``unet`` or ``vae_decode`` once for all sizes, as ``trace_component`` does for one.

    Raises DerivationError where a storage's size is no polynomial or PyTorch fixes a symbol.
    """
    tape = Tape(Settings(dtype, attention))
    sizes = SymbolicSizes(tape, GENERIC)
    factor = IMAGE_FACTOR
    if component == "vae_encode":
        factor = 1 << (len(config["block_out_channels"]) - 1)
    with sizes.kernels():
        trace = trace_component(
            component,
            config,
            dtype=dtype,
            attention=attention,
            height=factor * sizes["h0"],
            width=factor * sizes["w0"],
            batch_size=sizes["B"],
            prompt_length=sizes["L"],
            guidance=guidance,
        )
    return SymbolicTrace(tape, record(trace, sizes))


class SymbolicSizes:
    """A ShapeEnv whose symbols are the ring's, for one run on ``tape``; those that the tape fixes are integers.

    Decisions fall as at the tape's hint, at ``generic`` sizes where it has none.
    """

    def __init__(self, tape: Tape, generic: Mapping[str, int]) -> None:
        self.tape = tape
        self.values = with_levels(generic if tape.hint is None else tape.hint)
        self.env = ShapeEnv(duck_shape=False)
        self.translation = Translation({**tape.fixed, **dict.fromkeys(tape.ones, 1)})
        self._sizes: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        """Return the symbol ``name`` as a SymInt, or its value where the tape fixes it."""
        if name not in self._sizes:
            fixed = self.tape.size(name)
            self._sizes[name] = fixed if isinstance(fixed, int) else self._create(name)
        return self._sizes[name]

    def _create(self, name: str) -> Any:
        source, value = ConstantSource(name), self.values[name]
        created = self.env.create_symbol(value, source, DimDynamic.DYNAMIC, constraint_dim=None)
        self.translation.symbols[created] = name
        return self.env.create_symintnode(created, hint=value, source=source)

    def polynomial(self, size: Any) -> Size:
        """Return an int or a SymInt as a polynomial; raises DerivationError where it is none."""
        return size if isinstance(size, int) else self.translation.polynomial(size.node.expr)

    def by_level(self, size: Any) -> Any:
        """Return an equal size in which each ceil(side / 2^k) is the deeper level's own symbol."""
        if isinstance(size, int) or not size.node.expr.has(FloorDiv):
            return size
        terms = as_poly(self.polynomial(size)).items()
        return sum(
            reduce(mul, (self[SYMBOLS[i].name] ** power for i, power in enumerate(monomial) if power), int(c))
            for monomial, c in terms
        )

    @contextmanager
    def kernels(self) -> Iterator[None]:
        """Run operators on the meta kernels that take symbolic sizes."""
        with _Upsampling(), _Kernels(self):
            yield

    def decisions(self) -> tuple[list[Guard], list[str]]:
        """Return what the run decided about sizes: as guards, and in words what no guard can state.

        Raises DerivationError where a run without hint took a symbol for equal to something.
        """
        if self.tape.hint is None and self.env.replacements:
            equal = ", ".join(f"{self.translation.symbols[s]} = {to}" for s, to in self.env.replacements.items())
            raise DerivationError(f"symbolic trace: PyTorch specialised {equal}")
        guards = [Guard(symbol(name), 1, True) for name in self.translation.symbols.values()]
        words: list[str] = []
        for entry in self.env.guards:
            try:
                guards += self._stated(entry.expr)
            except DerivationError:
                words.append(self.translation.in_words(entry.expr))
        return guards, words

    def _stated(self, relation: Any) -> list[Guard]:
        if relation.func not in RELATIONS:
            raise DerivationError(f"symbolic trace: {relation} is no comparison of two sizes")
        left, right = (self.translation.polynomial(side) for side in relation.args)
        difference = left - right
        return compared(relation.func, difference, evaluate(difference, self.values) > 0)


class _Kernels(TorchDispatchMode):
    """Two operators on symbolic sizes: ``randn`` has no such kernel, a convolution's sides get their own symbols."""

    def __init__(self, sizes: SymbolicSizes) -> None:
        super().__init__()
        self._sizes = sizes

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket is aten.randn:
            kwargs = {name: value for name, value in kwargs.items() if name != "generator"}
            return aten.empty.memory_format(args[0], **kwargs)
        with enable_python_dispatcher():
            out = func(*args, **kwargs)
        if func is aten.convolution.default:
            return out.new_empty(tuple(self._sizes.by_level(side) for side in out.shape))
        return out


class _Upsampling(TorchFunctionMode):
    """Nearest-neighbour upsampling without its C++ wrapper, which takes no symbolic sizes."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.interpolate and kwargs.get("mode") == "nearest":
            return _nearest(*args, kwargs.get("size"), kwargs.get("scale_factor"))
        return func(*args, **kwargs)


def _nearest(x: Any, size: Any, scale_factor: float | None) -> Any:
    if scale_factor is not None:
        size = [side * int(scale_factor) for side in x.shape[2:]]
    return aten.upsample_nearest2d.default(x, list(size))


def record(trace: Trace, sizes: SymbolicSizes, root: str = "") -> tuple[str, ...]:
    """Write a symbolic trace and its decisions onto the tape of ``sizes``; return those that no guard can state."""
    tape, first = sizes.tape, len(sizes.tape.allocations) - 1
    for event in trace.events:
        if isinstance(event, Alloc):
            tape.allocations.append(_allocation(event, first + event.id, sizes, root))
            tape.events.append(first + event.id + 1)
        else:
            tape.events.append(-(first + event.id) - 1)
    guards, words = sizes.decisions()
    tape.guards.update({(guard.size, guard.bound): guard for guard in guards})
    return tuple(dict.fromkeys(words))


def _allocation(event: Alloc, index: int, sizes: SymbolicSizes, root: str) -> Allocation:
    shape = tuple(sizes.polynomial(dim) for dim in event.shape)
    path, op = ".".join(filter(None, (root, event.path))), event.op.split(".")[1]
    return Allocation(index, path, op, shape, event.dtype, sizes.polynomial(event.nbytes), category(op, shape))


def category(op: str, shape: tuple[Size, ...]) -> Category:
    """Return what an operator's output is for, as far as its name and rank tell."""
    if "attention" in op or op in ("bmm", "baddbmm", "_softmax", "_safe_softmax"):
        return Category.ATTENTION
    if op == "native_group_norm" and len(shape) == 2:
        return Category.STATISTICS
    return Category.STATISTICS if op == "native_layer_norm" and shape[-1] == 1 else Category.ACTIVATION


def with_levels(values: Mapping[str, int]) -> dict[str, int]:
    """Return ``values`` with the sides of every deeper level.

    >>> with_levels({"h0": 37})["h2"]
    10
    """
    result = dict(values)
    for k in range(1, MAX_LEVELS):
        for side in "hw":
            if f"{side}{k - 1}" in result:
                result.setdefault(f"{side}{k}", -(-result[f"{side}{k - 1}"] // 2))
    return result
