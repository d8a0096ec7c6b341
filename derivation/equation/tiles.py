"""The symbols of VAE tiles in integer operations: what ``derivation.tape.tiles.Tile.sizes`` computes."""

from __future__ import annotations

from derivation.equation.expression import Expression, Name, add, floor_div, maximum, mul
from derivation.tape.symbols import TILE_AXES
from derivation.tape.tiles import Tile


def tile_expressions(tile: Tile) -> dict[str, Expression]:
    """Return every tile symbol in h0, w0 and the tile symbols before it."""
    side, step = tile
    beyond = Name("E")
    # E is 1, or more where the VAE works in tiles: e - max(e - 1, 1) is then 1, else 0
    tiled = add(beyond, mul(-1, maximum((add(beyond, -1), 1))))
    found: dict[str, Expression] = {"E": add(maximum((Name("h0"), Name("w0"), side)), 1 - side)}
    for axis in TILE_AXES:
        latents, count, rest = Name(f"{axis}0"), Name(f"N{axis}"), Name(f"R{axis}")
        found[f"T{axis}"] = _minimum(latents, side)
        found[count.name] = add(floor_div(add(maximum((latents, side)), -side), step), 1)
        found[rest.name] = mul(tiled, maximum((add(latents, mul(-step, count)), 0)))
        found[f"Q{axis}"] = maximum((add(rest, -step), 0))
    return found | {"Ch": _minimum(Name("h0"), step)}


def _minimum(a: Expression, b: int) -> Expression:
    """Return min(a, b) = a - max(a, b) + b."""
    return add(a, mul(-1, maximum((a, b))), b)
