"""Where configs come from: a bundled id, a folder, one file, the Hugging Face Hub, or a live pipeline."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from ..errors import DerivationError, meant, shown
from . import hub
from .checkpoint import BUNDLED, COMPONENTS, Checkpoint, Part, alone, assembled, known_class, known_pipeline
from .checks import INDEX, At, one_of
from .controlnet import ControlNetConfig, controlnet_config
from .ip_adapter import live_projection
from .json_file import read_json
from .traced import bundled_traced

# Names that are parts of several ids, and the one that people mean.
SHORT = {"sdxl": "stabilityai/stable-diffusion-xl-base-1.0"}
# Ids that a refusal names.
CLOSE = 4
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
FILES = tuple(dict.fromkeys(component.file for component in COMPONENTS.values()))
CLASSES = {name: part for part, component in reversed(COMPONENTS.items()) for name in component.classes}
# transformers' CLIPTextConfig and CLIPConfig, where no architecture is named
MODEL_TYPES = {"clip_text_model": "CLIPTextModel", "clip": "StableDiffusionSafetyChecker"}
# unet_2d_condition.py: what load_ip_adapter writes into the config of a UNet
IP_ADAPTER = ("encoder_hid_dim_type", "ip_image_proj")


def load(
    source: object, revision: str | None = None, local_files_only: bool = False, scheduler: str | None = None
) -> Checkpoint:
    """Return the checkpoint of a bundled id, a folder or a file in diffusers' format, a Hub id, or a live pipeline.

    A file is a ``model_index.json``, or one component's config. A Hub id is "org/name" or "org/name@revision";
    with ``local_files_only`` it is read from the Hub's cache alone. The class ``scheduler`` takes the place of the
    file's before that is read, as ``scheduler.from_config(pipe.scheduler.config)``. Raises DerivationError.

    A bundled id may be given by its short name, or by a part that no other id has.

    >>> load("sd15").name, load("sd2.1").name
    ('stable-diffusion-v1-5/stable-diffusion-v1-5', 'stabilityai/stable-diffusion-2-1')
    >>> load("sdxl").name, load("inpainting").name
    ('stabilityai/stable-diffusion-xl-base-1.0', 'runwayml/stable-diffusion-inpainting')
    """
    if isinstance(source, Checkpoint):
        return source
    if isinstance(source, str | os.PathLike):
        path = os.fspath(source)
        if not isinstance(path, str):
            raise DerivationError(f"{shown(path)}: a path must be text")
        found = _local(path, scheduler) if revision is None else None
        return found or _named(path, revision, local_files_only, scheduler)
    if is_live(source) and revision is None:
        return _live(source, scheduler)
    raise DerivationError(f"cannot read {shown(source)}: pass a bundled id, a checkpoint folder, or a pipeline")


def bundled() -> tuple[str, ...]:
    """Return the ids of the bundled checkpoints, sorted."""
    return tuple(sorted(f"{path.parts[-3]}/{path.parts[-2]}" for path in BUNDLED.glob(f"*/*/{INDEX}")))


def is_live(source: object) -> bool:
    """Return whether ``source`` is an object with a pipeline's components."""
    return not isinstance(source, Checkpoint) and (hasattr(source, "unet") or hasattr(source, "vae"))


def _local(path: str, scheduler: str | None) -> Checkpoint | None:
    """Return the checkpoint of a folder or a file, None where there is neither."""
    folder = Path(path)
    if os.path.isfile(path):
        if folder.name != INDEX:
            return _component(path, folder)
        folder = folder.parent
    elif not os.path.isdir(path):
        return None
    if not os.path.lexists(folder / INDEX):
        for file in FILES:
            if os.path.isfile(folder / file):
                return _component(path, folder / file)
    return _pipeline(str(folder), str(folder), lambda file: folder / file, scheduler)


def _named(given: str, revision: str | None, local_files_only: bool, scheduler: str | None) -> Checkpoint:
    """Return the checkpoint of a bundled id, or of a Hub id; a revision is the Hub's."""
    name, _, pinned = (given, "", revision) if revision is not None else given.partition("@")
    ids = bundled()
    name = _bundled_id(name)
    if name in ids and not pinned:
        return _pipeline(name, "bundled", lambda file: BUNDLED / name / file, scheduler)
    if HUB_ID.fullmatch(name) and not os.path.islink(given):
        return _hub(name, pinned or None, local_files_only, scheduler)
    problem = "a broken link" if os.path.islink(given) else "neither a file, a folder nor an id of the Hugging Face Hub"
    if pinned:
        problem = f"not an id of the Hugging Face Hub, so it has no revision {shown(pinned)}"
    hint = f"pass a folder in diffusers' format ({INDEX} in it) or a bundled id: {', '.join(ids)}"
    asked, every = _squeezed(name), (*ids, *bundled_traced())
    close = [known for known in every if len(asked) > 2 and asked in _squeezed(known)][:CLOSE]
    words = (*SHORT, *(known.split("/")[1] for known in every))
    hint += f"; did you mean {' or '.join(close)}?" if close else meant(name, words)
    raise DerivationError(f"{shown(name if pinned else given)} is {problem}; {hint}")


def _bundled_id(name: str) -> str:
    """Return the bundled id that ``name`` is short for, ``name`` where none is; raises DerivationError for several."""
    asked = _squeezed(name)
    ids = {known: _squeezed(known.split("/")[1]) for known in bundled()}
    if name in ids or "/" in name or len(asked) < 2:
        return name
    found = [known for known, own in ids.items() if own == asked] or [SHORT[key] for key in SHORT if key == asked]
    found = found or [known for known, own in ids.items() if asked in own]
    if len(found) > 1:
        raise DerivationError(f"{shown(name)} is a part of several bundled ids: {', '.join(found)}")
    return found[0] if found else name


def _squeezed(name: str) -> str:
    """Return what is left of an id that nobody types.

    >>> _squeezed("stable-diffusion-v1-5"), _squeezed("SD2.1"), _squeezed("stable-diffusion-xl-base-1.0")
    ('sd15', 'sd21', 'sdxlbase10')
    """
    text = re.sub(r"[^a-z0-9]", "", name.lower().replace("stable-diffusion", "sd"))
    return re.sub(r"v(?=[0-9])", "", text)


def _hub(name: str, revision: str | None, local_files_only: bool, scheduler: str | None) -> Checkpoint:
    """Return the checkpoint of a repository: a pipeline, or a component alone; its files are of one commit."""
    label = name if revision is None else f"{name}@{revision}"
    try:
        index = hub.fetch(name, INDEX, revision, local_files_only)
    except hub.MissingFile as missing:
        try:
            return _component(label, hub.fetch(name, FILES[0], revision, local_files_only or missing.cached))
        except hub.MissingFile:
            raise missing from None
    commit = index.parent.name
    return _pipeline(label, str(index.parent), lambda file: hub.fetch(name, file, commit, local_files_only), scheduler)


def _entry(value: object, at: At) -> str | None:
    """Return the class of a ``[library, class]`` entry, None where it is null."""
    if value is None or value == [None, None]:
        return None
    if isinstance(value, list) and len(value) == 2 and all(isinstance(item, str) for item in value):
        return str(value[1])
    raise at.unsupported(value, "[library, class] or [null, null]")


def _pipeline(name: str, source: str, path_of: Callable[[str], Path], scheduler: str | None) -> Checkpoint:
    """Return the checkpoint whose files ``path_of`` finds by their path in its folder."""
    index_path = path_of(INDEX)
    index, file = read_json(index_path), str(index_path)
    if not isinstance(index, Mapping):
        raise DerivationError(f"{file}: expected a JSON object, got {shown(index)}")
    known_pipeline(index.get("_class_name"), file)
    parts = {}
    for part_name, component in COMPONENTS.items():
        class_name = _entry(index.get(part_name), At(file, part_name))
        if part_name == "scheduler" and class_name is not None:
            class_name = scheduler or class_name
        if class_name is None:
            continue
        known_class(part_name, class_name, file)
        path = path_of(f"{part_name}/{component.file}")
        parts[part_name] = Part(class_name, read_json(path), str(path))
    return assembled(name, source, file, index.get("_class_name"), index, parts)


def _component(name: str, path: Path) -> Checkpoint:
    """Return the checkpoint of one component's config file."""
    file = str(path)
    content = read_json(path)
    if not isinstance(content, Mapping):
        raise DerivationError(f"{file}: expected a JSON object, got {shown(content)}")
    class_name = _class_name(content, file)
    part_name = CLASSES[class_name]
    built = COMPONENTS[part_name].build(Part(class_name, content, file))
    return alone(name, file, {part_name: built})


def _class_name(content: Mapping[str, object], file: str) -> str:
    """Return the class of a config: diffusers' ``_class_name``, else transformers' ``architectures``."""
    named, key = content.get("_class_name"), "_class_name"
    if named is None and content.get("architectures") is not None:
        architectures, key = content["architectures"], "architectures"
        named = architectures[0] if isinstance(architectures, list) and len(architectures) == 1 else architectures
    elif named is None and content.get("model_type") is not None:
        named, key = content["model_type"], "model_type"
        one_of(*MODEL_TYPES)(named, At(file, key))
        named = MODEL_TYPES[str(named)]
    return one_of(*sorted(CLASSES))(named, At(file, key))


def _raw_config(component: object, file: str) -> object:
    """Return the config of a live component as a dict: diffusers' FrozenDict, or transformers' ``to_dict()``."""
    config = getattr(component, "config", None)
    if isinstance(config, Mapping):
        return {key: value for key, value in config.items() if (key, value) != IP_ADAPTER}
    if callable(to_dict := getattr(config, "to_dict", None)):
        return to_dict()
    raise DerivationError(f"{file}: {type(component).__name__} has no config that can be read")


def _live(pipeline: object, scheduler: str | None) -> Checkpoint:
    class_name = type(pipeline).__name__
    parts = {}
    for part_name in COMPONENTS:
        if (component := getattr(pipeline, part_name, None)) is None:
            continue
        component = getattr(component, "_orig_mod", component)  # torch.compile
        file = f"{class_name}.{part_name}.config"
        named = scheduler if scheduler and part_name == "scheduler" else type(component).__name__
        parts[part_name] = Part(named, _raw_config(component, file), file)
    config = getattr(pipeline, "config", None)
    index = dict(config) if isinstance(config, Mapping) else {}
    name = index.get("_name_or_path") or class_name
    unet = getattr(pipeline, "unet", None)
    projection = getattr(getattr(unet, "_orig_mod", unet), "encoder_hid_proj", None)
    if projection is not None:  # load_ip_adapter
        index.pop("image_encoder", None)
    images = getattr(projection, "image_projection_layers", ())
    plain = class_name
    if index.pop("controlnet", None) is not None:
        plain = class_name.replace("ControlNet", "")
    found = assembled(str(name), class_name, f"{class_name}.config", plain, index, parts)
    adapters = tuple(live_projection(layer, f"{class_name}.unet.encoder_hid_proj") for layer in images)
    return replace(found, controlnets=_live_controlnets(pipeline), ip_adapters=adapters)


def _live_controlnets(pipeline: object) -> tuple[ControlNetConfig, ...]:
    """Return the configs of a pipeline's one ControlNet, or of each in a MultiControlNetModel."""
    controlnet, file = getattr(pipeline, "controlnet", None), f"{type(pipeline).__name__}.controlnet.config"
    nets = [] if controlnet is None else list(getattr(controlnet, "nets", [controlnet]))
    plain = [getattr(net, "_orig_mod", net) for net in nets]
    return tuple(controlnet_config(_raw_config(net, file), file) for net in plain)
