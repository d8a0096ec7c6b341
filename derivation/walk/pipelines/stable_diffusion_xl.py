"""diffusers/pipelines/stable_diffusion_xl: txt2img, img2img and inpaint of SDXL base and refiner.

No invisible watermark is applied (``add_watermarker=False``).
"""

from __future__ import annotations

from collections.abc import Iterator

from derivation.config import AutoencoderKLConfig
from derivation.errors import DerivationError
from derivation.options.choices import EAGER
from derivation.tape.events import Category
from derivation.tape.tape import tape
from derivation.tape.tensor import SymTensor
from derivation.walk.models import CLIPTextModel, CLIPTextModelWithProjection
from derivation.walk.ops import cat, div, elementwise, empty, given, mul, repeat, to
from derivation.walk.pipelines.base import (
    POSTPROCESS,
    PREPARE_LATENTS,
    TEXT_ENCODER,
    UNET,
    VAE_DECODE,
    VAE_ENCODE,
    Pipeline,
    denormalize,
    family,
    required,
)
from derivation.walk.pipelines.controlnet import prepare_control
from derivation.walk.pipelines.denoising import Denoising
from derivation.walk.pipelines.inpaint import Inpainting, prepare_latents, prepare_mask_latents_xl
from derivation.walk.pipelines.ip_adapter import prepare_ip_adapter_image_embeds
from derivation.walk.schedulers import Scheduler
from derivation.walk.schedulers.arithmetic import Value

# original size, crop's corner, target size; with an aesthetic score in the target size's place
TIME_IDS, AESTHETIC_TIME_IDS = 6, 5
# what stays in float16 where fused attention does, in the order of the casts
HALF_PARTS = ("post_quant_conv", "decoder.conv_in", "decoder.mid_block")

# [N, L, K] for the prompt and under guidance for the negative prompt, and the same pooled, [N, P]
Prompt = tuple[SymTensor, SymTensor | None, SymTensor, SymTensor | None]


@family("StableDiffusionXL")
def stable_diffusion_xl(pipeline: Pipeline) -> None:
    """Record ``StableDiffusionXLPipeline.__call__``, or its Img2Img or Inpaint variant."""
    task = pipeline.options.pipeline
    scheduler = pipeline.scheduler()

    tape().mark(TEXT_ENCODER)
    prompt_embeds, negative_prompt_embeds, pooled_prompt_embeds, negative_pooled_prompt_embeds = encode_prompt(pipeline)

    # the pipelines with ControlNets embed the IP-Adapter's image early, the others late
    image_embeds = prepare_ip_adapter_image_embeds(pipeline) if pipeline.options.controlled else ()

    tape().mark(PREPARE_LATENTS if task == "txt2img" else VAE_ENCODE)
    control = prepare_control(pipeline)
    latent_timestep = None if task == "txt2img" else pipeline.latent_timestep(scheduler)
    if task == "inpaint":
        latents_outputs = prepare_latents(pipeline, scheduler, encode_vae_image)
        masks = prepare_mask_latents_xl(pipeline, encode_vae_image)
        inpainting = Inpainting(pipeline.guidance, latents_outputs, *masks)
        loop = Denoising(pipeline, scheduler, latents_outputs[0], inpainting, control)
    elif task == "img2img":
        loop = Denoising(pipeline, scheduler, prepare_image_latents(pipeline, scheduler), control=control)
    else:
        loop = Denoising(pipeline, scheduler, scheduler.init_noise(pipeline.randn()), control=control)

    tape().mark(UNET)
    if control is not None:
        loop.timestep_cond = pipeline.guidance_scale_embedding()
    add_text_embeds = pooled_prompt_embeds
    if negative_prompt_embeds is not None and negative_pooled_prompt_embeds is not None:
        prompt_embeds = cat([negative_prompt_embeds, prompt_embeds], 0)
        add_text_embeds = cat([negative_pooled_prompt_embeds, add_text_embeds], 0)
    added_cond = (add_text_embeds, time_ids(pipeline))
    loop.image_embeds = prepare_ip_adapter_image_embeds(pipeline) if control is None else image_embeds
    if control is None:
        loop.timestep_cond = pipeline.guidance_scale_embedding()
    loop.run(prompt_embeds, added_cond)

    image = decode_latents(pipeline, loop)
    tape().mark(POSTPROCESS)
    if control is not None:
        control.decoded()
    if not inpaints_with_controlnets(pipeline):
        pipeline.models.to("vae", pipeline.options.dtype)
    denormalize(image)
    del image
    pipeline.models.maybe_free_model_hooks()


def encode_prompt(pipeline: Pipeline) -> Prompt:
    """``encode_prompt``: both encoders' hidden states side by side, the last encoder's pooled output."""
    config = required(pipeline.checkpoint.text_encoder_2, "text_encoder_2")
    n, batch, length = pipeline.options.num_images_per_prompt, tape().size("B"), tape().size("L")
    long = tape().outgrows("text_encoder", length, config.max_position_embeddings)

    if long:
        prompt_embeds, pooled_prompt_embeds = given_embeddings(pipeline)
    else:
        prompt_embeds_list = [*encoded(pipeline, pipeline.options.clip_skip or 0)]
        pooled_prompt_embeds = prompt_embeds_list.pop()
        prompt_embeds = cat(prompt_embeds_list, 2)

    negative_prompt_embeds: SymTensor | None = None
    negative_pooled_prompt_embeds: SymTensor | None = None
    zeros = pipeline.checkpoint.force_zeros_for_empty_prompt and not pipeline.options.negative_prompt
    if pipeline.guidance and long:
        negative_prompt_embeds, negative_pooled_prompt_embeds = given_embeddings(pipeline)
    elif pipeline.guidance and zeros:
        negative_prompt_embeds = elementwise("zeros_like", prompt_embeds)
        negative_pooled_prompt_embeds = elementwise("zeros_like", pooled_prompt_embeds)
    elif pipeline.guidance:
        negative_prompt_embeds_list = [*encoded(pipeline, 0)]
        negative_pooled_prompt_embeds = negative_prompt_embeds_list.pop()
        negative_prompt_embeds = cat(negative_prompt_embeds_list, 2)

    prompt_embeds = repeat(prompt_embeds, 1, n, 1).view(batch * n, length, prompt_embeds.shape[2])
    if negative_prompt_embeds is not None:
        width = negative_prompt_embeds.shape[2]
        negative_prompt_embeds = repeat(negative_prompt_embeds, 1, n, 1).view(batch * n, length, width)
    pooled_prompt_embeds = repeat(pooled_prompt_embeds, 1, n).view(batch * n, config.projection_dim)
    if negative_pooled_prompt_embeds is not None:
        negative_pooled_prompt_embeds = repeat(negative_pooled_prompt_embeds, 1, n).view(
            batch * n, config.projection_dim
        )
    return prompt_embeds, negative_prompt_embeds, pooled_prompt_embeds, negative_pooled_prompt_embeds


def encoded(pipeline: Pipeline, clip_skip: int) -> Iterator[SymTensor]:
    """Yield each text encoder's hidden state before the last ``clip_skip`` + 1 layers, then the pooled output."""
    if (config := pipeline.checkpoint.text_encoder) is not None:
        ids = input_ids()
        pipeline.models.pre_forward("text_encoder")
        output = CLIPTextModel("text_encoder", ids, config=config, output_hidden_states=True)
        hidden_state = output.hidden_states[-(clip_skip + 2)]
        first = output.last_hidden_state if tape().libraries.follows("any_pooled_output") else None
        del ids, output
        yield hidden_state
    config = required(pipeline.checkpoint.text_encoder_2, "text_encoder_2")
    ids = input_ids()
    pipeline.models.pre_forward("text_encoder_2")
    outputs = CLIPTextModelWithProjection("text_encoder_2", ids, config=config, output_hidden_states=True)
    first = None
    text_embeds, hidden_state = outputs.text_embeds, outputs.hidden_states[-(clip_skip + 2)]
    del outputs
    yield hidden_state
    yield text_embeds


def input_ids() -> SymTensor:
    """Move B tokenized prompts [B, L] to the device."""
    return empty((tape().size("B"), tape().size("L")), "int64", "_to_copy", Category.PIPELINE)


def given_embeddings(pipeline: Pipeline) -> tuple[SymTensor, SymTensor]:
    """Return the caller's prompt_embeds [B, L, K] and pooled_prompt_embeds [B, P]."""
    config, dtype = required(pipeline.checkpoint.text_encoder_2, "text_encoder_2"), pipeline.options.dtype
    batch, width = tape().size("B"), pipeline.unet.cross_attention_dim[0]
    return given((batch, tape().size("L"), width), dtype), given((batch, config.projection_dim), dtype)


def time_ids(pipeline: Pipeline) -> SymTensor:
    """Sizes and crops [N, 6], made on the CPU; raises DerivationError where the UNet takes another width."""
    config = required(pipeline.checkpoint.text_encoder_2, "text_encoder_2")
    task, unet = pipeline.options.pipeline, pipeline.unet
    aesthetic = pipeline.checkpoint.requires_aesthetics_score and task != "txt2img"
    count = AESTHETIC_TIME_IDS if aesthetic else TIME_IDS
    width = count * (unet.addition_time_embed_dim or 0) + config.projection_dim
    if unet.addition_embed_type != "text_time" or width != unet.projection_class_embeddings_input_dim:
        raise DerivationError(
            f"{task}: the UNet's projection_class_embeddings_input_dim is "
            f"{unet.projection_class_embeddings_input_dim}, but {count} time ids and the pooled embedding are {width}"
        )
    rows = 2 if pipeline.guidance else 1
    if task == "txt2img":
        add_time_ids = empty((rows, count), pipeline.options.dtype, "_to_copy", Category.PIPELINE)
        return repeat(add_time_ids, pipeline.images, 1)
    return empty((rows * pipeline.images, count), pipeline.options.dtype, "_to_copy", Category.PIPELINE)


def prepare_image_latents(pipeline: Pipeline, scheduler: Scheduler) -> SymTensor:
    """img2img's ``prepare_latents``: B images on the CPU -> latents of every image."""
    dtype = pipeline.options.dtype
    image = pipeline.image_to_device()
    if pipeline.vae.force_upcast:
        image = to(image, "float32")
        pipeline.models.to("vae", "float32")
    init_latents = pipeline.encode(image)
    if pipeline.options.controlled:
        pipeline.fitting(init_latents)
    if pipeline.vae.force_upcast:
        pipeline.models.to("vae", dtype)
    init_latents = to(init_latents, dtype)
    if (moments := latents_moments(pipeline, dtype)) is not None:
        mean, std = moments
        init_latents = (Value(init_latents) - mean) * 1.0 / std
    else:
        init_latents = mul(init_latents)
    init_latents = cat([init_latents] * pipeline.options.num_images_per_prompt, 0)
    noise = empty(init_latents.shape, pipeline.options.dtype, "randn", Category.PIPELINE)
    init_latents = scheduler.add_noise(init_latents, noise)
    latents = init_latents
    return latents


def encode_vae_image(pipeline: Pipeline, image: SymTensor) -> SymTensor:
    """inpaint's ``_encode_vae_image``: [B, 3, H, W] -> [B, C, h, w]."""
    dtype = image.dtype
    if pipeline.vae.force_upcast:
        image = to(image, "float32")
        pipeline.models.to("vae", "float32")
    image_latents = pipeline.encode(image)
    if pipeline.vae.force_upcast:
        pipeline.models.to("vae", dtype)
    image_latents = to(image_latents, dtype)
    image_latents = mul(image_latents)
    return image_latents


def decode_latents(pipeline: Pipeline, loop: Denoising) -> SymTensor:
    """``vae.decode``; where the VAE must not run in float16, its weights and the latents become float32 first."""
    needs_upcasting = pipeline.options.dtype == "float16" and pipeline.vae.force_upcast
    if needs_upcasting:
        if not getattr(pipeline.vae, "use_post_quant_conv", True):
            # diffusers reads the upcast dtype off post_quant_conv
            raise DerivationError("the VAE's use_post_quant_conv = false is not supported in SDXL with force_upcast")
        tape().mark(VAE_DECODE)
        upcast_vae(pipeline)
        loop.latents = to(loop.latents, post_quant_conv_dtype())
    if inpaints_with_controlnets(pipeline):
        latents = div(loop.latents)
    else:
        latents = loop.latents = unscale(pipeline, loop)
    if not needs_upcasting:
        tape().mark(VAE_DECODE)
    return pipeline.decode(latents)


def upcast_vae(pipeline: Pipeline) -> None:
    """``upcast_vae``: the VAE in float32, parts of it back in float16 in some versions."""
    pipeline.models.to("vae", "float32")
    if tape().libraries.follows("half_upcast_vae") and pipeline.options.attention != EAGER:
        pipeline.models.to("vae", pipeline.options.dtype, *HALF_PARTS)


def post_quant_conv_dtype() -> str:
    """Return the dtype that the latents are cast to."""
    with tape().scope("vae"), tape().scope("post_quant_conv"):
        return tape().weights_dtype()


def unscale(pipeline: Pipeline, loop: Denoising) -> SymTensor:
    """``latents / scaling_factor``, or with the VAE's mean and standard deviation."""
    loop.moments = latents_moments(pipeline, loop.latents.dtype)
    if loop.moments is None:
        return div(loop.latents)
    mean, std = loop.moments
    return Value(loop.latents) * std / 1.0 + mean


def inpaints_with_controlnets(pipeline: Pipeline) -> bool:
    """Whether this is pipeline_controlnet_inpaint_sd_xl.py, which leaves the VAE in float32, and latents unnamed."""
    return pipeline.options.pipeline == "inpaint" and pipeline.options.controlled


def latents_moments(pipeline: Pipeline, dtype: str) -> tuple[SymTensor, SymTensor] | None:
    """Return ``latents_mean`` and ``latents_std`` [1, C, 1, 1] where the VAE's config has both."""
    vae = pipeline.vae
    if not isinstance(vae, AutoencoderKLConfig) or vae.latents_mean is None or vae.latents_std is None:
        return None
    shape = (1, vae.latent_channels, 1, 1)
    mean, std = (empty(shape, dtype, "_to_copy", Category.PIPELINE) for _ in range(2))
    return mean, std
