"""Reductions to a norm, in Triton: the partition and the order of ``fastopt/norm.py``, and so the
same bits. Terms and sums are in double."""

import triton
import triton.language as tl

from .dtypes import load
from .rules.arithmetic import maximum
from .tables import CHUNK, CLIP_VALUE, COEF, MAX_NORM, UNCLIPPED_COEF, as_double, as_word, locate

LANES = tl.constexpr(1024)
LOG_LANES = tl.constexpr(10)
INF = tl.constexpr(float("inf"))


@triton.jit
def add(a, b):
    return a + b


@triton.jit
def term(x, ORDER: tl.constexpr):
    if ORDER == 2:
        return x * x
    else:
        return tl.abs(x)


@triton.jit
def combine(a, b, ORDER: tl.constexpr):
    if ORDER == INF:
        return maximum(a, b)
    else:
        return a + b


@triton.jit
def reduce_lanes(x, ORDER: tl.constexpr):
    """Reduces LANES lanes by halving: lane i takes in lane i + half, for half = ..., 4, 2, 1."""
    for level in tl.static_range(LOG_LANES):
        pairs = tl.reshape(x, (2, LANES >> (level + 1)))
        x = tl.reduce(pairs, 0, maximum if ORDER == INF else add)
    return tl.sum(x, 0)  # of one


@triton.jit
def reduce_rows(x, n, ORDER: tl.constexpr):
    """Reduces n numbers, n > 0: rows of LANES one after the other, then the lanes."""
    lanes = tl.arange(0, LANES)
    total = tl.load(x + lanes, lanes < n, 0.0)
    for row in range(LANES, n, LANES):
        total = combine(total, tl.load(x + row + lanes, row + lanes < n, 0.0), ORDER)
    return reduce_lanes(total, ORDER)


@triton.jit(do_not_specialize=["numels", "grads", "chunks", "slots", "partials"])
def reduce_chunks(
    numels,  # [tensors]
    grads,  # [tensors]: addresses
    chunks,  # [programs]: see `locate`
    slots,  # [programs]: where in `partials` the results go
    partials,
    DTYPE: tl.constexpr,
    ORDER: tl.constexpr,
):
    """Reduces each chunk of the gradients to one number."""
    tensor, begin, left = locate(chunks, numels)
    address = tl.load(grads + tensor) + begin * (DTYPE.primitive_bitwidth // 8)
    lanes = tl.arange(0, LANES)
    if (left >= CHUNK) & (address % 16 == 0):
        total = term(load(address, lanes, None, DTYPE, tl.float64, True), ORDER)
        for row in tl.static_range(LANES, CHUNK, LANES):
            more = load(address, row + lanes, None, DTYPE, tl.float64, True)
            total = combine(total, term(more, ORDER), ORDER)
    else:
        n = tl.minimum(left, CHUNK).to(tl.int32)
        total = term(load(address, lanes, lanes < n, DTYPE, tl.float64, False), ORDER)
        for row in range(LANES, n, LANES):
            at = row + lanes
            more = load(address, at, at < n, DTYPE, tl.float64, False)
            total = combine(total, term(more, ORDER), ORDER)
    tl.store(partials + tl.load(slots + tl.program_id(0)), reduce_lanes(total, ORDER))


@triton.jit(do_not_specialize=["partials", "n", "total"])
def reduce_partials(partials, n, total, ORDER: tl.constexpr):
    """Reduces the chunks' results to one number."""
    tl.store(total, reduce_rows(partials, n, ORDER))


@triton.jit
def clip_coef(norm, max_norm):
    """The factor that brings a norm down to ``max_norm``, as in torch's ``clip_grad_norm_``."""
    coef = max_norm / (norm + 1e-6)
    coef = tl.where(coef > 1.0, 1.0, coef)  # NaN stays
    return tl.where(max_norm == INF, 1.0, coef)  # whatever the norm


@triton.jit(do_not_specialize=["partials", "n_partials", "scalars", "n_rows", "row_size", "norm"])
def clip(partials, n_partials, scalars, n_rows, row_size, norm, ASSIGNS: tl.constexpr):
    """Sets the norm of all gradients, and by it their factor in each row of scalars.

    Args:
        scalars: [n_rows, row_size].
        norm: 0-dim.
        ASSIGNS: the rule is `assign`: nothing is to be done where the factor is 1.
    """
    total_norm = tl.sqrt(reduce_rows(partials, n_partials, 2))
    tl.store(norm, total_norm)
    for start in range(0, n_rows, LANES):
        row = start + tl.arange(0, LANES)
        known = row < n_rows
        at = scalars + row * row_size
        sign = as_double(tl.load(at + UNCLIPPED_COEF, known, 0))
        max_norm = as_double(tl.load(at + MAX_NORM, known, 0))
        coef = sign * clip_coef(total_norm, max_norm)
        tl.store(at + COEF, as_word(coef), known)
        if ASSIGNS:
            tl.store(at + CLIP_VALUE, as_word(tl.where(coef == 1, -1.0, INF).to(tl.float64)), known)
