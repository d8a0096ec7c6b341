"""diffusers/models/autoencoders/autoencoder_kl.py: encode and decode, sliced and tiled.

Slices and tiles that are kept until the end are recorded as one group; the tiles of a larger image are
walked at its concrete size.
"""

from __future__ import annotations

from collections.abc import Callable

from derivation.blocks.vae import Decoder, DiagonalGaussianDistribution, Encoder
from derivation.config import AutoencoderKLConfig
from derivation.ops import Conv2d, add, cat, empty, mul
from derivation.symbols import Size
from derivation.tape import SymTensor, tape

# autoencoder_kl.py: tile_overlap_factor
TILE_OVERLAP_FACTOR = 0.25

Tile = Callable[[SymTensor], SymTensor]


def encode(x: SymTensor, config: AutoencoderKLConfig) -> DiagonalGaussianDistribution:
    """``AutoencoderKL.encode(x).latent_dist``: [N, 3, H, W] -> the posterior over [N, C, H/f, W/f]."""
    h = _sliced(x, lambda part: _encode(part, config))
    posterior = DiagonalGaussianDistribution(h)
    return posterior


def decode(z: SymTensor, config: AutoencoderKLConfig) -> SymTensor:
    """``AutoencoderKL.decode(z, return_dict=False)[0]``: [N, C, h, w] -> [N, 3, f h, f w]."""
    decoded = _sliced(z, lambda part: _decode(part, config))
    return decoded


def _sliced(x: SymTensor, run: Tile) -> SymTensor:
    """``torch.cat([run(part) for part in x.split(1)])`` where slicing is on and there is more than one."""
    if not (tape().settings.vae_slicing and tape().exceeds(x.shape[0], 1)):
        return run(x)
    part = x.narrow(0, 1)
    first = run(part)
    shape = first.shape
    del first
    earlier = empty(shape, x.dtype, "slices", count=x.shape[0] - 1)
    last = run(part)
    return empty((x.shape[0], *last.shape[1:]), last.dtype, "cat")


def _encode(x: SymTensor, config: AutoencoderKLConfig) -> SymTensor:
    if _tiled(x, tile_sample_min_size(config)):
        return _tiled_encode(x, config)
    enc = Encoder("encoder", x, config=config)
    if config.use_quant_conv:
        enc = Conv2d("quant_conv", enc, 2 * config.latent_channels, 1)
    return enc


def _decode(z: SymTensor, config: AutoencoderKLConfig) -> SymTensor:
    if _tiled(z, tile_latent_min_size(config)):
        return tiled_decode(z, config)
    if config.use_post_quant_conv:
        z = Conv2d("post_quant_conv", z, config.latent_channels, 1)
    dec = Decoder("decoder", z, config=config)
    return dec


def _tiled(x: SymTensor, tile_min_size: int) -> bool:
    if not tape().settings.vae_tiling:
        return False
    return tape().exceeds(x.shape[3], tile_min_size) or tape().exceeds(x.shape[2], tile_min_size)


def tile_sample_min_size(config: AutoencoderKLConfig) -> int:
    """Side of an encoder tile in pixels; diffusers compares sides with ``sample_size`` itself, here its first."""
    size = config.sample_size
    return size if isinstance(size, int) else size[0]


def tile_latent_min_size(config: AutoencoderKLConfig) -> int:
    """Side of a decoder tile in latents."""
    return tile_sample_min_size(config) // config.scale_factor


def _tiled_encode(x: SymTensor, config: AutoencoderKLConfig) -> SymTensor:
    sample, latent = tile_sample_min_size(config), tile_latent_min_size(config)

    def run(tile: SymTensor) -> SymTensor:
        tile = Encoder("encoder", tile, config=config)
        if config.use_quant_conv:
            tile = Conv2d("quant_conv", tile, 2 * config.latent_channels, 1)
        return tile

    return _tiles(x, run, sample, latent)


def tiled_decode(z: SymTensor, config: AutoencoderKLConfig) -> SymTensor:
    """``tiled_decode``: every decoded tile is kept until all are blended and joined."""
    sample, latent = tile_sample_min_size(config), tile_latent_min_size(config)

    def run(tile: SymTensor) -> SymTensor:
        if config.use_post_quant_conv:
            tile = Conv2d("post_quant_conv", tile, config.latent_channels, 1)
        decoded = Decoder("decoder", tile, config=config)
        return decoded

    return _tiles(z, run, latent, sample)


def _tiles(x: SymTensor, run: Tile, tile_in: int, tile_out: int) -> SymTensor:
    """Run overlapping tiles of ``tile_in``, blend them, and join what is left of each."""
    height, width = (tape().concrete(side) for side in x.shape[2:])
    overlap_size = int(tile_in * (1 - TILE_OVERLAP_FACTOR))
    blend_extent = int(tile_out * TILE_OVERLAP_FACTOR)
    row_limit = tile_out - blend_extent
    rows: list[list[SymTensor]] = []
    for i in range(0, height, overlap_size):
        row: list[SymTensor] = []
        for j in range(0, width, overlap_size):
            tile = x.narrow(2, min(tile_in, height - i)).narrow(3, min(tile_in, width - j))
            tile = run(tile)
            row.append(tile)
        rows.append(row)
    result_rows: list[SymTensor] = []
    for i, row in enumerate(rows):
        result_row: list[SymTensor] = []
        for j, tile in enumerate(row):
            if i > 0:
                _blend(rows[i - 1][j], tile, 2, blend_extent)
            if j > 0:
                _blend(row[j - 1], tile, 3, blend_extent)
            result_row.append(_crop(tile, row_limit))
        result_rows.append(cat(result_row, 3))
    joined = cat(result_rows, 2)
    return joined


def _crop(tile: SymTensor, limit: int) -> SymTensor:
    """``tile[:, :, :limit, :limit]``."""
    height, width = tile.shape[2:]
    assert isinstance(height, int)
    assert isinstance(width, int)
    return tile.narrow(2, min(limit, height)).narrow(3, min(limit, width))


def _blend(a: SymTensor, b: SymTensor, dim: int, blend_extent: int) -> None:
    """``blend_v`` (dim 2) and ``blend_h`` (dim 3): one line of ``b`` after the other, in place; one is recorded."""
    sides: tuple[Size, ...] = (a.shape[dim], b.shape[dim], blend_extent)
    if any(side == 0 for side in sides):
        return
    line_a, line_b = a.select(dim), b.select(dim)
    blended = add(mul(line_a), mul(line_b))
    del blended
