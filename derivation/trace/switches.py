"""What a user switches on in diffusers' models, by the name of the option that stands for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import diffusers
import torch
import transformers
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.models.attention_processor import Attention, AttnProcessor, IPAdapterAttnProcessor
from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection
from diffusers.utils.peft_utils import set_weights_and_activate_adapters
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open

from derivation.config import read_image_encoder
from derivation.config.ip_adapter import ip_adapter_files
from derivation.config.lora import lora_files
from derivation.options import Options
from derivation.registry import Registry

Switch = Callable[[Any, Any], None]

SWITCHES: Registry[Switch] = Registry("option switch")
TEXT_ENCODERS = (transformers.CLIPTextModel, transformers.CLIPTextModelWithProjection)
# read by build_pipeline itself
PIPELINE_SWITCHES = ("vae_dtype", "offload", "controlnets", "controlnet", "ip_adapter_images")


def switch(*classes: type) -> Callable[[Switch], Switch]:
    """Register a function that sets the option of its name on a new model of one of the classes."""

    def register(apply: Switch) -> Switch:
        def applied(_: Switch) -> Switch:
            return lambda model, value: apply(model, value) if isinstance(model, classes) else None

        return SWITCHES.register(apply.__name__, applied)(apply)

    return register


def switch_on(model: Any, switches: Mapping[str, Any]) -> None:
    """Set every option on ``model``; raises KeyError for an option that no switch stands for."""
    for name, value in switches.items():
        if name not in PIPELINE_SWITCHES:
            SWITCHES[name](model, value)


def switches(options: Options) -> tuple[tuple[str, Any], ...]:
    """Return what is switched on of the options that models or pipelines have a switch for."""
    usual, known = Options().as_dict(), {*SWITCHES, *PIPELINE_SWITCHES}
    return tuple((name, value) for name, value in options.as_dict().items() if name in known and value != usual[name])


@switch(diffusers.AutoencoderKL, diffusers.AutoencoderTiny)
def vae_slicing(vae: Any, value: bool) -> None:
    """``vae.enable_slicing()``."""
    vae.use_slicing = value


@switch(diffusers.AutoencoderKL)
def vae_tiling(vae: Any, value: bool) -> None:
    """``vae.enable_tiling()``."""
    vae.use_tiling = value


@switch(diffusers.AutoencoderKL)
def tile_sample_min_size(vae: Any, value: int) -> None:
    """Set the sides of a tile, in pixels and in latents."""
    vae.tile_sample_min_size = value
    vae.tile_latent_min_size = value // 2 ** (len(vae.config.block_out_channels) - 1)


@switch(diffusers.AutoencoderKL)
def tile_overlap_factor(vae: Any, value: float) -> None:
    """Set the overlap of tiles."""
    vae.tile_overlap_factor = value


@switch(diffusers.UNet2DConditionModel, diffusers.ControlNetModel)
def attention_slicing(model: Any, value: str | int) -> None:
    """``model.set_attention_slice(value)``."""
    model.set_attention_slice(value)


@switch(diffusers.UNet2DConditionModel, *TEXT_ENCODERS)
def lora(model: Any, value: str) -> None:
    """``pipe.load_lora_weights`` for each file and ``pipe.set_adapters`` of all, as far as they concern ``model``.

    peft leaves the second adapter of a layer on the CPU where the first is on ``meta``: it is moved there.
    """
    sgm = {"unet_config": model.config} if getattr(model.config, "addition_embed_type", None) else {}
    for number, file in enumerate(lora_files(value)):
        state, alphas = StableDiffusionLoraLoaderMixin.lora_state_dict(file, **sgm)
        _load_lora(model, state, alphas, f"default_{number}")
    if names := list(getattr(model, "peft_config", ())):
        set_weights_and_activate_adapters(model, names, [1.0] * len(names))
    model.to("meta")


def _load_lora(model: Any, state: dict[str, torch.Tensor], alphas: dict[str, float] | None, name: str) -> None:
    loader = StableDiffusionLoraLoaderMixin
    if isinstance(model, diffusers.UNet2DConditionModel):
        loader.load_lora_into_unet(state, alphas, model, adapter_name=name, low_cpu_mem_usage=True)
        return
    # build_text_encoder gives transformers 5's CLIPTextModel an attribute by which diffusers knows older ones
    alias = vars(model).pop("text_model", None)
    prefix = "text_encoder_2" if isinstance(model, transformers.CLIPTextModelWithProjection) else "text_encoder"
    try:
        loader.load_lora_into_text_encoder(
            state, alphas, model, prefix=prefix, adapter_name=name, low_cpu_mem_usage=True
        )
    finally:
        if alias is not None:
            object.__setattr__(model, "text_model", alias)


@switch(diffusers.UNet2DConditionModel)
def lora_rank(unet: Any, value: int) -> None:
    """``unet.add_adapter`` with the targets of diffusers' training scripts."""
    unet.add_adapter(LoraConfig(r=value, lora_alpha=value, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))


@switch(diffusers.UNet2DConditionModel, *TEXT_ENCODERS)
def lora_fused(model: Any, value: bool) -> None:
    """``pipe.fuse_lora()``, which merges on ``meta`` too (lora_base.py: fuse_lora)."""
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge()


@switch(diffusers.UNet2DConditionModel)
def ip_adapter(unet: Any, value: str) -> None:
    """``unet._load_ip_adapter_weights`` of the files as ``load_ip_adapter`` reads them, the values left out."""
    _with_image_prompts(unet, [_state_dict(file) for file in ip_adapter_files(value)])


@switch(diffusers.UNet2DConditionModel)
def ip_adapter_tokens(unet: Any, value: int) -> None:
    """``unet._load_ip_adapter_weights``, and what it does not choose itself: other than 4 tokens."""
    width, cross_dim = read_image_encoder().projection_dim, unet.config.cross_attention_dim
    _with_image_prompts(unet, [_ip_adapter(unet, width)])
    if value != 4:
        unet.encoder_hid_proj = MultiIPAdapterImageProjection([ImageProjection(width, cross_dim, value)])


def _with_image_prompts(unet: Any, states: list[dict[str, dict[str, torch.Tensor]]]) -> None:
    """Load IP-Adapters; eager processors stay eager, which diffusers does not choose itself."""
    cross = [m for name, m in unet.named_modules() if isinstance(m, Attention) and name.endswith("attn2")]
    eager = isinstance(cross[0].processor, AttnProcessor)
    unet._load_ip_adapter_weights(states, low_cpu_mem_usage=False)
    if not eager:
        return
    for attention in cross:
        width, tokens = unet.config.cross_attention_dim, attention.processor.num_tokens
        attention.set_processor(IPAdapterAttnProcessor(attention.inner_dim, width, tokens))
    for module in unet.encoder_hid_proj.modules():
        if isinstance(module, Attention):
            module.set_processor(AttnProcessor())


def _state_dict(file: str) -> dict[str, dict[str, torch.Tensor]]:
    """loaders/ip_adapter.py (load_ip_adapter), on ``meta``."""
    found: dict[str, dict[str, torch.Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    with safe_open(file, framework="pt", device="cpu") as opened:
        for key in opened.keys():  # noqa: SIM118 (it is no mapping)
            part, _, name = key.partition(".")
            found[part][name] = torch.empty(opened.get_slice(key).get_shape())
    return found


def _ip_adapter(unet: Any, width: int) -> dict[str, dict[str, torch.Tensor]]:
    """Return a state dict as ip-adapter_sd15 has it, for ``unet`` and image embeddings of ``width``."""
    cross_dim = unet.config.cross_attention_dim
    names = (name for name in unet.attn_processors if name.endswith("attn2.processor"))
    dims = [unet.get_submodule(name.removesuffix(".processor")).inner_dim for name in names]
    keys = {
        f"{2 * i + 1}.{key}.weight": torch.empty(dim, cross_dim)
        for i, dim in enumerate(dims)
        for key in ("to_k_ip", "to_v_ip")
    }
    projection = {"proj.weight": torch.empty(4 * cross_dim, width), "proj.bias": torch.empty(4 * cross_dim)}
    norm = {f"norm.{name}": torch.empty(cross_dim) for name in ("weight", "bias")}
    return {"image_proj": projection | norm, "ip_adapter": keys}


@switch(diffusers.UNet2DConditionModel, diffusers.AutoencoderKL, diffusers.AutoencoderTiny)
def channels_last(model: Any, value: bool) -> None:
    """``model.to(memory_format=torch.channels_last)``."""
    model.to(memory_format=torch.channels_last)
