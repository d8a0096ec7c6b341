"""A live pipeline's models, and the registry of what is read off them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from derivation.config import is_live_traced
from derivation.errors import DerivationError
from derivation.registry import Registry

Models = Mapping[str, Any]
Reader = Callable[[Any, Models], Any]

MODELS = ("text_encoder", "text_encoder_2", "image_encoder", "vae", "controlnet", "unet", "safety_checker")
READERS: Registry[Reader] = Registry("option reader")


def models_of(pipe: Any) -> dict[str, Any]:
    """Return the pipeline's models by name: those of MODELS, or all of one that is traced."""
    names = [n for n, part in pipe.components.items() if is_module(inner(part))] if is_live_traced(pipe) else MODELS
    models = {name: inner(getattr(pipe, name, None)) for name in names}
    return {name: model for name, model in models.items() if model is not None}


def first_parameter(model: Any) -> Callable[[], Any]:
    """Return how to get at a model's first parameter; at the model itself where it has none."""
    path = next((name for name, _ in called(model, "named_parameters")), None)
    if path is None:
        return lambda: model
    *scope, leaf = path.split(".")
    for name in scope:
        model = getattr(model, name)
    return lambda: getattr(model, leaf)


def attentions(models: Iterable[Any]) -> Iterator[Any]:
    """Yield the attention modules with a processor: those of UNet, ControlNets and VAE."""
    for model in models:
        yield from (module for module in called(model, "modules") if hasattr(module, "processor"))


def option(read: Reader) -> Reader:
    """Register how the option of the function's name is read."""
    return READERS.register(read.__name__)(read)


def up_blocks(models: Models) -> Iterator[Any]:
    """Yield the up blocks of the UNet."""
    yield from getattr(models.get("unet"), "up_blocks", ())


def tuners(model: Any) -> Iterator[tuple[str, Any]]:
    """Yield peft's layers of a model by path."""
    for name, module in called(model, "named_modules"):
        if any(cls.__name__ == "BaseTunerLayer" for cls in type(module).__mro__):
            yield name, module


def inner(model: Any) -> Any:
    """Return the module that torch.compile wrapped."""
    return getattr(model, "_orig_mod", model)


def is_module(module: Any) -> bool:
    """Return whether ``module`` is one of torch's."""
    return any(cls.__module__.startswith("torch.nn.") for cls in type(module).__mro__)


def called(model: Any, name: str) -> Iterator[Any]:
    """Yield from the method ``name``, from nothing where there is none."""
    method = getattr(model, name, None)
    yield from method() if callable(method) else ()


def config(model: Any, key: str) -> Any:
    """Return a key of a diffusers model's config, None where it is not there."""
    return model.config.get(key)


def unsupported(key: str, value: object, supported: str) -> DerivationError:
    """Return the error that names a value and what is supported in its place."""
    return DerivationError(f"{key} = {value} is not supported (supported: {supported})")
