"""Pipelines of other classes than the walked ones: their folders, bundled, the user's or the Hub's."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from derivation.errors import DerivationError, unsupported

from . import hub
from .checkpoint import BUNDLED, PIPELINE_CLASSES, task_of
from .checks import INDEX
from .gguf_file import gguf_tensors
from .json_file import read_json

TRACED = Path(__file__).resolve().parent / "traced"
# Whose classes the components of a live pipeline are, or are made from.
LIBRARIES = ("diffusers", "transformers")
# Classes of walked pipelines' components that are not walked.
PARTS = {"vae": ("AsymmetricAutoencoderKL",)}
# What diffusers' layerwise casting calls its hook (hooks/layerwise_casting.py), and a component's config says of it:
# [storage dtype, compute dtype, paths of the modules].
LAYERWISE = "layerwise_casting"
# What diffusers' group offload calls its hook (hooks/group_offloading.py), and a component's config says of it: the
# arguments of apply_group_offloading.
GROUPS = "group_offloading"
# What a component's config says of weights read from a GGUF file: path -> the type's name, or a dtype of torch.
GGUF = "gguf"
# The tensors of a GGUF file that a component's weights are read from, and the file's name.
GGUF_FILE = "gguf_file"
# The files of a component that a pipeline is built from.
FILES = ("config.json", "scheduler_config.json", "preprocessor_config.json", "tokenizer_config.json")


@dataclass(frozen=True)
class TracedFolder:
    """A folder in diffusers' format; ``source`` is "bundled", or where it was found."""

    path: Path
    name: str
    source: str

    @property
    def class_name(self) -> str:
        """The pipeline's class."""
        index = read_json(self.path / INDEX)
        return str(index.get("_class_name")) if isinstance(index, dict) else ""

    @property
    def task(self) -> str:
        """The option ``pipeline`` that the class stands for."""
        return task_of(self.class_name)

    @cached_property
    def contents(self) -> str:
        """A digest of all configs."""
        files = sorted(path for path in self.path.rglob("*.json") if path.is_file())
        content = [[str(path.relative_to(self.path)), path.read_text()] for path in files]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


@dataclass(frozen=True)
class LiveConfigs:
    """What a live pipeline, or one with weights of a file, is made of.

    ``components`` are (library, class, config) by name, None where it has none.
    """

    class_name: str
    name: str
    components: Mapping[str, tuple[str, str, Mapping[str, Any]] | None]
    arguments: Mapping[str, Any]

    @property
    def source(self) -> str:
        """The class of the pipeline."""
        return self.class_name

    @property
    def task(self) -> str:
        """The option ``pipeline`` that the class stands for."""
        return task_of(self.class_name)

    @property
    def casts(self) -> bool:
        """Whether layerwise casting is on some component."""
        return any(part is not None and LAYERWISE in part[2] for part in self.components.values())

    @property
    def grouped(self) -> tuple[str, ...]:
        """The components that are offloaded in groups of modules."""
        return tuple(name for name, part in self.components.items() if part is not None and GROUPS in part[2])

    @cached_property
    def contents(self) -> str:
        """A digest of all configs."""
        content = json.dumps([self.class_name, self.components, self.arguments], sort_keys=True, default=str)
        return hashlib.sha256(content.encode()).hexdigest()


def with_gguf(folder: TracedFolder, file: object, dtype: str) -> LiveConfigs:
    """Return a folder's pipeline, its transformer's weights those of a GGUF file, computed in ``dtype``.

    As ``from_single_file`` with ``GGUFQuantizationConfig(compute_dtype)`` and ``torch_dtype`` leaves them. Raises
    DerivationError for another file, and for a pipeline without a transformer.
    """
    if not isinstance(file, str | os.PathLike):
        raise unsupported("transformer", file, "a GGUF file")
    entries: Any = read_json(folder.path / INDEX)
    parts = {name: _part_of(folder.path / name, *entry) for name, entry in entries.items() if isinstance(entry, list)}
    if (transformer := parts.get("transformer")) is None:
        raise DerivationError(f"{folder.name}: transformer = {file}: {folder.class_name} has no transformer")
    library, class_name, config = transformer
    said = {"quantization_config": {"quant_method": GGUF, "compute_dtype": dtype}}
    given = {**config, **said, GGUF_FILE: [gguf_tensors(Path(file)), Path(file).name]}
    arguments = {n: value for n, value in entries.items() if not isinstance(value, list) and not n.startswith("_")}
    name = f"{folder.name} with {Path(file).name}"
    return LiveConfigs(folder.class_name, name, {**parts, "transformer": (library, class_name, given)}, arguments)


def _part_of(folder: Path, library: str | None, class_name: str | None) -> tuple[str, str, Mapping[str, Any]] | None:
    if library is None or class_name is None:
        return None
    config = next((read_json(folder / name) for name in FILES if (folder / name).is_file()), {})
    return library, class_name, config if isinstance(config, dict) else {}


def is_live_traced(source: object) -> bool:
    """Return whether ``source`` is a live pipeline of diffusers that is not walked, or with a part that is not."""
    own, name = type(source).__module__.startswith("diffusers."), type(source).__name__
    walked = name.replace("ControlNet", "") in PIPELINE_CLASSES
    other = name.endswith("Pipeline") and not walked
    part = walked and any(type(getattr(source, part, None)).__name__ in names for part, names in PARTS.items())
    return own and (other or part) and hasattr(type(source), "components")


def live_configs(pipe: Any) -> LiveConfigs:
    """Return the configs of a live pipeline's components; raises DerivationError for one without."""
    index, name = dict(pipe.config), type(pipe).__name__
    parts = {own: None if part is None else _live_part(f"{name}.{own}", part) for own, part in pipe.components.items()}
    rest = {key: value for key, value in index.items() if key not in parts and not key.startswith("_")}
    return LiveConfigs(name, str(index.get("_name_or_path") or name), parts, rest)


def _live_part(where: str, part: Any) -> tuple[str, str, Mapping[str, Any]]:
    part = getattr(part, "_orig_mod", part)  # torch.compile
    classes = [(cls.__module__.partition(".")[0], cls.__name__) for cls in type(part).__mro__]
    own = next((each for each in classes if each[0] in LIBRARIES), None)
    if own is None:
        supported = f"those of {' and '.join(LIBRARIES)}"
        raise DerivationError(f"{where} = {type(part).__name__} is not supported (supported: {supported})")
    if isinstance(length := getattr(part, "model_max_length", None), int):
        return *own, {"model_max_length": length}
    config: Any = getattr(part, "config", part)
    config = config.to_dict() if hasattr(config, "to_dict") else config
    known = dict(config) if isinstance(config, Mapping) else {}
    if callable(to_dict := getattr(known.get("quantization_config"), "to_dict", None)):
        known["quantization_config"] = to_dict()
    weights = {LAYERWISE: _layerwise(part), GGUF: _gguf(part), GROUPS: _groups(part)}
    said = {key: value for key, value in known.items() if not key.startswith("_")}
    return *own, said | {key: value for key, value in weights.items() if value}


def layerwise_hooks(model: Any) -> Iterator[tuple[str, Any]]:
    """Yield the path and hook of each module of a live model that layerwise casting is on."""
    return _hooks(model, LAYERWISE)


def _hooks(model: Any, name: str) -> Iterator[tuple[str, Any]]:
    for path, module in model.named_modules() if hasattr(model, "named_modules") else ():
        hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
        if name in hooks:
            yield path, hooks[name]


def _groups(model: Any) -> dict[str, Any]:
    """Return what group offload was asked for; empty without."""
    config = next((hook.config for _, hook in _hooks(model, GROUPS)), None)
    if config is None:
        return {}
    kind, blocks = str(config.offload_type.value), config.num_blocks_per_group
    size = {"num_blocks_per_group": blocks} if kind == "block_level" else {}
    modules = {"block_modules": list(config.block_modules)} if config.block_modules else {}
    return {"offload_type": kind, "use_stream": config.stream is not None, **size, **modules}


def _gguf(model: Any) -> dict[str, str]:
    """Return the types of all weights, where some are diffusers' GGUFParameter; empty elsewhere."""
    named = dict(model.named_parameters()) if hasattr(model, "named_parameters") else {}
    types = {name: getattr(getattr(weight, "quant_type", None), "name", None) for name, weight in named.items()}
    own = {name: str(weight.dtype).removeprefix("torch.") for name, weight in named.items()}
    return {name: types[name] or own[name] for name in named} if any(types.values()) else {}


def _layerwise(model: Any) -> list[list[Any]]:
    found: dict[tuple[str, str], list[str]] = {}
    for path, hook in layerwise_hooks(model):
        dtypes = (str(each).removeprefix("torch.") for each in (hook.storage_dtype, hook.compute_dtype))
        found.setdefault(tuple(dtypes), []).append(path)  # type: ignore[arg-type]
    return [[*dtypes, paths] for dtypes, paths in found.items()]


@cache
def bundled_traced() -> tuple[str, ...]:
    """Return the ids of the bundled pipelines that are traced, sorted."""
    return tuple(sorted(f"{path.parts[-3]}/{path.parts[-2]}" for path in TRACED.glob(f"*/*/{INDEX}")))


def quantized(name: str) -> tuple[str, ...]:
    """Return the bundled checkpoints of a model, by its id, whose weights are quantised: their names begin as its own.

    >>> quantized("black-forest-labs/FLUX.1-dev")
    ('diffusers/FLUX.1-dev-bnb-4bit',)
    """
    own = f"{name.rpartition('/')[2]}-"
    named = (each for each in bundled_traced() if each.rpartition("/")[2].startswith(own))
    return tuple(each for each in named if any(map(_is_quantized, (TRACED / each).glob("*/config.json"))))


def _is_quantized(config: Path) -> bool:
    content = read_json(config)
    return isinstance(content, dict) and "quantization_config" in content


def traced_folder(model: object, revision: str | None = None, any_class: bool = False) -> TracedFolder | None:
    """Return the folder here of a pipeline whose class is not walked, or of ``any_class``; None for none."""
    if not isinstance(model, str | os.PathLike) or not isinstance(given := os.fspath(model), str):
        return None
    if (name := _bundled(given)) is not None and revision is None:
        return TracedFolder(TRACED / name, name, "bundled")
    path = Path(given)
    if path.is_file() and path.name == INDEX:
        path = path.parent
    if path.is_dir():
        found = TracedFolder(path, path.resolve().name, str(path))
        return found if (path / INDEX).is_file() and (any_class or _is_other(found)) else None
    if any_class and (BUNDLED / given / INDEX).is_file():
        return TracedFolder(BUNDLED / given, given, "bundled")
    return None


def _bundled(given: str) -> str | None:
    named = [known for known in bundled_traced() if given.lower() in (known.lower(), known.split("/")[1].lower())]
    return named[0] if len(named) == 1 else None


def _is_other(folder: TracedFolder) -> bool:
    if folder.class_name not in PIPELINE_CLASSES:
        return folder.class_name.endswith("Pipeline")
    index = read_json(folder.path / INDEX)
    entries = [(index.get(part), names) for part, names in PARTS.items()] if isinstance(index, dict) else []
    return any(isinstance(entry, list) and entry[-1:] == [name] for entry, names in entries for name in names)


def hub_folder(model: object, revision: str | None = None, local_files_only: bool = False) -> TracedFolder:
    """Return the folder of a repository in the Hub's cache, every config fetched; raises DerivationError."""
    name, _, pinned = str(model).partition("@")
    index = hub.fetch(name, INDEX, revision or pinned or None, local_files_only)
    found = TracedFolder(index.parent, name, str(index.parent))
    content = read_json(index)
    components = [key for key, value in content.items() if isinstance(value, list)] if isinstance(content, dict) else []
    for component in components:
        for file in FILES:
            try:
                hub.fetch(name, f"{component}/{file}", index.parent.name, local_files_only)
            except hub.MissingFile:
                continue
    return found
