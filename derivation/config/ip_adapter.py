"""IP-Adapter files: by a safetensors header alone, the image projection and what it adds to cross-attention."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..errors import DerivationError, shown
from .checks import MAX_SIZE, At, one_of
from .clip import CLIPVisionConfig, clip_vision_config
from .json_file import read_json
from .named_files import names, stamp
from .safetensors import tensor_shapes

# h94/IP-Adapter: models/image_encoder, OpenCLIP ViT-H/14, which ip-adapter_sd15 and ip-adapter_sdxl_vit-h read
IMAGE_ENCODER = Path(__file__).resolve().parent / "configs" / "h94" / "IP-Adapter" / "image_encoder" / "config.json"
PLAIN, FULL, PLUS = "ImageProjection", "IPAdapterFullImageProjection", "IPAdapterPlusImageProjection"
# loaders/unet.py (_convert_ip_adapter_image_proj_to_diffusers): tokens of an ImageProjection, channels of a head
TOKENS, DIM_HEAD = 4, 64
# embeddings.py: IPAdapterPlusImageProjection's depth and ffn_ratio
DEPTH, FFN_RATIO = 4, 4
ATTENTION_KEY = re.compile(r"(\d+)\.to_([kv])_ip\.weight")
SUPPORTED = "IP-Adapter, IP-Adapter Plus and IP-Adapter Full Face as h94/IP-Adapter has them"

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class ImageProjectionConfig:
    """The constructor arguments of an image projection of class ``kind``.

    It takes ``embed_dims`` channels and gives ``output_dims``; ``tokens`` is how many it makes of an image, of a Full
    Face one as many as the encoder has; ``hidden_dims`` and ``heads`` are the resampler's.
    """

    kind: str
    embed_dims: int
    output_dims: int
    tokens: int = 0
    hidden_dims: int = 0
    heads: int = 0

    @property
    def reads_hidden_states(self) -> bool:
        """Whether it takes the encoder's last hidden state but one, not the pooled embedding."""
        return self.kind != PLAIN

    def tensors(self) -> Shapes:
        """Return the shapes of its tensors by the keys of a file."""
        inside, out = self.embed_dims, self.output_dims
        if self.kind == PLAIN:
            return {**_linear("proj", inside, self.tokens * out), **_norm("norm", out)}
        if self.kind == FULL:
            return {**_linear("proj.0", inside, inside), **_linear("proj.2", inside, out), **_norm("proj.3", out)}
        hidden, found = self.hidden_dims, dict[str, tuple[int, ...]]()
        found["latents"] = (1, self.tokens, hidden)
        found |= {**_linear("proj_in", inside, hidden), **_linear("proj_out", hidden, out), **_norm("norm_out", out)}
        for layer in (f"layers.{i}" for i in range(DEPTH)):
            found |= {**_norm(f"{layer}.0.norm1", hidden), **_norm(f"{layer}.0.norm2", hidden)}
            found[f"{layer}.0.to_q.weight"] = (self.heads * DIM_HEAD, hidden)
            found[f"{layer}.0.to_kv.weight"] = (2 * self.heads * DIM_HEAD, hidden)
            found[f"{layer}.0.to_out.weight"] = (hidden, self.heads * DIM_HEAD)
            found |= _norm(f"{layer}.1.0", hidden)
            found[f"{layer}.1.1.weight"] = (FFN_RATIO * hidden, hidden)
            found[f"{layer}.1.3.weight"] = (hidden, FFN_RATIO * hidden)
        return found


def live_projection(layer: Any, file: str) -> ImageProjectionConfig:
    """Return the config of a live image projection; raises UnsupportedConfig for another class or another depth."""
    kind = one_of(PLAIN, FULL, PLUS)(type(layer).__name__, At(file, "image_projection_layers"))
    if kind == PLAIN:
        width = layer.norm.normalized_shape[0]
        return ImageProjectionConfig(kind, layer.image_embeds.in_features, width, layer.num_image_text_embeds)
    if kind == FULL:
        return ImageProjectionConfig(kind, layer.ff.net[0].proj.in_features, layer.norm.normalized_shape[0])
    if len(layer.layers) != DEPTH:
        raise At(file, "layers").unsupported(len(layer.layers), f"{DEPTH}, as load_ip_adapter makes them")
    _, tokens, hidden = layer.latents.shape
    heads = layer.layers[0].attn.heads
    return ImageProjectionConfig(kind, layer.proj_in.in_features, layer.proj_out.out_features, tokens, hidden, heads)


def projection_of(values: object) -> ImageProjectionConfig:
    """Return the config of its fields by name; raises DerivationError for anything else."""
    names = [field.name for field in fields(ImageProjectionConfig)]
    if not isinstance(values, Mapping) or sorted(values) != sorted(names):
        raise DerivationError(f"ip_adapters: expected objects with the keys {', '.join(names)}")
    one_of(PLAIN, FULL, PLUS)(values["kind"], At("ip_adapters", "kind"))
    for name in names[1:]:
        if type(values[name]) is not int or not 0 <= values[name] <= MAX_SIZE:
            raise At("ip_adapters", name).unsupported(values[name], f"integers from 0 to {MAX_SIZE}")
    return ImageProjectionConfig(**values)


@dataclass(frozen=True, slots=True)
class IPAdapter:
    """One file: its projection, and the shapes of to_k_ip and to_v_ip [C, K], layer by layer."""

    projection: ImageProjectionConfig
    attention: tuple[tuple[int, ...], ...]


def tokens_of(projections: Iterable[ImageProjectionConfig], encoded: int) -> int:
    """Return the image tokens of all IP-Adapters together, where the encoder has ``encoded``."""
    return sum(encoded if projection.kind == FULL else projection.tokens for projection in projections)


def ip_adapter_files(option: str) -> tuple[str, ...]:
    """Return the files that the option names; raises DerivationError for none, or for too many."""
    return names("ip_adapter", option)


def image_encoder_file(option: str | None) -> Path:
    """Return the config of the image encoder: in ``image_encoder`` beside the first file, as load_ip_adapter takes it.

    Where there is none, and without a file, h94/IP-Adapter's ``models/image_encoder``.
    """
    if option is not None:
        beside = Path(ip_adapter_files(option)[0]).parent / "image_encoder" / "config.json"
        if beside.is_file():
            return beside
    return IMAGE_ENCODER


def read_image_encoder(option: str | None = None) -> CLIPVisionConfig:
    """Return the config of the image encoder; raises DerivationError naming its file."""
    file = str(image_encoder_file(option))
    return _read_encoder(file, *stamp(file))


@lru_cache(maxsize=8)
def _read_encoder(file: str, *_: int) -> CLIPVisionConfig:
    return clip_vision_config(read_json(Path(file)), file)


def read_ip_adapter(file: str) -> IPAdapter:
    """Return what a file adds to a UNet, by its header alone; raises DerivationError naming the file and the key."""
    return _read(file, *stamp(file))


@lru_cache(maxsize=32)
def _read(file: str, written: int, size: int) -> IPAdapter:
    parts: dict[str, dict[str, tuple[int, ...]]] = {"image_proj": {}, "ip_adapter": {}}
    for key, shape in tensor_shapes(file, size).items():
        part, _, name = key.partition(".")
        if part not in parts:
            raise DerivationError(f"{file}: {shown(key)} is not supported (supported: {SUPPORTED})")
        parts[part][name] = shape
    projection = _projection(file, parts["image_proj"])
    return IPAdapter(projection, _attention(file, parts["ip_adapter"], projection))


def _projection(file: str, found: Shapes) -> ImageProjectionConfig:
    """Return the projection whose tensors are those of the file, by the keys that diffusers tells them by."""
    try:
        if "proj.weight" in found:
            width, inside = found["proj.weight"]
            made = ImageProjectionConfig(PLAIN, inside, width // TOKENS, TOKENS)
        elif "proj.3.weight" in found:
            made = ImageProjectionConfig(FULL, found["proj.0.weight"][0], found["proj.3.weight"][0])
        elif "latents" in found:
            _, tokens, hidden = found["latents"]
            heads = found["layers.0.0.to_q.weight"][0] // DIM_HEAD
            inside, out = found["proj_in.weight"][1], found["proj_out.weight"][0]
            made = ImageProjectionConfig(PLUS, inside, out, tokens, hidden, heads)
        else:
            raise DerivationError(f"{file}: no image_proj that is supported in it (supported: {SUPPORTED})")
        expected = made.tensors()
    except (KeyError, ValueError, IndexError) as error:
        raise DerivationError(f"{file}: its image_proj lacks {error} (supported: {SUPPORTED})") from None
    for key in sorted(expected.keys() | found.keys()):
        if found.get(key) != expected.get(key):
            said = f"image_proj.{key} is {shown(found.get(key))}"
            raise DerivationError(
                f"{file}: {said}, {made.kind} has {shown(expected.get(key))} (supported: {SUPPORTED})"
            )
    if any(0 in shape for shape in expected.values()):
        raise DerivationError(f"{file}: its image_proj has no elements (supported: {SUPPORTED})")
    return made


def _attention(file: str, found: Shapes, projection: ImageProjectionConfig) -> tuple[tuple[int, ...], ...]:
    """Return the shapes of the odd numbers 1, 3, ..., where to_k_ip and to_v_ip are alike."""
    layers: dict[int, dict[str, tuple[int, ...]]] = {}
    for key, shape in found.items():
        if (match := ATTENTION_KEY.fullmatch(key)) is None:
            raise DerivationError(f"{file}: {shown(f'ip_adapter.{key}')} is not supported (supported: {SUPPORTED})")
        layers.setdefault(int(match[1]), {})[match[2]] = shape
    if sorted(layers) != list(range(1, 2 * len(layers), 2)) or not layers:
        raise DerivationError(f"{file}: ip_adapter has the layers {shown(sorted(layers))}, not 1, 3, 5, ...")
    for number, layer in layers.items():
        k, v = layer.get("k"), layer.get("v")
        if k is None or k != v or k[1:] != (projection.output_dims,):
            said = f"ip_adapter.{number}.to_k_ip and to_v_ip are {shown(k)} and {shown(v)}"
            raise DerivationError(f"{file}: {said}, expected [C, {projection.output_dims}] both")
    return tuple(layers[number]["k"] for number in sorted(layers))


def _linear(name: str, inside: int, out: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, inside), f"{name}.bias": (out,)}


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}
