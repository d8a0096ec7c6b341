"""diffusers/models/autoencoders/autoencoder_tiny.py, and EncoderTiny and DecoderTiny of vae.py."""

from __future__ import annotations

from derivation.config import AutoencoderTinyConfig
from derivation.tape.block import block
from derivation.tape.tensor import SymTensor
from derivation.walk.blocks.activations import activation
from derivation.walk.blocks.autoencoder_kl import sliced
from derivation.walk.ops import Conv2d, add, div, elementwise, mul, upsample_nearest2d


def encode(x: SymTensor, config: AutoencoderTinyConfig) -> SymTensor:
    """``AutoencoderTiny.encode(x).latents``: [N, 3, H, W] -> [N, latent_channels, H/f, W/f]."""
    output = sliced(x, lambda part: EncoderTiny("encoder", part, config=config))
    return output


def decode(x: SymTensor, config: AutoencoderTinyConfig) -> SymTensor:
    """``AutoencoderTiny.decode(x, return_dict=False)[0]``: [N, latent_channels, h, w] -> [N, 3, f h, f w]."""
    output = sliced(x, lambda part: DecoderTiny("decoder", part, config=config))
    return output


@block
def AutoencoderTinyBlock(x: SymTensor, *, channels: int, act_fn: str) -> SymTensor:
    """[N, C, h, w] -> [N, C, h, w]."""
    summed = add(_conv(x, channels, act_fn), x)
    return activation(summed, "relu")


def _conv(x: SymTensor, channels: int, act_fn: str) -> SymTensor:
    """``self.conv``: three convolutions, two activations between them."""
    x = Conv2d("conv.0", x, channels, 3, padding=1)
    x = activation(x, act_fn)
    x = Conv2d("conv.2", x, channels, 3, padding=1)
    x = activation(x, act_fn)
    x = Conv2d("conv.4", x, channels, 3, padding=1)
    return x


@block
def EncoderTiny(x: SymTensor, *, config: AutoencoderTinyConfig) -> SymTensor:
    """[N, 3, H, W] -> [N, latent_channels, H/f, W/f]."""
    scaled = div(elementwise("add", x))
    return _encoder_layers(scaled, config)


def _encoder_layers(x: SymTensor, config: AutoencoderTinyConfig) -> SymTensor:
    channels, place = config.encoder_block_out_channels[0], 0
    for i, blocks in enumerate(config.num_encoder_blocks):
        x = Conv2d(f"layers.{place}", x, channels, 3, padding=1, stride=min(i, 1) + 1, bias=i == 0)
        for j in range(blocks):
            x = AutoencoderTinyBlock(f"layers.{place + 1 + j}", x, channels=channels, act_fn=config.act_fn)
        place += 1 + blocks
    x = Conv2d(f"layers.{place}", x, config.latent_channels, 3, padding=1)
    return x


@block
def DecoderTiny(x: SymTensor, *, config: AutoencoderTinyConfig) -> SymTensor:
    """[N, latent_channels, h, w] -> [N, 3, f h, f w]."""
    x = mul(elementwise("tanh", div(x)))
    x = _decoder_layers(x, config)
    return elementwise("sub", mul(x))


def _decoder_layers(x: SymTensor, config: AutoencoderTinyConfig) -> SymTensor:
    channels, last = config.decoder_block_out_channels[0], len(config.num_decoder_blocks) - 1
    x = Conv2d("layers.0", x, channels, 3, padding=1)
    x = activation(x, config.act_fn)
    place = 2
    for i, blocks in enumerate(config.num_decoder_blocks):
        for j in range(blocks):
            x = AutoencoderTinyBlock(f"layers.{place + j}", x, channels=channels, act_fn=config.act_fn)
        place += blocks
        if i < last:
            x = upsample_nearest2d(x, (2 * x.shape[2], 2 * x.shape[3]))
            place += 1
        out_channels = channels if i < last else config.out_channels
        x = Conv2d(f"layers.{place}", x, out_channels, 3, padding=1, bias=i == last)
        place += 1
    return x
