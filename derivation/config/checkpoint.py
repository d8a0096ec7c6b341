"""The configs of one pipeline, or of one of its components, checked and put together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..call import DEFAULT_SIDE
from ..errors import DerivationError, UnsupportedConfig
from .checks import INDEX, At, Check, anything, flag_or_null, one_of, strict
from .clip import TEXT_CLASSES, CLIPTextConfig, CLIPVisionConfig, clip_text_config, clip_vision_config
from .controlnet import ControlNetConfig
from .ip_adapter import ImageProjectionConfig
from .models import VAE_SCALE_FACTOR, UNet2DConditionConfig, VAEConfig, unet_config, vae_config
from .schedulers import DEFAULTS, UNWALKED, SchedulerConfig, scheduler_config

BUNDLED = Path(__file__).resolve().parent / "configs"
PIPELINE_CLASSES = (
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionXLInpaintPipeline",
    "LatentConsistencyModelPipeline",
    "LatentConsistencyModelImg2ImgPipeline",
)
VAE_CLASSES = ("AutoencoderKL", "AutoencoderTiny")
# Parts of a class's name; without one it makes images of text alone.
TASKS = {"Img2Img": "img2img", "Inpaint": "inpaint"}


def task_of(class_name: str) -> str:
    """Return the option ``pipeline`` that a pipeline's class stands for.

    >>> task_of("StableDiffusionXLPipeline"), task_of("FluxImg2ImgPipeline"), task_of("StableDiffusionInpaintPipeline")
    ('txt2img', 'img2img', 'inpaint')
    """
    return next((task for part, task in TASKS.items() if part in class_name), "txt2img")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The configs of one pipeline, or of one component alone; a component may be None.

    ``source`` is "bundled", the folder, the file of a component alone, or the class name of the live pipeline;
    ``pipeline_class`` is "" for a component alone; ``controlnets`` and ``ip_adapters`` are a live
    pipeline's.
    """

    name: str
    source: str
    pipeline_class: str
    unet: UNet2DConditionConfig | None
    vae: VAEConfig | None
    text_encoder: CLIPTextConfig | None
    text_encoder_2: CLIPTextConfig | None
    safety_checker: CLIPVisionConfig | None
    scheduler: SchedulerConfig | None
    force_zeros_for_empty_prompt: bool
    requires_aesthetics_score: bool
    requires_safety_checker: bool
    controlnets: tuple[ControlNetConfig, ...] = ()
    ip_adapters: tuple[ImageProjectionConfig, ...] = ()

    @property
    def whole(self) -> bool:
        """Whether these are the configs of a pipeline, not of a component alone."""
        return bool(self.pipeline_class)

    @property
    def task(self) -> str:
        """The option ``pipeline`` that the class stands for."""
        return task_of(self.pipeline_class)

    @property
    def default_sides(self) -> tuple[int, int]:
        """The height and width in pixels of a call that says none: diffusers takes ``unet.config.sample_size``."""
        latents = None if self.unet is None else self.unet.sample_size
        if latents is None:
            return DEFAULT_SIDE, DEFAULT_SIDE
        height, width = (latents, latents) if isinstance(latents, int) else latents
        return height * self.vae_scale_factor, width * self.vae_scale_factor

    @property
    def vae_scale_factor(self) -> int:
        """How many pixels a side a latent is."""
        return VAE_SCALE_FACTOR if self.vae is None else self.vae.scale_factor

    def require_whole(self, needed_by: str) -> None:
        """Raise DerivationError for a component alone."""
        if not self.whole:
            raise DerivationError(f"{self.source}: {needed_by} needs a whole checkpoint ({INDEX} and its components)")


class Part(NamedTuple):
    """One component before it is checked: its class, its raw config, and the file to name in errors."""

    class_name: str
    mapping: object
    file: str


class Reader(NamedTuple):
    """How a component is read: its supported classes, its file name, and its checker."""

    classes: tuple[str, ...]
    build: Callable[[Part], Any]
    file: str = "config.json"


COMPONENTS: dict[str, Reader] = {
    "unet": Reader(("UNet2DConditionModel",), lambda part: unet_config(part.mapping, part.file)),
    "vae": Reader(VAE_CLASSES, lambda part: vae_config(part.mapping, part.file, part.class_name)),
    "text_encoder": Reader(TEXT_CLASSES, lambda part: clip_text_config(part.mapping, part.file, part.class_name)),
    "text_encoder_2": Reader(TEXT_CLASSES, lambda part: clip_text_config(part.mapping, part.file, part.class_name)),
    "safety_checker": Reader(
        ("StableDiffusionSafetyChecker",), lambda part: clip_vision_config(part.mapping, part.file)
    ),
    "scheduler": Reader(
        tuple(DEFAULTS),
        lambda part: scheduler_config(part.mapping, part.file, part.class_name),
        "scheduler_config.json",
    ),
}


def _absent(value: object, at: At) -> None:
    if value is not None and value not in ([None, None], (None, None)):
        raise at.unsupported(value, "null")


INDEX_KEYS: dict[str, Check[Any]] = {
    **dict.fromkeys((*COMPONENTS, "tokenizer", "tokenizer_2", "feature_extractor"), anything),
    "image_encoder": _absent,
    "watermark": _absent,
    "add_watermarker": anything,
    **dict.fromkeys(("requires_safety_checker", "requires_aesthetics_score"), flag_or_null),
    "force_zeros_for_empty_prompt": flag_or_null,
}


def _flags(index: object, file: str) -> dict[str, object]:
    given = strict(index, file, known=list(INDEX_KEYS), owner=INDEX)
    for name, value in given.items():
        INDEX_KEYS[name](value, At(file, name))
    return given


class OtherPipeline(UnsupportedConfig):
    """A pipeline of a class that is not walked."""


def known_pipeline(named: object, file: str) -> str:
    """Return the class of a pipeline that is walked; raises DerivationError for another, and says what to do."""
    if isinstance(named, str) and named not in PIPELINE_CLASSES:
        walked = f"{', '.join(PIPELINE_CLASSES)}; a transformer alone with method = 'trace'"
        raise OtherPipeline(file, "_class_name", named, walked)
    return one_of(*PIPELINE_CLASSES)(named, At(file, "_class_name"))


def known_class(part_name: str, class_name: str, file: str) -> None:
    """Raise UnsupportedConfig for a component of a class that is not walked."""
    supported = COMPONENTS[part_name].classes
    if class_name in UNWALKED:
        named = f"{', '.join(supported)}; not this one: {UNWALKED[class_name]}"
        raise UnsupportedConfig(file, part_name, class_name, named)
    one_of(*supported)(class_name, At(file, part_name))


def assembled(name: str, source: str, file: str, named: object, index: object, parts: Mapping[str, Part]) -> Checkpoint:
    """Return the checkpoint of a pipeline's index and components, all checked; raises ``DerivationError``."""
    pipeline_class = known_pipeline(named, file)
    given = _flags(index, file)
    built: dict[str, Any] = dict.fromkeys(COMPONENTS)
    for part_name, part in parts.items():
        known_class(part_name, part.class_name, file)
        built[part_name] = COMPONENTS[part_name].build(part)
    return Checkpoint(
        name=name,
        source=source,
        pipeline_class=pipeline_class,
        force_zeros_for_empty_prompt=bool(given.get("force_zeros_for_empty_prompt", "XL" in pipeline_class)),
        requires_aesthetics_score=bool(given.get("requires_aesthetics_score", False)),
        requires_safety_checker=bool(given.get("requires_safety_checker", "XL" not in pipeline_class)),
        **built,
    )


def alone(name: str, source: str, parts: Mapping[str, Any]) -> Checkpoint:
    """Return the checkpoint of components without a pipeline."""
    return Checkpoint(
        name=name,
        source=source,
        pipeline_class="",
        force_zeros_for_empty_prompt=False,
        requires_aesthetics_score=False,
        requires_safety_checker=False,
        **{**dict.fromkeys(COMPONENTS), **parts},
    )
