"""Weights that are kept in other dtypes: torchao's layers against its own on meta, and what they hold as they run."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
gguf = pytest.importorskip("gguf")

from derivation import derive
from derivation.call import Call
from derivation.config.gguf_file import gguf_tensors
from derivation.config.traced import GGUF_FILE, live_configs, traced_folder, with_gguf
from derivation.errors import DerivationError
from derivation.options import Options
from derivation.options.live import live_traced_options
from derivation.tape.recorded import RecordedSubject
from derivation.tape.symbols import ceil512
from derivation.trace.build import Description, build
from derivation.trace.build import model as built
from derivation.trace.pipeline import TracedPipeline
from derivation.trace.quantized import LinearTorchAo, parameter_count, quantize
from derivation.trace.regimes import entries, record
from derivation.trace.tracer import Tracer
from derivation.verify.pipelines import SIDES, arguments, description, read
from derivation.verify.streams import naive_peaks

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


# GGUF, from a file's header alone

FLUX = "black-forest-labs/FLUX.1-dev"
Shapes = dict[str, tuple[int, ...]]


def linear(name: str, rows: int, columns: int) -> Shapes:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def original_flux() -> Shapes:
    """The tensors of flux1-dev.safetensors: black-forest-labs/flux, src/flux/model.py and modules/layers.py."""
    width, mlp = 3072, 4 * 3072
    found = linear("img_in", width, 64) | linear("txt_in", width, 4096)
    for name, size in (("time_in", 256), ("vector_in", 768), ("guidance_in", 256)):
        found |= linear(f"{name}.in_layer", width, size) | linear(f"{name}.out_layer", width, width)
    for block in (f"double_blocks.{i}.{part}" for i in range(19) for part in ("img", "txt")):
        found |= linear(f"{block}_mod.lin", 6 * width, width) | linear(f"{block}_attn.qkv", 3 * width, width)
        found |= linear(f"{block}_attn.proj", width, width)
        found |= {f"{block}_attn.norm.{each}_norm.scale": (128,) for each in ("query", "key")}
        found |= linear(f"{block}_mlp.0", mlp, width) | linear(f"{block}_mlp.2", width, mlp)
    for block in (f"single_blocks.{i}" for i in range(38)):
        found |= linear(f"{block}.linear1", 3 * width + mlp, width) | linear(f"{block}.linear2", width, width + mlp)
        found |= {f"{block}.norm.{each}_norm.scale": (128,) for each in ("query", "key")}
        found |= linear(f"{block}.modulation.lin", 3 * width, width)
    last = linear("final_layer.adaLN_modulation.1", 2 * width, width) | linear("final_layer.linear", 64, width)
    return found | last


def header(tensors: Mapping[str, tuple[int, tuple[int, ...]]], metadata: bytes = b"", entries: int = 0) -> bytes:
    """ggml/docs/gguf.md: magic, version, counts, metadata, then name, dimensions, type and offset of each tensor."""

    def parts() -> Iterator[bytes]:
        yield b"GGUF" + struct.pack("<IQQ", 3, len(tensors), entries) + metadata
        for name, (kind, shape) in tensors.items():
            yield struct.pack("<Q", len(name)) + name.encode()
            yield struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], kind, 0)

    return b"".join(parts())


def test_a_header_is_read_as_the_package_gguf_reads_the_file(tmp_path: Path) -> None:
    import numpy as np

    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "flux")
    writer.add_array("words", ["a", "bc"])
    writer.add_array("numbers", [1, 2, 3])
    writer.add_float32("number", 1.5)
    writer.add_tensor("plain", np.zeros((3, 5), np.float32))
    kind = gguf.GGMLQuantizationType.Q8_0
    writer.add_tensor("packed", gguf.quants.quantize(np.zeros((4, 64), np.float32), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    read = {t.name: (int(t.tensor_type), tuple(map(int, t.shape[::-1]))) for t in gguf.GGUFReader(path).tensors}
    assert gguf_tensors(path) == read == {"plain": (0, (3, 5)), "packed": (8, (4, 64))}


def test_a_file_of_flux_is_put_into_diffusers_names(tmp_path: Path) -> None:
    """What city96/FLUX.1-dev-gguf's Q8_0 holds: matrices in blocks of 34 bytes for 32 weights, vectors in float32."""
    path = tmp_path / "flux1-dev-Q8_0.gguf"
    path.write_bytes(header({n: (8 if len(shape) == 2 else 0, shape) for n, shape in original_flux().items()}))
    configs = with_gguf(traced_folder(FLUX), path, "bfloat16")
    made = built(diffusers.FluxTransformer2DModel, configs.components["transformer"][2], "bfloat16")
    assert parameter_count(made) == 11_901_408_320
    plain = built(
        diffusers.FluxTransformer2DModel,
        Description.of(traced_folder(FLUX).path).parts["transformer"].config,
        "bfloat16",
    )
    ours = entries("", made)
    assert ours.keys() == entries("", plain).keys()
    for name, (shape, dtype) in entries("", plain).items():
        packed = len(shape) == 2
        assert ours[name] == ((*shape[:-1], shape[-1] // 32 * 34), "uint8") if packed else (shape, dtype)


def tiny_flux(folder: Path) -> Any:
    """A tiny Flux transformer, saved as a GGUF file in diffusers' names with its config beside it."""
    made = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=32,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    made.save_config(folder)
    writer = gguf.GGUFWriter(folder / "tiny.gguf", "flux")
    kinds = [gguf.GGMLQuantizationType[name] for name in ("Q8_0", "Q4_0", "F16")]
    for i, (name, weight) in enumerate(made.state_dict().items()):
        kind = kinds[i % 3] if weight.dim() == 2 and weight.shape[1] % 32 == 0 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(weight.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return made


def test_weights_of_a_file_are_those_that_from_single_file_loads(tmp_path: Path) -> None:
    tiny_flux(tmp_path)
    quantization = diffusers.GGUFQuantizationConfig(compute_dtype=torch.bfloat16)
    path = tmp_path / "tiny.gguf"
    loaded = diffusers.FluxTransformer2DModel.from_single_file(
        str(path), config=str(tmp_path), quantization_config=quantization, torch_dtype=torch.bfloat16
    )
    said = {"quantization_config": {"quant_method": "gguf", "compute_dtype": "bfloat16"}}
    config = {**loaded.config, **said, GGUF_FILE: [gguf_tensors(path), path.name]}
    made = built(diffusers.FluxTransformer2DModel, config, "bfloat16")
    assert entries("", made) == entries("", loaded)
    assert {dtype for _, dtype in entries("", made).values()} == {"uint8", "bfloat16"}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (header({}, struct.pack("<Q1sI", 1, b"k", 9) + struct.pack("<IQ", 9, 1) * 5000, 1), "cannot be read"),
        (b"", "does not begin with GGUF"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "GGUF version 1"),
        (header({"img_in.weight": (8, (64, 64))})[:-9], "its header ends early"),
        (header({}, struct.pack("<Q1sI", 1, b"a", 77), 1), "metadata of type 77"),
        (header({"img_in.weight": (8, (64, 64))}), r"tensors = \['img_in.weight'\] .* those of FluxTran"),
        (header({"img_in.weight": (99, (64, 64))}), r"img_in.weight = 99 is not supported"),
    ],
    ids=["arrays in arrays", "nothing", "version", "short", "metadata", "another model", "another type"],
)
def test_a_broken_or_other_file_is_one_line(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "other.gguf"
    path.write_bytes(content)
    with pytest.raises(DerivationError, match=said) as error:
        configs = with_gguf(traced_folder(FLUX), path, "bfloat16")
        built(diffusers.FluxTransformer2DModel, configs.components["transformer"][2], "bfloat16")
    assert "\n" not in str(error.value) and "other.gguf" in str(error.value)


def test_what_has_no_transformer_takes_no_file(tmp_path: Path) -> None:
    for model, file in (
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", tmp_path / "x.gguf"),
        ("guoyww/animatediff-motion-adapter-v1-5-2", tmp_path / "x.gguf"),
        (FLUX, 7),
        (FLUX, tmp_path / "x.gguf"),
    ):
        with pytest.raises(DerivationError, match=r"transformer|x.gguf: cannot be read"):
            derive(model, transformer=file)


# group offload

DOCUMENTS = {d["class"]: d for d in read(Path(__file__).parent / "tiny_pipelines.jsonl")}
DOCUMENT, OPTIONS = DOCUMENTS["FluxPipeline"], Options(pipeline="txt2img", dtype="float32")


def weights_bytes(*modules: Any) -> int:
    return sum(ceil512(t.nbytes) for m in modules for t in (*m.parameters(), *m.buffers()))


def grouped(tiny: Description, name: str, **given: Any) -> Description:
    part = tiny.parts[name]
    return replace(tiny, parts={**tiny.parts, name: replace(part, config={**part.config, "group_offloading": given})})


def test_groups_of_modules_come_and_go() -> None:
    """Beside what a call allocates: the modules outside blocks and one block, or a leaf, of which attention is none."""
    plain, call = TracedPipeline(description(DOCUMENT), OPTIONS, arguments(DOCUMENT), SIDES), Call(128, 192, 1, 64)
    model = plain.pipe.transformer
    blocks = {name: module for name, module in model.named_children() if isinstance(module, torch.nn.ModuleList)}
    outside = weights_bytes(*(module for name, module in model.named_children() if name not in blocks))
    without = naive_peaks(plain.trace(call))
    found = {}
    for level, given in (("block_level", {"num_blocks_per_group": 1}), ("leaf_level", {})):
        for stream in (False, True):
            offloaded = grouped(description(DOCUMENT), "transformer", offload_type=level, use_stream=stream, **given)
            traced = TracedPipeline(offloaded, OPTIONS, arguments(DOCUMENT), SIDES)
            tape = traced.trace(call)
            found[level, stream] = max(naive_peaks(tape).values())
            traced._tapes.clear()
            assert traced.trace(call).events == tape.events
    more = found["block_level", False] - without["transformer"]
    assert more in {outside + weights_bytes(block) for each in blocks.values() for block in each}
    assert found["leaf_level", False] == without["transformer"]
    # the next group is loaded while one runs
    assert (
        found["leaf_level", True] > found["leaf_level", False]
        and found["block_level", True] >= found["block_level", False]
    )


def test_group_offload_is_read_off_a_live_pipeline(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = build(description(DOCUMENT), "float32")
    for part in (pipe.transformer, pipe.text_encoder, pipe.text_encoder_2, pipe.vae):
        part.to_empty(device="cpu")
    cpu = torch.device("cpu")
    pipe.transformer.enable_group_offload(cpu, cpu, "block_level", num_blocks_per_group=2)
    configs = live_configs(pipe)
    said = {"offload_type": "block_level", "use_stream": False, "num_blocks_per_group": 2}
    assert configs.components["transformer"][2]["group_offloading"] == said and configs.grouped == ("transformer",)
    assert live_traced_options(pipe)["offload"] is None
    with pytest.raises(DerivationError, match=r"offload = 'model' is not supported: transformer has group offload"):
        derive(pipe, offload="model")


def test_what_is_grouped_is_not_resident() -> None:
    document = DOCUMENTS["DDIMPipeline"]
    tiny = grouped(description(document), "unet", offload_type="leaf_level", use_stream=False)
    found = record(tiny, OPTIONS, "tiny", "tiny", arguments(document), sides=SIDES)
    read_back = RecordedSubject.from_document(found.document())
    assert found.grouped == read_back.grouped == ("unet",)
    assert read_back.parameters.keys() == {"unet"} and not read_back.resident
