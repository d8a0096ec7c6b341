"""LoRA, ControlNets and IP-Adapter, as peft's and diffusers' loaders leave them in a pipeline."""

from __future__ import annotations

from typing import Any

from derivation.config import clip_vision_config, read_image_encoder
from derivation.config.ip_adapter import IMAGE_ENCODER, live_projection, tokens_of
from derivation.options.live.modules import Models, inner, option, tuners, unsupported

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")


@option
def lora(pipe: Any, models: Models) -> None:
    """No file: what one left in the models is read off their layers."""


@option
def lora_rank(pipe: Any, models: Models) -> int | None:
    """The rank of the one LoRA on every attention projection of the UNet."""
    layers = _lora(models)
    if not layers:
        return None
    unet = models["unet"]
    heads = [name for name, module in unet.named_modules() if hasattr(module, "processor")]
    expected = {f"{name}.{projection}" for name in heads for projection in PROJECTIONS}
    ranks = {rank for layer in layers.values() for rank in layer.r.values()}
    adapters = {name for layer in layers.values() for name in layer.r}
    odd = {
        "DoRA": any(any(layer.use_dora.values()) for layer in layers.values()),
        "disabled": any(layer.disable_adapters for layer in layers.values()),
    }
    if len(ranks) != 1 or len(adapters) != 1 or any(odd.values()) or layers.keys() != expected:
        said = f"{len(adapters)} adapters of rank {sorted(ranks)} on {len(layers)} layers"
        said = ", ".join([said, *(name for name, found in odd.items() if found)])
        where = f"{', '.join(PROJECTIONS)} of all {len(heads)} attentions of the UNet"
        supported = f"one of one rank, enabled, without DoRA, on {where}"
        raise unsupported("LoRA", said, supported)
    return int(ranks.pop())


@option
def lora_fused(pipe: Any, models: Models) -> bool:
    """Whether ``fuse_lora`` merged the LoRA into the weights."""
    merged = {bool(layer.merged) for layer in _lora(models).values()}
    if len(merged) > 1:
        raise unsupported("fuse_lora", "of some layers", "of all layers, or of none")
    return merged == {True}


def _lora(models: Models) -> dict[str, Any]:
    """Return peft's layers in the UNet by path; raises DerivationError where another model has one."""
    found = {name: dict(tuners(model)) for name, model in models.items()}
    if others := [name for name, layers in found.items() if layers and name != "unet"]:
        raise unsupported("LoRA", f"on {others[0]}", "on the UNet alone")
    return found.get("unet", {})


@option
def controlnets(pipe: Any, models: Models) -> int:
    """How many ControlNets there are."""
    if (controlnet := models.get("controlnet")) is None:
        return 0
    nets = [inner(net) for net in getattr(controlnet, "nets", [controlnet])]
    for net in nets:
        if (name := type(net).__name__) != "ControlNetModel":
            raise unsupported("controlnet", name, "ControlNetModel")
    return len(nets)


@option
def controlnet(pipe: Any, models: Models) -> None:
    """No file: a live pipeline has the configs of its ControlNets."""


@option
def ip_adapter(pipe: Any, models: Models) -> None:
    """No file: what one left in the models is read off their layers."""


@option
def ip_adapter_tokens(pipe: Any, models: Models) -> int | None:
    """How many tokens the image projections of ``load_ip_adapter`` make of an image, together."""
    projection = getattr(models.get("unet"), "encoder_hid_proj", None)
    if projection is None:
        return None
    layers = list(getattr(projection, "image_projection_layers", ()))
    if not layers:
        raise unsupported("IP-Adapter", type(projection).__name__, "image projections of load_ip_adapter")
    _check_encoder(models.get("image_encoder"))
    configs = [live_projection(layer, "unet.encoder_hid_proj") for layer in layers]
    return tokens_of(configs, read_image_encoder().tokens)


def _check_encoder(encoder: Any) -> None:
    """Raise unless the image encoder is the one that the published IP-Adapters for ViT-H read."""
    name = type(encoder).__name__
    if name != "CLIPVisionModelWithProjection":
        raise unsupported("image_encoder", name, "CLIPVisionModelWithProjection, with an IP-Adapter")
    if clip_vision_config(encoder.config.to_dict(), "image_encoder.config") != read_image_encoder():
        said = f"of {encoder.config.num_hidden_layers} layers, {encoder.config.hidden_size} wide"
        raise unsupported("image_encoder", said, f"that of h94/IP-Adapter's {'/'.join(IMAGE_ENCODER.parts[-3:-1])}")
