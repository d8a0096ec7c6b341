"""diffusers/pipelines/stable_diffusion: txt2img, img2img and inpaint of SD 1.x and 2.x."""

from __future__ import annotations

from derivation.tape.events import Category
from derivation.tape.tape import tape
from derivation.tape.tensor import SymTensor
from derivation.walk.models import CLIPTextModel, StableDiffusionSafetyChecker
from derivation.walk.ops import LayerNorm, cat, div, empty, given, mul, repeat
from derivation.walk.pipelines.base import (
    POSTPROCESS,
    PREPARE_LATENTS,
    SAFETY_CHECKER,
    TEXT_ENCODER,
    UNET,
    VAE_DECODE,
    VAE_ENCODE,
    Pipeline,
    denormalize,
    denormalize_each,
    family,
    required,
)
from derivation.walk.pipelines.controlnet import prepare_control
from derivation.walk.pipelines.denoising import Denoising
from derivation.walk.pipelines.inpaint import Inpainting, prepare_latents, prepare_mask_latents
from derivation.walk.pipelines.ip_adapter import prepare_ip_adapter_image_embeds
from derivation.walk.schedulers import Scheduler


@family("StableDiffusion")
def stable_diffusion(pipeline: Pipeline) -> None:
    """Record ``StableDiffusionPipeline.__call__``, or its Img2Img or Inpaint variant."""
    task = pipeline.options.pipeline
    scheduler = pipeline.scheduler(**corrections(pipeline))

    tape().mark(TEXT_ENCODER)
    prompt_embeds, negative_prompt_embeds = encode_prompt(pipeline)
    if negative_prompt_embeds is not None:
        prompt_embeds = cat([negative_prompt_embeds, prompt_embeds], 0)
    image_embeds = prepare_ip_adapter_image_embeds(pipeline)

    tape().mark(PREPARE_LATENTS if task == "txt2img" else VAE_ENCODE)
    control = prepare_control(pipeline)
    latent_timestep = None if task == "txt2img" else pipeline.latent_timestep(scheduler)
    if task == "inpaint":
        latents_outputs = prepare_latents(pipeline, scheduler, encode_vae_image)
        masks = prepare_mask_latents(pipeline, encode_vae_image)
        inpainting = Inpainting(pipeline.guidance, latents_outputs, *masks)
        loop = Denoising(pipeline, scheduler, latents_outputs[0], inpainting, control)
    elif task == "img2img":
        loop = Denoising(pipeline, scheduler, prepare_image_latents(pipeline, scheduler), control=control)
    else:
        loop = Denoising(pipeline, scheduler, scheduler.init_noise(pipeline.randn()), control=control)

    tape().mark(UNET)
    loop.image_embeds = image_embeds
    loop.timestep_cond = pipeline.guidance_scale_embedding()
    loop.run(prompt_embeds)

    image = decode_latents(pipeline, loop.latents)
    checked = pipeline.checkpoint.safety_checker is not None and pipeline.options.safety_checker
    tape().mark(SAFETY_CHECKER if checked else POSTPROCESS)
    if control is not None:
        control.decoded()
    if checked:
        run_safety_checker(pipeline, image)
        tape().mark(POSTPROCESS)
    denormalize_each(image)
    del image
    pipeline.models.maybe_free_model_hooks()


def corrections(pipeline: Pipeline) -> dict[str, object]:
    """Return what a constructor changes in an outdated scheduler config: nothing where there are ControlNets."""
    if pipeline.options.controlled:
        return {}
    last = {"skip_prk_steps": True} if pipeline.options.pipeline == "inpaint" else {"clip_sample": False}
    return {"steps_offset": 1, **last}


def encode_prompt(pipeline: Pipeline) -> tuple[SymTensor, SymTensor | None]:
    """``encode_prompt``: [N, L, K] for the prompt and, under guidance, for the negative prompt."""
    prompt_embeds = embed(pipeline, pipeline.options.clip_skip)
    negative_prompt_embeds: SymTensor | None = None
    if pipeline.guidance:
        negative_prompt_embeds = embed(pipeline, None)
    return prompt_embeds, negative_prompt_embeds


def embed(pipeline: Pipeline, clip_skip: int | None) -> SymTensor:
    """The text encoder on B prompts, or the caller's prompt_embeds where L is beyond its positions."""
    config = required(pipeline.checkpoint.text_encoder, "text_encoder")
    batch, length = tape().size("B"), tape().size("L")
    if tape().outgrows("text_encoder", length, config.max_position_embeddings):
        embeds = given((batch, length, config.hidden_size), pipeline.options.dtype)
    else:
        input_ids = empty((batch, length), "int64", "_to_copy", Category.PIPELINE)
        pipeline.models.pre_forward("text_encoder")
        outputs = CLIPTextModel("text_encoder", input_ids, config=config, output_hidden_states=clip_skip is not None)
        del input_ids
        if clip_skip is None:
            embeds = outputs.last_hidden_state
            del outputs
        else:
            embeds = outputs.hidden_states[-(clip_skip + 1)]
            del outputs
            with tape().scope("text_encoder"):
                embeds = LayerNorm("final_layer_norm", embeds)
    embeds = repeat(embeds, 1, pipeline.options.num_images_per_prompt, 1)
    return embeds.view(pipeline.images, length, config.hidden_size)


def prepare_image_latents(pipeline: Pipeline, scheduler: Scheduler, timesteps: int | None = None) -> SymTensor:
    """img2img's ``prepare_latents``: B images on the CPU -> latents of every image, noised at ``timesteps`` timesteps.

    None: one for each image.
    """
    image = pipeline.image_to_device()
    init_latents = pipeline.encode(image)
    if pipeline.options.controlled:
        pipeline.fitting(init_latents)
    init_latents = mul(init_latents)
    init_latents = cat([init_latents] * pipeline.options.num_images_per_prompt, 0)
    noise = empty(init_latents.shape, pipeline.options.dtype, "randn", Category.PIPELINE)
    init_latents = scheduler.add_noise(init_latents, noise, timesteps)
    latents = init_latents
    return latents


def encode_vae_image(pipeline: Pipeline, image: SymTensor) -> SymTensor:
    """``_encode_vae_image``: [B, 3, H, W] -> [B, C, h, w]."""
    image_latents = pipeline.encode(image)
    image_latents = mul(image_latents)
    return image_latents


def decode_latents(pipeline: Pipeline, latents: SymTensor) -> SymTensor:
    """``vae.decode(latents / scaling_factor)``."""
    latents = div(latents)
    tape().mark(VAE_DECODE)
    return pipeline.decode(latents)


def run_safety_checker(pipeline: Pipeline, image: SymTensor) -> None:
    """``run_safety_checker``: the image goes to the CPU and comes back resized."""
    config = required(pipeline.checkpoint.safety_checker, "safety_checker")
    denormalize(image)
    shape = (pipeline.images, config.num_channels, config.image_size, config.image_size)
    pixel_values = empty(shape, "float32", "_to_copy", Category.PIPELINE)
    clip_input = pixel_values
    if pipeline.options.dtype != "float32":
        clip_input = empty(shape, pipeline.options.dtype, "_to_copy", Category.PIPELINE)
    StableDiffusionSafetyChecker("safety_checker", clip_input, image, config=config)
