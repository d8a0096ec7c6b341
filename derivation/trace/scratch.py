"""What CUDA operators allocate inside themselves, put onto a traced tape: operators and shapes tell (no torch needed).

As ``derivation.walk.scratch`` does for walked ones, with the same profile. Not modelled: the copies of a pipeline that
is switched to another memory format.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import reduce
from operator import mul

from derivation.gpu.profile import Hardware
from derivation.tape.events import Allocation, Category, Mark
from derivation.tape.symbols import DTYPE_BYTES, Size, nonnegative_from_one
from derivation.tape.tape import Shapes, Tape

MATRICES = ("addmm", "mm", "bmm", "baddbmm")
EFFICIENT = "_scaled_dot_product_efficient_attention"
CUBLAS, CUBLASLT = "cublas workspace", "cublaslt workspace"
# mem_eff_attention/kernel_forward.h: kSingleValueIteration and output_accum
WIDEST_WITHOUT_ACCUMULATOR = 128


@dataclass(frozen=True, slots=True)
class Buffers:
    """What an operator allocates for itself: until it returns, or ``kept`` from its first call on."""

    inside: tuple[Allocation, ...] = ()
    kept: tuple[Allocation, ...] = ()


def with_scratch(tape: Tape, hardware: Hardware) -> Tape:
    """Return a traced tape with what its operators allocate on ``hardware``, each after its outputs."""
    allocations, events, kept = list(tape.allocations), list[int](), set[str]()
    moved: list[int] = []
    first = 0
    for i, event in enumerate(tape.events):
        moved.append(len(events))
        events.append(event)
        if event < 0:
            continue
        first = first if i and _continues(tape, i - 1) else event - 1
        if _continues(tape, i):
            continue
        found = buffers(tape.allocations[first], tape.convolutions.get(first), hardware)
        inside = list[int]()
        for allocation in (*found.kept, *found.inside):
            if allocation.op in kept or allocation.nbytes == 0:
                continue
            allocations.append(allocation)
            events.append(len(allocations))
            if allocation in found.kept:
                kept.add(allocation.op)
            else:
                inside.append(len(allocations))
        events += [-number for number in reversed(inside)]
    places = (*moved, len(events))
    return replace(
        tape,
        allocations=allocations,
        events=events,
        marks=[Mark(places[mark.event], mark.stage) for mark in tape.marks],
        iterations=[places[event] for event in tape.iterations],
        emptied=[places[event] for event in tape.emptied],
    )


def _continues(tape: Tape, i: int) -> bool:
    """Return whether the next event is another output of the same operator."""
    if i + 1 == len(tape.events) or min(tape.events[i : i + 2]) < 0:
        return False
    one, other = (tape.allocations[event - 1] for event in tape.events[i : i + 2])
    return (one.path, one.op) == (other.path, other.op) and one.op in (EFFICIENT, "native_group_norm")


def buffers(out: Allocation, shapes: Shapes | None, hardware: Hardware) -> Buffers:
    """Return what the operator whose first output is ``out`` allocates beside its outputs."""
    if out.op == "native_group_norm":  # a, b float32 [N, C] (group_norm_kernel.cu)
        nbytes = reduce(mul, out.shape[:2], DTYPE_BYTES["float32"])
        return Buffers(tuple(Allocation(out.path, n, out.shape[:2], "float32", nbytes, Category.SCRATCH) for n in "ab"))
    if out.op in MATRICES:
        return _matrix(out, hardware)
    if shapes is not None and len(shapes[1]) == 4:
        return Buffers(tuple(_convolution(out, shapes, hardware)))
    if shapes is not None and len(shapes[1]) == 5:
        return _video(out, shapes, hardware)
    if out.op == EFFICIENT:
        return Buffers(tuple(_accumulator(out)))
    return Buffers()


def _buffer(out: Allocation, nbytes: Size, op: str) -> Allocation:
    return Allocation(out.path, op, (nbytes,), "uint8", nbytes, Category.SCRATCH)


def _matrix(out: Allocation, hardware: Hardware) -> Buffers:
    """CublasHandlePool.cpp and CUDABlas.cpp (gemm_and_bias)."""
    cublas = _buffer(out, hardware.cublas_workspace_bytes(), CUBLAS)
    if out.op != "addmm":
        return Buffers(kept=(cublas,))
    own = _buffer(out, hardware.cublaslt_workspace_bytes(), CUBLASLT)
    return Buffers((own,), (cublas,))


def _convolution(out: Allocation, shapes: Shapes, hardware: Hardware) -> Iterator[Allocation]:
    """cudnn/Conv_v8.cpp, or columns [C R S, P Q] of one image where cuDNN lacks the type (cuda/ConvolutionMM2d.cu)."""
    given, weight = shapes
    filters, channels, kernel = weight[:3]
    assert isinstance(filters, int) and isinstance(channels, int) and isinstance(kernel, int)
    if not hardware.runs_cudnn(out.dtype):
        if kernel != 1:
            columns = reduce(mul, (*weight[1:], *out.shape[2:]), DTYPE_BYTES[out.dtype])
            yield _buffer(out, columns, "convolution columns")
        return
    kind = (kernel, channels, filters, out.shape[2:] != given[2:], nonnegative_from_one(given[0] - 2))
    workspace = hardware.convolution_workspace(out.dtype, False, *kind)
    nbytes = workspace.nbytes(given, out.shape, weight, DTYPE_BYTES[out.dtype], out.nbytes)
    yield _buffer(out, nbytes, "convolution workspace")


def _video(out: Allocation, shapes: Shapes, hardware: Hardware) -> Buffers:
    """cuDNN's workspace, or columns [C T R S, F P Q] of one video without it (cuda/NaiveDilatedConvolution.cu)."""
    given, weight = shapes
    channels, widest = weight[1], max(side for side in weight[2:] if isinstance(side, int))
    assert isinstance(channels, int)
    if given[1] != channels:  # groups have kernels of their own
        return Buffers()
    if hardware.runs_cudnn(out.dtype) if widest == 1 else hardware.runs_cudnn_on_videos(out.dtype):
        workspace = hardware.convolution_workspace(out.dtype, False, *hardware.video_kind(out.dtype, widest, channels))
        nbytes = workspace.nbytes(given, out.shape, weight, DTYPE_BYTES[out.dtype], out.nbytes)
        return Buffers((_buffer(out, nbytes, "convolution workspace"),))
    columns = reduce(mul, (*weight[1:], *out.shape[2:]), DTYPE_BYTES[out.dtype])
    cublas = _buffer(out, hardware.cublas_workspace_bytes(), CUBLAS)
    return Buffers((_buffer(out, columns, "convolution columns"),), (cublas,))


def _accumulator(out: Allocation) -> Iterator[Allocation]:
    """output_accum float32 [N, S, heads, D] for half precision and D > 128 (mem_eff_attention/kernel_forward.h)."""
    head_dim = out.shape[-1]
    if isinstance(head_dim, int) and out.dtype != "float32" and head_dim > WIDEST_WITHOUT_ACCUMULATOR:
        nbytes = reduce(mul, out.shape, DTYPE_BYTES["float32"])
        yield Allocation(out.path, "efficient_attention", out.shape, "float32", nbytes, Category.SCRATCH)
