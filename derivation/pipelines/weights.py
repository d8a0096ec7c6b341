"""The VAE's parameters as storages: what ``vae.to(dtype=...)`` allocates and frees, one after another."""

from __future__ import annotations

from functools import lru_cache

from derivation.config import AutoencoderKLConfig
from derivation.models import decode, encode
from derivation.ops import given
from derivation.tape import Category, Settings, Storage, Tape, tape

# The order in which AutoencoderKL and its submodules register what they contain; Module._apply follows it.
REGISTRATION = (
    *("encoder", "decoder", "quant_conv", "post_quant_conv"),
    *("conv_in", "down_blocks", "up_blocks", "mid_block", "attentions", "resnets", "downsamplers", "upsamplers"),
    *("group_norm", "to_q", "to_k", "to_v", "to_out", "norm1", "conv1", "norm2", "conv2", "conv_shortcut"),
    *("conv_norm_out", "conv_out", "conv", "weight", "bias"),
)


class VaeWeights:
    """The parameters of a VAE, loaded as ``dtype`` before the run."""

    def __init__(self, config: AutoencoderKLConfig, dtype: str) -> None:
        self.dtype = dtype
        self.parameters = vae_parameters(config)
        self.storages: list[Storage | None] = [None] * len(self.parameters)

    def to(self, dtype: str) -> None:
        """``vae.to(dtype=dtype)``: each new parameter exists before the old one is freed."""
        if dtype == self.dtype:
            return
        for i, (path, shape) in enumerate(self.parameters):
            storage = tape().allocate(shape, dtype, f"vae.{path}", Category.WEIGHT)
            if self.storages[i] is None:
                tape().unload(f"vae.{path}", shape, self.dtype)
            self.storages[i] = storage
        self.dtype = dtype

    def outlive(self) -> None:
        """Leave the parameters allocated after the run."""
        for storage in self.storages:
            if storage is not None:
                storage.disown()


@lru_cache(maxsize=64)
def vae_parameters(config: AutoencoderKLConfig) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Return (path, shape) of every parameter, in the order of ``AutoencoderKL.parameters()``."""
    recorded = Tape(Settings("float32", "math"))
    side = config.scale_factor
    with recorded.running():
        encode(given((1, config.in_channels, side, side), "float32"), config)
        decode(given((1, config.latent_channels, 1, 1), "float32"), config)
    shapes = {path: shape for path, (shape, _) in recorded.parameters.items()}
    return tuple((path, shapes[path]) for path in sorted(shapes, key=_place))


def _place(path: str) -> tuple[int, ...]:
    return tuple(int(name) if name.isdigit() else REGISTRATION.index(name) for name in path.split("."))
