"""Build the real modules and pipelines from plain config dicts, on the ``meta`` device."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers.models.attention_processor import AttnProcessor
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from diffusers.utils import logging as diffusers_logging

from derivation.call import DEFAULT_PROMPT_LENGTH
from derivation.config import controlnet_files
from derivation.config.ip_adapter import image_encoder_file
from derivation.options import Options
from derivation.trace.offload import offload_pipeline
from derivation.trace.switches import switch_on, switches

Config = Mapping[str, Any]
# options that differ from their defaults, by name
Switches = tuple[tuple[str, Any], ...]

# the class of each family and task
CLASSES: Mapping[str, Mapping[str, Any]] = {
    "SD": {
        "txt2img": diffusers.StableDiffusionPipeline,
        "img2img": diffusers.StableDiffusionImg2ImgPipeline,
        "inpaint": diffusers.StableDiffusionInpaintPipeline,
    },
    "LCM": {
        "txt2img": diffusers.LatentConsistencyModelPipeline,
        "img2img": diffusers.LatentConsistencyModelImg2ImgPipeline,
    },
    "SD ControlNet": {
        "txt2img": diffusers.StableDiffusionControlNetPipeline,
        "img2img": diffusers.StableDiffusionControlNetImg2ImgPipeline,
        "inpaint": diffusers.StableDiffusionControlNetInpaintPipeline,
    },
    "SDXL": {
        "txt2img": diffusers.StableDiffusionXLPipeline,
        "img2img": diffusers.StableDiffusionXLImg2ImgPipeline,
        "inpaint": diffusers.StableDiffusionXLInpaintPipeline,
    },
    "SDXL ControlNet": {
        "txt2img": diffusers.StableDiffusionXLControlNetPipeline,
        "img2img": diffusers.StableDiffusionXLControlNetImg2ImgPipeline,
        "inpaint": diffusers.StableDiffusionXLControlNetInpaintPipeline,
    },
}


def build_unet(config: Config, dtype: str = "float16", attention: str = "efficient", switches: Switches = ()) -> Any:
    """Return the UNet2DConditionModel of a config; ``attention="eager"`` sets diffusers' AttnProcessor."""
    return _build(_unet, config, dtype, attention == "eager", switches)


def build_vae(config: Config, dtype: str = "float16", attention: str = "efficient", switches: Switches = ()) -> Any:
    """Return the VAE of a config, AutoencoderKL where it names no class; "eager" sets diffusers' AttnProcessor."""
    # a pipeline may leave the VAE in float32
    return _frozen(_build(_vae, config, dtype, attention == "eager", switches), dtype)


def build_controlnet(
    config: Config, dtype: str = "float16", attention: str = "efficient", switches: Switches = ()
) -> Any:
    """Return what the switch ``controlnets`` counts: a ControlNetModel of a UNet's config, or several as one.

    The switch ``controlnet`` names the files of their own configs.

    Each takes the latents, ``out_channels`` of the UNet, as the pipelines pass them. Options of the pipeline do
    not reach the models in a MultiControlNetModel.
    """
    named = dict(switches).get("controlnet")
    own = [json.loads(Path(file).read_text()) for file in controlnet_files(named)] if named else []
    latents = {**config, "_class_name": "UNet2DConditionModel", "in_channels": config.get("out_channels", 4)}
    configs = own or [latents] * dict(switches)["controlnets"]
    inner = tuple(s for s in switches if len(configs) == 1 and s[0] == "attention_slicing")
    nets = [_build(_controlnet, each, dtype, attention == "eager", inner, i) for i, each in enumerate(configs)]
    return nets[0] if len(nets) == 1 else diffusers.MultiControlNetModel(nets)


def build_text_encoder(config: Config, dtype: str = "float16", switches: Switches = ()) -> Any:
    """Return the class that ``architectures`` names: CLIPTextModel or CLIPTextModelWithProjection."""
    return _build(_text_encoder, config, dtype, tuple(s for s in switches if s[0] in ("lora", "lora_fused")))


def build_safety_checker(config: Config, dtype: str = "float16") -> Any:
    """Return the StableDiffusionSafetyChecker of a config."""
    return _build(_safety_checker, config, dtype)


def build_image_encoder(config: Config, dtype: str = "float16") -> Any:
    """Return the CLIPVisionModelWithProjection of a config."""
    return _build(_image_encoder, config, dtype)


def build_pipeline(
    checkpoint_folder: str | Path,
    pipeline: str = "img2img",
    dtype: str = "float16",
    attention: str = "efficient",
    *,
    safety_checker: bool = True,
    prompt_length: int = DEFAULT_PROMPT_LENGTH,
    scheduler: str | None = None,
    switches: Switches = (),
) -> Any:
    """Return the real pipeline of a folder in diffusers' format, with stand-ins for what needs no tensor.

    The tokenizers give zeros of ``prompt_length`` tokens and the feature extractor zeros of the safety
    checker's image size, both on the CPU; the scheduler is real and new, its timesteps on the CPU, and of
    the class ``scheduler`` where one is named. ``attention="eager"`` sets AttnProcessor on UNet and VAE;
    CLIP's towers keep their SDPA call. ``switches`` are set on the models. Raises KeyError for another pipeline.
    """
    folder = Path(checkpoint_folder)
    scheduler_config = _required(folder, "scheduler")
    parts = {
        "vae": build_vae(_required(folder, "vae"), dict(switches).get("vae_dtype", dtype), attention, switches),
        "text_encoder": _optional_text_encoder(folder, "text_encoder", dtype, switches),
        "tokenizer": FakeTokenizer(prompt_length),
        "unet": build_unet(_required(folder, "unet"), dtype, attention, switches),
        "scheduler": build_scheduler(scheduler_config | ({"_class_name": scheduler} if scheduler else {})),
    }
    if {"ip_adapter", "ip_adapter_tokens"} & {name for name, _ in switches}:
        encoder = image_encoder_file(dict(switches).get("ip_adapter"))
        parts["image_encoder"] = build_image_encoder(json.loads(encoder.read_text()), dtype)
    index = json.loads((folder / "model_index.json").read_text())
    kind = ""
    if {"controlnets", "controlnet"} & {name for name, _ in switches}:
        kind = " ControlNet"
        parts["controlnet"] = build_controlnet(_required(folder, "unet"), dtype, attention, switches)
    if "XL" in index["_class_name"]:
        parts |= _sdxl_parts(folder, pipeline, dtype, prompt_length, index, switches)
        pipe = CLASSES[f"SDXL{kind}"][pipeline](**parts)
    else:
        family = "LCM" if index["_class_name"].startswith("LatentConsistencyModel") else f"SD{kind}"
        pipe = CLASSES[family][pipeline](**parts, **_checker(folder, dtype, safety_checker))
    if (offload := dict(switches).get("offload")) is not None:
        offload_pipeline(pipe, offload)
    return pipe


def pipeline_of(folder: str | Path, options: Options, prompt_length: int = DEFAULT_PROMPT_LENGTH) -> Any:
    """Return the real pipeline of a folder under options, see ``build_pipeline``."""
    return build_pipeline(
        folder,
        options.pipeline,
        options.dtype,
        options.attention,
        safety_checker=options.safety_checker,
        prompt_length=prompt_length,
        scheduler=options.scheduler,
        switches=switches(options),
    )


def _sdxl_parts(
    folder: Path, pipeline: str, dtype: str, prompt_length: int, index: Config, switches: Switches
) -> dict[str, Any]:
    second = {
        "text_encoder_2": _optional_text_encoder(folder, "text_encoder_2", dtype, switches),
        "tokenizer_2": FakeTokenizer(prompt_length),
        "force_zeros_for_empty_prompt": index.get("force_zeros_for_empty_prompt", True),
        "add_watermarker": False,
    }
    if read_config(folder, "text_encoder") is None:
        second["tokenizer"] = None
    if pipeline != "txt2img":
        second["requires_aesthetics_score"] = index.get("requires_aesthetics_score", False)
    return second


def _optional_text_encoder(folder: Path, component: str, dtype: str, switches: Switches) -> Any:
    config = read_config(folder, component)
    return None if config is None else build_text_encoder(config, dtype, switches)


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


def modules_of(pipe: Any) -> dict[str, torch.nn.Module]:
    """Return a pipeline's models by component name."""
    return {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}


@contextmanager
def quiet() -> Iterator[None]:
    """Let diffusers and transformers log errors alone, and nothing warn."""
    logs = (diffusers_logging, transformers.logging)
    levels = [log.get_verbosity() for log in logs]
    for log in logs:
        log.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.set_verbosity(level)


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


def _build(build: Callable[..., Any], config: Config, dtype: str, *options: object) -> Any:
    return build(json.dumps(config, sort_keys=True), dtype, *options)


@lru_cache(maxsize=16)
def _unet(config: str, dtype: str, eager: bool, switches: Switches) -> Any:
    return _diffusers_model(diffusers.UNet2DConditionModel, config, dtype, eager, switches)


@lru_cache(maxsize=16)
def _vae(config: str, dtype: str, eager: bool, switches: Switches) -> Any:
    cls = getattr(diffusers, json.loads(config).get("_class_name", "AutoencoderKL"))
    return _diffusers_model(cls, config, dtype, eager, switches)


@lru_cache(maxsize=16)
def _controlnet(config: str, dtype: str, eager: bool, switches: Switches, number: int) -> Any:
    values = json.loads(config)
    unet = _unet(config, dtype, eager, ()) if values.get("_class_name") == "UNet2DConditionModel" else None
    with torch.device("meta"):
        if unet is None:
            model = diffusers.ControlNetModel.from_config(values)
        else:
            model = diffusers.ControlNetModel.from_unet(unet, load_weights_from_unet=False)
    return _switched(model, dtype, eager, switches)


@lru_cache(maxsize=16)
def _text_encoder(config: str, dtype: str, switches: Switches) -> Any:
    values = json.loads(config)
    (name,) = values.get("architectures", ["CLIPTextModel"])
    if name not in ("CLIPTextModel", "CLIPTextModelWithProjection"):
        raise ValueError(f"architectures = {name!r}: expected CLIPTextModel or CLIPTextModelWithProjection")
    with torch.device("meta"):
        model = getattr(transformers, name)(transformers.CLIPTextConfig(**values))
    if name == "CLIPTextModel" and not hasattr(model, "text_model"):
        # transformers 5 dropped the wrapper through which diffusers' clip_skip finds final_layer_norm
        object.__setattr__(model, "text_model", model)
    switch_on(model, dict(switches))
    return _frozen(model, dtype)


@lru_cache(maxsize=16)
def _safety_checker(config: str, dtype: str) -> Any:
    with torch.device("meta"):
        model = StableDiffusionSafetyChecker(transformers.CLIPConfig(**json.loads(config)))
    return _frozen(model, dtype)


@lru_cache(maxsize=16)
def _image_encoder(config: str, dtype: str) -> Any:
    with torch.device("meta"):
        model = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**json.loads(config)))
    return _frozen(model, dtype)


def _diffusers_model(cls: Any, config: str, dtype: str, eager: bool, switches: Switches) -> Any:
    with torch.device("meta"):
        model = cls.from_config(json.loads(config))
    return _switched(model, dtype, eager, switches)


def _switched(model: Any, dtype: str, eager: bool, switches: Switches) -> Any:
    with torch.device("meta"):
        if eager and hasattr(model, "set_attn_processor"):
            model.set_attn_processor(AttnProcessor())
        switch_on(model, dict(switches))
    return _frozen(model, dtype)


def _frozen(model: Any, dtype: str) -> Any:
    # ModelMixin.to only adds a warning about modules kept in float32, of which there are none
    return torch.nn.Module.to(model, getattr(torch, dtype)).eval()
