"""The calls of the exactness contract, each on a tape of its own, and the parameters they touch.

A call's inputs exist before it, its outputs are alive at its end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod

from derivation.config import (
    Checkpoint,
    CLIPTextConfig,
    CLIPVisionConfig,
    ControlNetConfig,
    ImageProjectionConfig,
    UNet2DConditionConfig,
    VAEConfig,
    controlnet_files,
    read_controlnet,
    read_image_encoder,
)
from derivation.config.ip_adapter import PLAIN, image_encoder_file, ip_adapter_files, read_ip_adapter, tokens_of
from derivation.errors import DerivationError, shown
from derivation.options import Options
from derivation.tape.adapters import NO_ADAPTERS, Adapters
from derivation.tape.symbols import Size
from derivation.tape.tape import Tape, tape
from derivation.tape.tensor import SymTensor
from derivation.walk import models
from derivation.walk.adapters import Stamps, adapters, stamps
from derivation.walk.ops import given

# SDXL's added time ids: original size, crop, target size (pipeline_stable_diffusion_xl.py)
TIME_IDS = 6
# The models that load_lora_weights loads into.
LORA_MODELS = ("unet", "text_encoder", "text_encoder_2")
# UNet2DConditionModel's children in their order, by which load_ip_adapter counts the layers
PROCESSOR_ORDER = {"down_blocks": 0, "up_blocks": 1, "mid_block": 2}
# The calls that take two rows an image under guidance.
GUIDED = ("controlnet", "unet")


@dataclass(frozen=True, slots=True)
class Component:
    """One call on the active tape; ``model`` is the pipeline attribute that holds its parameters."""

    name: str
    model: str
    call: Callable[[Options, bool], object]


def components(checkpoint: Checkpoint, options: Options) -> dict[str, Component]:
    """Return the calls that ``checkpoint`` supports, in pipeline order."""
    found: list[Component] = []
    if (text := checkpoint.text_encoder) is not None:
        found.append(Component("text_encoder", "text_encoder", lambda o, g: _text(text, "text_encoder")))
    if (text_2 := checkpoint.text_encoder_2) is not None:
        found.append(Component("text_encoder_2", "text_encoder_2", lambda o, g: _text(text_2, "text_encoder_2")))
    if options.image_prompted:
        vision = read_image_encoder(options.ip_adapter)
        found.append(Component("image_encoder", "image_encoder", lambda o, g: _encode_image(vision, o)))
    if (vae := checkpoint.vae) is not None:
        found.append(Component("vae_encode", "vae", lambda o, g: _encode(vae)))
    if (unet := checkpoint.unet) is not None:
        pooled = None if checkpoint.text_encoder_2 is None else checkpoint.text_encoder_2.projection_dim
        if options.controlled:
            nets = controls(checkpoint, options)
            found.append(Component("controlnet", "controlnet", lambda o, g: _controlnet(unet, nets, o, g, pooled)))
        images = projections(checkpoint, options)
        found.append(Component("unet", "unet", lambda o, g: _unet(unet, images, o, g, pooled)))
    if vae is not None:
        found.append(Component("vae_decode", "vae", lambda o, g: _decode(vae, o)))
    if checkpoint.safety_checker is not None and options.safety_checker:
        checker = checkpoint.safety_checker
        found.append(Component("safety_checker", "safety_checker", lambda o, g: _check(checker, o)))
    return {component.name: component for component in found}


def images(options: Options) -> Size:
    """Return the images of one call: B prompts times num_images_per_prompt."""
    return tape().size("B") * options.num_images_per_prompt


def _input(*shape: Size, model: str = "") -> SymTensor:
    return given(shape, tape().options.dtype_of(model))


def _text(config: CLIPTextConfig, name: str) -> object:
    """``text_encoder(input_ids)``: input_ids [B, L]."""
    input_ids = given((tape().size("B"), tape().size("L")), "int64")
    model = models.CLIP_TEXT_MODELS[config.class_name]
    return model(name, input_ids, config=config)


def _encode_image(config: CLIPVisionConfig, options: Options) -> object:
    """``image_encoder(pixel_values)`` of one IP-Adapter's images."""
    pixel_values = _input(options.ip_adapter_images, config.num_channels, config.image_size, config.image_size)
    return models.CLIPVisionModelWithProjection("image_encoder", pixel_values, config=config)


def _encode(config: VAEConfig) -> object:
    """``vae.encode(x).latent_dist.sample()``: x [B, 3, H, W]."""
    factor = config.scale_factor
    sides = [factor * tape().size(side) for side in ("h0", "w0")]
    x = _input(tape().size("B"), config.in_channels, *sides, model="vae")
    with tape().scope("vae"):
        return models.encode(x, config)


def _decode(config: VAEConfig, options: Options) -> object:
    """``vae.decode(z, return_dict=False)``: z [images, C, h0, w0]."""
    z = _input(images(options), config.latent_channels, tape().size("h0"), tape().size("w0"), model="vae")
    with tape().scope("vae"):
        return models.decode(z, config)


def _unet(
    config: UNet2DConditionConfig,
    images: tuple[ImageProjectionConfig, ...],
    options: Options,
    guidance: bool,
    pooled: int | None,
) -> object:
    """``unet(sample, timestep, encoder_hidden_states, return_dict=False)``: two rows an image with guidance.

    A UNet that takes the guidance scale as an embedding (``timestep_cond``) has one row an image.
    """
    sample, embeds, added = _latent_inputs(config, options, guidance, pooled)
    timestep_cond, rows = None, sample.shape[0]
    tokens = (read_image_encoder(options.ip_adapter).tokens,) if images else ()
    image_embeds = tuple(
        _input(rows, options.ip_adapter_images, *(tokens if image.reads_hidden_states else ()), image.embed_dims)
        for image in images
    )
    if config.time_cond_proj_dim is not None:
        timestep_cond = _input(rows, config.time_cond_proj_dim)
    return models.UNet2DConditionModel(
        "unet",
        sample,
        given((1,), "int64"),
        embeds,
        added,
        image_embeds=image_embeds,
        projections=images,
        timestep_cond=timestep_cond,
        config=config,
    )


def controls(checkpoint: Checkpoint, options: Options) -> tuple[ControlNetConfig, ...]:
    """Return the ControlNets' configs: of the files named, a live pipeline's, else each made from the UNet.

    Raises DerivationError for one that does not fit the UNet.
    """
    unet = checkpoint.unet
    if unet is None:
        return ()
    live = f"{checkpoint.source}.controlnet.config"
    named = [(live, config) for config in checkpoint.controlnets]
    if options.controlnet is not None:
        named = [(file, read_controlnet(file)) for file in controlnet_files(options.controlnet)]
    elif len(named) != options.controlnets:
        return (ControlNetConfig.from_unet(unet),) * options.controlnets
    for file, config in named:
        config.require_fit(unet, file)
    return tuple(config for _, config in named)


def projections(checkpoint: Checkpoint, options: Options) -> tuple[ImageProjectionConfig, ...]:
    """Return the IP-Adapters' image projections: of the files named, a live pipeline's, else the plain one of tokens.

    Raises DerivationError for a file that does not fit the UNet or the image encoder.
    """
    unet = checkpoint.unet
    if unet is None or not options.image_prompted:
        return ()
    encoder, width = read_image_encoder(options.ip_adapter), unet.cross_attention_dim[0]
    live = checkpoint.ip_adapters
    if live and options.ip_adapter is None and options.ip_adapter_tokens == tokens_of(live, encoder.tokens):
        return live
    if options.ip_adapter is None:
        return (ImageProjectionConfig(PLAIN, encoder.projection_dim, width, options.ip_adapter_tokens or 0),)
    return _projections(checkpoint, options, stamps(options))


def cross_attentions(checkpoint: Checkpoint, options: Options) -> tuple[tuple[int, ...], ...]:
    """Return the shapes [C, K] of the UNet's to_k that read a prompt, in the order of its processors."""
    layers = lora_layers(checkpoint, options)
    ordered = sorted(layers, key=lambda path: PROCESSOR_ORDER.get(path.split(".")[1], 0))
    return tuple(layers[path] for path in ordered if path.startswith("unet.") and path.endswith(".attn2.to_k"))


@lru_cache(maxsize=64)
def _projections(checkpoint: Checkpoint, options: Options, _: Stamps) -> tuple[ImageProjectionConfig, ...]:
    named = options.ip_adapter or ""
    encoder, expected, found = read_image_encoder(named), cross_attentions(checkpoint, options), []
    for file in ip_adapter_files(named):
        adapter = read_ip_adapter(file)
        if adapter.attention != expected:
            said = f"to_k_ip of {shown(adapter.attention)}"
            raise DerivationError(f"{file}: {said} does not fit the UNet's to_k of {shown(expected)}")
        image = adapter.projection
        given = encoder.hidden_size if image.reads_hidden_states else encoder.projection_dim
        if image.embed_dims != given:
            raise DerivationError(
                f"{file}: it takes {image.embed_dims} channels, the image encoder of {image_encoder_file(named)} gives "
                f"{given} (supported: that encoder's folder, image_encoder, beside the file)"
            )
        found.append(image)
    return tuple(found)


def _controlnet(
    unet: UNet2DConditionConfig,
    configs: tuple[ControlNetConfig, ...],
    options: Options,
    guidance: bool,
    pooled: int | None,
) -> object:
    """``controlnet(sample, timestep, encoder_hidden_states, controlnet_cond, conditioning_scale, return_dict=False)``.

    controlnet_cond [rows, 3, 8 h0, 8 w0], a list of them for MultiControlNetModel.
    """
    guidance = guidance and not configs[0].global_pool_conditions
    sample, embeds, added = _latent_inputs(replace(unet, in_channels=unet.out_channels), options, guidance, pooled)
    sides = [[c.conditioning_factor * tape().size(side) for side in ("h0", "w0")] for c in configs]
    images = [_input(sample.shape[0], c.conditioning_channels, *s) for c, s in zip(configs, sides, strict=True)]
    return models.controlnet(sample, given((1,), "int64"), embeds, images, added, configs=configs)


def _latent_inputs(
    config: UNet2DConditionConfig, options: Options, guidance: bool, pooled: int | None
) -> tuple[SymTensor, SymTensor, tuple[SymTensor, SymTensor] | None]:
    """sample [rows, in_channels, h0, w0], encoder_hidden_states [rows, L, K], and SDXL's added conditions."""
    rows = images(options) * (2 if config.doubled(guidance) else 1)
    sample = _input(rows, config.in_channels, tape().size("h0"), tape().size("w0"))
    embeds = _input(rows, tape().size("L"), config.cross_attention_dim[0])
    added = _added_cond(config, rows, pooled) if config.addition_embed_type == "text_time" else None
    return sample, embeds, added


def _added_cond(config: UNet2DConditionConfig, rows: Size, pooled: int | None) -> tuple[SymTensor, SymTensor]:
    """text_embeds [rows, P] and time_ids [rows, T]: P + T addition_time_embed_dim is what the projection takes."""
    width, time = config.projection_class_embeddings_input_dim, config.addition_time_embed_dim
    assert width is not None
    assert time is not None
    pooled = width - TIME_IDS * time if pooled is None else pooled
    return _input(rows, pooled), _input(rows, (width - pooled) // time)


def _check(config: CLIPVisionConfig, options: Options) -> object:
    """``safety_checker(clip_input, images)``: clip_input [images, 3, S, S]."""
    side = config.image_size
    clip_input = _input(images(options), config.num_channels, side, side)
    return models.StableDiffusionSafetyChecker("safety_checker", clip_input, clip_input, config=config)


def lora(checkpoint: Checkpoint, options: Options) -> Adapters:
    """Return the LoRAs on the layers of a checkpoint's models; raises DerivationError for one that does not fit."""
    if options.lora is None and options.lora_rank is None:
        return NO_ADAPTERS
    return _lora(checkpoint, options, stamps(options))


@lru_cache(maxsize=64)
def _lora(checkpoint: Checkpoint, options: Options, _: Stamps) -> Adapters:
    return adapters(lora_layers(checkpoint, options), checkpoint, options)


def lora_layers(checkpoint: Checkpoint, options: Options) -> dict[str, tuple[int, ...]]:
    """Return the layers that a LoRA may be on: path -> shape of the weight."""
    plain = replace(options, lora=None, lora_rank=None, lora_fused=False, controlnets=0, controlnet=None)
    plain = replace(plain, ip_adapter=None, ip_adapter_images=1, ip_adapter_tokens=None)
    without = parameters(checkpoint, plain)
    entries = [entry for model in LORA_MODELS for entry in without.get(model, {}).items()]
    many = {path: shape for path, (shape, _) in entries if path.endswith(".weight") and len(shape) > 1}
    return {p.removesuffix(".weight"): shape for p, shape in many.items() if not p.endswith("_embedding.weight")}


# What neither adds nor changes a parameter.
UNREAD = ("pipeline", "attention", "gpu", "attention_slicing", "vae_slicing", "vae_tiling", "offload")


def parameters(checkpoint: Checkpoint, options: Options) -> dict[str, dict[str, tuple[tuple[int, ...], str]]]:
    """Return the parameters and buffers of each model: path -> (shape, dtype)."""
    defaults = Options()
    read = replace(options, **{name: getattr(defaults, name) for name in UNREAD})
    return _parameters(checkpoint, read, stamps(options))


@lru_cache(maxsize=64)
def _parameters(
    checkpoint: Checkpoint, options: Options, _: Stamps
) -> dict[str, dict[str, tuple[tuple[int, ...], str]]]:
    found: dict[str, dict[str, tuple[tuple[int, ...], str]]] = {}
    for component in components(checkpoint, options).values():
        recorded = Tape(options)
        with recorded.running(), recorded.adapted(lora(checkpoint, options)):
            component.call(options, False)
        found.setdefault(component.model, {}).update(recorded.parameters)
    return found


def is_buffer(entry: tuple[tuple[int, ...], str]) -> bool:
    """Return whether (shape, dtype) is a buffer's: those alone are int64."""
    return entry[1] == "int64"


def parameter_count(entries: Mapping[str, tuple[tuple[int, ...], str]]) -> int:
    """Return the number of parameters, buffers aside."""
    return sum(prod(entry[0]) for entry in entries.values() if not is_buffer(entry))
