"""Build the real modules and pipelines from plain config dicts, on the ``meta`` device."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers.models.attention_processor import AttnProcessor
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

Config = Mapping[str, Any]

# the class of each family and task
PIPELINES: Mapping[str, Mapping[str, Any]] = {
    "SD": {
        "txt2img": diffusers.StableDiffusionPipeline,
        "img2img": diffusers.StableDiffusionImg2ImgPipeline,
        "inpaint": diffusers.StableDiffusionInpaintPipeline,
    },
    "SDXL": {
        "txt2img": diffusers.StableDiffusionXLPipeline,
        "img2img": diffusers.StableDiffusionXLImg2ImgPipeline,
        "inpaint": diffusers.StableDiffusionXLInpaintPipeline,
    },
}


def build_unet(config: Config, dtype: str = "float16", attention: str = "efficient") -> Any:
    """Return the UNet2DConditionModel of a config; ``attention="eager"`` sets diffusers' AttnProcessor."""
    return _build(_unet, config, dtype, attention == "eager")


def build_vae(config: Config, dtype: str = "float16", attention: str = "efficient") -> Any:
    """Return the AutoencoderKL of a config; ``attention="eager"`` sets diffusers' AttnProcessor."""
    return _build(_vae, config, dtype, attention == "eager")


def build_text_encoder(config: Config, dtype: str = "float16") -> Any:
    """Return the class that ``architectures`` names: CLIPTextModel or CLIPTextModelWithProjection."""
    return _build(_text_encoder, config, dtype)


def build_safety_checker(config: Config, dtype: str = "float16") -> Any:
    """Return the StableDiffusionSafetyChecker of a config."""
    return _build(_safety_checker, config, dtype)


def build_pipeline(
    checkpoint_folder: str | Path,
    pipeline: str = "img2img",
    dtype: str = "float16",
    attention: str = "efficient",
    *,
    safety_checker: bool = True,
    prompt_length: int = 77,
    scheduler: str | None = None,
) -> Any:
    """Return the real pipeline of a folder in diffusers' format, with stand-ins for what needs no tensor.

    The tokenizers give zeros of ``prompt_length`` tokens and the feature extractor zeros of the safety
    checker's image size, both on the CPU; the scheduler is real and new, its timesteps on the CPU, and of
    the class ``scheduler`` where one is named. ``attention="eager"`` sets AttnProcessor on UNet and VAE;
    CLIP's towers keep their SDPA call. Raises KeyError for another pipeline.
    """
    folder = Path(checkpoint_folder)
    scheduler_config = _required(folder, "scheduler")
    parts = {
        "vae": build_vae(_required(folder, "vae"), dtype, attention),
        "text_encoder": _optional_text_encoder(folder, "text_encoder", dtype),
        "tokenizer": FakeTokenizer(prompt_length),
        "unet": build_unet(_required(folder, "unet"), dtype, attention),
        "scheduler": build_scheduler(scheduler_config | ({"_class_name": scheduler} if scheduler else {})),
    }
    index = json.loads((folder / "model_index.json").read_text())
    if "XL" not in index["_class_name"]:
        return PIPELINES["SD"][pipeline](**parts, **_checker(folder, dtype, safety_checker))
    second = {
        "text_encoder_2": _optional_text_encoder(folder, "text_encoder_2", dtype),
        "tokenizer_2": FakeTokenizer(prompt_length),
        "force_zeros_for_empty_prompt": index.get("force_zeros_for_empty_prompt", True),
        "add_watermarker": False,
    }
    if parts["text_encoder"] is None:
        parts["tokenizer"] = None
    if pipeline != "txt2img":
        second["requires_aesthetics_score"] = index.get("requires_aesthetics_score", False)
    return PIPELINES["SDXL"][pipeline](**parts, **second)


def _optional_text_encoder(folder: Path, component: str, dtype: str) -> Any:
    config = read_config(folder, component)
    return None if config is None else build_text_encoder(config, dtype)


def _checker(folder: Path, dtype: str, wanted: bool) -> dict[str, Any]:
    config = read_config(folder, "safety_checker") if wanted else None
    if config is None:
        return {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    checker = build_safety_checker(config, dtype)
    extractor = FakeFeatureExtractor(checker.config.vision_config.image_size)
    return {"safety_checker": checker, "feature_extractor": extractor, "requires_safety_checker": True}


def build_scheduler(config: Config) -> Any:
    """Return a new scheduler of the class that ``_class_name`` names; its timesteps stay on the CPU."""
    scheduler = getattr(diffusers, config["_class_name"]).from_config(dict(config))
    set_timesteps = scheduler.set_timesteps

    @wraps(set_timesteps)
    def on_cpu(*args: Any, device: object = None, **kwargs: Any) -> None:
        set_timesteps(*args, device="cpu", **kwargs)

    scheduler.set_timesteps = on_cpu
    return scheduler


def read_config(folder: Path, component: str) -> dict[str, Any] | None:
    """Return a component's config dict, None if the checkpoint has no such component."""
    name = "scheduler_config.json" if component == "scheduler" else "config.json"
    path = folder / component / name
    return json.loads(path.read_text()) if path.exists() else None


class FakeTokenizer:
    """A CLIPTokenizer's interface; every prompt is ``model_max_length`` zeros, unpadded two."""

    added_tokens_encoder: Mapping[str, int] = {}

    def __init__(self, model_max_length: int) -> None:
        self.model_max_length = model_max_length

    def tokenize(self, prompt: str) -> list[str]:
        """Return no tokens: nothing here needs textual inversion."""
        return []

    def __call__(
        self, prompt: str | list[str], *, padding: str, max_length: int = 2, **_: Any
    ) -> transformers.BatchEncoding:
        batch_size = 1 if isinstance(prompt, str) else len(prompt)
        ids = torch.zeros(batch_size, max_length, dtype=torch.int64, device="cpu")
        return transformers.BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})


class FakeFeatureExtractor:
    """A CLIPImageProcessor's interface; every image is float32 zeros [3, size, size] on the CPU."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, images: list[Any], *, return_tensors: str) -> transformers.BatchFeature:
        pixels = torch.zeros(len(images), 3, self.size, self.size, device="cpu")
        return transformers.BatchFeature({"pixel_values": pixels})


def _required(folder: Path, component: str) -> dict[str, Any]:
    if (config := read_config(folder, component)) is None:
        raise FileNotFoundError(f"{folder}: no config of {component!r}")
    return config


def _build(build: Callable[..., Any], config: Config, dtype: str, *options: bool) -> Any:
    return build(json.dumps(config, sort_keys=True), dtype, *options)


@lru_cache(maxsize=16)
def _unet(config: str, dtype: str, eager: bool) -> Any:
    return _diffusers_model(diffusers.UNet2DConditionModel, config, dtype, eager)


@lru_cache(maxsize=16)
def _vae(config: str, dtype: str, eager: bool) -> Any:
    return _diffusers_model(diffusers.AutoencoderKL, config, dtype, eager)


@lru_cache(maxsize=16)
def _text_encoder(config: str, dtype: str) -> Any:
    values = json.loads(config)
    (name,) = values.get("architectures", ["CLIPTextModel"])
    if name not in ("CLIPTextModel", "CLIPTextModelWithProjection"):
        raise ValueError(f"architectures = {name!r}: expected CLIPTextModel or CLIPTextModelWithProjection")
    with torch.device("meta"):
        model = getattr(transformers, name)(transformers.CLIPTextConfig(**values))
    if name == "CLIPTextModel" and not hasattr(model, "text_model"):
        # transformers 5 dropped the wrapper through which diffusers' clip_skip finds final_layer_norm
        object.__setattr__(model, "text_model", model)
    return _frozen(model, dtype)


@lru_cache(maxsize=16)
def _safety_checker(config: str, dtype: str) -> Any:
    with torch.device("meta"):
        model = StableDiffusionSafetyChecker(transformers.CLIPConfig(**json.loads(config)))
    return _frozen(model, dtype)


def _diffusers_model(cls: Any, config: str, dtype: str, eager: bool) -> Any:
    with torch.device("meta"):
        model = cls.from_config(json.loads(config))
    if eager:
        model.set_attn_processor(AttnProcessor())
    return _frozen(model, dtype)


def _frozen(model: Any, dtype: str) -> Any:
    # ModelMixin.to only adds a warning about modules kept in float32, of which there are none
    return torch.nn.Module.to(model, getattr(torch, dtype)).eval()
