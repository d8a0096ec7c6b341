"""diffusers/pipelines/controlnet: what its pipelines do and keep beyond those without ControlNets.

B control images are given for each ControlNet, one for each prompt.
"""

from __future__ import annotations

from derivation.errors import DerivationError
from derivation.tape.events import Category
from derivation.tape.tensor import SymTensor
from derivation.walk.components import controls
from derivation.walk.models import Residuals, controlnet
from derivation.walk.ops import cat, empty
from derivation.walk.pipelines.base import Pipeline


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
        self.txt2img = pipeline.options.pipeline == "txt2img"
        self.images = [prepare_control_image(pipeline) for _ in self.configs]
        self.control_model_input: SymTensor | None = None
        self.down_block_res_samples: tuple[SymTensor, ...] = ()
        self.mid_block_res_sample: SymTensor | None = None

    def __call__(
        self,
        latent_model_input: SymTensor,
        timestep: SymTensor,
        prompt_embeds: SymTensor,
        added_cond: tuple[SymTensor, SymTensor] | None,
    ) -> Residuals:
        """The ControlNets on the step's input."""
        self.control_model_input = latent_model_input
        self.down_block_res_samples, self.mid_block_res_sample = controlnet(
            latent_model_input, timestep, prompt_embeds, self.images, added_cond, configs=self.configs
        )
        return self.down_block_res_samples, self.mid_block_res_sample

    def decoded(self) -> None:
        """``image = vae.decode(...)``: in txt2img one control image has this name, several stay in ``images``."""
        if self.txt2img and len(self.images) == 1:
            self.images.clear()


def prepare_control(pipeline: Pipeline) -> Control | None:
    """Return the ControlNets' part of a pipeline, None where there are none."""
    return Control(pipeline) if pipeline.options.controlled else None


def prepare_control_image(pipeline: Pipeline) -> SymTensor:
    """Move a control image from the CPU to the device: [N, 3, H, W], twice with guidance."""
    image = empty(pipeline.image_shape(pipeline.images), pipeline.options.dtype, "_to_copy", Category.PIPELINE)
    if pipeline.guidance:
        image = cat([image] * 2, 0)
    return image
