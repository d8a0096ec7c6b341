"""Which plans cuDNN has for a convolution, and each one's workspace, on a card that need not be there.

cuDNN 9.8 and later take a card's properties as JSON (CUDNN_BACKEND_DEVICEPROP_DESCRIPTOR of cudnn_graph.h, where every
number here is from), so its heuristics answer without a GPU.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from operator import mul
from pathlib import Path
from typing import Any

from derivation.errors import DerivationError, unsupported
from derivation.gpu.cards import Gpu

# the first that takes a card's properties
OLDEST = 90800
# where the number of multiprocessors changes the choice of engines
COUNTED = "Turing"
# PyTorch issue 157517 and the last cuDNN that has kernels of its own for it: the ones after know no tensor cores there
LAST_OF_VOLTA = 91099
# what libcudnn.so.9 looks up by name
BESIDE = ("cuda_nvrtc/lib/libnvrtc.so.12", "cublas/lib/libcublasLt.so.12", "cublas/lib/libcublas.so.12")
INSTALL = "pip install diffusion-vram-derivation[cudnn]"
# cudnnBackendDescriptorType_t
CONVOLUTION, ENGINE, CONFIGURATION, HEURISTICS, PLAN, FORWARD, GRAPH, TENSOR, DEVICE = 1, 2, 3, 4, 5, 10, 15, 17, 38
# cudnnBackendAttributeType_t, and what C calls them
DATA_TYPE, INT64, FLOAT, MODE, HEURISTIC_MODE, NOTE, DESCRIPTOR, CHAR = 1, 3, 4, 7, 8, 11, 15, 24
C_TYPES: Mapping[int, Any] = {
    INT64: ctypes.c_int64,
    FLOAT: ctypes.c_float,
    DESCRIPTOR: ctypes.c_void_p,
    CHAR: ctypes.c_char,
    **dict.fromkeys((DATA_TYPE, MODE, HEURISTIC_MODE, NOTE), ctypes.c_int),
}
DATA_TYPES = {"float32": 0, "float16": 2, "bfloat16": 9}
CROSS_CORRELATION, INSTANT, DOWN_CONVERT_INPUTS, NOTES = 1, 0, 1, 16
# cudaMalloc's blocks are aligned to more; ATen/native/cudnn/Conv_v8.cpp: getAlignment
ALIGNMENT = 16
Attributes = Mapping[int, tuple[int, Sequence[Any]]]


@dataclass(frozen=True, slots=True)
class Convolution:
    """A convolution in 2 or 3 dimensions: input [N, C, (T,) H, W], weight [K, C, (U,) R, S]."""

    input: tuple[int, ...]
    weight: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dtype: str
    channels_last: bool

    @property
    def output(self) -> tuple[int, ...]:
        """[N, K, (V,) P, Q]."""
        sides = zip(self.input[2:], self.padding, self.weight[2:], self.stride, strict=True)
        return (
            self.input[0],
            self.weight[0],
            *((size + 2 * pad - kernel) // step + 1 for size, pad, kernel, step in sides),
        )

    def strides(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the strides of a tensor [N, C, (T,) H, W] in the convolution's memory format."""
        order = (0, *range(2, len(shape)), 1) if self.channels_last else range(len(shape))
        inner = dict(
            zip(reversed(order), accumulate((shape[dim] for dim in reversed(order)), mul, initial=1), strict=False)
        )
        return tuple(inner[dim] for dim in range(len(shape)))


def properties(card: Gpu) -> dict[str, Any]:
    """Return a card as cuDNN reads it; raises DerivationError for one of Turing without its multiprocessors.

    The workspaces follow from ``deviceVer`` and, on Turing, ``multiProcessorCount`` alone: tests/test_cudnn.py asks
    with others of the rest, which cuDNN wants to be there, and which are a Tesla T4's.
    """
    if card.sm_count is None and card.architecture == COUNTED:
        raise unsupported("card", card.key, f"a card of {COUNTED} whose number of multiprocessors is known")
    major, minor = card.compute_capability
    return {
        "deviceName": card.name,
        "deviceVer": 100 * major + 10 * minor,
        "multiProcessorCount": card.sm_count or 40,
        "totalGlobalMem": card.total_memory_bytes or card.nvidia_smi_bytes or 0,
        "warpSize": 32,
        "maxThreadsPerBlock": 1024,
        "maxBlockSize": [1024, 1024, 64],
        "maxGridSize": [2**31 - 1, 65535, 65535],
        "maxThreadsPerSM": 1024,
        "maxCtasPerSM": 16,
        "regsPerBlock": 65536,
        "maxRegistersPerSM": 65536,
        "maxSharedMemoryPerBlock": 49152,
        "maxSharedMemoryPerBlockOptin": 65536,
        "reservedSharedMemoryPerBlock": 0,
        "l2CacheSize": 4194304,
        "smClockRateKHz": 1590000,
        "memClockRateKHz": 5001000,
        "supportCoopLaunch": 1,
        "isTccDriver": 0,
        "cudaDeviceId": 0,
        "pciDeviceId": 0,
        "driverVer": 13000,
    }


@dataclass(frozen=True, slots=True)
class Plan:
    """An engine that can run a convolution, and the bytes that it asks for."""

    engine: int
    workspace_bytes: int


class CudnnRefused(Exception):
    """A call that cuDNN answered with another status than success."""


class Cudnn:
    """The library, its descriptors alive for one question each."""

    def __init__(self, root: Path) -> None:
        """Load ``root``/cudnn; raises DerivationError where that is not possible, or where it is too old."""
        try:
            for name in BESIDE:
                ctypes.CDLL(str(root / name), mode=ctypes.RTLD_GLOBAL)
            self._library = ctypes.CDLL(str(root / "cudnn/lib/libcudnn.so.9"), mode=ctypes.RTLD_GLOBAL)
        except OSError as error:
            raise DerivationError(f"cuDNN cannot be loaded: {error} ({INSTALL})") from None
        self._library.cudnnGetVersion.restype = ctypes.c_size_t
        self.version = int(self._library.cudnnGetVersion())
        if self.version < OLDEST:
            raise unsupported("cudnn_version", version_text(self.version), f"{version_text(OLDEST)} or newer")
        self._made: list[ctypes.c_void_p] = []

    def require(self, card: Gpu) -> None:
        """Raise DerivationError for a card that this version has no kernels for, or none of its own."""
        if card.compute_capability < (7, 5) and self.version > LAST_OF_VOLTA:
            here = f"cuDNN {version_text(self.version)} has no kernels for {card.architecture}"
            raise DerivationError(f"card = {card.key}: {here}: pip install nvidia-cudnn-cu12==9.10.2.21")

    def plans(self, card: Mapping[str, Any], convolution: Convolution, most: int = 1) -> list[Plan]:
        """Return the first ``most`` plans that can be built, in the order in which PyTorch tries them.

        That is HEUR_MODE_INSTANT's, less what converts its inputs down (ATen/native/cudnn/Conv_v8.cpp:
        filterEngineConfigs, try_configs).
        """
        with self._descriptors():
            text = json.dumps(card).encode()
            device = self._create(DEVICE, {2702: (CHAR, [bytes([byte]) for byte in text])})
            found: list[Plan] = []
            for configuration in self._configurations(device, self._graph(convolution)):
                if len(found) == most:
                    break
                if (plan := self._plan(device, configuration)) is not None:
                    found.append(plan)
            return found

    def _configurations(self, device: Any, graph: Any) -> list[ctypes.c_void_p]:
        try:
            asked = {201: (DESCRIPTOR, [graph]), 200: (HEURISTIC_MODE, [INSTANT]), 204: (DESCRIPTOR, [device])}
            heuristics = self._create(HEURISTICS, asked)
            return self._made_by(heuristics, 202, CONFIGURATION, self._count(heuristics, 202))
        except CudnnRefused:
            return []

    def _plan(self, device: Any, configuration: Any) -> Plan | None:
        engine = self._made_by(configuration, 300, ENGINE, 1)[0]
        notes = self._read(engine, 1303, NOTE, [0] * NOTES)
        if DOWN_CONVERT_INPUTS in notes:
            return None
        try:
            plan = self._create(PLAN, {401: (DESCRIPTOR, [configuration]), 407: (DESCRIPTOR, [device])})
        except CudnnRefused:
            return None
        return Plan(self._read(engine, 1301, INT64, [0])[0], self._read(plan, 402, INT64, [0])[0])

    def _graph(self, convolution: Convolution) -> ctypes.c_void_p:
        shapes = {"x": convolution.input, "w": convolution.weight, "y": convolution.output}
        x, w, y = (self._tensor(convolution, ord(name), shape) for name, shape in shapes.items())
        described = self._create(
            CONVOLUTION,
            {
                100: (DATA_TYPE, [DATA_TYPES["float32"]]),
                101: (MODE, [CROSS_CORRELATION]),
                102: (INT64, [1] * len(convolution.stride)),
                103: (INT64, convolution.stride),
                104: (INT64, convolution.padding),
                105: (INT64, convolution.padding),
                106: (INT64, [len(convolution.stride)]),
            },
        )
        operands = {number: (DESCRIPTOR, [value]) for number, value in ((702, described), (703, w), (704, x), (705, y))}
        forward = self._create(FORWARD, {700: (FLOAT, [1.0]), 701: (FLOAT, [0.0]), **operands})
        return self._create(GRAPH, {801: (DESCRIPTOR, [forward])})

    def _tensor(self, convolution: Convolution, uid: int, shape: Sequence[int]) -> ctypes.c_void_p:
        return self._create(
            TENSOR,
            {
                900: (INT64, [ALIGNMENT]),
                901: (DATA_TYPE, [DATA_TYPES[convolution.dtype]]),
                902: (INT64, shape),
                903: (INT64, convolution.strides(shape)),
                906: (INT64, [uid]),
            },
        )

    @contextmanager
    def _descriptors(self) -> Iterator[None]:
        try:
            yield
        finally:
            while self._made:
                self._library.cudnnBackendDestroyDescriptor(self._made.pop())

    def _create(self, kind: int, attributes: Attributes) -> ctypes.c_void_p:
        made = self._empty(kind)
        for name, (c_type, values) in attributes.items():
            array = (C_TYPES[c_type] * len(values))(*values)
            self._call("cudnnBackendSetAttribute", made, name, c_type, ctypes.c_int64(len(values)), array)
        self._call("cudnnBackendFinalize", made)
        return made

    def _empty(self, kind: int) -> ctypes.c_void_p:
        made = ctypes.c_void_p()
        self._call("cudnnBackendCreateDescriptor", kind, ctypes.byref(made))
        self._made.append(made)
        return made

    def _count(self, descriptor: Any, name: int) -> int:
        count = ctypes.c_int64()
        self._get(descriptor, name, DESCRIPTOR, 0, count, None)
        return count.value

    def _made_by(self, descriptor: Any, name: int, kind: int, count: int) -> list[ctypes.c_void_p]:
        """Return the descriptors, ``count`` at most, that an attribute fills in."""
        empty = [self._empty(kind) for _ in range(count)]
        return empty[: len(self._read(descriptor, name, DESCRIPTOR, empty))]

    def _read(self, descriptor: Any, name: int, c_type: int, values: Sequence[Any]) -> list[Any]:
        array, count = (C_TYPES[c_type] * len(values))(*values), ctypes.c_int64()
        self._get(descriptor, name, c_type, len(values), count, array)
        return list(array)[: count.value]

    def _get(self, descriptor: Any, name: int, c_type: int, size: int, count: ctypes.c_int64, array: Any) -> None:
        asked = (descriptor, name, c_type, ctypes.c_int64(size), ctypes.byref(count), array)
        self._call("cudnnBackendGetAttribute", *asked)

    def _call(self, name: str, *arguments: Any) -> None:
        if status := getattr(self._library, name)(*arguments):
            raise CudnnRefused(f"{name}: {status}")


def version_text(version: int) -> str:
    """Return cudnnGetVersion() as people write it.

    >>> version_text(91900), version_text(91002)
    ('9.19.0', '9.10.2')
    """
    return f"{version // 10000}.{version // 100 % 100}.{version % 100}"


@cache
def installed() -> Cudnn:
    """Return the pip wheel's cuDNN; raises DerivationError where there is none."""
    try:
        import nvidia
    except ImportError:
        raise DerivationError(f"cuDNN is not installed: {INSTALL}") from None
    roots = [Path(path) for path in nvidia.__path__ if (Path(path) / "cudnn/lib/libcudnn.so.9").exists()]
    if not roots:
        raise DerivationError(f"cuDNN is not installed: {INSTALL}")
    return Cudnn(roots[0])
