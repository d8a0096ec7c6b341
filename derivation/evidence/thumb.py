"""Public rules of thumb for the memory of Stable Diffusion, to set beside the derivation.

Facts and constants as their authors state them: ComfyUI (model_base.py, sd.py), InvokeAI (VAE working
memory), accelerate's "+ 20 %", and the draft of this project's origin.
"""

from __future__ import annotations

from dataclasses import dataclass

from derivation.config import Checkpoint
from derivation.options import Options
from derivation.tape.subject import weights_bytes
from derivation.tape.symbols import DTYPE_BYTES
from derivation.walk.components import parameter_count, parameters

MIB = 1 << 20
PIPELINE_MODELS = ("vae", "text_encoder", "unet")


@dataclass(frozen=True, slots=True)
class Call:
    """What is run: a component or pipeline, its image size in pixels, images or UNet rows, and prompt tokens."""

    what: str
    height: int
    width: int
    batch: int
    dtype: str
    tokens: int

    @property
    def pixels(self) -> int:
        """Pixels of one image."""
        return self.height * self.width


def rules_of_thumb(call: Call, checkpoint: Checkpoint, options: Options, with_weights: bool) -> dict[str, int]:
    """Return bytes by rule; ``with_weights`` adds the weights that the rule leaves out."""
    entries = parameters(checkpoint, options)
    if call.what.startswith("vae"):
        weights = weights_bytes(entries["vae"]) if with_weights else 0
        rules = {"ComfyUI": weights + _comfy_vae(call), "InvokeAI": weights + _invoke_vae(call)}
        return {"InvokeAI": rules["InvokeAI"]} if call.what == "vae_decode_tiled" else rules
    if call.what == "unet":
        return {"ComfyUI": weights_bytes(entries["unet"]) + _comfy_unet(call, call.batch)}
    weights = sum(weights_bytes(model) for model in entries.values())
    parameters_without_checker = sum(parameter_count(entries[name]) for name in PIPELINE_MODELS)
    return {
        "ComfyUI": weights + max(_comfy_unet(call, 2 * call.batch), _comfy_vae(call)),
        "InvokeAI": weights + _invoke_vae(call),
        "weights x 1.2": weights * 6 // 5,
        "activations by hand": _origin_draft(call, parameters_without_checker),
    }


def _comfy_vae(call: Call) -> int:
    """2178 (decode) or 1767 (encode) bytes a pixel and byte of dtype; the batch is ignored."""
    return (1767 if call.what == "vae_encode" else 2178) * call.pixels * DTYPE_BYTES[call.dtype]


def _invoke_vae(call: Call) -> int:
    """2200 (decode) or 1100 (encode) bytes a pixel and byte of dtype, a quarter more under tiling."""
    side = call.pixels if call.what != "vae_decode_tiled" else 512 * 512 * 5 // 4
    return (1100 if call.what == "vae_encode" else 2200) * side * DTYPE_BYTES[call.dtype]


def _comfy_unet(call: Call, rows: int) -> int:
    """Rows x latent area x bytes of dtype x 0.01 MiB (memory_usage_factor 1 for SD 1.5)."""
    return rows * (call.pixels // 64) * DTYPE_BYTES[call.dtype] * MIB // 100


def _origin_draft(call: Call, parameter_total: int) -> int:
    """1.2 x (2 bytes x parameters + max(24 H W + 8 h w, h w (4470 + 2 L))), h = H / 8, w = W / 8."""
    latents = call.pixels // 64
    activations = max(24 * call.pixels + 8 * latents, latents * (4470 + 2 * call.tokens))
    return (2 * parameter_total + activations) * 6 // 5
