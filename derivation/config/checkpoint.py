"""Where configs come from: a bundled id, a checkpoint folder, or a live pipeline."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import DerivationError, shown
from .checks import At, Check, anything, flag, one_of, strict
from .clip import TEXT_CLASSES, CLIPTextConfig, CLIPVisionConfig, clip_text_config, clip_vision_config
from .models import AutoencoderKLConfig, UNet2DConditionConfig, unet_config, vae_config
from .schedulers import DEFAULTS, SchedulerConfig, scheduler_config

BUNDLED = Path(__file__).resolve().parent.parent / "configs"
INDEX = "model_index.json"
MAX_FILE_BYTES = 4 << 20
PIPELINES = (
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionXLInpaintPipeline",
)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The configs of one pipeline; a component may be None.

    ``source`` is "bundled", the folder, or the class name of the live pipeline.
    """

    name: str
    source: str
    pipeline_class: str
    unet: UNet2DConditionConfig | None
    vae: AutoencoderKLConfig | None
    text_encoder: CLIPTextConfig | None
    text_encoder_2: CLIPTextConfig | None
    safety_checker: CLIPVisionConfig | None
    scheduler: SchedulerConfig | None
    force_zeros_for_empty_prompt: bool
    requires_aesthetics_score: bool
    requires_safety_checker: bool


class Part(NamedTuple):
    """One component before it is checked: its class, its raw config, and the file to name in errors."""

    class_name: str
    mapping: object
    file: str


class Component(NamedTuple):
    """How a component is read: its supported classes, its file name, and its checker."""

    classes: tuple[str, ...]
    build: Callable[[Part], Any]
    file: str = "config.json"


COMPONENTS: dict[str, Component] = {
    "unet": Component(("UNet2DConditionModel",), lambda part: unet_config(part.mapping, part.file)),
    "vae": Component(("AutoencoderKL",), lambda part: vae_config(part.mapping, part.file)),
    "text_encoder": Component(TEXT_CLASSES, lambda part: clip_text_config(part.mapping, part.file, part.class_name)),
    "text_encoder_2": Component(TEXT_CLASSES, lambda part: clip_text_config(part.mapping, part.file, part.class_name)),
    "safety_checker": Component(
        ("StableDiffusionSafetyChecker",), lambda part: clip_vision_config(part.mapping, part.file)
    ),
    "scheduler": Component(
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
    "requires_safety_checker": flag,
    "requires_aesthetics_score": flag,
    "force_zeros_for_empty_prompt": flag,
}


def read_json(path: Path) -> object:
    """Return the content of one JSON file; raises ``DerivationError`` naming it."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise DerivationError(f"{path}: not a file")
        with path.open("rb") as stream:
            content = stream.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:
        if isinstance(error, DerivationError):
            raise
        raise DerivationError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if len(content) > MAX_FILE_BYTES:
        raise DerivationError(f"{path}: over {MAX_FILE_BYTES >> 20} MiB, so not a config file")
    try:
        return json.loads(content.decode("utf-8"))
    except UnicodeDecodeError:
        raise DerivationError(f"{path}: not UTF-8 text") from None
    except RecursionError:
        raise DerivationError(f"{path}: nested too deeply") from None
    except ValueError as error:
        raise DerivationError(f"{path}: not valid JSON ({error})") from None


def _flags(index: object, file: str) -> dict[str, object]:
    given = strict(index, file, known=list(INDEX_KEYS), owner=INDEX)
    for name, value in given.items():
        INDEX_KEYS[name](value, At(file, name))
    return given


def _checkpoint(
    name: str, source: str, file: str, named: object, index: object, parts: Mapping[str, Part]
) -> Checkpoint:
    pipeline_class = one_of(*PIPELINES)(named, At(file, "_class_name"))
    given = _flags(index, file)
    built: dict[str, Any] = dict.fromkeys(COMPONENTS)
    for part_name, part in parts.items():
        component = COMPONENTS[part_name]
        one_of(*component.classes)(part.class_name, At(file, part_name))
        built[part_name] = component.build(part)
    return Checkpoint(
        name=name,
        source=source,
        pipeline_class=pipeline_class,
        force_zeros_for_empty_prompt=bool(given.get("force_zeros_for_empty_prompt", "XL" in pipeline_class)),
        requires_aesthetics_score=bool(given.get("requires_aesthetics_score", False)),
        requires_safety_checker=bool(given.get("requires_safety_checker", "XL" not in pipeline_class)),
        **built,
    )


def _entry(value: object, at: At) -> str | None:
    """Return the class of a ``[library, class]`` entry, None where it is null."""
    if value is None or value == [None, None]:
        return None
    if isinstance(value, list) and len(value) == 2 and all(isinstance(item, str) for item in value):
        return str(value[1])
    raise at.unsupported(value, "[library, class] or [null, null]")


def _folder(name: str, folder: Path, source: str) -> Checkpoint:
    index = read_json(folder / INDEX)
    file = str(folder / INDEX)
    if not isinstance(index, Mapping):
        raise DerivationError(f"{file}: expected a JSON object, got {shown(index)}")
    parts = {}
    for part_name, component in COMPONENTS.items():
        class_name = _entry(index.get(part_name), At(file, part_name))
        if class_name is None:
            continue
        one_of(*component.classes)(class_name, At(file, part_name))
        path = folder / part_name / component.file
        parts[part_name] = Part(class_name, read_json(path), str(path))
    return _checkpoint(name, source, file, index.get("_class_name"), index, parts)


def _raw_config(component: object, file: str) -> object:
    """Return the config of a live component as a dict: diffusers' FrozenDict, or transformers' ``to_dict()``."""
    config = getattr(component, "config", None)
    if isinstance(config, Mapping):
        return dict(config)
    if callable(to_dict := getattr(config, "to_dict", None)):
        return to_dict()
    raise DerivationError(f"{file}: {type(component).__name__} has no config that can be read")


def _live(pipeline: object) -> Checkpoint:
    pipeline_class = type(pipeline).__name__
    parts = {}
    for part_name in COMPONENTS:
        if (component := getattr(pipeline, part_name, None)) is None:
            continue
        component = getattr(component, "_orig_mod", component)  # torch.compile
        file = f"{pipeline_class}.{part_name}.config"
        parts[part_name] = Part(type(component).__name__, _raw_config(component, file), file)
    config = getattr(pipeline, "config", None)
    index = dict(config) if isinstance(config, Mapping) else {}
    name = index.get("_name_or_path") or pipeline_class
    return _checkpoint(str(name), pipeline_class, f"{pipeline_class}.config", pipeline_class, index, parts)


def bundled() -> tuple[str, ...]:
    """Return the ids of the bundled checkpoints, sorted."""
    return tuple(sorted(f"{path.parts[-3]}/{path.parts[-2]}" for path in BUNDLED.glob(f"*/*/{INDEX}")))


def _named(source: str) -> Checkpoint:
    ids = bundled()
    found = [name for name in ids if source in (name, name.split("/")[1])]
    if len(found) == 1:
        return _folder(found[0], BUNDLED / found[0], "bundled")
    problem = "a file, not a folder" if os.path.isfile(source) else "a broken link" if os.path.islink(source) else ""
    hint = f"pass a folder in diffusers' format ({INDEX} in it) or a bundled id: {', '.join(ids)}"
    raise DerivationError(f"{shown(source)} is {problem or 'neither a folder nor a bundled id'}; {hint}")


def load(source: object) -> Checkpoint:
    """Return the checkpoint of a bundled id, a folder in diffusers' format, or a live pipeline.

    >>> load("stable-diffusion-v1-5").unet.block_out_channels
    (320, 640, 1280, 1280)
    """
    if isinstance(source, str | os.PathLike):
        path = os.fspath(source)
        if not isinstance(path, str):
            raise DerivationError(f"{shown(path)}: a path must be text")
        return _folder(path, Path(path), path) if os.path.isdir(path) else _named(path)
    if hasattr(source, "unet") or hasattr(source, "vae"):
        return _live(source)
    raise DerivationError(f"cannot read {shown(source)}: pass a bundled id, a checkpoint folder, or a pipeline")
