"""How image sides map to the sides of a UNet's levels, and the symbols of an equation in pixels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import sympy

from derivation.call import MAX_SIDE_PIXELS
from derivation.errors import unsupported
from derivation.tape.tiles import Tile

# The symbols of a headline equation: image height and width in pixels, prompt length, batch size.
H, W, L, B = sympy.symbols("H W L B", integer=True, positive=True)


@dataclass(frozen=True, slots=True)
class Sides:
    """The image sides in pixels that a pipeline accepts: from ``least`` to ``most``, in multiples of ``step``."""

    least: int
    step: int = 1
    most: int = MAX_SIDE_PIXELS

    def check(self, key: str, side: int) -> None:
        """Raise DerivationError for a side that is not accepted."""
        if side < self.least:
            raise unsupported(key, side, f"integers from {self.least}")
        if side % self.step:
            raise unsupported(key, side, f"multiples of {self.step}")
        if side > self.most:
            raise unsupported(key, side, f"up to {self.most}")

    @property
    def bounded(self) -> bool:
        """Whether the pipeline itself has a largest side."""
        return self.most < MAX_SIDE_PIXELS


@dataclass(frozen=True, slots=True)
class Range:
    """The integers from ``first`` to ``last`` in steps of ``step``."""

    first: int
    last: int
    step: int = 1

    def __contains__(self, value: int) -> bool:
        return self.first <= value <= self.last and (value - self.first) % self.step == 0

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.first, self.last + 1, self.step))

    @property
    def is_one(self) -> bool:
        """Whether there is one value."""
        return self.first == self.last

    def __str__(self) -> str:
        if self.is_one:
            return str(self.first)
        return f"{self.first} to {self.last}" + (f" in steps of {self.step}" if self.step > 1 else "")


@dataclass(frozen=True, slots=True)
class Frames:
    """How a video's frames map to latent frames: the VAE's temporal factor; ``default`` frames where none are given."""

    factor: int
    default: int

    def latent(self, num_frames: int | None) -> int:
        """Return the latent frames; raises DerivationError for frames that are not 1 + a multiple of the factor."""
        given = self.default if num_frames is None else num_frames
        if (given - 1) % self.factor:
            raise unsupported("num_frames", given, f"1 + multiples of {self.factor}")
        return (given - 1) // self.factor + 1

    def frames(self, latent: int) -> int:
        """Return the frames of ``latent`` latent frames."""
        return (latent - 1) * self.factor + 1


@dataclass(frozen=True, slots=True)
class Grid:
    """How image sides map to level sides: the VAE's scale factor, the number of levels, the VAE's tile; and frames."""

    vae_scale_factor: int
    levels: int
    tile: Tile | None = None
    frames: Frames | None = None

    @property
    def unit(self) -> int:
        """Image sides for which every level is exact are multiples of this many pixels."""
        return self.vae_scale_factor << (self.levels - 1)

    def sizes(self, height: int, width: int) -> dict[str, int]:
        """Return every level's sides for an image of ``height`` x ``width`` pixels."""
        values = {"h0": height // self.vae_scale_factor, "w0": width // self.vae_scale_factor}
        for k in range(1, self.levels):
            for side in "hw":
                values[f"{side}{k}"] = -(-values[f"{side}{k - 1}"] // 2)
        return values if self.tile is None else values | self.tile.sizes(values["h0"], values["w0"])

    def explicit(self, expression: sympy.Expr) -> sympy.Expr:
        """Return an expression with what the symbols of VAE tiles are in terms of H and W."""
        for name, value in reversed(self.definitions.items()):
            expression = expression.xreplace({name: value})
        return expression

    @property
    def definitions(self) -> dict[sympy.Symbol, sympy.Expr]:
        """What the symbols of VAE tiles are in terms of H, W and earlier ones; empty where there are no tiles."""
        return {} if self.tile is None else self.tile.definitions(H, W, self.vae_scale_factor)

    def defined(self, expressions: Iterable[sympy.Expr]) -> dict[sympy.Symbol, sympy.Expr]:
        """Return the definitions that expressions need, in an order in which each uses earlier ones alone."""
        needed = {symbol for expression in expressions for symbol in expression.free_symbols}
        found: dict[sympy.Symbol, sympy.Expr] = {}
        for name, value in reversed(self.definitions.items()):
            if name in needed:
                needed |= value.free_symbols
                found = {name: value, **found}
        return found
