"""LoRA files: the layers that their keys name in kohya's and diffusers' formats."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from ..errors import DerivationError, shown
from .named_files import names, stamp
from .safetensors import tensor_shapes

# kohya's sd-scripts name the models so (networks/lora.py), diffusers as a pipeline's attributes
KOHYA = {"unet": "unet", "te": "text_encoder", "te1": "text_encoder", "te2": "text_encoder_2"}
KOHYA_KEY = re.compile(r"lora_(unet|te1|te2|te)_(.+)\.(lora_down\.weight|lora_up\.weight|alpha|dora_scale)")
DIFFUSERS_KEY = re.compile(
    r"(unet|text_encoder_2|text_encoder)\.(.+?)(_lora|\.lora|\.lora_linear_layer)"
    r"(?:\.(down|up)|_([AB])(?:\.default)?)\.weight"
)
# load_lora_weights leaves these out (lora_pipeline.py: lora_state_dict)
UNREAD = ("alpha", "dora_scale")
# What LoRA processors called an attention's projections (state_dict_utils.py: UNET_TO_DIFFUSERS, DIFFUSERS_OLD_TO_PEFT)
OF_PROCESSORS = {
    "unet": {"to_q": "to_q", "to_k": "to_k", "to_v": "to_v", "to_out": "to_out_0"},
    "text": {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"},
}
SUPPORTED = "kohya's lora_unet_..., lora_te_...; diffusers' and peft's unet...., text_encoder...., of LoRA alone"


@dataclass(frozen=True, slots=True)
class Factor:
    """One matrix of a LoRA: ``layer`` is its layer's path in ``model`` with "_" for ".", ``down`` whether it is A."""

    key: str
    model: str
    layer: str
    down: bool
    shape: tuple[int, ...]


def lora_files(option: str) -> tuple[str, ...]:
    """Return the files that the option names; raises DerivationError for none, or for too many."""
    return names("lora", option)


def read_lora(file: str) -> tuple[Factor, ...]:
    """Return the matrices of a LoRA file by its header alone; raises DerivationError naming the file and the key."""
    return _read(file, *stamp(file))


@lru_cache(maxsize=32)
def _read(file: str, _: int, size: int) -> tuple[Factor, ...]:
    found = [_factor(file, key, shape) for key, shape in tensor_shapes(file, size).items()]
    factors = tuple(factor for factor in found if factor is not None)
    if not factors:
        raise DerivationError(f"{file}: no LoRA in it (supported: {SUPPORTED})")
    return factors


def _factor(file: str, key: str, shape: tuple[int, ...]) -> Factor | None:
    """Return what a key stands for, None where diffusers leaves it out."""
    if (match := KOHYA_KEY.fullmatch(key)) is not None:
        name, layer, kind = match.groups()
        return None if kind in UNREAD else Factor(key, KOHYA[name], layer, kind.startswith("lora_down"), shape)
    if (match := DIFFUSERS_KEY.fullmatch(key)) is None:
        raise DerivationError(f"{file}: {shown(key)} is not supported (supported: {SUPPORTED})")
    model, layer, suffix, direction, letter = match.groups()
    layer = layer.replace(".processor.", ".").replace(".", "_")
    if suffix == "_lora":
        layer = _unprocessed(layer, "unet" if model == "unet" else "text")
    return Factor(key, model, layer, (direction or letter) in ("down", "A"), shape)


def _unprocessed(layer: str, kind: str) -> str:
    for old, new in OF_PROCESSORS[kind].items():
        if layer.endswith(f"_{old}"):
            return layer.removesuffix(old) + new
    return f"{layer}_lora"
