"""What each backend of ``F.scaled_dot_product_attention`` allocates, and which one PyTorch runs.

Sources: torch/_meta_registrations.py, ATen/native/transformers/attention.cpp and cuda/sdp_utils.cpp.
Shapes: query [N, heads, S, D], key and value [N, heads, T, D].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from derivation.call import DEFAULT_PROMPT_LENGTH
from derivation.gpu.profile import Hardware
from derivation.options.choices import EAGER, SDPA
from derivation.registry import Registry
from derivation.tape.events import Category
from derivation.tape.symbols import Size
from derivation.tape.tape import tape
from derivation.tape.tensor import SymTensor
from derivation.walk import scratch as kernels
from derivation.walk.ops import elementwise, empty, matmul, pad_last, softmax, to

HALF = ("float16", "bfloat16")
FLASH_MAX_HEAD_DIM = 256
# Taken by that choice alone, never asked for.
CUDNN = "cudnn"
FLASH = "flash"
# attention.cpp: mem_eff_alignment
BIAS_ALIGNMENT = 8


@dataclass(frozen=True, slots=True)
class Backend:
    """One SDPA backend: its kernel's allocations, when it can run without a GPU, and what PyTorch tries next."""

    run: Callable[[SymTensor, SymTensor, SymTensor, bool, SymTensor | None], SymTensor]
    usable: Callable[[int, str], bool]
    fallback: str | None

    def can_run(self, name: str, head_dim: int, dtype: str) -> bool:
        """Return whether it runs, on the run's GPU where there is one."""
        if tape().hardware is None or self.fallback is None:
            return self.usable(head_dim, dtype)
        return tape().gpu(Hardware.runs, name, dtype, head_dim)


BACKENDS: Registry[Backend] = Registry("attention backend")


def backend(
    name: str, *, usable: Callable[[int, str], bool], fallback: str | None
) -> Callable[[Callable[..., SymTensor]], Callable[..., SymTensor]]:
    """Register an SDPA backend; raises ValueError for a name that is taken."""
    return BACKENDS.register(name, lambda run: Backend(run, usable, fallback))


def scaled_dot_product_attention(
    query: SymTensor, key: SymTensor, value: SymTensor, is_causal: bool = False, attn_mask: SymTensor | None = None
) -> SymTensor:
    """``F.scaled_dot_product_attention`` on the chosen backend, or the next one that can run; flash takes no mask."""
    head_dim = query.shape[-1]
    assert isinstance(head_dim, int)
    name = first_tried(tape().options.attention)
    while (attn_mask is not None and name == FLASH) or not BACKENDS[name].can_run(name, head_dim, query.dtype):
        name = BACKENDS[name].fallback or "math"
    return BACKENDS[name].run(query, key, value, is_causal, attn_mask)


def first_tried(attention: str) -> str:
    """Return the backend that an ``attention`` option tries first (sdp_utils.cpp: priority_order)."""
    if attention == SDPA:
        return "efficient" if tape().hardware is None else CUDNN if tape().gpu(Hardware.prefers_cudnn) else FLASH
    return "math" if attention == EAGER else attention


@backend("math", usable=lambda head_dim, dtype: True, fallback=None)
def math(query: SymTensor, key: SymTensor, value: SymTensor, is_causal: bool, attn_mask: SymTensor | None) -> SymTensor:
    """Scores in float32 in full: 9 bytes a score and more where the inputs are half precision."""
    dtype = query.dtype
    if dtype in HALF:
        query, key, value = (to(x, "float32", Category.ATTENTION) for x in (query, key, value))
    scaled = elementwise("mul", query, category=Category.ATTENTION)
    bias = _causal_bias(query, key) if is_causal else attn_mask
    scores = matmul(scaled, elementwise("mul", key.transpose(2, 3), category=Category.ATTENTION))
    if bias is not None and tape().hardware is None:
        # in place on CUDA (attention.cpp: areAnyTensorSubclassLike, which meta tensors are)
        scores = elementwise("add", scores, bias, category=Category.ATTENTION)
    probs = softmax(scores, "_safe_softmax")
    kernels.safe_softmax_masks(probs)
    del scores
    returned = to(probs, dtype, Category.ATTENTION)
    out = to(matmul(probs, value), dtype)
    del returned
    return out


def _causal_bias(query: SymTensor, key: SymTensor) -> SymTensor:
    """The lower-triangular boolean mask [S, T] as a float bias (attention.cpp)."""
    shape = (query.shape[2], key.shape[2])
    mask = empty(shape, "bool", "ones", Category.ATTENTION)
    mask = empty(shape, "bool", "tril", Category.ATTENTION)
    zero, minus_infinity = (empty((), query.dtype, "scalar_tensor", Category.ATTENTION) for _ in range(2))
    return empty(shape, query.dtype, "where", Category.ATTENTION)


@backend(
    "efficient",
    usable=lambda head_dim, dtype: head_dim % (8 if dtype in HALF else 4) == 0,
    fallback="math",
)
def efficient(
    query: SymTensor, key: SymTensor, value: SymTensor, is_causal: bool, attn_mask: SymTensor | None
) -> SymTensor:
    """The result [N, S, heads, D], and int64 scalars for the dropout seed and offset, on CUDA kept on the CPU."""
    bias = None if attn_mask is None else _padded(attn_mask)
    out = _by_tokens(query)
    state = None if tape().hardware else _scalars("efficient_attention")
    kernels.efficient_accumulator(query)
    del state
    return out


@backend(CUDNN, usable=lambda head_dim, dtype: False, fallback="flash")
def cudnn(
    query: SymTensor, key: SymTensor, value: SymTensor, is_causal: bool, attn_mask: SymTensor | None
) -> SymTensor:
    """The result in the query's layout and two int64 scalars; the workspace's size is cuDNN's (cudnn/MHA.cpp)."""
    out = elementwise("cudnn_attention", query)
    state = _scalars("cudnn_attention")
    del state
    return out


@backend(
    "flash",
    usable=lambda head_dim, dtype: dtype in HALF and head_dim <= FLASH_MAX_HEAD_DIM,
    fallback="efficient",
)
def flash(
    query: SymTensor, key: SymTensor, value: SymTensor, is_causal: bool, attn_mask: SymTensor | None
) -> SymTensor:
    """The result in the query's layout, the float32 logsumexp [N, heads, S], and the random state."""
    head_dim = query.shape[-1]
    if head_dim % 8:
        query, key, value = (pad_last(x, -head_dim % 8) for x in (query, key, value))
    out = elementwise("flash_attention", query)
    logsumexp = empty(query.shape[:3], "float32", "flash_attention", Category.STATISTICS)
    kernels.flash_split_buffers(query, key)
    on_gpu = tape().hardware is None or tape().libraries.follows("flash_state_on_gpu")
    state = _flash_state() if on_gpu else None
    del logsumexp, state
    return out.narrow(3, head_dim) if head_dim % 8 else out


def _flash_state() -> tuple[SymTensor, SymTensor]:
    """rng_state [2] and an unused scalar."""
    state = empty((2,), "int64", "flash_attention", Category.STATISTICS)
    return state, empty((), "int64", "flash_attention", Category.STATISTICS)


def _scalars(op: str) -> tuple[SymTensor, SymTensor]:
    """Two int64 scalars on the device."""
    return empty((), "int64", op, Category.STATISTICS), empty((), "int64", op, Category.STATISTICS)


def _padded(attn_mask: SymTensor) -> SymTensor:
    """A mask [1, 1, S, T], its rows padded to eights where they are none (attention.cpp: pad_bias).

    A symbol's rows are padded as 77 ones are, to which the pipelines pad a prompt; no peak has them.
    """
    last = attn_mask.shape[-1]
    beyond = (last if isinstance(last, int) else DEFAULT_PROMPT_LENGTH) % BIAS_ALIGNMENT
    return pad_last(attn_mask, BIAS_ALIGNMENT - beyond) if beyond else attn_mask


def _by_tokens(query: SymTensor) -> SymTensor:
    """Allocate [N, S, heads, D] and return it as [N, heads, S, D]."""
    batch, heads, tokens, head_dim = query.shape
    return empty((batch, tokens, heads, head_dim), query.dtype, "efficient_attention").transpose(1, 2)


def attention_scores(query: SymTensor, key: SymTensor, *, upcast: bool, upcast_softmax: bool) -> SymTensor:
    """``Attention.get_attention_scores``: query [M, S, D], key [M, T, D] -> probabilities [M, S, T]."""
    dtype = query.dtype
    if upcast:
        query = to(query, "float32")
        key = to(key, "float32")
    shape: tuple[Size, ...] = (query.shape[0], query.shape[1], key.shape[1])
    baddbmm_input = empty(shape, query.dtype, "empty", Category.ATTENTION)
    scores = empty(shape, query.dtype, "baddbmm", Category.ATTENTION)
    kernels.cublas_workspace()
    del baddbmm_input
    if upcast_softmax:
        scores = to(scores, "float32", Category.ATTENTION)
    probs = softmax(scores)
    del scores
    probs = to(probs, dtype, Category.ATTENTION)
    return probs
