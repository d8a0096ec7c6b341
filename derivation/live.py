"""What a live pipeline says of itself: the options that it runs with, read off its models without importing torch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from derivation.errors import DerivationError, shown
from derivation.options import DTYPES, TILE_OVERLAP_FACTOR, Options, options_of

Models = Mapping[str, Any]
Reader = Callable[[Any, Models], Any]

MODELS = ("text_encoder", "text_encoder_2", "vae", "unet", "safety_checker")
# diffusers' attention processors by class name, and the option they stand for; None: F.scaled_dot_product_attention
PROCESSORS: dict[str, str | None] = {
    "AttnProcessor": "eager",
    "AttnProcessor2_0": None,
    "XFormersAttnProcessor": "efficient",
    "IPAdapterAttnProcessor": "eager",
    "IPAdapterAttnProcessor2_0": None,
    "IPAdapterXFormersAttnProcessor": "efficient",
}
SLICED = "SlicedAttnProcessor"
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
# free_u: what enable_freeu sets on the up blocks of a UNet
FREEU = ("s1", "s2", "b1", "b2")
# ControlNetModel.from_unet: what it copies from the UNet, and its own defaults
FROM_UNET = (
    *("in_channels", "down_block_types", "block_out_channels", "layers_per_block", "cross_attention_dim"),
    *("transformer_layers_per_block", "attention_head_dim", "norm_num_groups", "use_linear_projection"),
    *("upcast_attention", "addition_embed_type", "addition_time_embed_dim", "projection_class_embeddings_input_dim"),
    "mid_block_type",
)
CONTROLNET = {"conditioning_embedding_out_channels": (16, 32, 96, 256), "controlnet_conditioning_channel_order": "rgb"}

READERS: dict[str, Reader] = {}


def live_options(pipe: Any, **given: Any) -> Options:
    """Return the options that ``pipe`` runs with, ``given`` ones as they are; raises DerivationError for others."""
    models = models_of(pipe)
    _refuse(pipe, models)
    found = {name: read(pipe, models) for name, read in READERS.items() if name not in given}
    return options_of({**found, **given})


def models_of(pipe: Any) -> dict[str, Any]:
    """Return the pipeline's models by name."""
    models = {name: _inner(getattr(pipe, name, None)) for name in MODELS}
    return {name: model for name, model in models.items() if model is not None}


def first_parameter(model: Any) -> Callable[[], Any]:
    """Return how to get at a model's first parameter; at the model itself where it has none."""
    path = next((name for name, _ in _called(model, "named_parameters")), None)
    if path is None:
        return lambda: model
    *scope, leaf = path.split(".")
    for name in scope:
        model = getattr(model, name)
    return lambda: getattr(model, leaf)


def attentions(models: Iterable[Any]) -> Iterator[Any]:
    """Yield the attention modules of the UNet and the VAE."""
    for model in models:
        yield from (module for module in _called(model, "modules") if hasattr(module, "processor"))


def option(read: Reader) -> Reader:
    """Register how the option of the function's name is read."""
    READERS[read.__name__] = read
    return read


@option
def pipeline(pipe: Any, models: Models) -> str:
    """The task, by the pipeline's class."""
    name = type(pipe).__name__
    return "img2img" if "Img2Img" in name else "inpaint" if "Inpaint" in name else "txt2img"


@option
def dtype(pipe: Any, models: Models) -> str:
    """The type of every model's weights."""
    dtypes = {name: getattr(first_parameter(model)(), "dtype", None) for name, model in models.items()}
    found = {str(dtype).removeprefix("torch.") for dtype in dtypes.values()}
    if len(found) != 1 or not found <= set(DTYPES):
        raise _unsupported("dtype", shown(dtypes), f"all one of {', '.join(DTYPES)}")
    return found.pop()


@option
def attention(pipe: Any, models: Models) -> str:
    """What the processors of UNet and VAE call, sliced ones of the UNet aside."""
    names = {
        type(module.processor).__name__
        for name, model in models.items()
        for module in attentions([model])
        if (name, type(module.processor).__name__) != ("unet", SLICED)
    }
    backends = {PROCESSORS[name] or _sdpa_backend() for name in names & PROCESSORS.keys()} or {_sdpa_backend()}
    if len(backends) != 1 or not names <= PROCESSORS.keys():
        raise _unsupported("attn_processors", sorted(names), f"one of {', '.join(PROCESSORS)}; {SLICED} on the UNet")
    return backends.pop()


@option
def attention_slicing(pipe: Any, models: Models) -> str | int | None:
    """"auto", "max" or the slice size of the UNet's SlicedAttnProcessors."""
    modules = list(attentions([models.get("unet")]))
    sliced = [module for module in modules if type(module.processor).__name__ == SLICED]
    if not sliced:
        return None
    sizes = [module.processor.slice_size for module in sliced]
    if len(sliced) == len(modules):
        if sizes == [module.sliceable_head_dim // 2 for module in sliced]:
            return "auto"
        if len(set(sizes)) == 1:
            return "max" if sizes[0] == 1 else int(sizes[0])
    raise _unsupported("slice_size", sizes, "enable_attention_slicing of the whole pipeline, with one size")


@option
def safety_checker(pipe: Any, models: Models) -> bool:
    """Whether there is one."""
    return "safety_checker" in models


@option
def vae_slicing(pipe: Any, models: Models) -> bool:
    """Whether ``vae.enable_slicing`` was called."""
    return bool(getattr(models.get("vae"), "use_slicing", False))


@option
def vae_tiling(pipe: Any, models: Models) -> bool:
    """Whether ``vae.enable_tiling`` was called."""
    return bool(getattr(models.get("vae"), "use_tiling", False))


@option
def tile_sample_min_size(pipe: Any, models: Models) -> int | None:
    """The VAE's attribute, None where it is its config's sample_size."""
    vae = models.get("vae")
    if (side := getattr(vae, "tile_sample_min_size", None)) is None:
        return None
    default, levels = _config(vae, "sample_size"), len(_config(vae, "block_out_channels"))
    pixels = side[0] if isinstance(side, list | tuple) else side
    latent, expected = vae.tile_latent_min_size, pixels // (1 << (levels - 1))  # type: ignore[union-attr]
    if latent != expected:
        raise _unsupported("tile_latent_min_size", latent, f"{expected}, as tile_sample_min_size = {side}")
    return None if side == default else int(pixels)


@option
def tile_overlap_factor(pipe: Any, models: Models) -> float:
    """The VAE's attribute."""
    return float(getattr(models.get("vae"), "tile_overlap_factor", TILE_OVERLAP_FACTOR))


@option
def channels_last(pipe: Any, models: Models) -> bool:
    """Whether every convolution of UNet and VAE has its weight in torch.channels_last."""
    found = {name: _channels_last(models[name]) for name in ("unet", "vae") if name in models}
    formats = set().union(*found.values())
    if len(formats) > 1:
        raise _unsupported("torch.channels_last", "on some weights", "on all weights of UNet and VAE, or on none")
    return formats == {True}


def _channels_last(model: Any) -> set[bool]:
    """Return whether [out, in, kh, kw] weights have stride 1 along their channels, where that can be told."""
    weights = [p for _, p in _called(model, "named_parameters") if len(getattr(p, "shape", ())) == 4]
    return {p.stride()[1] == 1 for p in weights if p.shape[1] > 1 and p.shape[2] * p.shape[3] > 1}


@option
def offload(pipe: Any, models: Models) -> str | None:
    """What accelerate's hooks say: ``enable_model_cpu_offload``, ``enable_sequential_cpu_offload`` or neither."""
    excluded = getattr(pipe, "_exclude_from_cpu_offload", ())
    found = {name: _offload(model) for name, model in models.items() if name not in excluded}
    kinds = set(found.values()) or {None}
    if len(kinds) != 1 or "device_map" in kinds:
        supported = "enable_model_cpu_offload or enable_sequential_cpu_offload of the whole pipeline"
        raise _unsupported("offload", found, supported)
    return kinds.pop()


def _offload(model: Any) -> str | None:
    """accelerate/hooks.py: CpuOffload on a model; AlignDevicesHook on every module, offload set on those it moves."""
    names = {type(hook).__name__ for hook in _hooks(model)}
    if "CpuOffload" in names:
        return "model"
    if "AlignDevicesHook" not in names:
        return None
    moved = any(getattr(hook, "offload", False) for module in _called(model, "modules") for hook in _hooks(module))
    return "sequential" if moved else "device_map"


def _hooks(module: Any) -> list[Any]:
    hook = getattr(module, "_hf_hook", None)
    return [] if hook is None else list(getattr(hook, "hooks", (hook,)))


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
        supported = f"one of one rank, on, without DoRA, on {', '.join(PROJECTIONS)} of all {len(heads)} UNet attentions"
        raise _unsupported("LoRA", said, supported)
    return int(ranks.pop())


@option
def lora_fused(pipe: Any, models: Models) -> bool:
    """Whether ``fuse_lora`` merged the LoRA into the weights."""
    merged = {bool(layer.merged) for layer in _lora(models).values()}
    if len(merged) > 1:
        raise _unsupported("fuse_lora", "of some layers", "of all layers, or of none")
    return merged == {True}


def _lora(models: Models) -> dict[str, Any]:
    """Return peft's layers in the UNet by path; raises DerivationError where another model has one."""
    found = {name: dict(tuners(model)) for name, model in models.items()}
    if others := [name for name, layers in found.items() if layers and name != "unet"]:
        raise _unsupported("LoRA", f"on {others[0]}", "on the UNet alone")
    return found.get("unet", {})


def tuners(model: Any) -> Iterator[tuple[str, Any]]:
    """Yield peft's layers of a model by path."""
    for name, module in _called(model, "named_modules"):
        if any(cls.__name__ == "BaseTunerLayer" for cls in type(module).__mro__):
            yield name, module


@option
def controlnets(pipe: Any, models: Models) -> int:
    """How many ControlNets there are, each of the UNet's architecture."""
    controlnet = _inner(getattr(pipe, "controlnet", None))
    if controlnet is None:
        return 0
    nets = [_inner(net) for net in getattr(controlnet, "nets", [controlnet])]
    for net in nets:
        if (name := type(net).__name__) != "ControlNetModel":
            raise _unsupported("controlnet", name, "ControlNetModel")
        expected = {key: _config(models["unet"], key) for key in FROM_UNET}
        for key, value in {**expected, **CONTROLNET}.items():
            if (given := _config(net, key)) != value:
                raise _unsupported(f"controlnet.config.{key}", shown(given), shown(value))
    return len(nets)


@option
def ip_adapter_tokens(pipe: Any, models: Models) -> int | None:
    """How many tokens the one ImageProjection of ``load_ip_adapter`` makes."""
    projection = getattr(models.get("unet"), "encoder_hid_proj", None)
    if projection is None:
        return None
    layers = [type(layer).__name__ for layer in getattr(projection, "image_projection_layers", ())]
    if layers != ["ImageProjection"]:
        raise _unsupported("IP-Adapter", layers or type(projection).__name__, "one ImageProjection")
    return int(projection.image_projection_layers[0].num_image_text_embeds)


def _refuse(pipe: Any, models: Models) -> None:
    """Raise for what changes the memory of a call and has no option."""
    if any(getattr(block, name, None) is not None for block in up_blocks(models) for name in FREEU):
        raise _unsupported("enable_freeu", "on", "FreeU off, by pipe.disable_freeu()")
    if (device_map := getattr(pipe, "hf_device_map", None)) is not None:
        raise _unsupported("device_map", shown(device_map), "none, by pipe.reset_device_map()")
    for name, model in models.items():
        registry = getattr(model, "_diffusers_hook", None)
        if hooks := list(getattr(registry, "hooks", ())):
            raise _unsupported(f"{name}'s hooks", hooks, "none")
        backend = getattr(getattr(model, "config", None), "_attn_implementation", None)
        if name.startswith("text_encoder") and backend not in (None, "sdpa"):
            raise _unsupported(f"{name}'s attn_implementation", shown(backend), "sdpa")


def up_blocks(models: Models) -> Iterator[Any]:
    """Yield the up blocks of the UNet."""
    yield from getattr(models.get("unet"), "up_blocks", ())


def _inner(model: Any) -> Any:
    """Return the module that torch.compile wrapped."""
    return getattr(model, "_orig_mod", model)


def _called(model: Any, name: str) -> Iterator[Any]:
    """Yield from the method ``name``, from nothing where there is none."""
    method = getattr(model, name, None)
    yield from method() if callable(method) else ()


def _config(model: Any, key: str) -> Any:
    return model.config.get(key)


def _sdpa_backend() -> str:
    """Return the backend that F.scaled_dot_product_attention takes: flash since sm80, else memory-efficient."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0):
        return "flash"
    return "efficient"


def _unsupported(key: str, value: object, supported: str) -> DerivationError:
    return DerivationError(f"{key} = {value} is not supported (supported: {supported})")
