"""Models that are kept in four or eight bits, as ``quantization_config`` says, or in GGUF's blocks.

Four and eight bits are bitsandbytes' and torchao's layers without their kernels. bitsandbytes 0.50: functional.py
(quantize_4bit: blocks of 64 weights with a float32 scale each, or an 8-bit one and a float32 for 256 of them),
nn/modules.py (Linear4bit, Linear8bitLt), backends/cuda/ops.py (gemm_4bit: a product of more than 1,536 rows dequantises
the weight, one of at most 4 does not; what is between depends on the card and is dequantised here, as before 0.50).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from importlib import import_module
from math import prod
from typing import Any, NamedTuple

import torch
import transformers
from torch.nn import functional as F
from transformers.quantizers.base import get_keys_to_not_convert

from derivation.config.traced import GGUF, GGUF_FILE
from derivation.errors import UnsupportedConfig

KEY = "quantization_config"
BLOCK, SCALES = 64, 256
FEW_ROWS = 4
# cuBLASLt multiplies int8 of such widths; for others bitsandbytes multiplies in float32 (_int8_linear_matmul_impl).
INT8_WIDTH = 4
# torchao's configs of weights alone, by the dtype that they are kept in where the config names none.
TORCHAO: Mapping[str, str] = {"Int8WeightOnlyConfig": "int8", "Float8WeightOnlyConfig": "float8_e4m3fn"}
GRANULARITIES = ("PerRow", "PerTensor")


class Linear4bit(torch.nn.Module):
    """``bitsandbytes.nn.Linear4bit`` on ``meta``: the packed weight [(n + 1) // 2, 1], its scales and tables."""

    def __init__(self, linear: torch.nn.Linear, double: bool, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self.shape, self.compute_dtype = linear.weight.shape, compute_dtype
        count = linear.weight.numel()
        blocks = -(-count // BLOCK)
        self.weight = torch.nn.Parameter(_empty((count + 1) // 2, 1, dtype=torch.uint8), requires_grad=False)
        self.bias = linear.bias
        self.register_buffer("absmax", _empty(blocks, dtype=torch.uint8 if double else torch.float32))
        self.register_buffer("code", _empty(16, dtype=torch.float32))
        if double:
            self.register_buffer("nested_absmax", _empty(-(-blocks // SCALES), dtype=torch.float32))
            self.register_buffer("nested_code", _empty(SCALES, dtype=torch.float32))
            self.register_buffer("offset", _empty(dtype=torch.float32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x W^T + b, in x's dtype, computed in bfloat16 or float32, or as the config says for float16."""
        given = x.dtype
        x = x.to(self.compute_dtype if given is torch.float16 else given)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        features_out, features_in = self.shape
        if x.numel() // features_in <= FEW_ROWS and features_in % BLOCK == 0:
            return x.new_empty(*x.shape[:-1], features_out).to(given)
        _scales = self._scales()  # alive through the product, as gemm_4bit's fallback holds them
        return F.linear(x, _empty(*self.shape, dtype=x.dtype), bias).to(given)

    def _scales(self) -> tuple[torch.Tensor, ...]:
        """Return what 8-bit scales are made into: themselves in float32, and with the offset."""
        scales = self.get_buffer("absmax")
        if scales.dtype is torch.float32:
            return ()
        wide = torch.empty_like(scales, dtype=torch.float32)
        return wide, wide + self.get_buffer("offset")


class Linear8bit(torch.nn.Module):
    """``bitsandbytes.nn.Linear8bitLt`` on ``meta``: the weight [out, in] in int8, and a float32 scale for each row."""

    def __init__(self, linear: torch.nn.Linear, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold
        self.weight = torch.nn.Parameter(_empty(*linear.weight.shape, dtype=torch.int8), requires_grad=False)
        self.bias = linear.bias
        self.register_buffer("SCB", _empty(linear.weight.shape[0], dtype=torch.float32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x W^T + b, in x's dtype (autograd/_functions.py: MatMul8bitLt): x is put into int8 row by row."""
        rows = x.reshape(-1, x.shape[-1])
        _held = self._quantized(rows.to(torch.float16))
        product = _empty(rows.shape[0], self.weight.shape[0], dtype=torch.int32)
        half = torch.empty_like(product, dtype=torch.float16)
        return half.to(x.dtype).reshape(*x.shape[:-1], -1)

    def _quantized(self, half: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return int8_vectorwise_quant: the scale of each row, the rows in int8, and the columns that hold outliers."""
        scales, codes = _empty(half.shape[0], dtype=torch.float32), _empty(*half.shape, dtype=torch.int8)
        if self.threshold <= 0:
            return scales, codes
        outliers = half.abs() >= self.threshold
        columns = torch.argwhere(outliers.any(dim=0)).view(-1) if outliers.any() else _empty(0, dtype=torch.int64)
        if half.shape[0] > 1:
            codes[:, columns] = 0
        return scales, codes, columns


class LinearTorchAo(torch.nn.Module):
    """A linear layer with torchao's Int8Tensor or Float8Tensor on ``meta``: [out, in], float32 scales [out or 1, 1].

    torchao 0.18, quantization/quantize_/workflows: int8_tensor.py (the weight is put into x's dtype, the product is
    scaled), float8_tensor.py (the weight is scaled in float32 and put into its own dtype), for weights alone.
    """

    def __init__(self, linear: torch.nn.Linear, dtype: torch.dtype, scales: int) -> None:
        super().__init__()
        self.kept_dtype, self.bias = linear.weight.dtype, linear.bias
        self.weight = torch.nn.Parameter(_empty(*linear.weight.shape, dtype=dtype), requires_grad=False)
        self.register_buffer("scale", _empty(scales, 1, dtype=torch.float32))
        if dtype is torch.int8:
            self.register_buffer("zero_point", _empty(scales, 1, dtype=torch.int8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x W^T + b, in x's dtype."""
        return self._scaled(x) if self.weight.dtype is torch.int8 else self._dequantised(x)

    def _scaled(self, x: torch.Tensor) -> torch.Tensor:
        product = torch.mm(x.reshape(-1, x.shape[-1]), self.weight.t().to(x.dtype))
        y = product * self.get_buffer("scale").to(x.dtype).flatten()
        y = y.reshape(*x.shape[:-1], -1)
        if self.bias is not None:
            y += self.bias
        return y

    def _dequantised(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.matmul(x, self._weight())
        return y if self.bias is None else y + self.bias

    def _weight(self) -> torch.Tensor:
        wide = self.weight.t().to(torch.float32)
        scaled = wide * self.get_buffer("scale").t()
        return scaled.to(self.kept_dtype)


def _empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def quantize(model: Any, config: Mapping[str, Any], file: str = "config.json") -> None:
    """Replace a model's linear layers as ``from_pretrained`` does; raises UnsupportedConfig for another method."""
    given = config.get(KEY)
    if not given:
        return
    if isinstance(given, Mapping) and given.get("quant_method") == GGUF and (GGUF in config or GGUF_FILE in config):
        # of diffusers' GGUF layers, which need the package gguf
        gguf = import_module("derivation.trace.gguf")
        types = config[GGUF] if GGUF in config else gguf.types_of(model, *config[GGUF_FILE])
        gguf.read_gguf(model, types, _dtype(given["compute_dtype"]), file)
        return
    if not isinstance(given, Mapping) or (method := _METHODS.get(str(given.get("quant_method")))) is None:
        raise UnsupportedConfig(file, KEY, given, f"quant_method {', '.join(_METHODS)}")
    kept = _kept(model, given.get(method.skipped), method.suffix)
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and not kept(name):
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, method.made(module, given, file).eval())


def _bitsandbytes(linear: torch.nn.Linear, given: Mapping[str, Any], file: str) -> torch.nn.Module:
    if given.get("load_in_4bit"):
        compute_dtype = _dtype(given.get("bnb_4bit_compute_dtype", "float32"))
        return Linear4bit(linear, bool(given.get("bnb_4bit_use_double_quant")), compute_dtype)
    if given.get("llm_int8_has_fp16_weight") or linear.in_features % INT8_WIDTH:
        supported = f"weights in int8, of layers whose width is a multiple of {INT8_WIDTH}"
        raise UnsupportedConfig(file, KEY, given, supported)
    return Linear8bit(linear, float(given.get("llm_int8_threshold", 6.0)))


def _torchao(linear: torch.nn.Linear, given: Mapping[str, Any], file: str) -> torch.nn.Module:
    """Return a layer as torchao's config says (torchao/core/config.py: config_to_dict)."""
    config = given["quant_type"].get("default") if isinstance(given.get("quant_type"), Mapping) else None
    name, data = (str(config.get("_type")), config.get("_data", {})) if isinstance(config, Mapping) else ("", {})
    granularity = (data.get("granularity") or {}).get("_type", "PerRow")
    if name not in TORCHAO or granularity not in GRANULARITIES or given.get("include_input_output_embeddings"):
        supported = f"quant_type {', '.join(TORCHAO)}, {' or '.join(GRANULARITIES)}, of linear layers"
        raise UnsupportedConfig(file, KEY, given, supported)
    dtype = (data.get("weight_dtype") or {}).get("_data", TORCHAO[name])
    return LinearTorchAo(linear, _dtype(dtype), linear.out_features if granularity == "PerRow" else 1)


class _Method(NamedTuple):
    """What makes a layer, the key of modules that are left alone, and what their names are matched against."""

    made: Callable[[torch.nn.Linear, Mapping[str, Any], str], torch.nn.Module]
    skipped: str
    suffix: str


_METHODS: Mapping[str, _Method] = {
    "bitsandbytes": _Method(_bitsandbytes, "llm_int8_skip_modules", ""),
    "torchao": _Method(_torchao, "modules_to_not_convert", ".weight"),
}


def _dtype(name: object) -> torch.dtype:
    found: torch.dtype = getattr(torch, str(name).removeprefix("torch."))
    return found


def _kept(model: Any, skipped: Any, suffix: str) -> Callable[[str], bool]:
    """Return what says whether a layer keeps its dtype, ``suffix`` after its name where a parameter's is matched.

    transformers/quantizers/base.py: get_modules_to_not_convert, quantizers_utils.py: should_convert_module;
    diffusers/quantizers: bitsandbytes/utils.py (_replace_with_bnb_linear), torchao/torchao_quantizer.py
    (check_if_quantized_param).
    """
    keys = list(skipped or ()) + list(getattr(model, "_keep_in_fp32_modules", None) or ())
    if isinstance(model, transformers.PreTrainedModel):
        keys += [] if skipped else get_keys_to_not_convert(model)

        def keeps(name: str) -> bool:
            return any(re.match(rf"(?:{key})(?:(?<=\.)|(?=\.|$))", name) or name.endswith(key) for key in keys)
    else:

        def keeps(name: str) -> bool:
            return name.rpartition(".")[2] in keys or any(f"{key}." in name or key == name for key in keys)

    return lambda name: keeps(f"{name}{suffix}")


def parameter_count(model: torch.nn.Module) -> int:
    """Return a model's parameters, of which two are in a byte of a packed weight, and a type's block in its bytes."""
    packed = [m for m in model.modules() if isinstance(m, Linear4bit)]
    plain = sum(prod(getattr(p, "quant_shape", p.shape)) for p in model.parameters())
    return plain + sum(m.shape.numel() - m.weight.numel() for m in packed)
