"""Run the calls of the exactness contract, and whole pipelines, under the tracer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers.models.embeddings import ImageProjection
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import retrieve_latents

from derivation.call import DEFAULT_PROMPT_LENGTH
from derivation.call import Call as PipelineCall
from derivation.config import read_image_encoder
from derivation.options import Options
from derivation.tape.tape import Tape
from derivation.trace.inputs import arguments, embeddings
from derivation.trace.modules import (
    Config,
    Switches,
    build_controlnet,
    build_image_encoder,
    build_safety_checker,
    build_text_encoder,
    build_unet,
    build_vae,
    modules_of,
    pipeline_of,
    quiet,
)
from derivation.trace.offload import meta_as_gpu, offload_model
from derivation.trace.sdpa import SdpaMode
from derivation.trace.tracer import Onto, Tracer, marked

# A module, its inputs and the call to watch.
Call = tuple[torch.nn.Module, dict[str, torch.Tensor], Callable[..., object]]
# The pipelines' default guidance_scale, and the largest without guidance.
GUIDED, UNGUIDED = 7.5, 1.0
# the inputs of IP-Adapters by name, numbered
IMAGE_EMBEDS = "image_embeds_"


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes of one run: pixels, images or prompts, tokens; what follows from them in tensors."""

    height: int
    width: int
    batch_size: int
    prompt_length: int
    guidance: bool
    dtype: str
    switches: Switches = ()

    @property
    def unet_batch(self) -> int:
        """Two rows an image with guidance, one without."""
        return self.batch_size * (2 if self.guidance else 1)

    def image(self, channels: int) -> torch.Tensor:
        """Return an image batch [B, channels, height, width]."""
        return self.empty(self.batch_size, channels, self.height, self.width)

    def latents(self, batch_size: int, channels: int) -> torch.Tensor:
        """Return latents [batch_size, channels, height // 8, width // 8]."""
        return self.empty(batch_size, channels, self.height // 8, self.width // 8)

    def empty(self, *shape: int) -> torch.Tensor:
        """Return a meta tensor in the run's dtype."""
        return torch.empty(shape, dtype=getattr(torch, self.dtype), device="meta")


def trace_component(
    component: str,
    config: Config,
    *,
    dtype: str = "float16",
    attention: str = "efficient",
    height: int = 512,
    width: int = 512,
    batch_size: int = 1,
    prompt_length: int = 77,
    guidance: bool = True,
    switches: Switches = (),
    paths: bool = True,
    onto: Onto | None = None,
) -> Tape:
    """Trace one call of a component: ``text_encoder``, ``unet``, ``vae_decode`` and the other keys of ``_CALLS``.

    ``config`` is the component's, the UNet's for ``controlnet``; ``height`` and ``width`` are the image's, and
    the latents' are an eighth, rounded down. With guidance the UNet's batch is twice ``batch_size``. Parameters,
    buffers and inputs are excluded; outputs are included, and alive at the trace's end. Under
    ``attention="eager"`` CLIP's SDPA takes the math path. ``switches`` are options set on the model. Raises
    ValueError for an unknown component.
    """
    if component not in _CALLS:
        raise ValueError(f"component {component!r}: expected one of {', '.join(_CALLS)}")
    sizes = Sizes(height, width, batch_size, prompt_length, guidance, dtype, switches)
    module, inputs, call = _CALLS[component](config, attention, sizes)
    tracer = Tracer({"": module}, inputs.values(), paths=paths, stage=component, onto=onto)
    with torch.no_grad(), sdpa_mode(attention), meta_as_gpu(), tracer:
        _output = call(**inputs)
    return tracer.tape


def trace_pipeline(checkpoint_folder: str | Path, options: Options, call: PipelineCall, paths: bool = True) -> Tape:
    """Trace the whole ``__call__`` of a real pipeline, every event marked with its stage.

    Stages are contiguous, in this order, and each begins where the one before ends:

    - ``text_encoder``: from the start until ``prepare_latents`` is called (encode_prompt and, in SD, the
      concatenation for guidance)
    - ``vae_encode`` (img2img; inpaint, with prepare_mask_latents) or ``prepare_latents`` (txt2img): that call, and
      the preparation of control images before it
    - ``unet``: the denoising loop, scheduler included, and the division by the scaling factor
    - ``vae_decode``: the call of ``vae.decode``, in SDXL from ``upcast_vae`` on where it is called
    - ``safety_checker``: until ``run_safety_checker`` returns; no events without one
    - ``postprocess``: the rest

    Image and mask inputs are float32 on the CPU, [batch_size, 3 or 1, height, width]; the output is PIL.
    Prompts are ``batch_size`` strings, or embeddings given as (excluded) inputs where ``prompt_length`` is
    over 77. ``strength`` None is the class's default.
    """
    length = call.prompt_length or DEFAULT_PROMPT_LENGTH
    with quiet():
        pipe = pipeline_of(checkpoint_folder, options, min(length, DEFAULT_PROMPT_LENGTH))
    pipe.set_progress_bar_config(disable=True)
    guided = call.guidance and pipe.unet.config.time_cond_proj_dim is None
    inputs = arguments(
        pipe,
        options.as_dict(),
        height=call.height,
        width=call.width,
        batch_size=call.batch_size,
        guidance_scale=GUIDED if call.guidance else UNGUIDED,
        prompt_embeds=embeddings(pipe, call.batch_size, length, guided, options.dtype),
    )
    tensors = [value for value in inputs.values() if isinstance(value, torch.Tensor)]
    tracer = Tracer(modules_of(pipe), tensors, paths=paths, stage="text_encoder")
    with quiet(), sdpa_mode(options.attention), meta_as_gpu(), _stages(pipe, options.pipeline, tracer), tracer:
        pipe(**inputs)
    return tracer.tape


def sdpa_mode(attention: str) -> SdpaMode:
    """Return the SDPA routing of an attention option: ``eager`` means the math path."""
    return SdpaMode("math" if attention == "eager" else attention)


def _placed(model: Any, sizes: Sizes) -> Any:
    """Return the model with the hooks of sequential offload where it is on; model offload does nothing to one call."""
    return offload_model(model) if dict(sizes.switches).get("offload") == "sequential" else model


def _text_encoder(config: Config, attention: str, sizes: Sizes) -> Call:
    module = _placed(build_text_encoder(config, sizes.dtype, sizes.switches), sizes)
    shape = (sizes.batch_size, sizes.prompt_length)
    return module, {"input_ids": torch.empty(shape, dtype=torch.int64, device="meta")}, module


def _vae_encode(config: Config, attention: str, sizes: Sizes) -> Call:
    vae = _placed(build_vae(config, sizes.dtype, attention, sizes.switches), sizes)
    return vae, {"x": sizes.image(vae.config.in_channels)}, lambda x: retrieve_latents(vae.encode(x))


def _unet(config: Config, attention: str, sizes: Sizes) -> Call:
    unet = _placed(build_unet(config, sizes.dtype, attention, sizes.switches), sizes)
    sizes = _doubled(config, sizes)
    inputs = _latent_inputs(unet.config, sizes)
    if (width := unet.config.time_cond_proj_dim) is not None:
        inputs["timestep_cond"] = sizes.empty(sizes.unet_batch, width)
    added = _added_conditions(unet.config, sizes) | _image_embeds(unet, sizes)

    def call(**inputs: torch.Tensor) -> object:
        return unet(**_grouped(inputs, added), return_dict=False)

    return unet, inputs | added, call


def _image_encoder(config: Config, attention: str, sizes: Sizes) -> Call:
    module = build_image_encoder(config, sizes.dtype)
    side = module.config.image_size
    images = dict(sizes.switches).get("ip_adapter_images", 1)
    return module, {"pixel_values": sizes.empty(images, module.config.num_channels, side, side)}, module


def _controlnet(config: Config, attention: str, sizes: Sizes) -> Call:
    module = build_controlnet(config, sizes.dtype, attention, sizes.switches)
    nets = list(getattr(module, "nets", [module]))
    own, count = nets[0].config, len(nets)
    sizes = _doubled(config, sizes)
    sizes = replace(sizes, guidance=sizes.guidance and not own.global_pool_conditions)
    inputs, added = _latent_inputs(own, sizes), _added_conditions(own, sizes)
    image = {"controlnet_cond": sizes.empty(sizes.unet_batch, 3, 8 * (sizes.height // 8), 8 * (sizes.width // 8))}

    def call(controlnet_cond: torch.Tensor, **inputs: torch.Tensor) -> object:
        images, scales = (controlnet_cond, 1.0) if count == 1 else ([controlnet_cond] * count, [1.0] * count)
        conditions = {"controlnet_cond": images, "conditioning_scale": scales}
        return module(**_grouped(inputs, added), **conditions, return_dict=False)

    return module, inputs | added | image, call


def _doubled(config: Config, sizes: Sizes) -> Sizes:
    """Return sizes without guidance for a UNet that takes the guidance scale as an input, as the pipelines do."""
    return replace(sizes, guidance=sizes.guidance and config.get("time_cond_proj_dim") is None)


def _latent_inputs(config: Any, sizes: Sizes) -> dict[str, torch.Tensor]:
    return {
        "sample": sizes.latents(sizes.unet_batch, config.in_channels),
        "timestep": torch.empty(1, dtype=torch.int64, device="meta"),
        "encoder_hidden_states": sizes.empty(sizes.unet_batch, sizes.prompt_length, config.cross_attention_dim),
    }


def _grouped(inputs: dict[str, torch.Tensor], added: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Return ``inputs`` with those of ``added`` as added_cond_kwargs."""
    named: dict[str, Any] = {name: inputs.pop(name) for name in list(inputs) if name in added}
    if images := [named.pop(name) for name in list(named) if name.startswith(IMAGE_EMBEDS)]:
        named["image_embeds"] = images
    return {**inputs, **({"added_cond_kwargs": named} if named else {})}


def _vae_decode(config: Config, attention: str, sizes: Sizes) -> Call:
    vae = _placed(build_vae(config, sizes.dtype, attention, sizes.switches), sizes)
    latents = sizes.latents(sizes.batch_size, vae.config.latent_channels)
    return vae, {"z": latents}, lambda z: vae.decode(z, return_dict=False)


def _safety_checker(config: Config, attention: str, sizes: Sizes) -> Call:
    module = build_safety_checker(config, sizes.dtype)
    side = module.config.vision_config.image_size
    inputs = {"clip_input": sizes.empty(sizes.batch_size, 3, side, side), "images": sizes.image(3)}
    return module, inputs, module


_CALLS: Mapping[str, Callable[[Config, str, Sizes], Call]] = {
    "text_encoder": _text_encoder,
    "image_encoder": _image_encoder,
    "vae_encode": _vae_encode,
    "controlnet": _controlnet,
    "unet": _unet,
    "vae_decode": _vae_decode,
    "safety_checker": _safety_checker,
}


def _added_conditions(config: Any, sizes: Sizes) -> dict[str, torch.Tensor]:
    """Return SDXL's pooled embeddings [2B, width] and time ids: six, five with an aesthetic score."""
    if config.addition_embed_type != "text_time":
        return {}
    inputs, side = config.projection_class_embeddings_input_dim, config.addition_time_embed_dim
    time_ids = 5 if inputs == config.cross_attention_dim + 5 * side else 6
    return {
        "text_embeds": sizes.empty(sizes.unet_batch, inputs - time_ids * side),
        "time_ids": sizes.empty(sizes.unet_batch, time_ids),
    }


def _image_embeds(unet: Any, sizes: Sizes) -> dict[str, torch.Tensor]:
    """Return what IP-Adapters project: [rows, images, P], or an encoder's hidden states [rows, images, S, C]."""
    if unet.config.encoder_hid_dim_type != "ip_image_proj":
        return {}
    given, found = dict(sizes.switches), dict[str, torch.Tensor]()
    encoder = read_image_encoder(given.get("ip_adapter"))
    rows = (sizes.unet_batch, given.get("ip_adapter_images", 1))
    for i, layer in enumerate(unet.encoder_hid_proj.image_projection_layers):
        plain = isinstance(layer, ImageProjection)
        shape = (encoder.projection_dim,) if plain else (encoder.tokens, encoder.hidden_size)
        found[f"{IMAGE_EMBEDS}{i}"] = sizes.empty(*rows, *shape)
    return found


@contextmanager
def _stages(pipe: Any, pipeline: str, tracer: Tracer) -> Iterator[None]:
    checked = getattr(pipe, "safety_checker", None) is not None
    prepared = "prepare_latents" if pipeline == "txt2img" else "vae_encode"
    marks = [
        (pipe, "prepare_image", prepared, prepared),
        (pipe, "prepare_control_image", prepared, prepared),
        (pipe, "prepare_latents", prepared, "vae_encode" if pipeline == "inpaint" else "unet"),
        (pipe, "prepare_mask_latents", "vae_encode", "unet"),
        (pipe, "upcast_vae", "vae_decode", "vae_decode"),
        (pipe.vae, "decode", "vae_decode", "safety_checker" if checked else "postprocess"),
        *([(pipe, "run_safety_checker", "safety_checker", "postprocess")] if checked else []),
    ]
    with ExitStack() as scope:
        for owner, name, during, after in marks:
            if hasattr(owner, name):
                scope.callback(marked(owner, name, tracer, during, after))
        yield
