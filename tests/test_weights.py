"""Weights that are kept in other dtypes: torchao's layers against its own on meta, and what they hold as they run."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from derivation.errors import DerivationError
from derivation.trace.quantized import LinearTorchAo, quantize
from derivation.trace.tracer import Tracer

ROWS, IN, OUT = 5, 64, 32
PER_ROW, PER_TENSOR = ({"_type": name, "_version": 1, "_data": {}} for name in ("PerRow", "PerTensor"))
INT8, FLOAT8 = "Int8WeightOnlyConfig", "Float8WeightOnlyConfig"


def config(name: str, granularity: dict[str, Any], **given: Any) -> dict[str, Any]:
    """What diffusers' and transformers' TorchAoConfig.to_dict() say."""
    quant_type = {"default": {"_type": name, "_version": 2, "_data": {"granularity": granularity}}}
    return {"quantization_config": {"quant_method": "torchao", "quant_type": quant_type, **given}}


def events(module: Any, inner: list[Any], *shape: int) -> list[object]:
    """What one call allocates, by operator, dtype and shape, and the numbers of what dies."""
    x = torch.empty(*shape, dtype=torch.bfloat16, device="meta")
    with torch.no_grad(), Tracer({"": module}, [x, *inner]) as tracer:
        y = module(x)
    assert tuple(y.shape) == (*shape[:-1], OUT) and y.dtype == torch.bfloat16
    made = [(a.op, a.dtype, a.shape) for a in tracer.tape.allocations]
    return [made[event - 1] if event > 0 else event for event in tracer.tape.events]


def layer(name: str, granularity: dict[str, Any], bias: bool) -> Any:
    model = torch.nn.Sequential(torch.nn.Linear(IN, OUT, bias, dtype=torch.bfloat16, device="meta"))
    quantize(model.requires_grad_(False), config(name, granularity))
    return model[0]


SCALED = [("_to_copy", "bfloat16", (IN, OUT)), ("mm", "bfloat16", (ROWS, OUT)), -1]
DEQUANTISED = [("_to_copy", "float32", (IN, OUT)), ("mul", "float32", (IN, OUT)), ("_to_copy", "bfloat16", (IN, OUT))]


@pytest.mark.parametrize(
    ("name", "bias", "shape", "expected"),
    [
        (INT8, True, (ROWS,), [*SCALED, ("_to_copy", "bfloat16", (OUT, 1)), ("mul", "bfloat16", (ROWS, OUT)), -3, -2]),
        (FLOAT8, False, (ROWS,), [*DEQUANTISED, -1, -2, ("mm", "bfloat16", (ROWS, OUT)), -3]),
        (
            FLOAT8,
            True,
            (1, ROWS),
            [*DEQUANTISED, -1, -2, ("mm", "bfloat16", (ROWS, OUT)), -3, ("add", "bfloat16", (1, ROWS, OUT)), -4],
        ),
    ],
)
def test_what_torchaos_layers_allocate(name: str, bias: bool, shape: tuple[int, ...], expected: list[object]) -> None:
    """As torchao 0.18.0's own layers did on meta with torch 2.13: a weight is put into x's dtype for every product."""
    ours = layer(name, PER_ROW, bias)
    tensors = {name: (tuple(t.shape), t.dtype) for name, t in [*ours.named_parameters(), *ours.named_buffers()]}
    kept = {"weight": ((OUT, IN), torch.int8 if name == INT8 else torch.float8_e4m3fn)}
    kept |= {"bias": ((OUT,), torch.bfloat16)} if bias else {}
    zero = {"zero_point": ((OUT, 1), torch.int8)} if name == INT8 else {}
    assert tensors == {**kept, "scale": ((OUT, 1), torch.float32), **zero}
    assert events(ours, [], *shape, IN) == expected


@pytest.mark.parametrize("name", [INT8, FLOAT8])
@pytest.mark.parametrize("granularity", [PER_ROW, PER_TENSOR])
@pytest.mark.parametrize("bias", [False, True])
def test_layers_are_torchaos_own(name: str, granularity: dict[str, Any], bias: bool) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    theirs = torch.nn.Linear(IN, OUT, bias, dtype=torch.bfloat16, device="meta").requires_grad_(False)
    chosen = getattr(quantization, granularity["_type"])()
    quantization.quantize_(theirs, getattr(quantization, name)(granularity=chosen))
    names = ("qdata", "scale", "zero_point")
    inner = [t for n in names if (t := getattr(theirs.weight, n, None)) is not None]
    ours = layer(name, granularity, bias)
    own = [ours.weight, *ours.buffers()]
    assert [(t.shape, t.dtype) for t in inner] == [(t.shape, t.dtype) for t in own]
    for shape in ((ROWS, IN), (2, ROWS, IN), (1, IN)):
        assert events(ours, [], *shape) == events(theirs, [*inner, *([theirs.bias] if bias else [])], *shape)


def model() -> Any:
    parts = {"proj": torch.nn.Linear(IN, OUT), "norm_out": torch.nn.Sequential(torch.nn.Linear(IN, OUT))}
    return torch.nn.ModuleDict(parts).to("meta")


def test_modules_that_torchao_leaves_alone() -> None:
    made = model()
    quantize(made, config(INT8, PER_ROW, modules_to_not_convert=["norm_out"]))
    assert isinstance(made["proj"], LinearTorchAo) and type(made["norm_out"][0]) is torch.nn.Linear


@pytest.mark.parametrize(
    "given",
    [
        config("Int4WeightOnlyConfig", PER_ROW),
        config("Int8DynamicActivationInt8WeightConfig", PER_ROW),
        config(INT8, {"_type": "PerGroup", "_data": {"group_size": 32}}),
        config(FLOAT8, PER_ROW, include_input_output_embeddings=True),
        {"quantization_config": {"quant_method": "torchao", "quant_type": "int8wo"}},
    ],
)
def test_other_kinds_of_torchao_are_told(given: dict[str, Any]) -> None:
    with pytest.raises(DerivationError, match=r"config.json: quantization_config = .* Float8WeightOnlyConfig"):
        quantize(model(), given)
