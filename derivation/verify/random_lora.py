"""LoRA files with zeros in them: random ranks on random layers, in each of the formats that diffusers reads."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path

from derivation.walk.components import LORA_MODELS
from derivation.walk.ops import lora_shapes

FORMATS = ("kohya", "peft", "diffusers", "processor")
KOHYA = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
# a layer's last name and what attention processors called it
PROCESSOR = {"to_q": "to_q", "to_k": "to_k", "to_v": "to_v", "to_out.0": "to_out"}
PROCESSOR |= {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}
# diffusers 0.42.1 has no rule for kohya's name of the one, and reads no rank of the other
NOT_KOHYA, NO_RANK = "add_embedding", "text_projection"
# without one of these diffusers cannot tell the format of a text encoder's LoRA (convert_state_dict_to_diffusers)
TELLING = ("out_proj", "fc1")
BYTES = {"F32": 4, "F16": 2, "BF16": 2}

# path, its model's name before it -> shape of the weight
Layers = Mapping[str, tuple[int, ...]]
Shapes = dict[str, tuple[int, ...]]


def lora_tensors(form: str, layers: Layers, ranks: Mapping[str, int]) -> Shapes:
    """Return the tensors of a LoRA of ``ranks`` on ``layers``, by their keys in the format ``form``."""
    found: Shapes = {}
    for path, rank in ranks.items():
        model, _, layer = path.partition(".")
        for key, shape in zip(_keys(form, model, layer), lora_shapes(layers[path], rank), strict=True):
            found[key] = shape
        if form == "kohya":
            found[f"{_kohya(model, layer)}.alpha"] = ()
    return found


def _keys(form: str, model: str, layer: str) -> tuple[str, str]:
    """Return the keys of A and B."""
    if form == "kohya":
        name = _kohya(model, layer)
        return f"{name}.lora_down.weight", f"{name}.lora_up.weight"
    path = f"{model}.{layer}"
    if form == "peft":
        return f"{path}.lora_A.weight", f"{path}.lora_B.weight"
    for last, old in PROCESSOR.items():
        if form == "processor" and path.endswith(f".{last}"):
            path = path.removesuffix(last) + ("processor." if model == "unet" else "") + f"{old}_lora"
            return f"{path}.down.weight", f"{path}.up.weight"
    middle = "lora" if model == "unet" or layer == "text_projection" else "lora_linear_layer"
    return f"{path}.{middle}.down.weight", f"{path}.{middle}.up.weight"


def _kohya(model: str, layer: str) -> str:
    full = layer if model == "unet" or layer.startswith("text_") else f"text_model.{layer}"
    return f"{KOHYA[model]}_{full.replace('.', '_')}"


def random_lora(rng: random.Random, layers: Layers) -> Shapes:
    """Return the tensors of a LoRA on a part of ``layers``, of every rank from 1 to 5."""
    form, share = rng.choice(FORMATS), rng.choice((0.1, 0.5, 1.0))
    models = [model for model in LORA_MODELS if any(path.startswith(f"{model}.") for path in layers)]
    chosen = {model for model in models if rng.random() < 0.7} or {"unet"}
    ranks = {}
    for path in layers:
        if path.split(".")[0] in chosen and not path.endswith(NO_RANK) and not (form == "kohya" and NOT_KOHYA in path):
            always = path.endswith(TELLING) and not path.startswith("unet.")
            if always or rng.random() < share:
                ranks[path] = rng.randint(1, 5)
    return lora_tensors(form, layers, ranks or {next(path for path in layers if path.startswith("unet.")): 1})


def write_safetensors(path: Path, tensors: Shapes, dtype: str = "F32") -> None:
    """Write a safetensors file of zeros."""
    header, end = {}, 0
    for key, shape in tensors.items():
        count = 1
        for side in shape:
            count *= side
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end := end + count * BYTES[dtype]]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)
