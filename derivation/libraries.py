"""Versions of torch, diffusers and transformers: those that were verified, and every rule that depends on one."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from derivation.errors import DerivationError

Version = tuple[int, int]
LIBRARIES = ("torch", "diffusers", "transformers")
# As in pyproject.toml's extra "verify".
DEFAULT: Mapping[str, str] = {"torch": "2.13.0", "diffusers": "0.42.1", "transformers": "5.23.0"}
# Pairs of diffusers and transformers that ``verify --versions`` traces with torch 2.13.0: evidence/versions.json.
PAIRS = (
    ("0.30.3", "4.44.2"),
    ("0.31.0", "4.46.3"),
    ("0.32.2", "4.48.3"),
    ("0.33.1", "4.50.3"),
    ("0.34.0", "4.53.3"),
    ("0.35.2", "4.57.1"),
    ("0.36.0", "4.57.6"),
    ("0.37.1", "5.3.0"),
    ("0.38.0", "5.7.0"),
    ("0.39.0", "5.10.4"),
    ("0.40.0", "5.14.1"),
    ("0.41.0", "5.18.0"),
    ("0.42.1", "5.23.0"),
    ("0.42.1", "5.24.0"),
)
# From scaled_dot_product_attention's math path of torch 2.5 on, the rules below follow torch's sources.
TORCH = (*(f"2.{minor}" for minor in range(5, 13)), DEFAULT["torch"], "2.14.1")
VERIFIED: Mapping[str, tuple[str, ...]] = {
    "torch": TORCH,
    "diffusers": tuple(pair[0] for pair in PAIRS),
    "transformers": tuple(pair[1] for pair in PAIRS),
}


class NearestVersion(UserWarning):
    """A version that was not verified answers as its nearest neighbour among those that were."""


@dataclass(frozen=True, slots=True)
class Rule:
    """What a library does from version ``since`` on and before ``until`` (None: without end), and where it says so."""

    library: str
    since: Version | None
    until: Version | None
    what: str
    source: str


RULES: Mapping[str, Rule] = {
    "causal_mask": Rule(
        "transformers",
        None,
        (5, 0),
        "CLIP's text model makes its causal mask [L, L] and keeps it until the encoder returns",
        "modeling_clip.py: CLIPTextTransformer.forward; modeling_attn_mask_utils.py: _make_causal_mask",
    ),
    "arange_for_mask": Rule(
        "transformers",
        (5, 0),
        (5, 4),
        "CLIP's text model gives create_causal_mask an arange of its positions",
        "modeling_clip.py: CLIPTextTransformer.forward",
    ),
    "contiguous_qkv": Rule(
        "transformers",
        (4, 52),
        (4, 56),
        "CLIP's attention makes queries, keys and values contiguous",
        "integrations/sdpa_attention.py: sdpa_attention_forward, which modeling_clip.py calls since 4.52",
    ),
    "any_pooled_output": Rule(
        "diffusers",
        None,
        (0, 33),
        "SDXL's encode_prompt keeps the first text encoder's last hidden state as if it were pooled",
        "pipeline_stable_diffusion_xl.py: encode_prompt",
    ),
    "stacked_denormalize": Rule(
        "diffusers",
        None,
        (0, 32),
        "images are denormalized one by one and stacked, always",
        "image_processor.py: VaeImageProcessor.postprocess",
    ),
    "kept_encoder_output": Rule(
        "diffusers",
        None,
        (0, 31),
        "AutoencoderKL.encode keeps the encoder's output beside the moments",
        "autoencoder_kl.py: AutoencoderKL.encode",
    ),
    "euler_draws_noise": Rule(
        "diffusers",
        None,
        (0, 31),
        "EulerDiscreteScheduler.step draws its noise and scales it though s_churn = 0 needs none",
        "scheduling_euler_discrete.py: EulerDiscreteScheduler.step",
    ),
    "half_upcast_vae": Rule(
        "diffusers",
        None,
        (0, 36),
        "under fused attention upcast_vae puts post_quant_conv, decoder.conv_in and decoder.mid_block back to float16",
        "pipeline_stable_diffusion_xl.py: upcast_vae",
    ),
    "float32_upsample": Rule(
        "diffusers", None, (0, 31), "Upsample2D interpolates bfloat16 in float32", "upsampling.py: Upsample2D.forward"
    ),
    "contiguous_shortcut": Rule(
        "diffusers",
        (0, 33),
        (0, 37),
        "conv_shortcut takes input_tensor.contiguous()",
        "resnet.py: ResnetBlock2D.forward",
    ),
    "shared_cublaslt": Rule(
        "torch", (2, 12), None, "cuBLASLt shares cuBLAS's workspace", "PR 168175, PR 175879; gpu-history.json"
    ),
    "kept_cublaslt": Rule("torch", (2, 9), None, "cuBLASLt's workspace is kept once allocated", "PR 156495"),
    "blackwell_cublas": Rule("torch", (2, 12), None, "cuBLAS's workspace is 32 MiB on Blackwell, too", "PR 175344"),
    "flash_state_on_gpu": Rule(
        "torch", (2, 7), None, "flash attention's random state and its unused twin are CUDA tensors", "flash_api.cpp"
    ),
    "conv3d_columns": Rule(
        "torch",
        (2, 9),
        (2, 10),
        "conv3d in half precision leaves cuDNN 9.8 to 9.14 and takes columns, but for kernels of 1",
        "Convolution.cpp: use_cudnn (PR 163581, PR 166480); cuDNN 9.10.2 in the wheels",
    ),
    "fused_on_blackwell": Rule("torch", (2, 7), None, "fused attention runs up to sm121", "PR 145602"),
    "wide_split_head_dim": Rule(
        "torch", (2, 7), None, "flash's split accumulator rounds head dims above 128 to 64", "flash_api.cpp"
    ),
    "wide_cudnn": Rule(
        "torch", (2, 8), None, "cuDNN attention takes head dims to 256 on Hopper", "cuDNN 9.10, in the wheels"
    ),
    "cudnn_first_on_x0": Rule(
        "torch", (2, 9), (2, 10), "cuDNN attention is tried first on sm90 and sm100", "check_prefer_cudnn_attention"
    ),
    "cudnn_first": Rule(
        "torch",
        (2, 11),
        None,
        "cuDNN attention is tried first on sm90, sm100 and sm103",
        "check_prefer_cudnn_attention: cuDNN above 9.15, in the wheels",
    ),
}


@dataclass(frozen=True, slots=True)
class Libraries:
    """The verified versions whose allocations are followed."""

    torch: str = DEFAULT["torch"]
    diffusers: str = DEFAULT["diffusers"]
    transformers: str = DEFAULT["transformers"]

    def follows(self, name: str) -> bool:
        """Return whether the rule of that name holds."""
        rule = RULES[name]
        version = parse_version(rule.library, getattr(self, rule.library))
        return (rule.since is None or version >= rule.since) and (rule.until is None or version < rule.until)


@lru_cache(maxsize=256)
def libraries(torch: str | None = None, diffusers: str | None = None, transformers: str | None = None) -> Libraries:
    """Return the verified versions nearest to those given; a half of a pair that is not given is the other's.

    Raises DerivationError for text that is no version.

    >>> libraries(diffusers="0.35.1")
    Libraries(torch='2.13.0', diffusers='0.35.2', transformers='4.57.1')
    """
    found = dict(DEFAULT)
    given = {"torch": torch, "diffusers": diffusers, "transformers": transformers}
    for name, text in given.items():
        if text is not None:
            found[name] = nearest(name, text)
    if diffusers is not None and transformers is None:
        found["transformers"] = next(theirs for ours, theirs in PAIRS if ours == found["diffusers"])
    if transformers is not None and diffusers is None:
        found["diffusers"] = next(ours for ours, theirs in reversed(PAIRS) if theirs == found["transformers"])
    return Libraries(**found)


def nearest(library: str, text: str) -> str:
    """Return the verified version of a library that is nearest to ``text``, of two alike the newer."""
    major, minor = parse_version(library, text)

    def distance(known: str) -> tuple[int, int, bool]:
        its_major, its_minor = parse_version(library, known)
        # the newest of an older major version is the nearest of it, the oldest of a newer one
        steps = its_minor if its_major > major else -its_minor if its_major < major else abs(its_minor - minor)
        return abs(its_major - major), steps, its_minor < minor

    return text if text in VERIFIED[library] else min(VERIFIED[library], key=distance)


def tell_unverified(**given: str | None) -> None:
    """Warn NearestVersion of each version that stands for another minor version."""
    for name, text in given.items():
        if text is None:
            continue
        found = nearest(name, text)
        if parse_version(name, found) != parse_version(name, text):
            message = f"{name} {text} is not verified: what follows is {name} {found}'s, the nearest that is"
            warnings.warn(message, NearestVersion, stacklevel=3)


@lru_cache(maxsize=256)
def parse_version(library: str, text: str) -> Version:
    """Return (major, minor) of a version.

    >>> parse_version("torch", "2.8.0+cu126")
    (2, 8)
    """
    parts = text.split(".")
    if len(parts) < 2 or not all(part.isdecimal() for part in parts[:2]):
        raise DerivationError(f"{library} = {text!r} is not a version (expected: major.minor)")
    return int(parts[0]), int(parts[1])
