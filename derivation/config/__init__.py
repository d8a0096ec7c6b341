"""Config files in diffusers' format, read into frozen dataclasses; anything unknown raises."""

from __future__ import annotations

from .checkpoint import Checkpoint, bundled, load
from .clip import CLIPTextConfig, CLIPVisionConfig, clip_text_config, clip_vision_config
from .models import AutoencoderKLConfig, UNet2DConditionConfig, unet_config, vae_config
from .schedulers import SchedulerConfig, scheduler_config

__all__ = [
    "AutoencoderKLConfig",
    "CLIPTextConfig",
    "CLIPVisionConfig",
    "Checkpoint",
    "SchedulerConfig",
    "UNet2DConditionConfig",
    "bundled",
    "clip_text_config",
    "clip_vision_config",
    "load",
    "scheduler_config",
    "unet_config",
    "vae_config",
]
