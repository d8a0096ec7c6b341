"""Any pipeline of diffusers on ``meta``, from its components' classes and configs: models, scheduler, stand-ins."""

from __future__ import annotations

import inspect
import json
import sys
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers.hooks.layerwise_casting import apply_layerwise_casting_hook
from diffusers.utils.import_utils import DummyObject
from transformers.initialization import no_init_weights

from derivation.config.traced import GGUF, GGUF_FILE, GROUPS, LAYERWISE, LiveConfigs
from derivation.errors import DerivationError, UnsupportedConfig, shown
from derivation.trace.modules import modules_of, quiet
from derivation.trace.quantized import quantize
from derivation.trace.standins import MARKS, processor, stand_in, word_tokenizer

INDEX = "model_index.json"
# What from_pretrained raises for configs that do not fit their class.
REJECTIONS = (TypeError, ValueError, RuntimeError, ArithmeticError, AttributeError, KeyError, IndexError, ImportError)
# CLIP's text towers have 77 positions; what a tokenizer of another kind accepts is the pipeline's to cut.
CLIP_TOKENS, OTHER_TOKENS = 77, 512
# VAEs that decode in tiles alone.
TILED = ("AutoencoderKLAllegro",)
# What a config says of its weights beside the class's own arguments.
SAID = (LAYERWISE, GROUPS, GGUF, GGUF_FILE)
VOCABULARIES = ("tokenizer.json", "vocab.json", "spiece.model")


@dataclass(frozen=True, slots=True)
class Part:
    """One component: the library, or the pipeline's folder, that has its class, and its config."""

    library: str
    class_name: str
    config: Mapping[str, Any]
    folder: Path | None = None


@dataclass(frozen=True, slots=True)
class Description:
    """A pipeline's class, its components (None where it goes without) and its other arguments."""

    class_name: str
    parts: Mapping[str, Part | None]
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path) -> Description:
        """Return what ``model_index.json`` and the components' configs say; raises DerivationError for no pipeline."""
        index = _json(folder / INDEX)
        entries = {name: value for name, value in index.items() if not name.startswith("_")}
        parts = {n: _part(folder / n, *value) for n, value in entries.items() if isinstance(value, list)}
        arguments = {n: value for n, value in entries.items() if not isinstance(value, list)}
        return cls(str(index.get("_class_name")), parts, arguments)

    @classmethod
    def live(cls, configs: LiveConfigs) -> Description:
        """Return what a live pipeline's components say."""
        parts = {name: None if part is None else Part(*part) for name, part in configs.components.items()}
        return cls(configs.class_name, parts, configs.arguments)

    @property
    def pipeline_class(self) -> Any:
        """The pipeline's class in diffusers; raises DerivationError where there is none."""
        found = getattr(diffusers, self.class_name, None)
        if isinstance(found, DummyObject):
            raise DerivationError(f"{INDEX}: {self.class_name} wants {', '.join(found._backends)} installed")
        if not (isinstance(found, type) and issubclass(found, diffusers.DiffusionPipeline)):
            raise DerivationError(f"{INDEX}: _class_name = {self.class_name!r} is no pipeline of diffusers")
        return found

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        parts = {n: None if p is None else [p.library, p.class_name, p.config] for n, p in self.parts.items()}
        return {"class": self.class_name, "parts": parts, "arguments": dict(self.arguments)}


def _json(path: Path) -> dict[str, Any]:
    try:
        loaded = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise DerivationError(f"{path}: no JSON: {shown(str(error))}") from None
    if not isinstance(loaded, dict):
        raise DerivationError(f"{path}: no JSON object")
    return loaded


def _part(folder: Path, library: str | None, class_name: str | None) -> Part | None:
    if library is None or class_name is None:
        return None
    names = ("config.json", "scheduler_config.json", "preprocessor_config.json", "tokenizer_config.json")
    file = next((folder / name for name in names if (folder / name).is_file()), None)
    return Part(library, class_name, {} if file is None else _json(file), folder)


def build(description: Description, dtype: str) -> Any:
    """Return the real pipeline, its models on ``meta`` in the dtypes that ``from_pretrained`` gives.

    Raises DerivationError, with one line, for what diffusers or transformers rejects.
    """
    cls = description.pipeline_class
    stand_in(cls)
    try:
        with quiet():
            made = _components(cls, description, dtype)
            known = inspect.signature(cls.__init__).parameters
            pipe = _assembled(cls, {n: v for n, v in {**made, **description.arguments}.items() if n in known})
    except DerivationError:
        raise
    except REJECTIONS as error:
        said = f"{type(error).__name__}: {shown(str(error))}"
        raise DerivationError(f"{description.class_name}: rejected: {said}") from None
    pipe.set_progress_bar_config(disable=True)
    vae: Any = modules_of(pipe).get("vae")
    if type(vae).__name__ in TILED:
        vae.enable_tiling()
    return pipe


def _assembled(cls: Any, arguments: Mapping[str, Any]) -> Any:
    try:
        with no_init_weights():
            return cls(**arguments)
    except (RuntimeError, NotImplementedError):  # a model that is made of others' weights (AnimateDiff)
        with no_init_weights(), torch.device("meta"):
            return cls(**arguments)


def _components(pipeline: type, description: Description, dtype: str) -> dict[str, Any]:
    """Return the components by name, models first: tokenizers know the ids of their marks."""
    parts = {name: part for name, part in description.parts.items() if part is not None}
    classes = {name: _class(name, part, pipeline) for name, part in parts.items()}
    made: dict[str, Any] = dict.fromkeys(description.parts)
    for name, cls in classes.items():
        if issubclass(cls, torch.nn.Module):
            made[name] = model(cls, parts[name].config, dtype)
    token_ids = _token_ids(each for each in made.values() if each is not None)
    for name, cls in classes.items():
        if made[name] is None:
            made[name] = _other(cls, parts[name], token_ids)
    return made


def _token_ids(models: Iterable[Any]) -> dict[str, int]:
    """Return the ids at which models look for marks of images and videos: ``image_token`` -> id."""
    configs = [model.config for model in models if isinstance(model, transformers.PreTrainedModel)]
    found = {name: getattr(config, f"{name}_id", None) for config in configs for name in MARKS}
    return {name: i for name, i in found.items() if isinstance(i, int)}


def _other(cls: Any, part: Part, token_ids: Mapping[str, int]) -> Any:
    """Return a component that is no model."""
    if hasattr(cls, "set_timesteps") or part.class_name.endswith("Scheduler"):
        return _scheduler(cls, part.config)
    if issubclass(cls, transformers.PreTrainedTokenizerBase):
        return _tokenizer(cls, part, token_ids)
    if issubclass(cls, transformers.ProcessorMixin):
        return processor(part.class_name, token_ids)
    return cls(**part.config)


def _class(name: str, part: Part, pipeline: type) -> Any:
    """Return a component's class: a library's, or that of a pipeline's own module."""
    for module in (part.library, f"diffusers.pipelines.{part.library}", pipeline.__module__):
        try:
            found = getattr(import_module(module), part.class_name, None)
        except ImportError:
            continue
        if isinstance(found, type):
            return found
    raise UnsupportedConfig(INDEX, name, [part.library, part.class_name], "classes of diffusers and transformers")


def model(cls: Any, config: Mapping[str, Any], dtype: str) -> Any:
    """Return a model of diffusers or transformers on ``meta``, evaluated, quantised or cast, without gradients."""
    given, config = config, {key: value for key, value in config.items() if key not in SAID}
    try:
        with no_init_weights(), torch.device("meta"):
            made = _constructed(cls, config)
    except (RuntimeError, NotImplementedError):  # a model that copies weights while it is built
        with no_init_weights():
            made = _constructed(cls, config)
    made.requires_grad_(False).eval()
    made = _cast(made, getattr(torch, dtype))
    quantize(made, given)
    for storage, _, paths in given.get(LAYERWISE, ()):
        for path in paths:
            made.get_submodule(path).to(getattr(torch, storage))
    return made


def cast_layerwise(pipe: Any, description: Description) -> None:
    """Put layerwise casting's hooks onto the models that have it, whose weights are in its storage dtype."""
    for name, part in description.parts.items():
        for storage, compute, paths in () if part is None else part.config.get(LAYERWISE, ()):
            dtypes = getattr(torch, storage), getattr(torch, compute)
            for path in paths:
                apply_layerwise_casting_hook(getattr(pipe, name).get_submodule(path), *dtypes, False)


def _constructed(cls: Any, config: Mapping[str, Any]) -> Any:
    if hasattr(cls, "from_config") and not issubclass(cls, transformers.PreTrainedModel):
        return cls.from_config(dict(config))
    made = cls(cls.config_class.from_dict(dict(config)))
    made.tie_weights()
    return made


def _cast(made: Any, dtype: torch.dtype) -> Any:
    """Cast what a state dict holds, but what the class keeps in float32, and move all to ``meta``.

    diffusers (load_model_dict_into_meta) keeps parameters under ``_keep_in_fp32_modules`` for every dtype, transformers
    (_get_dtype_plan) for float16 alone, those of ``_keep_in_fp32_modules_strict`` for both half types.
    """
    kept = _kept_names(made, dtype)
    persistent = {id(buffer) for name, buffer in made.named_buffers() if name in made.state_dict().keys()}  # noqa: SIM118
    for name, tensor in [*made.named_parameters(), *made.named_buffers()]:
        own = isinstance(tensor, torch.nn.Parameter) or id(tensor) in persistent
        if own and tensor.is_floating_point():
            tensor.data = tensor.data.to(torch.float32 if kept & set(name.split(".")) else dtype)
    return torch.nn.Module.to(made, "meta")


def _kept_names(made: Any, dtype: torch.dtype) -> set[str]:
    kept = set(getattr(made, "_keep_in_fp32_modules", None) or ())
    if isinstance(made, transformers.PreTrainedModel):
        strict = set(getattr(made, "_keep_in_fp32_modules_strict", None) or ())
        kept = (kept if dtype is torch.float16 else set()) | strict
    return kept


def _scheduler(cls: Any, config: Mapping[str, Any]) -> Any:
    with torch.device("cpu"):
        return cls.from_config(dict(config))


def _tokenizer(cls: Any, part: Part, token_ids: Mapping[str, int]) -> Any:
    """Return the real tokenizer where its files are there, else a stand-in of the same class."""
    if part.folder is not None and any((part.folder / name).is_file() for name in VOCABULARIES):
        return cls.from_pretrained(str(part.folder))
    default = CLIP_TOKENS if cls.__name__.startswith("CLIP") else OTHER_TOKENS
    length = part.config.get("model_max_length", default)
    return word_tokenizer(cls.__name__, length if isinstance(length, int) else default, token_ids)


class State:
    """What a call leaves behind (tables made at first use, a scheduler's history), to be put back before the next.

    Theorem: a call depends on the pipeline's attributes and diffusers' caches alone, so with both as before it
    allocates as a first call does.
    """

    def __init__(self, pipe: Any) -> None:
        self._saved = [
            (each, dict(each.__dict__), _copies(each, dict, OrderedDict), _copies(each, list)) for each in _owned(pipe)
        ]
        self._caches = list(_caches())

    def restore(self) -> None:
        """Put everything back."""
        for each, attributes, mappings, lists in self._saved:
            for name in each.__dict__.keys() - attributes.keys():
                del each.__dict__[name]
            each.__dict__.update(attributes)
            for name, content in mappings.items():
                each.__dict__[name].clear()
                each.__dict__[name].update(content)
            for name, content in lists.items():
                each.__dict__[name][:] = content
        for cached in self._caches:
            cached.cache_clear()


def _copies(owner: Any, *kinds: type) -> dict[str, Any]:
    return {name: type(value)(value) for name, value in owner.__dict__.items() if type(value) in kinds}


def _owned(pipe: Any) -> Iterator[Any]:
    """Yield the pipeline, its components, their submodules and other objects of diffusers and transformers in them."""
    seen: set[int] = set()
    queue = [pipe, *(part for part in pipe.components.values() if part is not None)]
    while queue:
        each = queue.pop()
        if id(each) in seen or isinstance(each, torch.Tensor | type) or not hasattr(each, "__dict__"):
            continue
        seen.add(id(each))
        yield each
        queue += each._modules.values() if isinstance(each, torch.nn.Module) else ()
        queue += [value for value in each.__dict__.values() if _is_theirs(value)]


def _is_theirs(value: Any) -> bool:
    module = type(value).__module__
    return module.split(".")[0] in ("diffusers", "transformers") and "config" not in module


def _caches() -> Iterator[Any]:
    """Yield the ``lru_cache`` functions of diffusers' and transformers' models and pipelines that are loaded."""
    for name, module in list(sys.modules.items()):
        if name.startswith(("diffusers.", "transformers.")) and (".models." in name or ".pipelines." in name):
            own = [value for value in vars(module).values() if getattr(value, "__module__", None) == name]
            inside = [value for each in own if isinstance(each, type) for value in vars(each).values()]
            yield from (each for value in (*own, *inside) for each in _behind(value) if type(each) is _CACHED)


def _behind(value: Any) -> Iterator[Any]:
    """Yield a function and what it closes over: diffusers' lru_cache_unless_export closes over a cached one."""
    function = getattr(value, "__func__", value)
    yield function
    yield from (cell.cell_contents for cell in getattr(function, "__closure__", None) or ())


_CACHED = type(lru_cache(lambda: None))
