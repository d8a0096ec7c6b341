"""How each option is read that a pipeline has without adapters."""

from __future__ import annotations

import sys
from typing import Any

from derivation.config.checkpoint import task_of
from derivation.errors import shown
from derivation.options.choices import DTYPES, TILE_OVERLAP_FACTOR
from derivation.options.live.modules import Models, attentions, called, config, first_parameter, option, unsupported

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


@option
def pipeline(pipe: Any, models: Models) -> str:
    """The task, by the pipeline's class."""
    return task_of(type(pipe).__name__)


@option
def dtype(pipe: Any, models: Models) -> str:
    """The type of every model's weights, the VAE's aside where there are others."""
    others = {name: model for name, model in models.items() if name != "vae"}
    dtypes = {name: getattr(first_parameter(model)(), "dtype", None) for name, model in (others or models).items()}
    found = {str(dtype).removeprefix("torch.") for dtype in dtypes.values()}
    if len(found) != 1 or not found <= set(DTYPES):
        raise unsupported("dtype", shown(dtypes), f"all one of {', '.join(DTYPES)}")
    return found.pop()


@option
def vae_dtype(pipe: Any, models: Models) -> str | None:
    """The type of the VAE's weights where it is another one than the others'."""
    if "vae" not in models:
        return None
    found = str(getattr(first_parameter(models["vae"])(), "dtype", None)).removeprefix("torch.")
    return None if found == dtype(pipe, models) else found


@option
def attention(pipe: Any, models: Models) -> str:
    """What the processors of UNet, ControlNets and VAE call, aside from those that ``attention_slicing`` reads."""
    sliceable = slices(models)
    names = {
        type(module.processor).__name__
        for name, model in models.items()
        for module in attentions([model])
        if name not in sliceable or type(module.processor).__name__ != SLICED
    }
    backends = {PROCESSORS[name] or sdpa_backend() for name in names & PROCESSORS.keys()} or {sdpa_backend()}
    if len(backends) != 1 or not names <= PROCESSORS.keys():
        supported = f"one of {', '.join(PROCESSORS)}; {SLICED} by enable_attention_slicing"
        raise unsupported("attn_processors", sorted(names), supported)
    return backends.pop()


def slices(models: Models) -> Models:
    """Return the models that ``enable_attention_slicing`` reaches: those with ``set_attention_slice``."""
    return {name: model for name, model in models.items() if hasattr(model, "set_attention_slice")}


@option
def attention_slicing(pipe: Any, models: Models) -> str | int | None:
    """ "auto", "max" or the slice size of the SlicedAttnProcessors of UNet and ControlNet."""
    modules = list(attentions(slices(models).values()))
    sliced = [module for module in modules if type(module.processor).__name__ == SLICED]
    if not sliced:
        return None
    sizes = [module.processor.slice_size for module in sliced]
    if len(sliced) == len(modules):
        if sizes == [module.sliceable_head_dim // 2 for module in sliced]:
            return "auto"
        if len(set(sizes)) == 1:
            return "max" if sizes[0] == 1 else int(sizes[0])
    raise unsupported("slice_size", sizes, "enable_attention_slicing of the whole pipeline, with one size")


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
    default, levels = config(vae, "sample_size"), len(config(vae, "block_out_channels"))
    pixels = side[0] if isinstance(side, list | tuple) else side
    latent, expected = vae.tile_latent_min_size, pixels // (1 << (levels - 1))  # type: ignore[union-attr]
    if latent != expected:
        raise unsupported("tile_latent_min_size", latent, f"{expected}, as tile_sample_min_size = {side}")
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
    controlnet = models.get("controlnet")
    if len(formats) > 1 or True in _channels_last(controlnet):
        supported = "on all weights of UNet and VAE and none of a ControlNet's, or on none"
        raise unsupported("torch.channels_last", "on some weights", supported)
    return formats == {True}


def _channels_last(model: Any) -> set[bool]:
    """Return whether [out, in, kh, kw] weights have stride 1 along their channels, where that can be told."""
    weights = [p for _, p in called(model, "named_parameters") if len(getattr(p, "shape", ())) == 4]
    return {p.stride()[1] == 1 for p in weights if p.shape[1] > 1 and p.shape[2] * p.shape[3] > 1}


@option
def offload(pipe: Any, models: Models) -> str | None:
    """What accelerate's hooks say: ``enable_model_cpu_offload``, ``enable_sequential_cpu_offload`` or neither."""
    excluded = getattr(pipe, "_exclude_from_cpu_offload", ())
    found = {name: _offload(model) for name, model in models.items() if name not in excluded}
    kinds = set(found.values()) or {None}
    if len(kinds) != 1 or "device_map" in kinds:
        supported = "enable_model_cpu_offload or enable_sequential_cpu_offload of the whole pipeline"
        raise unsupported("offload", found, supported)
    return kinds.pop()


def _offload(model: Any) -> str | None:
    """accelerate/hooks.py: CpuOffload on a model; AlignDevicesHook on every module, offload set on those it moves."""
    names = {type(hook).__name__ for hook in _hooks(model)}
    if "CpuOffload" in names:
        return "model"
    if "AlignDevicesHook" not in names:
        return None
    moved = any(getattr(hook, "offload", False) for module in called(model, "modules") for hook in _hooks(module))
    return "sequential" if moved else "device_map"


def _hooks(module: Any) -> list[Any]:
    hook = getattr(module, "_hf_hook", None)
    return [] if hook is None else list(getattr(hook, "hooks", (hook,)))


def sdpa_backend() -> str:
    """Return the backend that F.scaled_dot_product_attention takes: flash since sm80, else memory-efficient."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0):
        return "flash"
    return "efficient"
