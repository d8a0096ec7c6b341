"""What is read off the models of a live pipeline whose class is traced."""

from __future__ import annotations

from typing import Any

from derivation.config import layerwise_hooks
from derivation.errors import shown
from derivation.options.choices import DTYPES
from derivation.options.live.modules import Models, attentions, first_parameter, tuners, unsupported
from derivation.options.live.readers import PROCESSORS, SLICED

# What a VAE is switched to, for which tracing has no option.
VAE_SWITCHES = ("use_tiling", "use_slicing")
# Processors in whose place the traced model has the one of its class, which calls F.scaled_dot_product_attention.
OTHER_PROCESSORS = {*PROCESSORS, SLICED} - {"AttnProcessor2_0"}


def dtype(models: Models) -> str:
    """Return the type of every model's weights, of cast ones what they compute in; quantised models have their own."""
    plain = {name: model for name, model in models.items() if getattr(model, "hf_quantizer", None) is None}
    dtypes = {name: _dtype(model) for name, model in plain.items()}
    found = {str(each).removeprefix("torch.") for each in dtypes.values()}
    if len(found) != 1 or not found <= set(DTYPES):
        raise unsupported("dtype", shown(dtypes), f"all one of {', '.join(DTYPES)}")
    return found.pop()


def _dtype(model: Any) -> Any:
    hooks = (hook.compute_dtype for _, hook in layerwise_hooks(model))
    return next(hooks, None) or getattr(first_parameter(model)(), "dtype", None)


def refuse(models: Models) -> None:
    """Raise DerivationError for what changes a traced call's memory and is not read."""
    for name, model in models.items():
        if (path := next((path for path, _ in tuners(model)), None)) is not None:
            raise unsupported(f"{name}.{path}", "an adapter's layer", "none, by pipe.unload_lora_weights()")
        for switch in VAE_SWITCHES:
            if getattr(model, switch, False) is True:
                raise unsupported(f"{name}.{switch}", True, "False")
        for module in attentions([model]):
            processor = type(module.processor).__name__
            backend = getattr(module.processor, "_attention_backend", None)
            if processor in OTHER_PROCESSORS or backend is not None:
                raise unsupported(f"{name}'s attention", backend or processor, "the processors of its class")
