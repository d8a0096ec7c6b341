"""diffusers/pipelines/stable_diffusion: ``__call__`` stage by stage, with what the pipeline keeps alive.

A stage lasts from its mark to the next: text_encoder (encode_prompt), vae_encode or prepare_latents, unet
(the denoising loop), vae_decode (the call of ``vae.decode``), safety_checker, postprocess.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TypeVar

from derivation.config import Checkpoint, SchedulerConfig
from derivation.errors import DerivationError
from derivation.models import (
    CLIPTextModel,
    StableDiffusionSafetyChecker,
    UNet2DConditionModel,
    decode,
    encode,
)
from derivation.ops import add, cat, elementwise, empty, given, mul, repeat, sub
from derivation.options import Options
from derivation.schedulers import Scheduler, make_scheduler
from derivation.symbols import Size
from derivation.tape import Category, SymTensor, tape

T = TypeVar("T")

TEXT_ENCODER = "text_encoder"
VAE_ENCODE = "vae_encode"
PREPARE_LATENTS = "prepare_latents"
UNET = "unet"
VAE_DECODE = "vae_decode"
SAFETY_CHECKER = "safety_checker"
POSTPROCESS = "postprocess"


@dataclass(frozen=True, slots=True)
class Pipeline:
    """A checkpoint, options, and whether classifier-free guidance is on."""

    checkpoint: Checkpoint
    options: Options
    guidance: bool

    @property
    def vae_scale_factor(self) -> int:
        """Image pixels per latent, along a side."""
        return 2 ** (len(required(self.checkpoint.vae, "vae").block_out_channels) - 1)

    @property
    def images(self) -> Size:
        """Images per call: B prompts times num_images_per_prompt."""
        return tape().size("B") * self.options.num_images_per_prompt

    @property
    def latent_shape(self) -> tuple[Size, ...]:
        """[images, C, h0, w0]."""
        channels = required(self.checkpoint.vae, "vae").latent_channels
        return (self.images, channels, tape().size("h0"), tape().size("w0"))

    def image_shape(self, images: Size) -> tuple[Size, ...]:
        """[images, 3, H, W]."""
        f = self.vae_scale_factor
        return (images, 3, f * tape().size("h0"), f * tape().size("w0"))

    def __call__(self) -> None:
        """Record the whole pipeline on the active tape.

        Once the scheduler is settled and an iteration leaves the same sizes alive as the one before, the
        iterations up to the last are all the same: they are recorded once, as a loop.
        """
        scheduler = self._scheduler()
        tape().mark(TEXT_ENCODER)
        prompt_embeds, negative_prompt_embeds = self._encode_prompt()
        if self.guidance:
            assert negative_prompt_embeds is not None
            prompt_embeds = cat([negative_prompt_embeds, prompt_embeds], 0)
        if self.options.pipeline == "img2img":
            tape().mark(VAE_ENCODE)
            latents = self._prepare_image_latents(scheduler)
        else:
            tape().mark(PREPARE_LATENTS)
            latents = self._prepare_noise_latents(scheduler)

        tape().mark(UNET)
        timesteps = self._timesteps(scheduler)
        i = 0
        while i < timesteps:
            start, settled = len(tape().events), scheduler.settled
            before = live_sizes() if settled else None
            latent_model_input = cat([latents] * 2, 0) if self.guidance else latents
            latent_model_input = scheduler.scale_model_input(latent_model_input)
            noise_pred = self._unet(latent_model_input, prompt_embeds)
            if self.guidance:
                noise_pred_uncond, noise_pred_text = noise_pred.chunk(2, 0)
                noise_pred = add(noise_pred_uncond, mul(sub(noise_pred_text, noise_pred_uncond)))
            latents = scheduler.step(noise_pred, latents, last=i == timesteps - 1)
            i += 1
            if settled and i < timesteps - 1 and live_sizes() == before:
                tape().loops.append((start, len(tape().events), timesteps - i))
                i = timesteps - 1

        image = self._decode(latents)
        self._postprocess(image)

    def _scheduler(self) -> Scheduler:
        config: SchedulerConfig = required(self.checkpoint.scheduler, "scheduler")
        return make_scheduler(config, self.options.num_inference_steps)

    def _timesteps(self, scheduler: Scheduler) -> int:
        """Return the number of UNet calls."""
        if self.options.pipeline == "txt2img":
            return scheduler.num_timesteps
        steps = self.options.num_inference_steps
        init_timestep = min(int(steps * self.options.strength), steps)
        return scheduler.num_timesteps - max(steps - init_timestep, 0) * scheduler.order

    def _encode_prompt(self) -> tuple[SymTensor, SymTensor | None]:
        """``encode_prompt``: [N, L, K] for the prompt, and for the negative prompt under guidance."""
        prompt_embeds = self._embed()
        negative_prompt_embeds: SymTensor | None = None
        if self.guidance:
            negative_prompt_embeds = self._embed()
        return prompt_embeds, negative_prompt_embeds

    def _embed(self) -> SymTensor:
        """The text encoder on B prompts, or the caller's prompt_embeds where L is beyond its positions."""
        config = required(self.checkpoint.text_encoder, "text_encoder")
        batch, length = tape().size("B"), tape().size("L")
        if tape().exceeds(length, config.max_position_embeddings):
            embeds = given((batch, length, config.hidden_size), self.options.dtype)
        else:
            input_ids = empty((batch, length), "int64", "_to_copy", Category.PIPELINE)
            embeds = CLIPTextModel("text_encoder", input_ids, config=config)[0]
            del input_ids
        embeds = repeat(embeds, 1, self.options.num_images_per_prompt, 1)
        return embeds.view(self.images, length, config.hidden_size)

    def _prepare_noise_latents(self, scheduler: Scheduler) -> SymTensor:
        """txt2img's ``prepare_latents``."""
        latents = self._randn()
        latents = scheduler.init_noise(latents)
        return latents

    def _prepare_image_latents(self, scheduler: Scheduler) -> SymTensor:
        """img2img's ``prepare_latents``: B images on the CPU -> latents of every image."""
        batch = tape().size("B")
        image = empty(self.image_shape(batch), self.options.dtype, "_to_copy", Category.PIPELINE)
        with tape().scope("vae"):
            init_latents = encode(image, required(self.checkpoint.vae, "vae")).sample()
        init_latents = mul(init_latents)
        init_latents = cat([init_latents] * self.options.num_images_per_prompt, 0)
        noise = self._randn()
        init_latents = scheduler.add_noise(init_latents, noise)
        latents = init_latents
        return latents

    def _randn(self) -> SymTensor:
        return empty(self.latent_shape, self.options.dtype, "randn", Category.PIPELINE)

    def _unet(self, latent_model_input: SymTensor, prompt_embeds: SymTensor) -> SymTensor:
        config = required(self.checkpoint.unet, "unet")
        return UNet2DConditionModel("unet", latent_model_input, None, prompt_embeds, config=config)

    def _decode(self, latents: SymTensor) -> SymTensor:
        """``vae.decode(latents / scaling_factor)``."""
        scaled = elementwise("div", latents)
        tape().mark(VAE_DECODE)
        with tape().scope("vae"):
            return decode(scaled, required(self.checkpoint.vae, "vae"))

    def _postprocess(self, image: SymTensor) -> None:
        """``run_safety_checker`` and ``image_processor.postprocess``."""
        if self.checkpoint.safety_checker is not None and self.options.safety_checker:
            tape().mark(SAFETY_CHECKER)
            self._run_safety_checker(image)
        tape().mark(POSTPROCESS)
        self._denormalize_each(image)

    def _run_safety_checker(self, image: SymTensor) -> None:
        config = required(self.checkpoint.safety_checker, "safety_checker")
        denormalize(image)
        shape = (self.images, config.num_channels, config.image_size, config.image_size)
        pixel_values = empty(shape, "float32", "_to_copy", Category.PIPELINE)
        clip_input = pixel_values
        if self.options.dtype != "float32":
            clip_input = empty(shape, self.options.dtype, "_to_copy", Category.PIPELINE)
        StableDiffusionSafetyChecker("safety_checker", clip_input, image, config=config)

    def _denormalize_each(self, image: SymTensor) -> None:
        """``torch.stack([denormalize(image) for image in images])``, then to the CPU."""
        images = image.shape[0]
        one = image.select(0)
        earlier = elementwise("clamp", one, category=Category.PIPELINE, count=images - 1)
        last = denormalize(one)
        stacked = empty(image.shape, image.dtype, "stack", Category.PIPELINE)
        del earlier, last, stacked


def denormalize(images: SymTensor) -> SymTensor:
    """``(images * 0.5 + 0.5).clamp(0, 1)``."""
    return elementwise("clamp", elementwise("add", mul(images)))


def live_sizes() -> Counter[Size]:
    """Return how many storages of each size are alive on the active tape."""
    alive: Counter[Size] = Counter()
    for event in tape().events:
        nbytes = tape().allocations[abs(event) - 1].nbytes
        alive[nbytes] += 1 if event > 0 else -1
    return +alive


def required(component: T | None, name: str) -> T:
    """Return ``component``; raises DerivationError where the checkpoint has none."""
    if component is None:
        raise DerivationError(f"the checkpoint has no {name}, which this pipeline needs")
    return component
