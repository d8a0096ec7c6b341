"""``_threshold_sample``, which several of diffusers' schedulers have alike."""

from __future__ import annotations

from math import prod

from derivation.walk.ops import reshape
from derivation.walk.schedulers.arithmetic import Value, on_device, pointwise


def threshold_sample(sample: Value) -> Value:
    """Dynamic thresholding of the predicted x_0 in float32: [N, C, h, w] -> the same shape and dtype."""
    dtype = sample.dtype
    batch_size, *dims = sample.shape
    sample = sample.to("float32")
    sample = Value(reshape(sample, batch_size, prod(dims)))
    abs_sample = sample.apply("abs")

    s = quantile(abs_sample)
    s = s.apply("clamp")
    s = Value(s.unsqueeze(1))
    sample = pointwise("clamp", sample, -s, s) / s

    sample = Value(reshape(sample, batch_size, *dims))
    sample = sample.to(dtype)
    return sample


def quantile(x: Value) -> Value:
    """``torch.quantile(x, q, dim=1)`` with a number q: [N, K] -> [N] (ATen/native/Sorting.cpp)."""
    rows = x.shape[0]
    q = on_device((), x.dtype, "scalar_tensor")
    ordered, _ = x.apply("sort"), on_device(x.shape, "int64", "sort")
    del _

    ranks = _masked_ranks(ordered, q)
    ranks_below = ranks.to("int64")
    values_below = on_device((rows, 1), x.dtype, "gather")
    weights = ranks - ranks_below
    ranks_above = ranks.to("int64")
    values_above = on_device((rows, 1), x.dtype, "gather")
    del weights, ranks_above, values_above, q
    return Value(values_below.view(rows))


def _masked_ranks(ordered: Value, q: Value) -> Value:
    """``masked_fill(q * last_index, isnan(ordered).any(-1), last_index)``: [N, 1]."""
    rank = q * 1.0
    rows = ordered.shape[0]
    nan = pointwise("isnan", ordered, dtype="bool")
    nan = on_device((rows, 1), "bool", "any")
    ranks = on_device((rows, 1), ordered.dtype, "masked_fill")
    del rank, nan
    return ranks
