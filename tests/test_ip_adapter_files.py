"""IP-Adapter files, by their headers alone: plain, Plus and Full Face, several at once, several images each."""

from __future__ import annotations

import json
import random

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from conftest import SD15, SDXL, small_folders

from derivation import derive
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
