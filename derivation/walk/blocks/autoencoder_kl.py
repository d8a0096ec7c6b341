"""diffusers/models/autoencoders/autoencoder_kl.py: encode and decode, sliced and tiled.

Slices that are kept until the end are recorded as one group. Tiles are too where the image's sides are symbols;
where they are numbers, each is walked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from derivation.config import AutoencoderKLConfig
from derivation.errors import DerivationError
from derivation.tape.events import Allocation, Tiled
from derivation.tape.symbols import TILE_AXES, Size
from derivation.tape.tape import Tape, tape
from derivation.tape.tensor import SymTensor
from derivation.tape.tiles import Cut, Tiling, cut_symbols, cuts
from derivation.walk.blocks.vae import Decoder, DiagonalGaussianDistribution, Encoder
from derivation.walk.ops import Conv2d, add, cat, empty, given, mul

# Where sides are numbers: 8192 x 8192 pixels in tiles of 512 are 484.
MAX_TILES = 512
Run = Callable[[SymTensor], SymTensor]


def encode(x: SymTensor, config: AutoencoderKLConfig) -> DiagonalGaussianDistribution:
    """``AutoencoderKL.encode(x).latent_dist``: [N, 3, H, W] -> the posterior over [N, C, H/f, W/f]."""
    if tape().libraries.follows("kept_encoder_output") and not _tiled(x, Tiling.of(config, tape().options).sample):
        h = sliced(x, lambda part: Encoder("encoder", part, config=config))
        moments = _moments(h, config)
    else:
        moments = sliced(x, lambda part: _encode(part, config))
    posterior = DiagonalGaussianDistribution(moments)
    return posterior


def _moments(enc: SymTensor, config: AutoencoderKLConfig) -> SymTensor:
    return Conv2d("quant_conv", enc, 2 * config.latent_channels, 1) if config.use_quant_conv else enc


def decode(z: SymTensor, config: AutoencoderKLConfig) -> SymTensor:
    """``AutoencoderKL.decode(z, return_dict=False)[0]``: [N, C, h, w] -> [N, 3, f h, f w]."""
    decoded = sliced(z, lambda part: _decode(part, config))
    return decoded


def sliced(x: SymTensor, run: Run) -> SymTensor:
    """Return ``torch.cat([run(part) for part in x.split(1)])`` where slicing is on and there is more than one."""
    if not (tape().options.vae_slicing and tape().exceeds(x.shape[0], 1)):
        return run(x)
    part = x.narrow(0, 1)
    first = run(part)
    shape, dtype = first.shape, first.dtype
    del first
    earlier = empty(shape, dtype, "slices", count=x.shape[0] - 1)
    last = run(part)
    return empty((x.shape[0], *last.shape[1:]), last.dtype, "cat")


def _encode(x: SymTensor, config: AutoencoderKLConfig) -> SymTensor:
    if _tiled(x, Tiling.of(config, tape().options).sample):
        return _tiled_encode(x, config)
    enc = Encoder("encoder", x, config=config)
    enc = _moments(enc, config)
    return enc


def _decode(z: SymTensor, config: AutoencoderKLConfig) -> SymTensor:
    if _tiled(z, Tiling.of(config, tape().options).latent):
        return tiled_decode(z, config)
    if config.use_post_quant_conv:
        z = Conv2d("post_quant_conv", z, config.latent_channels, 1)
    dec = Decoder("decoder", z, config=config)
    return dec


def _tiled(x: SymTensor, tile_min_size: int) -> bool:
    if not tape().options.vae_tiling:
        return False
    height, width = x.shape[2:]
    if isinstance(height, int) and isinstance(width, int):
        return max(height, width) > tile_min_size
    return tape().exceeds(tape().size("E"), 1)


def _tiled_encode(x: SymTensor, config: AutoencoderKLConfig) -> SymTensor:
    tiles = Tiling.of(config, tape().options)

    def run(tile: SymTensor) -> SymTensor:
        tile = Encoder("encoder", tile, config=config)
        tile = _moments(tile, config)
        return tile

    return _tiles(x, run, tiles, (tiles.sample, tiles.latent), 2 * config.latent_channels)


def tiled_decode(z: SymTensor, config: AutoencoderKLConfig) -> SymTensor:
    """``tiled_decode``: every decoded tile is kept until all are blended and joined."""
    tiles = Tiling.of(config, tape().options)

    def run(tile: SymTensor) -> SymTensor:
        if config.use_post_quant_conv:
            tile = Conv2d("post_quant_conv", tile, config.latent_channels, 1)
        decoded = Decoder("decoder", tile, config=config)
        return decoded

    return _tiles(z, run, tiles, (tiles.latent, tiles.sample), config.out_channels)


def _tiles(x: SymTensor, run: Run, tiling: Tiling, tile: tuple[int, int], channels: int) -> SymTensor:
    """Run overlapping tiles, blend them, and join what is left; ``tile`` is a tile's side, given and resulting."""
    here, runs = tape(), list[tuple[int, int]]()
    start = len(here.events)
    tall_cuts, wide_cuts = (cuts(side, axis, tiling, tile) for side, axis in zip(x.shape[2:], TILE_AXES, strict=True))
    joined = _joined(x, run, tiling, tile, channels, tall_cuts, wide_cuts, runs)
    if here.tile is not None:
        lines = _lines((x.shape[0], channels), [cut.out for cut in (*wide_cuts, *tall_cuts)])
        unit, extent = tile[1] // tiling.latent, tiling.blend_extent(tile[1])
        here.tilings.append(Tiled(start, len(here.events), tuple(runs), lines, unit, extent))
    return joined


def _joined(
    x: SymTensor,
    run: Run,
    tiling: Tiling,
    tile: tuple[int, int],
    channels: int,
    tall_cuts: Sequence[Cut],
    wide_cuts: Sequence[Cut],
    runs: list[tuple[int, int]],
) -> SymTensor:
    """Return the tiles' results joined, and add each one's events to ``runs``.

    Of tiles that are alike the last is run, with the earlier ones alive.
    """
    if not all(isinstance(side, int) for side in x.shape[2:]):
        tape().tile = tiling.tile
    elif len(tall_cuts) * len(wide_cuts) > MAX_TILES:
        cut = f"{len(tall_cuts)} x {len(wide_cuts)} tiles of {tiling.sample} pixels"
        raise DerivationError(f"vae_tiling: {cut} are too many to walk one by one (supported: {MAX_TILES} tiles)")
    dtype = tape().weights_dtype()
    rows: list[list[SymTensor]] = []
    earlier: list[SymTensor] = []

    def alike(height: Size, width: Size, count: Size) -> SymTensor:
        return empty((x.shape[0], channels, height, width), dtype, "tiles", count=count)

    for tall in tall_cuts:
        earlier += [alike(tall.out, wide.out, (tall.count - 1) * wide.count) for wide in wide_cuts]
        row: list[SymTensor] = []
        for wide in wide_cuts:
            earlier.append(alike(tall.out, wide.out, wide.count - 1))
            start = len(tape().events)
            row.append(run(x.narrow(2, tall.side).narrow(3, wide.side)))
            runs.append((start, len(tape().events)))
            if symbols := cut_symbols(tall.side, wide.side):
                tape().cut.append((start, len(tape().events), symbols))
        rows.append(row)
    result_rows: list[SymTensor] = []
    for i, (tall, row) in enumerate(zip(tall_cuts, rows, strict=True)):
        earlier.append(alike(tall.kept, sum(wide.kept_in_all for wide in wide_cuts), tall.count - 1))
        for j, decoded in enumerate(row):
            if i > 0:
                _blend(rows[i - 1][j], decoded, 2, tiling.blend_extent(tile[1]))
            if j > 0:
                _blend(row[j - 1], decoded, 3, tiling.blend_extent(tile[1]))
        result_row = [
            decoded.narrow(2, tall.kept).narrow(3, wide.kept_in_all)
            for decoded, wide in zip(row, wide_cuts, strict=True)
        ]
        result_rows.append(cat(result_row, 3))
    joined = cat([row.narrow(2, tall.kept_in_all) for row, tall in zip(result_rows, tall_cuts, strict=True)], 2)
    return joined


def _blend(a: SymTensor, b: SymTensor, dim: int, blend_extent: int) -> None:
    """``blend_v`` (dim 2) and ``blend_h`` (dim 3): one line of ``b`` after the other, in place.

    Symbolic sides record none: three lines of one tile are less than the joined result that follows them.
    """
    sides = (a.shape[dim], b.shape[dim], blend_extent)
    lines = min(side if isinstance(side, int) else 0 for side in sides)
    if lines == 0:
        return
    start = len(tape().events)
    _blend_line(a.select(dim), b.select(dim))
    tape().loops.append((start, len(tape().events), lines))


def _blend_line(line_a: SymTensor, line_b: SymTensor) -> None:
    blended = add(mul(line_a), mul(line_b))
    del blended


def _lines(outer: tuple[Size, Size], sides: Sequence[Size]) -> tuple[tuple[Allocation, ...], ...]:
    """Return what ``_blend_line`` allocates for lines [N, C, side] of each side, in order."""
    here, found = tape(), list[tuple[Allocation, ...]]()
    for side in sides:
        aside = Tape(here.options, here.hardware, ones=here.ones, fixed=here.fixed, path=list(here.path))
        with aside.running():
            line = given((*outer, side), here.weights_dtype())
            _blend_line(line, line)
        found.append(tuple(aside.allocations))
    return tuple(found)
