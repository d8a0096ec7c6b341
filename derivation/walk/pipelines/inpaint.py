"""pipeline_stable_diffusion_inpaint.py: masks and masked images, for UNets of 9 and of 4 input channels.

B images and B masks are given, one for each prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from derivation.tape.events import Category
from derivation.tape.tape import tape
from derivation.tape.tensor import SymTensor
from derivation.walk.ops import cat, empty, repeat
from derivation.walk.pipelines.base import Pipeline
from derivation.walk.schedulers import Scheduler
from derivation.walk.schedulers.arithmetic import Value

Encode = Callable[[Pipeline, SymTensor], SymTensor]


@dataclass
class Inpainting:
    """What an inpainting pipeline keeps besides the latents.

    ``latents_outputs`` holds the first latents, the noise and, with 4 channels, the image's latents.
    """

    guidance: bool
    latents_outputs: tuple[SymTensor, ...]
    mask: SymTensor
    masked_image_latents: SymTensor
    init_latents_proper: SymTensor | None = field(init=False, default=None)

    @property
    def nine_channels(self) -> bool:
        """Whether the UNet takes latents, mask and masked image."""
        return len(self.latents_outputs) == 2

    def blend(self, latents: SymTensor, scheduler: Scheduler, last: bool) -> SymTensor:
        """``(1 - init_mask) * init_latents_proper + init_mask * latents``."""
        _, noise, image_latents = self.latents_outputs
        self.init_latents_proper = image_latents
        init_mask = Value(self.mask.chunk(2, 0)[0] if self.guidance else self.mask)
        if not last:
            self.init_latents_proper = scheduler.add_noise(self.init_latents_proper, noise, count=1)
        return (1 - init_mask) * self.init_latents_proper + init_mask * latents


def prepare_latents(pipeline: Pipeline, scheduler: Scheduler, encode: Encode) -> tuple[SymTensor, ...]:
    """Return (latents, noise), and the image's latents where the UNet has 4 input channels."""
    is_strength_max = pipeline.strength == 1.0
    return_image_latents = pipeline.unet.in_channels == 4
    if return_image_latents or not is_strength_max:
        image = pipeline.image_to_device()
        image_latents = pipeline.fitting(encode(pipeline, image))
        image_latents = repeat(image_latents, pipeline.options.num_images_per_prompt, 1, 1, 1)

    noise = pipeline.randn()
    latents = noise if is_strength_max else scheduler.add_noise(image_latents, noise)
    latents = scheduler.init_noise(latents) if is_strength_max else latents
    return (latents, noise, image_latents) if return_image_latents else (latents, noise)


def prepare_mask_latents(pipeline: Pipeline, encode: Encode) -> tuple[SymTensor, SymTensor]:
    """Return mask [N, 1, h, w] and masked_image_latents [N, C, h, w], both twice with guidance."""
    n = pipeline.options.num_images_per_prompt
    mask = mask_to_device(pipeline)
    masked_image = pipeline.image_to_device()
    masked_image_latents = pipeline.fitting(encode(pipeline, masked_image))
    if n > 1:
        mask = repeat(mask, n, 1, 1, 1)
        masked_image_latents = repeat(masked_image_latents, n, 1, 1, 1)
    if pipeline.guidance:
        mask = cat([mask] * 2, 0)
        masked_image_latents = cat([masked_image_latents] * 2, 0)
    return mask, masked_image_latents


def prepare_mask_latents_xl(pipeline: Pipeline, encode: Encode) -> tuple[SymTensor, SymTensor]:
    """``prepare_mask_latents`` of pipeline_stable_diffusion_xl_inpaint.py: the mask first."""
    n = pipeline.options.num_images_per_prompt
    mask = mask_to_device(pipeline)
    if n > 1:
        mask = repeat(mask, n, 1, 1, 1)
    if pipeline.guidance:
        mask = cat([mask] * 2, 0)
    masked_image = pipeline.image_to_device()
    masked_image_latents = pipeline.fitting(encode(pipeline, masked_image))
    if n > 1:
        masked_image_latents = repeat(masked_image_latents, n, 1, 1, 1)
    if pipeline.guidance:
        masked_image_latents = cat([masked_image_latents] * 2, 0)
    return mask, masked_image_latents


def mask_to_device(pipeline: Pipeline) -> SymTensor:
    """Move B masks [B, 1, h, w], resized on the CPU, to the device."""
    shape = (tape().size("B"), 1, tape().size("h0"), tape().size("w0"))
    return empty(shape, pipeline.options.dtype, "_to_copy", Category.PIPELINE)
