"""The tiles of a VAE (autoencoder_kl.py: tiled_decode, _tiled_encode): where they are cut, in numbers and in symbols.

Along a side of h latents tiles of T begin every S latents. The tallest, min(T, h), come first; n of them. What is
left over is at most two cut tiles, of r and q latents, since S is at least T / 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import sympy

from derivation.config import AutoencoderKLConfig, VAEConfig
from derivation.errors import DerivationError
from derivation.options import Options
from derivation.tape.symbols import SYMBOLS, TILE_AXES, Size, floor_div, free_names, is_tile, symbol

# The symbols of VAE tiles in an equation in pixels: sides in pixels, and counts.
IN_PIXELS = {s.name: sympy.Symbol(s.latex, integer=True, nonnegative=True) for s in SYMBOLS if is_tile(s.name)}

MEANINGS_IN_PIXELS = {
    IN_PIXELS[s.name]: s.meaning.split(":")[0].replace("in latents", "in pixels") for s in SYMBOLS if is_tile(s.name)
}


class Tile(NamedTuple):
    """The side of a tile and the step to the next one, in latents."""

    side: int
    step: int

    def sizes(self, h0: int, w0: int) -> dict[str, int]:
        """Return the value of every tile symbol for latents of ``h0`` x ``w0``.

        >>> Tile(64, 48).sizes(100, 40)["Th"], Tile(64, 48).sizes(100, 40)["Rh"], Tile(64, 48).sizes(100, 40)["Qh"]
        (64, 52, 4)
        """
        excess = max(h0, w0, self.side) - self.side
        values = {"E": 1 + excess}
        for axis, latents in zip(TILE_AXES, (h0, w0), strict=True):
            count = max(latents - self.side, 0) // self.step + 1
            rest = max(latents - count * self.step, 0) if excess else 0
            values |= {f"T{axis}": min(self.side, latents), f"N{axis}": count, f"R{axis}": rest}
            values[f"Q{axis}"] = max(rest - self.step, 0)
        return values | {"Ch": min(self.step, h0)}

    def definitions(self, height: sympy.Expr, width: sympy.Expr, factor: int) -> dict[sympy.Symbol, sympy.Expr]:
        """Return the tile symbols of an equation, sides in pixels, each in ``height``, ``width`` and earlier ones."""
        side, step = self.side * factor, self.step * factor
        tiled = sympy.Min(sympy.Max(height - side, width - side, 0), 1)
        found: dict[sympy.Symbol, sympy.Expr] = {}
        for axis, pixels in zip(TILE_AXES, (height, width), strict=True):
            count, rest = IN_PIXELS[f"N{axis}"], IN_PIXELS[f"R{axis}"]
            found[IN_PIXELS[f"T{axis}"]] = sympy.Min(side, pixels)
            found[count] = sympy.floor(sympy.Max(pixels - side, 0) / step) + 1
            found[rest] = tiled * sympy.Max(pixels - step * count, 0)
            found[IN_PIXELS[f"Q{axis}"]] = sympy.Max(rest - step, 0)
        return found | {IN_PIXELS["Ch"]: sympy.Min(step, height)}


@dataclass(frozen=True, slots=True)
class Tiling:
    """diffusers' ``tile_sample_min_size``, the VAE's scale factor and ``tile_overlap_factor``."""

    sample: int
    factor: int
    overlap: float

    @classmethod
    def of(cls, vae: VAEConfig, options: Options) -> Tiling:
        """Return the VAE's attributes under ``options``; its ``sample_size`` may be [height, width].

        Raises DerivationError for a VAE of another class than AutoencoderKL, which cuts its tiles otherwise.
        """
        if not isinstance(vae, AutoencoderKLConfig):
            raise DerivationError(
                f"vae_tiling = True is not supported with {vae.class_name} (supported: AutoencoderKL)"
            )
        size = vae.sample_size if isinstance(vae.sample_size, int) else vae.sample_size[0]
        return cls(options.tile_sample_min_size or size, vae.scale_factor, options.tile_overlap_factor)

    @property
    def latent(self) -> int:
        """tile_latent_min_size."""
        return self.sample // self.factor

    def __post_init__(self) -> None:
        if min(self.step(self.sample), self.step(self.latent)) < 1:
            raise DerivationError(
                f"tile_sample_min_size = {self.sample} is not supported with tile_overlap_factor = {self.overlap}: "
                "its tiles do not advance"
            )

    def step(self, side: int) -> int:
        """overlap_size: from one tile of ``side`` to the next."""
        return int(side * (1 - self.overlap))

    def blend_extent(self, side: int) -> int:
        """Lines of a resulting tile of ``side`` that are blended with the tile before."""
        return int(side * self.overlap)

    @property
    def tile(self) -> Tile | None:
        """The tile in latents, where pixels and latents are cut alike and what is kept is a step; else None."""
        sample, latent = self.step(self.sample), self.step(self.latent)
        alike = (self.sample, sample) == (self.factor * self.latent, self.factor * latent)
        kept = [side - self.blend_extent(side) == self.step(side) for side in (self.sample, self.latent)]
        return Tile(self.latent, latent) if alike and all(kept) else None


@dataclass(frozen=True, slots=True)
class Cut:
    """``count`` tiles that are alike along one axis: the side given, the resulting one, and what is kept of it."""

    side: Size
    out: Size
    kept: Size
    kept_in_all: Size
    count: Size = 1


def cuts(side: Size, axis: str, tiling: Tiling, tile: tuple[int, int]) -> list[Cut]:
    """Return the tiles along a side, in order; ``tile`` is the side of a tile as given and as it results.

    Raises DerivationError where the side is a symbol and pixels are not cut as latents are.
    """
    if not isinstance(side, int):
        return _symbolic_cuts(side, axis, tiling, tile)
    limit = tile[1] - tiling.blend_extent(tile[1])
    found = []
    for start in range(0, side, tiling.step(tile[0])):
        given = min(tile[0], side - start)
        out = given * tiling.factor if tile[0] == tiling.latent else given // tiling.factor
        found.append(Cut(given, out, min(limit, out), min(limit, out)))
    return found


def cut_symbols(*sides: Size) -> frozenset[str]:
    """Return the symbols of cut tiles in ``sides``."""
    return frozenset(name for side in sides for name in free_names(side) if name[0] in "RQ")


def _symbolic_cuts(side: Size, axis: str, tiling: Tiling, tile: tuple[int, int]) -> list[Cut]:
    if tiling.tile is None:
        raise DerivationError(
            f"tile_overlap_factor = {tiling.overlap} has no closed form with tiles of {tiling.sample} pixels "
            "(supported: a whole number of latents; or fix the size with at(height=, width=))"
        )
    given, out = (each // tiling.latent for each in tile)
    whole, rest, second = (symbol(f"{kind}{axis}") for kind in "TRQ")
    kept = symbol("Ch") if axis == "h" else whole  # result rows are joined from what columns keep in all
    in_all = floor_div(side, given) * out
    return [
        Cut(given * whole, out * whole, out * kept, in_all - out * rest, symbol(f"N{axis}")),
        Cut(given * rest, out * rest, out * (rest - second), out * (rest - second)),
        Cut(given * second, out * second, out * second, out * second),
    ]
