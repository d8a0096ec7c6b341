"""What runs in a live pipeline must be what is derived: the libraries' own modules, with the weights of the configs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Set
from typing import Any

from derivation.errors import shown
from derivation.options.live.modules import Models, called, is_module, models_of, tuners, unsupported

# Whose forward() methods are mirrored, or leave a module's tensors as they are.
LIBRARIES = frozenset({"torch", "diffusers", "transformers", "peft", "accelerate"})
# What accelerate (hooks.py: add_hook_to_module) and diffusers (hooks/hooks.py) leave on modules that they wrap.
WRAPPED = ("_hf_hook", "_old_forward", "_diffusers_hook")
HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def refuse_foreign(models: Models, also: Set[str] = frozenset()) -> None:
    """Raise DerivationError for a module whose ``forward`` is not a library's own, or that has other forward hooks.

    Libraries are those whose modules are mirrored, and ``also`` those of quantised layers.
    transformers keeps hooks of its own on encoder layers once they have run (utils/output_capturing.py).
    """
    for own, model in models.items():
        for path, module in called(model, "named_modules"):
            where = ".".join(filter(None, (own, path)))
            if not is_module(module):
                continue
            forward = getattr(type(module), "forward", None)
            if forward is not None and not _of_a_library(forward, also):
                raise unsupported(f"{where}'s class", type(module).__qualname__, "the library's own")
            if "forward" in vars(module) and not any(hasattr(module, mark) for mark in WRAPPED):
                raise unsupported(f"{where}.forward", "replaced", f"that of {type(module).__qualname__}")
            hooks = (hook for name in HOOKS for hook in getattr(module, name, {}).values())
            if odd := [hook for hook in hooks if not _of_a_library(hook)]:
                raise unsupported(f"{where}'s forward hooks", shown(odd[0]), "the libraries' own")


def refuse_other_weights(pipe: Any, parameters: Mapping[str, Mapping[str, tuple[tuple[int, ...], str]]]) -> None:
    """Raise DerivationError where a model's parameters or buffers are not those that its config implies.

    Models that adapters extended are left out: what adapters add is read by itself; quantised ones, too, whose layers
    keep tensors beside parameters and buffers.
    """
    for name, model in models_of(pipe).items():
        if name in parameters and is_module(model) and not _extended(model):
            derived, found = Counter(parameters[name].values()), dict(_weights(model))
            real = Counter(found.values())
            for path, entry in found.items():
                if real[entry] > derived[entry]:
                    said = f"{list(entry[0])} {entry[1]}"
                    raise unsupported(f"{name}.{path}", said, f"what {name}'s config and dtype imply")
            if real != derived:
                implied = f"{sum(derived.values())}, as its config implies"
                raise unsupported(name, f"{sum(real.values())} tensors", implied)


def _of_a_library(function: Any, also: Set[str] = frozenset()) -> bool:
    function = getattr(function, "func", function)  # functools.partial
    return str(getattr(function, "__module__", None)).split(".")[0] in LIBRARIES | also


def _weights(model: Any) -> Iterator[tuple[str, tuple[tuple[int, ...], str]]]:
    for method in ("named_parameters", "named_buffers"):
        for path, tensor in called(model, method):
            yield path, (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))


def _extended(model: Any) -> bool:
    quantised = getattr(model, "hf_quantizer", None) is not None
    return quantised or next(tuners(model), None) is not None or getattr(model, "encoder_hid_proj", None) is not None
