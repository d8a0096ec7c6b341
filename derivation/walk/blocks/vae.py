"""diffusers/models/autoencoders/vae.py."""

from __future__ import annotations

from derivation.config import AutoencoderKLConfig
from derivation.tape.block import block
from derivation.tape.tape import tape
from derivation.tape.tensor import SymTensor
from derivation.walk.blocks.activations import activation
from derivation.walk.blocks.attention_processor import AttentionSpec
from derivation.walk.blocks.unet_2d_blocks import BlockSpec, DownEncoderBlock2D, UNetMidBlock2D, UpDecoderBlock2D
from derivation.walk.ops import Conv2d, GroupNorm, add, elementwise, empty, mul, to


def _level(config: AutoencoderKLConfig, channels: int, layers: int, resample: bool) -> BlockSpec:
    return BlockSpec(channels, layers, config.norm_num_groups, config.act_fn, resample)


def _mid_block(sample: SymTensor, config: AutoencoderKLConfig) -> SymTensor:
    channels = config.block_out_channels[-1]
    attention = AttentionSpec(
        channels,
        heads=1,
        dim_head=channels,
        bias=True,
        upcast_softmax=True,
        norm_num_groups=config.norm_num_groups,
        residual_connection=True,
    )
    spec = _level(config, channels, 1, False)
    return UNetMidBlock2D(
        "mid_block", sample, spec=spec, attention=attention if config.mid_block_add_attention else None
    )


@block
def Encoder(sample: SymTensor, *, config: AutoencoderKLConfig) -> SymTensor:
    """[N, 3, H, W] -> moments [N, 2 latent_channels, H/f, W/f]."""
    channels = config.block_out_channels
    sample = Conv2d("conv_in", sample, channels[0], 3, padding=1)
    for i, out_channels in enumerate(channels):
        spec = _level(config, out_channels, config.layers_per_block, i < len(channels) - 1)
        sample = DownEncoderBlock2D(f"down_blocks.{i}", sample, spec=spec)
    sample = _mid_block(sample, config)
    sample = GroupNorm("conv_norm_out", sample, config.norm_num_groups)
    sample = activation(sample, "silu")
    sample = Conv2d("conv_out", sample, 2 * config.latent_channels, 3, padding=1)
    return sample


@block
def Decoder(sample: SymTensor, *, config: AutoencoderKLConfig) -> SymTensor:
    """[N, latent_channels, h, w] -> [N, 3, f h, f w]."""
    channels = config.block_out_channels[::-1]
    sample = Conv2d("conv_in", sample, channels[0], 3, padding=1)
    sample = _mid_block(sample, config)
    sample = to(sample, tape().weights_dtype())
    for i, out_channels in enumerate(channels):
        spec = _level(config, out_channels, config.layers_per_block + 1, i < len(channels) - 1)
        sample = UpDecoderBlock2D(f"up_blocks.{i}", sample, spec=spec)
    sample = GroupNorm("conv_norm_out", sample, config.norm_num_groups)
    sample = activation(sample, "silu")
    sample = Conv2d("conv_out", sample, config.out_channels, 3, padding=1)
    return sample


class DiagonalGaussianDistribution:
    """The posterior over latents, from moments [N, 2 C, h, w]."""

    def __init__(self, parameters: SymTensor) -> None:
        self.parameters = parameters
        self.mean, self.logvar = parameters.chunk(2, 1)
        self.logvar = elementwise("clamp", self.logvar)
        self.std = elementwise("exp", mul(self.logvar))
        self.var = elementwise("exp", self.logvar)

    def sample(self) -> SymTensor:
        """Return mean + std * noise, [N, C, h, w]."""
        sample = empty(self.mean.shape, self.parameters.dtype, "randn")
        return add(self.mean, mul(self.std, sample))
