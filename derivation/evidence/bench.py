"""One process on one GPU, simulated: weights, inputs and calls, one after another on one caching allocator."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import replace
from math import prod

from derivation.allocator.allocator import CachingAllocator
from derivation.allocator.replay import ReplayResult, load_weights
from derivation.allocator.simulate import replay
from derivation.config import AutoencoderKLConfig, Checkpoint
from derivation.gpu.profile import Hardware
from derivation.options import Options
from derivation.tape.program import decides_alike
from derivation.tape.symbols import DTYPE_BYTES, Size
from derivation.tape.tape import Tape, tape
from derivation.tape.tensor import SymTensor
from derivation.walk.blocks.autoencoder_kl import tiled_decode
from derivation.walk.components import components, parameters
from derivation.walk.models import decode
from derivation.walk.ops import elementwise, given
from derivation.walk.pipelines import Pipeline

Values = Mapping[str, int]
_TAPES: dict[Hashable, list[Tape]] = {}
# pipeline_stable_diffusion.py: the order in which .to() moves the modules
PIPELINE_ORDER = ("vae", "text_encoder", "unet", "safety_checker")


class Bench:
    """A checkpoint's models on a GPU of ``capacity_bytes`` (None: without limit), run with ``attention``."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        options: Options,
        hardware: Hardware,
        attention: str = "sdpa",
        capacity_bytes: int | None = None,
    ) -> None:
        self.checkpoint, self.options = checkpoint, options
        self.run = Options(dtype=options.dtype, attention=attention), hardware
        self.allocator = CachingAllocator(capacity_bytes=capacity_bytes)
        self._kept: dict[str, int | None] = {}

    def load(self, *names: str, dtype: str | None = None) -> None:
        """Put the models' parameters and buffers on the GPU, one allocation each."""
        entries = parameters(self.checkpoint, replace(self.options, dtype=dtype or self.options.dtype))
        for name in names:
            load_weights(self.allocator, (prod(s) * DTYPE_BYTES[d] for s, d in entries[name].values()))

    def hold(self, shape: tuple[int, ...], dtype: str) -> None:
        """Put an input on the GPU for good."""
        load_weights(self.allocator, [prod(shape) * DTYPE_BYTES[dtype]])

    def call(self, run: Callable[[], object], values: Values) -> ReplayResult:
        """Run one call at ``values``; a library's workspace is allocated by the first call that needs it."""
        recorded = self._recorded(run, values)
        self._kept |= recorded.kept
        return replay(recorded, values).run(self.allocator)

    def _recorded(self, run: Callable[[], object], values: Values) -> Tape:
        """Return a tape of ``run`` whose decisions hold at ``values``; those of equal pipelines are shared."""
        known: list[Tape] = []
        if isinstance(run, Pipeline):
            known = _TAPES.setdefault((run, self.run, frozenset(self._kept)), [])
        for recorded in known:
            if decides_alike(recorded, values):
                return recorded
        ones = frozenset(name for name, value in values.items() if value == 1)
        recorded = Tape(*self.run, hint=values, ones=ones, kept=dict(self._kept))
        with recorded.running():
            outputs = run()
            del outputs
        known.append(recorded)
        return recorded

    def component(self, name: str, guidance: bool = False) -> Callable[[], object]:
        """Return one component call of the checkpoint."""
        call = components(self.checkpoint, self.options)[name].call
        return lambda: call(self.options, guidance)

    def pipeline(self, guidance: bool = True) -> Callable[[], object]:
        """Return the pipeline's ``__call__``."""
        return Pipeline(self.checkpoint, self.options, guidance)

    @property
    def vae(self) -> AutoencoderKLConfig:
        """The VAE's config."""
        assert isinstance(self.checkpoint.vae, AutoencoderKLConfig)
        return self.checkpoint.vae

    def scaled_decode(self) -> SymTensor:
        """``vae.decode(latents / scaling_factor)`` of B latents."""
        sides = tape().size("h0"), tape().size("w0")
        return decode(self._scaled(tape().size("B"), *sides), self.vae)

    def tiled_decode(self, height: int, width: int) -> Callable[[], SymTensor]:
        """Return ``vae.tiled_decode(latents / scaling_factor)`` of one image, sides in pixels."""
        levels = len(self.vae.block_out_channels) - 1
        return lambda: tiled_decode(self._scaled(1, height >> levels, width >> levels), self.vae)

    def _scaled(self, batch: Size, height: Size, width: Size) -> SymTensor:
        return elementwise("div", given((batch, self.vae.latent_channels, height, width), self.options.dtype))
