"""IP-Adapter files, by their headers alone: plain, Plus and Full Face, several at once, several images each."""

from __future__ import annotations

import json
import random

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from conftest import SD15, SDXL, small_folders

from derivation import DerivationError, derive
from derivation.api import Derivation
from derivation.config import ImageProjectionConfig, load
from derivation.config.checkpoint import BUNDLED
from derivation.config.ip_adapter import FULL, PLAIN, PLUS
from derivation.options import Options
from derivation.trace.modules import pipeline_of
from derivation.verify.compare import compare_components, compare_pipeline
from derivation.verify.random_configs import random_controlnet
from derivation.verify.random_ip_adapter import ip_adapter_tensors, write_ip_adapters
from derivation.verify.random_lora import write_safetensors
from derivation.walk.components import cross_attentions

# Seeds of a checkpoint of each family.
SMALL = {"SD": 0, "SDXL": 3}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return small_folders(tmp_path_factory, SMALL)


def named(folder, tmp_path, seed, kinds):
    shapes = cross_attentions(load(str(folder)), Options())
    files = []
    for i, kind in enumerate(kinds):
        own = tmp_path if not i else tmp_path / str(i)
        own.mkdir(exist_ok=True)
        # the same seed: every file is for the encoder beside the first
        files += write_ip_adapters(own, 1, random.Random(seed), shapes, kind)
    return ",".join(map(str, files))


@pytest.mark.parametrize(
    ("family", "kinds", "options", "guidance"),
    [
        ("SD", (PLUS,), {"pipeline": "txt2img"}, True),
        ("SD", (PLUS,), {"pipeline": "img2img", "attention": "eager"}, False),
        ("SD", (FULL, PLAIN), {"pipeline": "inpaint", "ip_adapter_images": 3}, True),
        ("SD", (PLAIN, PLUS), {"pipeline": "txt2img", "attention": "eager", "ip_adapter_images": 2}, True),
        ("SD", (PLUS, PLAIN, FULL), {"pipeline": "txt2img", "attention": "math"}, False),
        ("SD", (PLUS,), {"pipeline": "txt2img", "offload": "model"}, True),
        ("SD", (PLUS, FULL), {"pipeline": "txt2img", "offload": "sequential"}, True),
        ("SDXL", (PLUS,), {"pipeline": "txt2img", "num_images_per_prompt": 2}, True),
        ("SDXL", (FULL,), {"pipeline": "img2img", "offload": "model"}, False),
        ("SDXL", (PLUS, PLUS), {"pipeline": "inpaint", "controlnet": "", "ip_adapter_images": 2}, True),
        ("SDXL", (PLAIN,), {"pipeline": "txt2img", "lora_rank": 4, "ip_adapter_images": 2}, True),
    ],
)
def test_files_equal_diffusers(folders, tmp_path, family, kinds, options, guidance):
    files = named(folders[family], tmp_path, len(kinds), kinds)
    if "controlnet" in options:
        control = tmp_path / "controlnet.json"
        unet = json.loads((folders[family] / "unet/config.json").read_text())
        control.write_text(json.dumps(random_controlnet(random.Random(5), unet)))
        options = options | {"controlnet": str(control)}
    derivation = derive(str(folders[family]), ip_adapter=files, num_inference_steps=4, **options)
    compared = compare_pipeline(derivation, 72, 136, 2, 7, guidance)
    if "offload" not in options:
        compared += compare_components(derivation, 72, 64)
    assert [each for each in compared if not each.match] == []


# h94/IP-Adapter: tokens, hidden_dims and heads of ip-adapter-plus_sd15 and ip-adapter-plus_sdxl_vit-h
PUBLISHED = {SD15: (768, 16, 768, 12), SDXL: (2048, 16, 1280, 20)}


@pytest.mark.parametrize("model", PUBLISHED)
def test_a_published_plus_adapter_has_the_real_parameters(tmp_path, model):
    width, tokens, hidden, heads = PUBLISHED[model]
    projection = ImageProjectionConfig(PLUS, 1280, width, tokens, hidden, heads)
    file = tmp_path / "plus.safetensors"
    write_safetensors(file, ip_adapter_tensors(projection, cross_attentions(load(model), Options())), "F16")
    derivation = derive(model, pipeline="txt2img", ip_adapter=str(file))
    pipe = pipeline_of(BUNDLED / model, derivation.options)
    expected = {f"unet.{path}": tuple(p.shape) for path, p in pipe.unet.named_parameters()}
    assert {path: shape for path, (shape, _) in derivation.parameters["unet"].items()} == expected
    assert all(each.match for each in compare_components(derivation, 64, 72))


def changed_tensors(change):
    projection = ImageProjectionConfig(PLUS, 1280, 768, 16, 768, 12)
    tensors = ip_adapter_tensors(projection, cross_attentions(load(SD15), Options()))
    for key, shape in change.items():
        tensors.pop(key, None)
        if shape is not None:
            tensors[key] = shape
    return tensors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_proj.latents": None}, "no image_proj that is supported in it"),
        ({"image_proj.latents": (16, 768)}, "its image_proj lacks"),
        ({"image_proj.latents": (1, 0, 768)}, "its image_proj has no elements"),
        ({"image_proj.layers.0.0.to_q.weight": None}, "its image_proj lacks 'layers.0.0.to_q.weight'"),
        ({"image_proj.layers.4.1.0.weight": (768,)}, r"image_proj.layers.4.1.0.weight is \(768,\), .* has None"),
        ({"image_proj.layers.3.1.3.weight": None}, "image_proj.layers.3.1.3.weight is None"),
        ({"image_proj.proj_in.weight": (768, 1664)}, "it takes 1664 channels, the image encoder of .* gives 1280"),
        ({"ip_adapter.1.to_k_ip.weight": None}, "ip_adapter.1.to_k_ip and to_v_ip are None"),
        ({"ip_adapter.1.to_k_ip.weight": (640, 768)}, r"ip_adapter.1.to_k_ip and to_v_ip are \(640, 768\)"),
        ({"ip_adapter.2.to_k_ip.weight": (320, 768)}, "not 1, 3, 5"),
        ({"ip_adapter.0.to_q_lora.down.weight": (4, 320)}, "'ip_adapter.0.to_q_lora.down.weight' is not supported"),
        ({"lora.unet": (1,)}, "'lora.unet' is not supported"),
        (
            {f"ip_adapter.1.to_{name}_ip.weight": (640, 768) for name in "kv"},
            r"to_k_ip of \(\(640, 768\), .* does not fit the UNet's to_k of \(\(320, 768\)",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_named(tmp_path, change, message):
    file = tmp_path / "odd.safetensors"
    write_safetensors(file, changed_tensors(change))
    with pytest.raises(DerivationError, match=rf"^{file}: .*{message}") as raised:
        _ = derive(SD15, ip_adapter=str(file)).weights
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ip_adapter": ""}, "ip_adapter = .*: expected 1 to 8 files"),
        ({"ip_adapter": "a,b,,c"}, "ip_adapter = .*: expected 1 to 8 files"),
        ({"ip_adapter": "no/such.safetensors"}, "no/such.safetensors: cannot be read"),
        ({"ip_adapter": "a", "ip_adapter_tokens": 4}, "ip_adapter_tokens = 4 is not supported with ip_adapter"),
        ({"ip_adapter": "a", "attention_slicing": "max"}, "ip_adapter = a is not supported with attention_slicing"),
        ({"ip_adapter_images": 2}, "ip_adapter_images = 2 is not supported without"),
        ({"ip_adapter_tokens": 4, "ip_adapter_images": 65}, "ip_adapter_images = 65"),
    ],
)
def test_what_is_no_file_is_told_in_a_line(options, message):
    with pytest.raises(DerivationError, match=message):
        _ = derive(SD15, **options).weights


@pytest.mark.parametrize("kind", [PLUS, FULL])
def test_a_live_pipeline_has_the_adapters_of_its_layers(folders, tmp_path, kind):
    shapes = cross_attentions(load(str(folders["SD"])), Options())
    # the published encoder: 1280 channels
    dims = (1280, shapes[0][1])
    projection = ImageProjectionConfig(kind, *dims, *((4, 32, 1) if kind == PLUS else ()))
    file = tmp_path / "adapter.safetensors"
    write_safetensors(file, ip_adapter_tensors(projection, shapes))
    named = derive(str(folders["SD"]), pipeline="txt2img", ip_adapter=str(file))
    live = derive(pipeline_of(folders["SD"], named.options), pipeline="txt2img")
    assert live.checkpoint.ip_adapters == (projection,)
    again = Derivation.from_json(live.to_json())
    for derivation in (live, again):
        assert derivation.weights == named.weights
        assert derivation.stage_peaks(128, 128) == named.stage_peaks(128, 128)
