"""The denoising loop, the same in every pipeline of both families."""

from __future__ import annotations

from collections import Counter
from functools import partial

from derivation.tape.events import Category
from derivation.tape.symbols import Size
from derivation.tape.tape import tape
from derivation.tape.tensor import SymTensor
from derivation.walk.components import projections
from derivation.walk.models import Residuals, UNet2DConditionModel
from derivation.walk.ops import add, cat, empty, given, mul, sub
from derivation.walk.pipelines.base import Pipeline
from derivation.walk.pipelines.controlnet import Control
from derivation.walk.pipelines.inpaint import Inpainting
from derivation.walk.schedulers import Scheduler


class Denoising:
    """The loop and its local variables, which stay alive until ``__call__`` returns."""

    def __init__(
        self,
        pipeline: Pipeline,
        scheduler: Scheduler,
        latents: SymTensor,
        inpainting: Inpainting | None = None,
        control: Control | None = None,
    ) -> None:
        self.pipeline = pipeline
        self.scheduler = scheduler
        self.latents = latents
        self.inpainting = inpainting
        self.control = control
        self.moments: tuple[SymTensor, SymTensor] | None = None
        self.image_embeds: tuple[SymTensor, ...] = ()
        self.timestep_cond: SymTensor | None = None
        self.timesteps: SymTensor | None = None
        if tape().hardware is not None:
            self.timesteps = empty((scheduler.num_timesteps,), scheduler.timestep_dtype, "_to_copy", Category.PIPELINE)

    def run(self, prompt_embeds: SymTensor, added_cond: tuple[SymTensor, SymTensor] | None = None) -> None:
        """Record every iteration; ``added_cond`` is SDXL's pooled embeddings and time ids.

        Once the scheduler is settled and a step, ``order`` iterations, leaves the same sizes alive as the one before,
        the steps up to the last ones are all the same: they are recorded once, as a loop.
        """
        order = self.scheduler.order
        timesteps = self.scheduler.num_timesteps - self.scheduler.begin_index
        unrolled = timesteps - self.scheduler.tail
        tape().repeats = self.scheduler.num_timesteps - self.scheduler.num_inference_steps
        i = 0
        while i < timesteps:
            start, settled = len(tape().events), self.scheduler.settled
            before = live_sizes() if settled else None
            for _ in range(min(order, timesteps - i)):
                tape().iterations.append(len(tape().events))
                self.iteration(prompt_embeds, added_cond, last=i == timesteps - 1)
                i += 1
            if settled and i < unrolled and live_sizes() == before:
                steps = (unrolled - i) // order
                tape().loops.append((start, len(tape().events), steps + 1))
                self.scheduler.step_index += steps * order
                i += steps * order

    def unet(
        self,
        sample: SymTensor,
        prompt_embeds: SymTensor,
        added_cond: tuple[SymTensor, SymTensor] | None,
        residuals: Residuals | None,
    ) -> SymTensor:
        """The UNet on the step's input ``sample``."""
        config = self.pipeline.unet
        moved = self.pipeline.models.pre_forward("unet")
        return UNet2DConditionModel(
            "unet",
            sample,
            self.timestep(moved),
            prompt_embeds,
            added_cond,
            residuals,
            image_embeds=self.image_embeds,
            projections=projections(self.pipeline.checkpoint, self.pipeline.options),
            timestep_cond=self.timestep_cond,
            config=config,
        )

    def timestep(self, moved: bool) -> SymTensor:
        """Return the step's entry of ``timesteps``: a view on a GPU, else a scalar on the CPU unless ``moved``."""
        if self.timesteps is not None:
            return self.timesteps.narrow(0, 1)
        dtype = self.scheduler.timestep_dtype
        return empty((), dtype, "_to_copy", Category.PIPELINE) if moved else given((), dtype)

    def iteration(self, prompt_embeds: SymTensor, added_cond: tuple[SymTensor, SymTensor] | None, last: bool) -> None:
        """One pass of the loop's body."""
        guidance = self.pipeline.guidance
        self.latent_model_input = cat([self.latents] * 2, 0) if guidance else self.latents
        self.latent_model_input = self.scheduler.scale_model_input(self.latent_model_input)
        residuals = None
        if self.control is not None:
            self.control.take(self.latent_model_input, self.latents, self.scheduler)
            moved = self.pipeline.models.pre_forward("controlnet")
            residuals = self.control(partial(self.timestep, moved), prompt_embeds, added_cond)
        if self.inpainting is not None and self.inpainting.nine_channels:
            masked = [self.latent_model_input, self.inpainting.mask, self.inpainting.masked_image_latents]
            self.latent_model_input = cat(masked, 1)
            del masked

        self.noise_pred = self.unet(self.latent_model_input, prompt_embeds, added_cond, residuals)
        if guidance:
            self.noise_pred_uncond, self.noise_pred_text = self.noise_pred.chunk(2, 0)
            self.noise_pred = add(self.noise_pred_uncond, mul(sub(self.noise_pred_text, self.noise_pred_uncond)))

        self.latents = self.scheduler.step(self.noise_pred, self.latents)
        if self.inpainting is not None and not self.inpainting.nine_channels:
            self.latents = self.inpainting.blend(self.latents, self.scheduler, last)


def live_sizes() -> Counter[Size]:
    """Return how many storages of each size are alive on the active tape."""
    return Counter(tape().allocations[index].nbytes for index in tape().alive)
