"""Config files in diffusers' format, read into frozen dataclasses; anything unknown raises."""

from __future__ import annotations

from .checkpoint import Checkpoint, OtherPipeline
from .clip import CLIPTextConfig, CLIPVisionConfig, clip_text_config, clip_vision_config
from .controlnet import ControlNetConfig, controlnet_config, controlnet_files, read_controlnet
from .ip_adapter import ImageProjectionConfig, read_image_encoder
from .models import (
    VAE_SCALE_FACTOR,
    AutoencoderKLConfig,
    AutoencoderTinyConfig,
    UNet2DConditionConfig,
    VAEConfig,
    unet_config,
    vae_config,
)
from .schedulers import SchedulerConfig, scheduler_config
from .sources import bundled, is_live, load
from .traced import LAYERWISE, TracedFolder, bundled_traced, hub_folder, is_live_traced, layerwise_hooks, traced_folder

__all__ = [
    "LAYERWISE",
    "VAE_SCALE_FACTOR",
    "AutoencoderKLConfig",
    "AutoencoderTinyConfig",
    "CLIPTextConfig",
    "CLIPVisionConfig",
    "Checkpoint",
    "ControlNetConfig",
    "ImageProjectionConfig",
    "OtherPipeline",
    "SchedulerConfig",
    "TracedFolder",
    "UNet2DConditionConfig",
    "VAEConfig",
    "bundled",
    "bundled_traced",
    "clip_text_config",
    "clip_vision_config",
    "controlnet_config",
    "controlnet_files",
    "hub_folder",
    "is_live",
    "is_live_traced",
    "layerwise_hooks",
    "load",
    "read_controlnet",
    "read_image_encoder",
    "scheduler_config",
    "traced_folder",
    "unet_config",
    "vae_config",
]
