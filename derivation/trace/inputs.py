"""The arguments of a real Stable Diffusion ``__call__``: traced on ``meta`` and measured on a GPU alike."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import Any

import torch

from derivation.call import DEFAULT_PROMPT_LENGTH

# Options that ``__call__`` takes by the same name.
CALL_OPTIONS = ("num_images_per_prompt", "num_inference_steps", "strength", "clip_skip")


def arguments(
    pipe: Any,
    options: Mapping[str, Any],
    *,
    height: int,
    width: int,
    batch_size: int,
    guidance_scale: float,
    prompt_embeds: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, Any]:
    """Return what ``pipe`` takes of the options by name and of a call: blank images and masks, float32 on the CPU.

    Images are [batch_size, 3, height, width], masks [batch_size, 1, height, width]; ``prompt_embeds`` stand in for
    ``batch_size`` empty prompts.
    """
    shape = (batch_size, 3, height, width)
    prompts = ("prompt", "negative_prompt") if options["negative_prompt"] and guidance_scale > 1 else ("prompt",)
    given: dict[str, Any] = {
        **(prompt_embeds or dict.fromkeys(prompts, [""] * batch_size)),
        "image": torch.zeros(shape, device="cpu"),
        "mask_image": torch.ones(batch_size, 1, height, width, device="cpu"),
        "height": height,
        "width": width,
        "guidance_scale": guidance_scale,
        **{name: value for name in CALL_OPTIONS if (value := options[name]) is not None},
        **_control(pipe, options["pipeline"], shape),
        **_ip_adapter_image(pipe, options["ip_adapter_images"]),
    }
    accepted = signature(pipe.__call__).parameters
    return {name: value for name, value in given.items() if name in accepted}


def embeddings(pipe: Any, rows: int, prompt_length: int, guidance: bool, dtype: str) -> dict[str, torch.Tensor] | None:
    """Return a prompt that the tokenizer would cut as meta embeddings [rows, prompt_length, C]; None for a shorter."""
    if prompt_length <= DEFAULT_PROMPT_LENGTH:
        return None
    shapes: dict[str, tuple[int, ...]] = {"prompt_embeds": (rows, prompt_length, pipe.unet.config.cross_attention_dim)}
    if (second := getattr(pipe, "text_encoder_2", None)) is not None:
        shapes["pooled_prompt_embeds"] = (rows, second.config.projection_dim)
    signs = ("", "negative_") if guidance else ("",)
    kind = getattr(torch, dtype)
    return {s + name: torch.empty(shape, dtype=kind, device="meta") for s in signs for name, shape in shapes.items()}


def _ip_adapter_image(pipe: Any, images: int) -> dict[str, list[torch.Tensor]]:
    """Return each IP-Adapter's images as the feature extractor gives them, where there is an image encoder."""
    if pipe.image_encoder is None:
        return {}
    side = pipe.image_encoder.config.image_size
    count = len(pipe.unet.encoder_hid_proj.image_projection_layers)
    return {"ip_adapter_image": [torch.zeros(images, 3, side, side, device="cpu") for _ in range(count)]}


def _control(pipe: Any, pipeline: str, shape: tuple[int, ...]) -> dict[str, Any]:
    """Return the control image, a list of them for several ControlNets, and its size.

    The default of SDXL's ``original_size``, a torch.Size, fails where an aesthetic score, a float, is appended.
    """
    if (controlnet := getattr(pipe, "controlnet", None)) is None:
        return {}
    nets = getattr(controlnet, "nets", None)
    image = torch.zeros(shape, device="cpu")
    name = "image" if pipeline == "txt2img" else "control_image"
    return {name: image if nets is None else [torch.zeros_like(image) for _ in nets], "original_size": shape[2:]}
