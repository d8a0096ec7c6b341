"""Weights of a GGUF file in a real model on ``meta``: diffusers' own layers hold and dequantise them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.loaders import single_file_model
from diffusers.quantizers.gguf import utils

from derivation.errors import UnsupportedConfig
from derivation.options.choices import DTYPES

SUPPORTED = ", ".join(kind.name for kind in utils.SUPPORTED_GGUF_QUANT_TYPES)
PLAIN = ("F32", "F16")


def read_gguf(model: Any, types: Mapping[str, str], compute_dtype: torch.dtype, file: str = "config.json") -> None:
    """Give a model the weights of a GGUF file, of which ``types`` says each one's.

    diffusers/quantizers/gguf: a block's type says its bytes; what computes with them dequantises the weight, whole.
    Raises UnsupportedConfig for a quantised weight of a layer that is not linear.
    """
    for path, kind in types.items():
        owner, _, name = path.rpartition(".")
        module, weight = model.get_submodule(owner), model.get_parameter(path)
        if kind in DTYPES:
            weight.data = weight.data.to(getattr(torch, kind))
        elif isinstance(module, torch.nn.Linear) and name == "weight":
            parent, _, attribute = owner.rpartition(".")
            setattr(model.get_submodule(parent), attribute, _linear(module, kind, compute_dtype))
        else:
            raise UnsupportedConfig(file, path, kind, "GGUF's types for weights of linear layers")


def types_of(model: Any, tensors: Mapping[str, tuple[int, tuple[int, ...]]], file: str) -> dict[str, str]:
    """Return the types of a model's quantised weights, by path, from a file's tensors: name -> (number, shape).

    Names are put into diffusers' by its own converter, as ``from_single_file`` does; what is not quantised, and what
    the class keeps in float32, has the dtype that is asked for. Raises UnsupportedConfig for a file of another model.
    """
    state = {name: _meta(name, number, shape, file) for name, (number, shape) in tensors.items()}
    own, cls = model.state_dict(), type(model).__name__
    if single_file_model._should_convert_state_dict_to_diffusers(own, state):
        known = single_file_model.SINGLE_FILE_LOADABLE_CLASSES.get(cls, {})
        try:
            state = known["checkpoint_mapping_fn"](config=dict(model.config), checkpoint=state)
        except (LookupError, ValueError, RuntimeError, TypeError):  # a converter that does not know its tensors
            raise UnsupportedConfig(file, "tensors", sorted(tensors)[:3], f"those of {cls}") from None
    for path, weight in own.items():
        shape = getattr(state.get(path), "quant_shape", getattr(state.get(path), "shape", None))
        if shape is None or tuple(shape) != tuple(weight.shape):
            raise UnsupportedConfig(
                file, path, shape and list(shape), f"{list(weight.shape)}, as {cls}'s config has it"
            )
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    quantised = {path: kind for path in own if (kind := getattr(state[path], "quant_type", None)) is not None}
    return {path: kind.name for path, kind in quantised.items() if not kept & set(path.split("."))}


def _meta(name: str, number: int, shape: tuple[int, ...], file: str) -> torch.Tensor:
    """Return a tensor of a file without its bytes (model_loading_utils.py: load_gguf_checkpoint)."""
    try:
        kind = utils.gguf.GGMLQuantizationType(number)
    except ValueError:
        raise UnsupportedConfig(file, name, number, SUPPORTED) from None
    if kind.name in PLAIN:
        return torch.empty(*shape, device="meta")
    block, size = utils.GGML_QUANT_SIZES[kind]
    if kind not in utils.SUPPORTED_GGUF_QUANT_TYPES or shape[-1] % block:
        raise UnsupportedConfig(file, name, f"{kind.name} {list(shape)}", f"{SUPPORTED}, whole blocks of {block}")
    data = torch.empty(*shape[:-1], shape[-1] // block * size, dtype=torch.uint8, device="meta")
    return utils.GGUFParameter(data, quant_type=kind)


def _linear(linear: torch.nn.Linear, kind: str, compute_dtype: torch.dtype) -> torch.nn.Module:
    block, size = utils.GGML_QUANT_SIZES[utils.gguf.GGMLQuantizationType[kind]]
    rows, columns = linear.weight.shape
    made = utils.GGUFLinear(columns, rows, linear.bias is not None, compute_dtype=compute_dtype, device="meta")
    data = torch.empty(rows, columns // block * size, dtype=torch.uint8, device="meta")
    made.weight = utils.GGUFParameter(data, quant_type=utils.gguf.GGMLQuantizationType[kind])
    made.bias = linear.bias
    return made.eval()
