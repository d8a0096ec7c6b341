"""What a GPU and its libraries are, and the numbers that follow: who runs attention, how large a scratch is.

Coefficients and their sources are in ``profiles.json``; PyTorch's own rules are functions here.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache, reduce
from itertools import product
from operator import mul
from pathlib import Path
from typing import Any

from derivation.errors import DerivationError, one_of
from derivation.gpu.cards import Gpu, lookup
from derivation.libraries import Libraries, libraries, tell_unverified

PROFILES = Path(__file__).with_name("profiles.json")
SCRATCH = ("expected", "upper", "none")
# sizes are integers, or polynomials
Shape = tuple[Any, ...]
# dtype, whether in channels_last, kind, output channels (0: any), whether of two images or more alone
WorkspaceKey = tuple[str, bool, str, int, bool]


class NearestProfile(UserWarning):
    """A figure that nobody measured on this GPU was taken from the nearest documented one."""


@dataclass(frozen=True, slots=True)
class Workspace:
    """A convolution's workspace: these multiples of the bytes of its input, output and weight, and a constant.

    ``pixel`` are bytes for each pixel of one output image (an implicit GEMM's table of offsets), ``pair`` and
    ``filter`` for each pair of channels and each output channel (weights in Winograd's transform).
    """

    input: int
    output: int
    weight: int
    constant: int = 0
    pixel: int = 0
    pair: int = 0
    filter: int = 0

    def nbytes(self, given: Shape, out: Shape, weight: Shape, item_bytes: int, out_bytes: Any = None) -> Any:
        """Return the bytes for an input [N, C, (T,) H, W], an output [N, K, ...] and a weight [K, C, ...].

        ``out_bytes`` are the output's where its sides are no polynomials.
        """
        output = reduce(mul, out, item_bytes) if out_bytes is None else out_bytes
        tensors = self.input * reduce(mul, given, item_bytes) + self.output * output
        own = reduce(mul, out[2:], self.pixel) if self.pixel else 0
        channels = self.pair * weight[0] * weight[1] + self.filter * weight[0]
        return tensors + self.weight * reduce(mul, weight, item_bytes) + own + channels + self.constant


NO_WORKSPACE = Workspace(0, 0, 0)
# Kinds of convolutions that a profile may tell apart; "spatial" is every other.
POINTWISE, UNALIGNED, STRIDED, SPATIAL = "pointwise", "unaligned", "strided", "spatial"
# The widest heads of the models' attention: the VAE's.
MAX_HEAD_DIM = 512
# cuDNN's tensor-core kernels read channels in eights.
CHANNEL_ALIGNMENT = 8
UPPER_WORKSPACE = Workspace(1, 1, 1)


@dataclass(frozen=True, slots=True)
class Hardware:
    """A GPU with its library versions; ``scratch`` is "expected" (the profile), "upper" or "none".

    ``workspaces`` holds the profile's convolution workspace by (dtype, channels_last, kind). cuDNN's benchmark
    mode is off, which is PyTorch's default.
    """

    compute_capability: tuple[int, int]
    sm_count: int | None = None
    libraries: Libraries = field(default_factory=Libraries)
    scratch: str = "expected"
    workspaces: tuple[tuple[WorkspaceKey, Workspace], ...] = ()

    def convolution_workspace(
        self,
        dtype: str,
        channels_last: bool,
        kernel: int = 3,
        in_channels: int = CHANNEL_ALIGNMENT,
        out_channels: int = 0,
        strided: bool = False,
        batched: bool = False,
    ) -> Workspace:
        """Return the workspace of a convolution; raises DerivationError where the profile has none."""
        if self.scratch != "expected":
            return UPPER_WORKSPACE if self.scratch == "upper" else NO_WORKSPACE
        kind = convolution_kind(kernel, in_channels, strided)
        found = dict(self.workspaces)
        for wanted, channels, alone in product(dict.fromkeys((kind, SPATIAL)), (out_channels, 0), (batched, False)):
            if (key := (dtype, channels_last, wanted, channels, alone)) in found:
                return found[key]
        sm = "sm{}{}".format(*self.compute_capability)
        raise DerivationError(f"{PROFILES.name}: no convolution workspace for {sm} {dtype}; use scratch upper or none")

    def runs_cudnn(self, dtype: str) -> bool:
        """Return whether cuDNN convolves a type (CUDAHooks.cpp: supportsBFloat16ConvolutionWithCuDNNv8)."""
        return dtype != "bfloat16" or self.compute_capability >= (8, 0)

    def runs_cudnn_on_videos(self, dtype: str) -> bool:
        """Return whether cuDNN convolves videos of a type with kernels above 1; those of 1 are as ``runs_cudnn``."""
        return self.runs_cudnn(dtype) and (dtype == "float32" or not self.libraries.follows("conv3d_columns"))

    def video_kind(self, dtype: str, kernel: int, in_channels: int) -> tuple[int, int, int, bool, bool]:
        """Return the kind of a conv3d, as ``convolution_workspace`` takes it.

        Half precision follows the rules of images on any number of channels; in float32, whose Winograd kernels are of
        two dimensions, some engines transpose the output as well: cuDNN 9.10.2 and 9.19.0, asked without a card.
        """
        return kernel, in_channels if dtype == "float32" else CHANNEL_ALIGNMENT, 0, True, False

    def cublas_workspace_bytes(self) -> int:
        """Bytes that the first use of a cuBLAS handle allocates for good: ``:4096:2:16:8``, or 32 MiB.

        Source: CublasHandlePool.cpp.
        """
        major = self.compute_capability[0]
        large = major == 9 or (major in (10, 12) and self.libraries.follows("blackwell_cublas"))
        return 32 * 1024 * 1024 if large else (2 * 4096 + 8 * 16) * 1024

    def cublaslt_workspace_bytes(self) -> int:
        """Bytes of cuBLASLt's own workspace."""
        return 0 if self.libraries.follows("shared_cublaslt") else 1024 * 1024

    def runs(self, backend: str, dtype: str, head_dim: int) -> bool:
        """Return whether an SDPA backend runs without a mask (ATen/native/transformers/cuda/sdp_utils.cpp)."""
        half = dtype != "float32"
        if backend == "flash":
            return half and head_dim <= 256 and self._fused_from((8, 0))
        if backend == "cudnn":
            widest = 256 if self.compute_capability == (9, 0) and self.libraries.follows("wide_cudnn") else 128
            return half and head_dim % 8 == 0 and head_dim <= widest and self.compute_capability >= (8, 0)
        alignment = self._efficient_alignment(half)
        return head_dim % alignment == 0 and self._fused_from((8, 0) if dtype == "bfloat16" else (5, 0))

    def _efficient_alignment(self, half: bool) -> int:
        """minimum_gemm_alignment: elements in 128 bits where the kernel uses tensor cores."""
        if self.compute_capability < ((7, 0) if half else (8, 0)):
            return 1
        return 8 if half else 4

    def _fused_from(self, oldest: tuple[int, int]) -> bool:
        """check_sm_version."""
        newest = (12, 1) if self.libraries.follows("fused_on_blackwell") else (9, 0)
        return oldest <= self.compute_capability <= newest

    def prefers_cudnn(self) -> bool:
        """check_prefer_cudnn_attention()."""
        major, minor = self.compute_capability
        if self.libraries.follows("cudnn_first_on_x0"):
            return major in (9, 10) and minor == 0
        return self.libraries.follows("cudnn_first") and major in (9, 10) and minor in (0, 3)

    def behaviour(self, dtype: str, fused: bool, asked: Iterable[tuple[int, ...]]) -> tuple[object, ...]:
        """Return all that tapes of a type follow from: GPUs where it is equal have the same ones.

        ``fused`` says whether kernels of SDPA are tried, ``asked`` are the arguments of num_splits of those calls.
        """
        convolutions = (self.workspaces, self.scratch, self.runs_cudnn(dtype))
        scratch = (*convolutions, self.cublas_workspace_bytes(), self.cublaslt_workspace_bytes())
        if not fused:
            return scratch
        widths = range(8, MAX_HEAD_DIM + 1, 8)
        runs = tuple(self.runs(name, dtype, dim) for name in ("flash", "cudnn", "efficient") for dim in widths)
        return (
            *scratch,
            self.prefers_cudnn() and dtype != "float32",
            runs,
            tuple(self.num_splits(*args) for args in asked),
        )

    def num_splits(self, batch_heads: int, queries: int, keys: int, head_dim: int) -> int:
        """Return flash attention's split-KV factor (flash_api.cpp: num_splits_heuristic); 1 without sm_count."""
        if self.sm_count is None:
            return 1
        slots = 2 * self.sm_count
        blocks = batch_heads * -(-queries // 64)
        key_blocks = -(-keys // (256 if head_dim <= 64 else 128 if head_dim <= 128 else 64))
        if blocks >= 0.8 * slots:
            return 1
        eligible = [n for n in range(1, min(128, slots, key_blocks) + 1) if _changes(key_blocks, n)]
        efficiency = {n: _wave_efficiency(blocks * n, slots) for n in eligible}
        best = max(efficiency.values())
        return next(n for n in eligible if efficiency[n] >= 0.85 * best)

    def split_head_dim(self, head_dim: int) -> int:
        """Return the head dimension of the split-KV accumulator: a multiple of 32, or of 64."""
        unit = 64 if head_dim > 128 and self.libraries.follows("wide_split_head_dim") else 32
        return -(-head_dim // unit) * unit


class UnfusedAttention(UserWarning):
    """No fused attention kernel of the GPU takes the dtype."""


def lacks_fused_attention(gpu: str | None, dtype: str) -> bool:
    """Return whether PyTorch takes the math path on ``gpu``: bfloat16 before sm80 (sdp_utils.cpp).

    >>> lacks_fused_attention("t4", "bfloat16"), lacks_fused_attention("t4", "float16")
    (True, False)
    """
    return gpu is not None and dtype == "bfloat16" and lookup(gpu).compute_capability < (8, 0)


def convolution_kind(kernel: int, in_channels: int, strided: bool = False) -> str:
    """Return the kind of a convolution with a square kernel.

    >>> convolution_kind(1, 4), convolution_kind(3, 4), convolution_kind(3, 320), convolution_kind(3, 320, True)
    ('pointwise', 'unaligned', 'spatial', 'strided')
    """
    if kernel == 1:
        return POINTWISE
    return UNALIGNED if in_channels % CHANNEL_ALIGNMENT else STRIDED if strided else SPATIAL


def _changes(blocks: int, splits: int) -> bool:
    return splits == 1 or -(-blocks // splits) != -(-blocks // (splits - 1))


def _wave_efficiency(blocks: int, slots: int) -> float:
    waves = blocks / slots
    return waves / -(-blocks // slots)


def hardware(
    gpu: str,
    *,
    torch: str | None = None,
    diffusers: str | None = None,
    transformers: str | None = None,
    scratch: str = "expected",
) -> Hardware:
    """Describe ``gpu`` (a name or architecture of the GPU table) with library versions such as "2.8.0+cu126".

    Warns NearestProfile where the profile of another architecture stands in, NearestVersion where another version
    does; raises DerivationError for an unknown GPU or version, or where no documented architecture is near enough.
    """
    one_of("scratch", scratch, SCRATCH)
    card = lookup(gpu)
    versions = {"torch": torch, "diffusers": diffusers, "transformers": transformers}
    tell_unverified(**versions)
    return Hardware(
        compute_capability=card.compute_capability,
        sm_count=card.sm_count,
        libraries=libraries(**versions),
        scratch=scratch,
        workspaces=_workspaces(card) if scratch == "expected" else (),
    )


def _workspaces(card: Gpu) -> tuple[tuple[WorkspaceKey, Workspace], ...]:
    """Return the convolution workspaces of a card's architecture, or of the nearest documented one."""
    nearest = _profiles()["nearest"].get(card.architecture)
    if nearest is None:
        raise DerivationError(
            f"{card.name} ({card.architecture}): no documented architecture is near enough; use scratch upper or none"
        )
    found: dict[WorkspaceKey, Workspace] = {}
    for entry in _profiles()["convolution_workspace"]:
        documented = card.architecture in entry["architectures"]
        if not documented and nearest["architecture"] not in entry["architectures"]:
            continue
        for dtype, (kind, coefficients) in product(entry["dtypes"], _kinds(entry).items()):
            found[dtype, entry["memory_format"] == "channels_last", *kind] = Workspace(**coefficients)
    if nearest["architecture"] != card.architecture:
        warnings.warn(
            f"{card.name}: convolution workspace as measured on {nearest['architecture']} ({nearest['reason']})",
            NearestProfile,
            stacklevel=3,
        )
    return tuple(found.items())


def _kinds(entry: Mapping[str, Any]) -> dict[tuple[str, int, bool], Mapping[str, int]]:
    """Return an entry's coefficients by kind, output channels, and whether they are those of two images or more."""
    kinds = {kind: entry.get(kind, entry["coefficients"]) for kind in (SPATIAL, POINTWISE, UNALIGNED)}
    kinds |= {STRIDED: entry[STRIDED]} if STRIDED in entry else {}
    found = {(kind, 0, False): coefficients for kind, coefficients in kinds.items()}
    for name, batched in (("out_channels", False), ("batched_out_channels", True)):
        found |= {(SPATIAL, int(k), batched): coefficients for k, coefficients in entry.get(name, {}).items()}
    return found


def documented(card: Gpu) -> bool:
    """Whether the workspace profile is that of the card's own architecture, as published or measured."""
    nearest = _profiles()["nearest"].get(card.architecture, {})
    return card.architecture == nearest.get("architecture") and "asked" not in nearest


def asked_of(card: Gpu) -> str | None:
    """Return the cuDNN that was asked of the card's architecture without a card, None where none was needed."""
    version: str | None = _profiles()["nearest"].get(card.architecture, {}).get("asked")
    return version


@cache
def _profiles() -> Mapping[str, Any]:
    profiles: dict[str, Any] = json.loads(PROFILES.read_text(encoding="utf-8"))
    for entry in profiles["convolution_workspace"]:
        if not all(entry.get(key) for key in ("source", "versions", "date")):
            raise DerivationError(f"{PROFILES.name}: an entry of convolution_workspace has no source, versions or date")
    return profiles


def fitted_rows(dtype: str, channels_last: bool = False) -> tuple[str, ...]:
    """Return the evidence rows that a convolution workspace's coefficients came from."""
    for entry in _profiles()["convolution_workspace"]:
        if dtype in entry["dtypes"] and channels_last == (entry["memory_format"] == "channels_last"):
            return tuple(entry["fitted_on"])
    return ()
