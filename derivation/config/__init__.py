"""Config files in diffusers' format, read into frozen dataclasses; anything unknown raises."""

from __future__ import annotations

from .checkpoint import Checkpoint, image_encoder
from .clip import CLIPTextConfig, CLIPVisionConfig, clip_text_config, clip_vision_config
from .models import (
    VAE_SCALE_FACTOR,
    AutoencoderKLConfig,
    ControlNetConfig,
    UNet2DConditionConfig,
    unet_config,
    vae_config,
)
from .schedulers import SchedulerConfig, scheduler_config
from .sources import bundled, is_live, load

__all__ = [
    "VAE_SCALE_FACTOR",
    "AutoencoderKLConfig",
    "CLIPTextConfig",
    "CLIPVisionConfig",
    "Checkpoint",
    "ControlNetConfig",
    "SchedulerConfig",
    "UNet2DConditionConfig",
    "bundled",
    "clip_text_config",
    "clip_vision_config",
    "image_encoder",
    "is_live",
    "load",
    "scheduler_config",
    "unet_config",
    "vae_config",
]
