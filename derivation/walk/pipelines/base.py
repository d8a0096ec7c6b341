"""What the pipelines of every family share: stages, sizes, and the components that they need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TypeVar, cast

from derivation.config import Checkpoint, SchedulerConfig, UNet2DConditionConfig, VAEConfig
from derivation.config.checks import MAX_SIZE
from derivation.errors import DerivationError
from derivation.options import Options
from derivation.registry import Registry
from derivation.tape.events import Category
from derivation.tape.symbols import Size
from derivation.tape.tape import tape
from derivation.tape.tensor import SymTensor
from derivation.walk.models import decode, encode
from derivation.walk.ops import elementwise, empty, mul
from derivation.walk.pipelines.offload import Models
from derivation.walk.schedulers import Scheduler, make_scheduler

T = TypeVar("T")

TEXT_ENCODER = "text_encoder"
VAE_ENCODE = "vae_encode"
PREPARE_LATENTS = "prepare_latents"
UNET = "unet"
VAE_DECODE = "vae_decode"
SAFETY_CHECKER = "safety_checker"
POSTPROCESS = "postprocess"

# the defaults of __call__
DEFAULT_STRENGTH = {
    ("StableDiffusion", "img2img"): 0.8,
    ("StableDiffusion", "inpaint"): 1.0,
    ("StableDiffusionXL", "img2img"): 0.3,
    ("StableDiffusionXL", "inpaint"): 0.9999,
    ("LatentConsistencyModel", "img2img"): 0.8,
    ("StableDiffusionControlNet", "img2img"): 0.8,
    ("StableDiffusionControlNet", "inpaint"): 1.0,
    ("StableDiffusionXLControlNet", "img2img"): 0.8,
    ("StableDiffusionXLControlNet", "inpaint"): 0.9999,
}

FAMILIES: Registry[Callable[[Pipeline], None]] = Registry("pipeline family")


def family(prefix: str) -> Callable[[Callable[[Pipeline], None]], Callable[[Pipeline], None]]:
    """Register the ``__call__`` of the pipeline classes that are named ``prefix`` and a suffix of their task."""
    return FAMILIES.register(prefix)


@dataclass(frozen=True, slots=True)
class Pipeline:
    """A checkpoint, options, and whether classifier-free guidance is on; ``models`` is the call's."""

    checkpoint: Checkpoint
    options: Options
    guidance: bool
    _models: Models | None = field(default=None, repr=False, compare=False)

    def __call__(self) -> None:
        """Record the whole pipeline on the active tape; raises DerivationError for what it does not support."""
        self._check_clip_skip()
        self._check_vae_dtype()
        guidance = self.unet.doubled(self.guidance)
        models = Models(self.checkpoint, self.options, self.family)
        FAMILIES[self.family](replace(self, guidance=guidance, _models=models))

    def _check_clip_skip(self) -> None:
        """encode_prompt: SD takes hidden_states[-(clip_skip + 1)] of the n layers' n + 1, SDXL [-(clip_skip + 2)]."""
        spare = int(self.checkpoint.text_encoder_2 is not None)
        for config in (self.checkpoint.text_encoder, self.checkpoint.text_encoder_2):
            most = MAX_SIZE if config is None else config.num_hidden_layers - spare
            if self.options.clip_skip is not None and self.options.clip_skip > most:
                said = f"clip_skip = {self.options.clip_skip} is not supported"
                raise DerivationError(f"{said} (supported: integers from 1 to {most} with this text encoder)")

    @property
    def casts_vae(self) -> bool:
        """Whether the task casts its images and the VAE, hence takes one of another dtype than the UNet's."""
        return self.family == "StableDiffusionXL" and self.options.pipeline != "txt2img" and self.vae.force_upcast

    def _check_vae_dtype(self) -> None:
        own, dtype = self.options.dtype_of("vae"), self.options.dtype
        if own != dtype and not self.casts_vae:
            raise DerivationError(
                f"vae_dtype = {own} beside dtype = {dtype} is not supported in {self.family}'s "
                f"{self.options.pipeline}: diffusers hands the VAE {dtype} tensors, which torch refuses "
                "(supported: SDXL's img2img and inpaint with force_upcast = true in the VAE's config)"
            )

    @property
    def models(self) -> Models:
        """The weights in this call."""
        assert self._models is not None
        return self._models

    @property
    def family(self) -> str:
        """The common prefix of the names of the checkpoint's pipeline classes."""
        name = self.checkpoint.pipeline_class
        return max((prefix for prefix in FAMILIES if name.startswith(prefix)), key=len)

    @property
    def vae(self) -> VAEConfig:
        """The config of the VAE."""
        return cast(VAEConfig, required(self.checkpoint.vae, "vae"))

    @property
    def unet(self) -> UNet2DConditionConfig:
        """The config of the UNet, its input channels checked against the task."""
        config = required(self.checkpoint.unet, "unet")
        channels = self.vae.latent_channels
        supported = (4, 9) if self.options.pipeline == "inpaint" else (channels,)
        if config.in_channels not in supported:
            raise DerivationError(
                f"{self.options.pipeline} with a UNet of in_channels = {config.in_channels} is not supported "
                f"(supported: {', '.join(map(str, supported))})"
            )
        if config.time_cond_proj_dim is not None and self.options.controlled and self.options.pipeline != "txt2img":
            raise DerivationError(
                f"the UNet's time_cond_proj_dim = {config.time_cond_proj_dim} is not supported with controlnets in "
                f"{self.options.pipeline} (supported: null)"
            )
        return config

    @property
    def vae_scale_factor(self) -> int:
        """Image pixels per latent, along a side."""
        return self.vae.scale_factor

    @property
    def images(self) -> Size:
        """Images per call: B prompts times num_images_per_prompt."""
        return tape().size("B") * self.options.num_images_per_prompt

    @property
    def latent_shape(self) -> tuple[Size, ...]:
        """[images, C, h0, w0]."""
        return (self.images, self.vae.latent_channels, tape().size("h0"), tape().size("w0"))

    def image_shape(self, images: Size) -> tuple[Size, ...]:
        """[images, 3, H, W]."""
        f = self.vae_scale_factor
        return (images, 3, f * tape().size("h0"), f * tape().size("w0"))

    @property
    def strength(self) -> float:
        """The part of the schedule that runs."""
        task, family = self.options.pipeline, self.family + "ControlNet" * self.options.controlled
        if task == "txt2img":
            return 1.0
        return DEFAULT_STRENGTH[family, task] if self.options.strength is None else self.options.strength

    def scheduler(self, **changes: object) -> Scheduler:
        """Return the scheduler at the first timestep of the task, its config changed as a constructor does."""
        scheduler, steps = self.whole_schedule(**changes), self.options.num_inference_steps
        init_timestep = min(int(steps * self.strength), steps)
        if init_timestep < 1:
            raise DerivationError(f"num_inference_steps = {steps} with strength = {self.strength} denoises no step")
        scheduler.set_begin_index((steps - init_timestep) * scheduler.order)
        return scheduler

    def whole_schedule(self, **changes: object) -> Scheduler:
        """Return the scheduler at its first timestep."""
        config: SchedulerConfig = required(self.checkpoint.scheduler, "scheduler")
        if self.options.scheduler is not None:
            config = config.with_class(self.options.scheduler)
        return make_scheduler(config.changed(**changes), self.options.num_inference_steps)

    def latent_timestep(self, scheduler: Scheduler) -> SymTensor | None:
        """Return ``timesteps[:1].repeat(images)`` of a run on a GPU; elsewhere the timesteps are on the CPU."""
        if tape().hardware is None:
            return None
        return empty((self.images,), scheduler.timestep_dtype, "repeat", Category.PIPELINE)

    def randn(self) -> SymTensor:
        """Return noise of the latents' shape."""
        return empty(self.latent_shape, self.options.dtype, "randn", Category.PIPELINE)

    def guidance_scale_embedding(self) -> SymTensor | None:
        """``get_guidance_scale_embedding``, made on the CPU: [images, time_cond_proj_dim], None where it has no use."""
        width = self.unet.time_cond_proj_dim
        if width is None:
            return None
        return empty((self.images, width), self.options.dtype, "_to_copy", Category.PIPELINE)

    def image_to_device(self) -> SymTensor:
        """Move B preprocessed images [B, 3, H, W] from the CPU to the device."""
        return empty(self.image_shape(tape().size("B")), self.options.dtype, "_to_copy", Category.PIPELINE)

    def fitting(self, latents: SymTensor) -> SymTensor:
        """Return encoded latents; raises DerivationError where VAE tiles join to another size than the latents'."""
        expected = self.latent_shape[2:]
        if latents.shape[2:] != expected:
            raise DerivationError(
                f"vae_tiling: the tiles of tile_overlap_factor = {self.options.tile_overlap_factor} join to "
                f"{latents.shape[2]} x {latents.shape[3]} latents; the pipeline needs {expected[0]} x {expected[1]}"
            )
        return latents

    def encode(self, image: SymTensor) -> SymTensor:
        """``retrieve_latents(vae.encode(image))``."""
        self.models.pre_forward("vae")
        with tape().scope("vae"):
            return encode(image, self.vae)

    def decode(self, latents: SymTensor) -> SymTensor:
        """``vae.decode(latents)``."""
        self.models.pre_forward("vae")
        with tape().scope("vae"):
            return decode(latents, self.vae)


def denormalize(images: SymTensor) -> None:
    """``(images * 0.5 + 0.5).clamp(0, 1)``, then to the CPU."""
    if tape().libraries.follows("stacked_denormalize"):
        denormalize_each(images)
    else:
        denormalized(images)


def denormalize_each(images: SymTensor) -> None:
    """``torch.stack([denormalize(image) for image in images])``, then to the CPU."""
    one = images.select(0)
    earlier = elementwise("clamp", one, category=Category.PIPELINE, count=images.shape[0] - 1)
    last = denormalized(one)
    stacked = empty(images.shape, images.dtype, "stack", Category.PIPELINE)
    del earlier, last, stacked


def denormalized(images: SymTensor) -> SymTensor:
    """``(images * 0.5 + 0.5).clamp(0, 1)``."""
    return elementwise("clamp", elementwise("add", mul(images)))


def required(component: T | None, name: str) -> T:
    """Return ``component``; raises DerivationError where the checkpoint has none."""
    if component is None:
        raise DerivationError(f"the checkpoint has no {name}, which this pipeline needs")
    return component
