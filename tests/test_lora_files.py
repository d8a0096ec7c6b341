"""LoRA files: ranks and layers are read from headers, and what they add equals peft's layers to the byte."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("peft")

from conftest import SD15, SDXL, small_folders

from derivation import DerivationError, derive
from derivation.config import load
from derivation.options import Options
from derivation.trace.modules import build_text_encoder, build_unet, quiet
from derivation.trace.switches import switches
from derivation.verify.compare import compare_pipeline, read_config
from derivation.verify.random_lora import FORMATS, lora_tensors, write_safetensors
from derivation.walk.components import lora_layers

# seeds of small checkpoints with cross-attention at several levels
SMALL = {"SD": 5, "SDXL": 8}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return small_folders(tmp_path_factory, SMALL)


def layers_of(folder):
    found = lora_layers(load(str(folder)), Options())
    return {path: shape for path, shape in found.items() if "add_embedding" not in path and "text_proj" not in path}


def write(path, form, layers, first=1, dtype="F32", of=""):
    """Write a LoRA on the layers with ``of`` in their paths, of ranks from ``first`` to ``first + 2``."""
    ranks = {path: first + i % 3 for i, path in enumerate(p for p in layers if of in p)}
    write_safetensors(path, lora_tensors(form, layers, ranks), dtype)
    return path


@pytest.mark.parametrize(("family", "form"), zip(("SD", "SDXL", "SDXL", "SD"), FORMATS, strict=True))
def test_a_lora_on_every_layer_equals_peft_s(folders, tmp_path, family, form):
    folder = folders[family]
    file = write(tmp_path / "a.safetensors", form, layers_of(folder), dtype="BF16" if form == "peft" else "F32")
    derivation = derive(str(folder), lora=str(file), num_inference_steps=1, pipeline="txt2img")
    for comparison in compare_pipeline(derivation, 72, 64, batch_size=2):
        assert comparison.match, comparison


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("SDXL", {"lora_fused": True, "attention": "eager"}),
        ("SD", {"offload": "sequential", "lora_fused": True}),
        ("SD", {"offload": "model", "pipeline": "img2img", "strength": 1.0, "ip_adapter_tokens": 4}),
    ],
    ids=str,
)
def test_several_files_equal_peft_s_with_all_adapters_active(folders, tmp_path, family, options):
    folder = folders[family]
    layers = layers_of(folder)
    files = [
        write(tmp_path / "a.safetensors", "kohya", layers),
        write(tmp_path / "b.safetensors", "peft", layers, 7, of="to_"),
        write(tmp_path / "c.safetensors", "processor", layers, 4, of="text_encoder.encoder.layers"),
    ]
    chosen = {"num_inference_steps": 1, "pipeline": "txt2img", **options}
    derivation = derive(str(folder), lora=", ".join(map(str, files)), **chosen)
    for comparison in compare_pipeline(derivation, 64, 72):
        assert comparison.match, comparison


def test_parameters_have_peft_s_names_and_shapes(folders, tmp_path):
    folder = folders["SDXL"]
    layers = layers_of(folder)
    files = (write(tmp_path / "a.safetensors", "kohya", layers), write(tmp_path / "b.safetensors", "peft", layers, 2))
    derivation = derive(str(folder), lora=",".join(map(str, files)))
    chosen = switches(derivation.options)
    with quiet():
        models = {"unet": build_unet(read_config(derivation, "unet"), switches=chosen)}
        for name in {"text_encoder", "text_encoder_2"} & derivation.parameters.keys():
            models[name] = build_text_encoder(read_config(derivation, name), switches=chosen)
    for name, model in models.items():
        tensors = {f"{name}.{p}": (tuple(t.shape), "float16") for p, t in model.named_parameters()}
        found = {path: entry for path, entry in derivation.parameters[name].items() if entry[1] != "int64"}
        assert found == tensors
        assert any("lora_B.default_1" in path for path in tensors)


# What kohya's scripts call layers of SDXL's original UNet, and the shape of each one's weight.
ORIGINAL = {
    "input_blocks_0_0": (320, 4, 3, 3),
    "time_embed_0": (1280, 320),
    "label_emb_0_2": (1280, 1280),
    "input_blocks_1_0_in_layers_2": (320, 320, 3, 3),
    "input_blocks_2_0_emb_layers_1": (320, 1280),
    "input_blocks_3_0_op": (320, 320, 3, 3),
    "input_blocks_4_0_skip_connection": (640, 320, 1, 1),
    "input_blocks_5_1_transformer_blocks_1_attn2_to_k": (640, 2048),
    "input_blocks_8_1_proj_in": (1280, 1280),
    "middle_block_1_transformer_blocks_9_ff_net_0_proj": (10240, 1280),
    "middle_block_2_out_layers_3": (1280, 1280, 3, 3),
    "output_blocks_0_1_transformer_blocks_0_attn1_to_out_0": (1280, 1280),
    "output_blocks_2_2_conv": (1280, 1280, 3, 3),
    "output_blocks_5_1_proj_out": (640, 640),
    "output_blocks_8_0_in_layers_2": (320, 640, 3, 3),
    "out_2": (4, 320, 3, 3),
}


def test_kohya_s_names_of_sdxl_s_original_unet(tmp_path):
    layers = {f"unet.{name}": shape for name, shape in ORIGINAL.items()}
    file = write(tmp_path / "a.safetensors", "kohya", layers)
    derivation = derive(SDXL, lora=str(file))
    with quiet():
        real = build_unet(read_config(derivation, "unet"), switches=switches(derivation.options))
    expected = {f"unet.{path}": (tuple(p.shape), "float16") for path, p in real.named_parameters()}
    assert sum("lora_A" in path for path in expected) == len(ORIGINAL)
    assert derivation.parameters["unet"] == expected


def test_a_text_encoder_alone_leaves_the_unet_s_layers_out(tmp_path):
    layers = lora_layers(load(SD15), Options())
    file = write(tmp_path / "a.safetensors", "kohya", layers, of="to_q")
    unet = tmp_path / "unet.json"
    unet.write_text(json.dumps(read_config(derive(SD15), "text_encoder")))
    with_it, without = (derive(str(unet), **given) for given in ({"lora": str(file)}, {}))
    assert with_it.weights_bytes == without.weights_bytes


def test_weights_are_what_the_ranks_say(tmp_path):
    layers = {"unet.conv_in": (320, 4, 3, 3), "unet.time_embedding.linear_1": (1280, 320)}
    file = write(tmp_path / "a.safetensors", "peft", layers, 8)
    added = 8 * (4 * 9 + 320) + 9 * (320 + 1280)
    grown = derive(SD15, lora=str(file)).parameter_counts["unet"] - derive(SD15).parameter_counts["unet"]
    assert grown == added


def test_a_file_that_changes_is_read_again(tmp_path):
    layers = {"unet.conv_in": (320, 4, 3, 3)}
    counts = []
    for rank in (1, 2):
        file = write(tmp_path / "a.safetensors", "peft", layers, rank)
        counts.append(derive(SD15, lora=str(file)).parameter_counts["unet"])
    assert counts[1] - counts[0] == 4 * 9 + 320


DOWN, UP = "unet.conv_in.lora_A.weight", "unet.conv_in.lora_B.weight"
GOOD = {DOWN: (4, 4, 3, 3), UP: (320, 4, 1, 1)}


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"unet.conv_in.lora_A.weight": (4, 4, 3, 3)}, "lora_A.weight has no up matrix beside it"),
        ({UP: (320, 4, 1, 1)}, "lora_B.weight has no down matrix beside it"),
        ({**GOOD, UP: (320, 5, 1, 1)}, r"is \[320, 5, 1, 1\], which does not fit a weight of 320 x 4 x 3 x 3"),
        ({**GOOD, DOWN: (4, 4)}, r"is \[4, 4\], which does not fit"),
        ({**GOOD, DOWN: ()}, r"is \[\], which does not fit"),
        ({**GOOD, DOWN: (0, 4, 3, 3), UP: (320, 0, 1, 1)}, "does not fit"),
        (
            {**GOOD, "unet.conv_in.lora_magnitude_vector": (320,)},
            "'unet.conv_in.lora_magnitude_vector' is not supported",
        ),
        ({**GOOD, "lora_unet_conv_in.hada_w1_a": (4, 4)}, "hada_w1_a' is not supported"),
        ({**GOOD, "lora_unet_conv_in.lora_mid.weight": (4, 4)}, "lora_mid.weight' is not supported"),
        ({**GOOD, "unet.conv_in.lora_B.bias": (320,)}, "lora_B.bias' is not supported"),
        ({"down_blocks.0.resnets.0.conv1.lora_A.weight": (4, 4)}, "is not supported"),
        ({"transformer.x.lora_A.weight": (4, 4)}, "is not supported"),
        ({"unet.down_blocks.9.conv.lora_A.weight": (4, 4)}, "is on no layer of .*'s unet"),
        ({"lora_te2_text_projection.lora_down.weight": (4, 4)}, "is on no layer of .*'s text_encoder_2"),
        ({"lora_unet_conv_norm_out.lora_down.weight": (4, 4)}, "is on no layer"),
        ({"text_encoder.embeddings.token_embedding.lora_A.weight": (4, 4)}, "is on no layer"),
        ({"lora_unet_conv_in.alpha": ()}, "no LoRA in it"),
        ({}, "no LoRA in it"),
    ],
    ids=str,
)
def test_a_key_that_fits_no_layer_is_refused_by_name(tmp_path, tensors, said):
    file = tmp_path / "bad.safetensors"
    write_safetensors(file, tensors)
    with pytest.raises(DerivationError, match=said) as caught:
        derive(SD15, lora=str(file))
    assert str(file) in str(caught.value)


def header(content, length=None):
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not a safetensors file"),
        (b"12345678", "not a safetensors file"),
        (header({}, 1 << 62), "not a safetensors file"),
        (header(b"{} and more"), "not JSON"),
        (header(b"\xff\xfe"), "not JSON"),
        (header(b"[" * 100_000), "not JSON"),
        (header([1, 2]), "its header is"),
        (header({DOWN: 3}), "is no tensor of a safetensors file"),
        (header({DOWN: {"dtype": "F32"}}), "is no tensor of a safetensors file"),
        (header({DOWN: {"dtype": "F32", "shape": [4, -1]}}), "is no tensor of a safetensors file"),
        (header({DOWN: {"dtype": "F32", "shape": [4, True]}}), "is no tensor of a safetensors file"),
        (header({DOWN: {"dtype": "I8", "shape": [4, 4]}}), "has dtype 'I8'"),
        (b"PK\x03\x04" + bytes(100), "not a safetensors file"),
    ],
    ids=str,
)
def test_a_file_in_another_format_is_one_line(tmp_path, content, said):
    file = tmp_path / "bad.safetensors"
    file.write_bytes(content)
    with pytest.raises(DerivationError, match=said) as caught:
        derive(SD15, lora=str(file))
    assert str(caught.value).startswith(str(file))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"lora": "no/such.safetensors"}, "no/such.safetensors: cannot be read"),
        ({"lora": "."}, "not a file"),
        ({"lora": ","}, "expected 1 to 8 files"),
        ({"lora": ",".join("abcdefghi")}, "expected 1 to 8 files"),
        ({"lora": "a\0b"}, "cannot be read"),
        ({"lora": "a.safetensors", "lora_rank": 4}, "lora_rank = 4 is not supported with lora"),
        ({"lora": 3}, "lora = 3 is not supported"),
    ],
    ids=str,
)
def test_an_option_that_names_no_file_is_one_line(given, said):
    with pytest.raises(DerivationError, match=said):
        derive(SD15, **given)
