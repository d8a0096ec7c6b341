"""diffusers/models/embeddings.py."""

from __future__ import annotations

from derivation.tape.block import block
from derivation.tape.events import Category
from derivation.tape.tensor import SymTensor
from derivation.walk.blocks.activations import activation
from derivation.walk.ops import Linear, add, cat, div, elementwise, empty, mul, to


def one_timestep(timestep: SymTensor) -> SymTensor:
    """Return a model's ``timestep`` as [1]: a scalar that is an input is on the CPU, and copied."""
    if timestep.ndim:
        return timestep
    if timestep.is_on_cpu:
        return empty((1,), timestep.dtype, "_to_copy", Category.PIPELINE)
    return timestep.unsqueeze(0)


def get_timestep_embedding(timesteps: SymTensor, embedding_dim: int, *, flip_sin_to_cos: bool) -> SymTensor:
    """[N] -> float32 [N, embedding_dim] (``embedding_dim`` even)."""
    half_dim = embedding_dim // 2
    exponent = mul(empty((half_dim,), "float32", "arange"))
    exponent = div(exponent)
    emb = elementwise("exp", exponent)
    emb = _outer(to(timesteps.unsqueeze(1), "float32"), emb)
    emb = mul(emb)
    emb = cat([elementwise("sin", emb), elementwise("cos", emb)], 1)
    if flip_sin_to_cos:
        emb = cat([emb.narrow(1, half_dim), emb.narrow(1, half_dim)], 1)
    if embedding_dim % 2:
        emb = empty((emb.shape[0], embedding_dim), "float32", "constant_pad_nd")
    return emb


def _outer(column: SymTensor, row: SymTensor) -> SymTensor:
    """[N, 1] * [K] -> [N, K]."""
    return empty((column.shape[0], row.shape[0]), row.dtype, "mul")


@block
def TimestepEmbedding(
    sample: SymTensor, condition: SymTensor | None = None, *, time_embed_dim: int, act_fn: str
) -> SymTensor:
    """[N, K] -> [N, time_embed_dim]; ``condition`` [N, time_cond_proj_dim] is projected and added first."""
    if condition is not None:
        in_features = sample.shape[-1]
        assert isinstance(in_features, int)
        sample = add(sample, Linear("cond_proj", condition, in_features, bias=False))
    sample = Linear("linear_1", sample, time_embed_dim)
    sample = activation(sample, act_fn)
    sample = Linear("linear_2", sample, time_embed_dim)
    return sample
