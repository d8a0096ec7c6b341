"""The second derivation: the real modules run with the ring's symbols as tensor sizes, recorded on a tape.

They run on plain ``meta`` tensors whose sizes are SymInts of a ShapeEnv, so the storages are those that the
numeric trace watches; FakeTensorMode is left out, as it specialised the sizes of SD 1.5's VAE to their hints.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
from derivation.options import Options
from derivation.tape.events import Guard
from derivation.tape.symbols import MAX_LEVELS, SYMBOLS, Size, as_poly, evaluate, symbol
from derivation.tape.tape import Tape
from derivation.tape.tensor import contiguous_strides
from derivation.trace.polynomials import RELATIONS, Decision, Translation, compared
from derivation.trace.runs import trace_component
from derivation.trace.tracer import Onto

aten = torch.ops.aten

# Distinct primes: every level's sides are odd somewhere and no two sizes are equal by accident.
GENERIC: Mapping[str, int] = {"B": 3, "L": 89, "h0": 37, "w0": 53}
# trace_component takes latents an eighth of the image's sides.
TRACE_FACTOR = 8


def symbolic_trace(
    component: str,
    config: Mapping[str, Any],
    *,
    dtype: str = "float16",
    attention: str = "efficient",
    guidance: bool = True,
    level: int = 0,
) -> Tape:
    """Trace ``vae_encode``, ``unet`` or ``vae_decode`` once for all sizes, as ``trace_component`` does for one.

    With a ``level`` the latents' sides are 2^level times that level's, so that every shallower level divides.
    Raises DerivationError where a storage's size is no polynomial or PyTorch fixes a symbol.
    """
    tape = Tape(Options(dtype=dtype, attention=attention))
    sizes = SymbolicSizes(tape, GENERIC)
    factor = 1 << (len(config["block_out_channels"]) - 1) if component == "vae_encode" else TRACE_FACTOR
    factor <<= level
    with sizes.kernels():
        trace_component(
            component,
            config,
            dtype=dtype,
            attention=attention,
            height=factor * sizes[f"h{level}"],
            width=factor * sizes[f"w{level}"],
            batch_size=sizes["B"],
            prompt_length=sizes["L"],
            guidance=guidance,
            onto=sizes.onto,
        )
    sizes.decide()
    return tape


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

    def named(self, text: str) -> str:
        """Return ``text`` with PyTorch's names of symbols replaced by the ring's and their values in this run."""
        for created, name in self.translation.symbols.items():
            text = re.sub(rf"\b{created}\b", f"{name} = {self.values[name]}", text)
        return text

    @contextmanager
    def kernels(self) -> Iterator[None]:
        """Run operators on the meta kernels that take symbolic sizes."""
        with _Upsampling(), _Kernels(self):
            yield

    @property
    def onto(self) -> Onto:
        """Where the run is recorded."""
        return Onto(self.tape, self.polynomial)

    def decide(self) -> None:
        """Record what the run decided about sizes; raises DerivationError where it took a symbol for a number.

        A run with a hint may: what it says then holds where the guard "equal" does.
        """
        if self.tape.hint is None and self.env.replacements:
            equal = ", ".join(f"{self.translation.symbols[s]} = {to}" for s, to in self.env.replacements.items())
            raise DerivationError(f"symbolic trace: PyTorch specialised {equal}")
        guards = [Guard(symbol(name), 1, True) for name in self.translation.symbols.values()]
        relations = list(dict.fromkeys(entry.expr for entry in self.env.guards))
        for i, relation in enumerate(relations):
            try:
                guards += self._stated(relation)
            except DerivationError:
                guards.append(Decision(i + 1, 0, True, self.translation.named(relation)))
        self.tape.guards.update({(guard.size, guard.bound): guard for guard in guards})

    def _stated(self, relation: Any) -> list[Guard]:
        if relation.func not in RELATIONS:
            raise DerivationError(f"symbolic trace: {relation} is no comparison of two sizes")
        left, right = (self.translation.polynomial(side) for side in relation.args)
        difference = left - right
        return compared(relation.func, difference, evaluate(difference, self.values) > 0)


class _Kernels(TorchDispatchMode):
    """Python's meta kernels, with three exceptions.

    ``randn`` has none for symbolic sizes; a view of a contiguous tensor needs none, and would ask which sizes
    divide each other; a convolution's sides get symbols of their own.
    """

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
        if func in _VIEWS and args[0].is_contiguous() and -1 not in args[1]:
            return args[0].as_strided(args[1], contiguous_strides(args[1]), args[0].storage_offset())
        with enable_python_dispatcher():
            out = func(*args, **kwargs)
        if func is aten.convolution.default:
            return out.new_empty(tuple(self._sizes.by_level(side) for side in out.shape))
        return out


_VIEWS = frozenset({aten.view.default, aten._unsafe_view.default})


class _Upsampling(TorchFunctionMode):
    """Nearest-neighbour upsampling without its C++ wrapper, which takes no symbolic sizes."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.interpolate and kwargs.get("mode") == "nearest" and kwargs.get("scale_factor") in (None, 2.0):
            return _nearest(args[0], kwargs.get("size"), kwargs.get("scale_factor"))
        return func(*args, **kwargs)


def _nearest(x: Any, size: Any, scale_factor: float | None) -> Any:
    if scale_factor is not None:
        size = [int(scale_factor) * side for side in x.shape[2:]]
    return aten.upsample_nearest2d.default(x, list(size))


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
