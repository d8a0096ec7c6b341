"""diffusers/pipelines/controlnet: what its pipelines do and keep beyond those without ControlNets.

B control images are given for each ControlNet, one for each prompt.
"""

from __future__ import annotations

from collections.abc import Callable

from derivation.errors import DerivationError
from derivation.tape.events import Category
from derivation.tape.tensor import SymTensor
from derivation.walk.components import controls
from derivation.walk.models import Residuals, controlnet
from derivation.walk.ops import cat, elementwise, empty
from derivation.walk.pipelines.base import Pipeline
from derivation.walk.schedulers import Scheduler


class Control:
    """The control images, and the loop variables that stay alive until the next iteration overwrites them."""

    def __init__(self, pipeline: Pipeline) -> None:
        """Prepare the control images; raises DerivationError where they do not fit the latents."""
        self.configs = controls(pipeline.checkpoint, pipeline.options)
        for config in self.configs:
            if pipeline.vae_scale_factor != config.conditioning_factor:
                raise DerivationError(
                    f"controlnets = {len(self.configs)} with a VAE of scale factor {pipeline.vae_scale_factor} "
                    f"is not supported (supported: {config.conditioning_factor})"
                )
        pools = [config.global_pool_conditions for config in self.configs]
        if pools[0] and not all(pools):
            said = "a ControlNet without global_pool_conditions after a first one with is not supported"
            raise DerivationError(f"{said}: diffusers adds its residuals in place to [N, C, 1, 1], which torch refuses")
        # pipeline_controlnet_inpaint_sd_xl.py does not read global_pool_conditions
        unread = pipeline.family == "StableDiffusionXL" and pipeline.options.pipeline == "inpaint"
        guess_mode = pools[0] and not unread
        self.txt2img = pipeline.options.pipeline == "txt2img"
        self.conditional_alone = guess_mode and pipeline.guidance
        doubled = pipeline.guidance and not guess_mode
        self.images = [prepare_control_image(pipeline, doubled) for _ in self.configs]
        self.control_model_input: SymTensor | None = None
        self.down_block_res_samples: tuple[SymTensor, ...] = ()
        self.mid_block_res_sample: SymTensor | None = None

    def take(self, latent_model_input: SymTensor, latents: SymTensor, scheduler: Scheduler) -> None:
        """``control_model_input``: the step's input, or the conditional half alone, scaled by itself."""
        self.control_model_input = latents if self.conditional_alone else latent_model_input
        if self.conditional_alone:
            self.control_model_input = scheduler.scale_model_input(self.control_model_input)

    def __call__(
        self,
        timestep: Callable[[], SymTensor],
        prompt_embeds: SymTensor,
        added_cond: tuple[SymTensor, SymTensor] | None,
    ) -> Residuals:
        """The ControlNets on what ``take`` took; a moved timestep dies with their call."""
        assert self.control_model_input is not None
        if self.conditional_alone:
            prompt_embeds = prompt_embeds.chunk(2, 0)[1]
            added_cond = None if added_cond is None else (added_cond[0].chunk(2, 0)[1], added_cond[1].chunk(2, 0)[1])
        self.down_block_res_samples, self.mid_block_res_sample = controlnet(
            self.control_model_input, timestep(), prompt_embeds, self.images, added_cond, configs=self.configs
        )
        if self.conditional_alone:
            self.down_block_res_samples = tuple(with_zeros(sample) for sample in self.down_block_res_samples)
            self.mid_block_res_sample = with_zeros(self.mid_block_res_sample)
        return self.down_block_res_samples, self.mid_block_res_sample

    def decoded(self) -> None:
        """``image = vae.decode(...)``: in txt2img one control image has this name, several stay in ``images``."""
        if self.txt2img and len(self.images) == 1:
            self.images.clear()


def prepare_control(pipeline: Pipeline) -> Control | None:
    """Return the ControlNets' part of a pipeline, None where there are none."""
    return Control(pipeline) if pipeline.options.controlled else None


def with_zeros(sample: SymTensor) -> SymTensor:
    """``torch.cat([torch.zeros_like(sample), sample])``."""
    return cat([elementwise("zeros_like", sample), sample], 0)


def prepare_control_image(pipeline: Pipeline, doubled: bool) -> SymTensor:
    """Move a control image from the CPU to the device: [N, 3, H, W], twice where guidance doubles it."""
    image = empty(pipeline.image_shape(pipeline.images), pipeline.options.dtype, "_to_copy", Category.PIPELINE)
    if doubled:
        image = cat([image] * 2, 0)
    return image
