"""IP-Adapter files with zeros in them, and small image encoders: every kind of image projection, random dimensions."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from derivation.config import ImageProjectionConfig
from derivation.config.ip_adapter import FULL, PLAIN, PLUS, TOKENS
from derivation.verify.random_lora import Shapes, write_safetensors

KINDS = (PLAIN, FULL, PLUS)


def random_image_encoder(rng: random.Random) -> dict[str, Any]:
    """Return a small config of a CLIPVisionModelWithProjection."""
    heads = rng.choice((1, 2, 4))
    return {
        "architectures": ["CLIPVisionModelWithProjection"],
        "hidden_size": heads * rng.choice((8, 16, 40)),
        "intermediate_size": rng.choice((32, 100)),
        "num_hidden_layers": rng.randint(1, 3),
        "num_attention_heads": heads,
        "image_size": rng.choice((28, 56)),
        "patch_size": 14,
        "hidden_act": rng.choice(("gelu", "quick_gelu")),
        "projection_dim": rng.choice((16, 48)),
    }


def ip_adapter_tensors(projection: ImageProjectionConfig, attention: Sequence[tuple[int, ...]]) -> Shapes:
    """Return a file's tensors for the shapes of the UNet's to_k, in the order of its processors."""
    found = {f"image_proj.{key}": shape for key, shape in projection.tensors().items()}
    for i, shape in enumerate(attention):
        found |= {f"ip_adapter.{2 * i + 1}.to_{name}_ip.weight": shape for name in "kv"}
    return found


def random_ip_adapter(
    rng: random.Random, encoder: dict[str, Any], attention: Sequence[tuple[int, ...]], kind: str | None = None
) -> Shapes:
    """Return the tensors of an IP-Adapter of a random kind, or of ``kind``."""
    kind, width = kind or rng.choice(KINDS), attention[0][1]
    if kind == PLAIN:
        made = ImageProjectionConfig(kind, encoder["projection_dim"], width, TOKENS)
    elif kind == FULL:
        made = ImageProjectionConfig(kind, encoder["hidden_size"], width)
    else:
        tokens, hidden, heads = rng.choice((1, 4, 16)), rng.choice((32, 72)), rng.choice((1, 2))
        made = ImageProjectionConfig(kind, encoder["hidden_size"], width, tokens, hidden, heads)
    return ip_adapter_tensors(made, attention)


def write_ip_adapters(
    folder: Path, count: int, rng: random.Random, attention: Sequence[tuple[int, ...]], kind: str | None = None
) -> list[Path]:
    """Write ``count`` files and the image encoder beside them, and return the files."""
    encoder = random_image_encoder(rng)
    beside = folder / "image_encoder"
    beside.mkdir(exist_ok=True)
    (beside / "config.json").write_text(json.dumps(encoder))
    files = [folder / f"ip_adapter{number}.safetensors" for number in range(count)]
    for file in files:
        write_safetensors(file, random_ip_adapter(rng, encoder, attention, kind))
    return files
