"""A checkpoint as plain JSON values and back, through the same checks as config files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from typing import Any

from ..errors import DerivationError
from .checkpoint import PIPELINE_CLASSES, Checkpoint
from .checks import At, Check, flag, one_of, text
from .clip import clip_text_config, clip_vision_config
from .controlnet import UNET_ALONE, ControlNetConfig, controlnet_config
from .ip_adapter import projection_of
from .models import unet_config, vae_config
from .schedulers import SchedulerConfig, scheduler_config


def to_document(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return a checkpoint's configs as JSON values."""
    document = {field.name: getattr(checkpoint, field.name) for field in fields(checkpoint)}
    for name in READERS:
        part = document[name]
        if isinstance(part, SchedulerConfig):
            document[name] = {"class_name": part.class_name, **part.options}
        elif part is not None:
            document[name] = asdict(part)
    document["ip_adapters"] = [asdict(part) for part in checkpoint.ip_adapters]
    document["controlnets"] = [_controlnet(part) for part in checkpoint.controlnets]
    return document


def _controlnet(part: ControlNetConfig) -> dict[str, Any]:
    """Return the config as its class takes it."""
    one = {name: getattr(part, name)[0] for name in ("layers_per_block", "cross_attention_dim")}
    return {name: value for name, value in {**asdict(part), **one}.items() if name not in UNET_ALONE}


def from_document(document: Mapping[str, Any]) -> Checkpoint:
    """Return the checkpoint of ``to_document``; raises DerivationError for anything else."""
    names = {field.name for field in fields(Checkpoint)}
    if not isinstance(document, Mapping) or {*document, "controlnets", "ip_adapters"} != names:
        raise DerivationError(f"checkpoint: expected an object with the keys {', '.join(sorted(names))}")
    nets, images = (document.get(name, ()) for name in ("controlnets", "ip_adapters"))
    values = {**document, "controlnets": tuple(map(controlnet_config, nets))}
    values["ip_adapters"] = tuple(map(projection_of, images))
    for name, check in PLAIN.items():
        check(values[name], At("checkpoint", name))
    for name, read in READERS.items():
        if values[name] is not None:
            values[name] = read(dict(values[name]))
    return Checkpoint(**values)


def _named(read: Callable[..., Any]) -> Callable[[dict[str, Any]], Any]:
    return lambda part: read(part, class_name=part.pop("class_name", None))


PLAIN: dict[str, Check[Any]] = {
    "name": text,
    "source": text,
    "pipeline_class": one_of("", *PIPELINE_CLASSES),
    "force_zeros_for_empty_prompt": flag,
    "requires_aesthetics_score": flag,
    "requires_safety_checker": flag,
}
READERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "unet": unet_config,
    "vae": lambda part: vae_config(part, class_name=part.pop("class_name", "AutoencoderKL")),
    "text_encoder": _named(clip_text_config),
    "text_encoder_2": _named(clip_text_config),
    "safety_checker": clip_vision_config,
    "scheduler": _named(scheduler_config),
}
