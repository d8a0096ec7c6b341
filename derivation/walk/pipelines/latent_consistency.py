"""diffusers/pipelines/latent_consistency_models: txt2img and img2img of guidance-distilled SD checkpoints."""

from __future__ import annotations

from derivation.errors import DerivationError
from derivation.options import Options
from derivation.tape.tape import tape
from derivation.tape.tensor import SymTensor
from derivation.walk.pipelines.base import (
    POSTPROCESS,
    PREPARE_LATENTS,
    SAFETY_CHECKER,
    TEXT_ENCODER,
    UNET,
    VAE_ENCODE,
    Pipeline,
    denormalize_each,
    family,
)
from derivation.walk.pipelines.denoising import Denoising
from derivation.walk.pipelines.stable_diffusion import (
    decode_latents,
    encode_prompt,
    prepare_image_latents,
    run_safety_checker,
)
from derivation.walk.schedulers.lcm import LCMScheduler

NAME = "LatentConsistencyModelPipeline"


@family("LatentConsistencyModel")
def latent_consistency(pipeline: Pipeline) -> None:
    """Record ``LatentConsistencyModelPipeline.__call__``, or its Img2Img variant."""
    check_options(pipeline)
    task, scheduler = pipeline.options.pipeline, make_scheduler(pipeline)

    tape().mark(TEXT_ENCODER)
    prompt_embeds, _ = encode_prompt(pipeline)

    tape().mark(PREPARE_LATENTS if task == "txt2img" else VAE_ENCODE)
    if task == "img2img":
        loop = Consistency(pipeline, scheduler, prepare_image_latents(pipeline, scheduler, timesteps=1))
    else:
        loop = Consistency(pipeline, scheduler, scheduler.init_noise(pipeline.randn()))

    tape().mark(UNET)
    loop.timestep_cond = pipeline.guidance_scale_embedding()
    loop.run(prompt_embeds)

    assert loop.denoised is not None
    image = decode_latents(pipeline, loop.denoised)
    if pipeline.checkpoint.safety_checker is not None and pipeline.options.safety_checker:
        tape().mark(SAFETY_CHECKER)
        run_safety_checker(pipeline, image)
    tape().mark(POSTPROCESS)
    denormalize_each(image)
    del image
    pipeline.models.maybe_free_model_hooks()


class Consistency(Denoising):
    """The loop without guidance, which keeps the last denoised sample and decodes it."""

    denoised: SymTensor | None = None

    def iteration(self, prompt_embeds: SymTensor, added_cond: tuple[SymTensor, SymTensor] | None, last: bool) -> None:
        assert isinstance(self.scheduler, LCMScheduler)
        self.noise_pred = self.unet(self.latents, prompt_embeds, None, None)
        self.latents, self.denoised = self.scheduler.step_with_denoised(self.noise_pred, self.latents)


def make_scheduler(pipeline: Pipeline) -> LCMScheduler:
    """Return the scheduler, whose whole schedule runs: ``strength`` shortens the one that it is taken from."""
    scheduler = pipeline.whole_schedule()
    if not isinstance(scheduler, LCMScheduler):
        name = scheduler.config.class_name
        raise DerivationError(f"{NAME} with scheduler {name} is not supported (supported: LCMScheduler)")
    scheduler.check_steps(pipeline.strength)
    return scheduler


def check_options(pipeline: Pipeline) -> None:
    """Raise DerivationError for what these pipelines do not have, or are not followed in here."""
    options = pipeline.options
    if options.pipeline == "inpaint":
        raise DerivationError(f"pipeline = inpaint is not supported for {NAME} (supported: txt2img, img2img)")
    if pipeline.unet.time_cond_proj_dim is None:
        raise DerivationError(f"{NAME} needs a UNet with a time_cond_proj_dim")
    for name in ("negative_prompt", "controlnets", "controlnet", "ip_adapter", "ip_adapter_tokens"):
        if (value := getattr(options, name)) != (unset := getattr(Options(), name)):
            raise DerivationError(f"{name} = {value} is not supported for {NAME} (supported: {unset})")
