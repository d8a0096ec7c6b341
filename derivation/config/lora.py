"""LoRA files: a safetensors file's header, and the layers that its keys name in kohya's and diffusers' formats."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ..errors import DerivationError, shown

# safetensors/src/tensor.rs: MAX_HEADER_LEN; the header's length is a little-endian u64 before it
MAX_HEADER_BYTES = 100_000_000
LENGTH_BYTES = 8
DTYPES = ("F64", "F32", "F16", "BF16")
MAX_FILES = 8
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
    files = tuple(name.strip() for name in option.split(","))
    if not all(files) or len(files) > MAX_FILES:
        raise DerivationError(f"lora = {shown(option)}: expected 1 to {MAX_FILES} files, separated by commas")
    return files


def stamp(file: str) -> tuple[int, int]:
    """Return when a file was written, in ns, and its bytes; raises DerivationError naming it."""
    try:
        state = Path(file).stat()
    except (OSError, ValueError) as error:
        said = getattr(error, "strerror", None) or error
        raise DerivationError(f"{file}: cannot be read ({said})") from None
    return state.st_mtime_ns, state.st_size


def read_lora(file: str) -> tuple[Factor, ...]:
    """Return the matrices of a LoRA file by its header alone; raises DerivationError naming the file and the key."""
    return _read(file, *stamp(file))


@lru_cache(maxsize=32)
def _read(file: str, _: int, size: int) -> tuple[Factor, ...]:
    header = _header(file, size)
    header.pop("__metadata__", None)
    found = [_factor(file, key, entry) for key, entry in header.items()]
    factors = tuple(factor for factor in found if factor is not None)
    if not factors:
        raise DerivationError(f"{file}: no LoRA in it (supported: {SUPPORTED})")
    return factors


def _header(file: str, size: int) -> dict[str, object]:
    """The header: entries by key."""
    path = Path(file)
    if not path.is_file():
        raise DerivationError(f"{file}: not a file")
    try:
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(LENGTH_BYTES), "little")
            if not 2 <= length <= min(MAX_HEADER_BYTES, size - LENGTH_BYTES):
                raise DerivationError(f"{file}: not a safetensors file (a header of {shown(length)} bytes)")
            header = json.loads(stream.read(length).decode("utf-8"))
    except OSError as error:
        raise DerivationError(f"{file}: cannot be read ({error.strerror or error})") from None
    except (UnicodeDecodeError, RecursionError):
        raise DerivationError(f"{file}: not a safetensors file (its header is not JSON)") from None
    except DerivationError:
        raise
    except ValueError as error:
        raise DerivationError(f"{file}: not a safetensors file (its header is not JSON: {error})") from None
    if not isinstance(header, dict):
        raise DerivationError(f"{file}: not a safetensors file (its header is {shown(header)})")
    return header


def _factor(file: str, key: str, entry: object) -> Factor | None:
    """Return what a key stands for, None where diffusers leaves it out."""
    shape = _shape(file, key, entry)
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


def _shape(file: str, key: str, entry: object) -> tuple[int, ...]:
    if isinstance(entry, dict) and isinstance(shape := entry.get("shape"), list):
        if entry.get("dtype") not in DTYPES:
            supported = f"(supported: {', '.join(DTYPES)})"
            raise DerivationError(f"{file}: {shown(key)} has dtype {shown(entry.get('dtype'))} {supported}")
        if all(type(side) is int and 0 <= side < 1 << 40 for side in shape):
            return tuple(shape)
    raise DerivationError(f"{file}: {shown(key)} is no tensor of a safetensors file: {shown(entry)}")
