"""The kernels that update many tensors in one launch."""

import triton
import triton.language as tl

from .norm import INF, clip_coef, reduce_rows
from .packing import SUM_BLOCK, b_bytes, chunk_key, pack, tensor_key, unpack
from .tables import (
    BLOCK,
    CHUNK,
    CLIP_VALUE,
    COEF,
    COUNT,
    GROUP,
    MAX_NORM,
    NUMBER,
    NUMEL,
    OFFSET,
    OWN,
    PARAM,
    RUN,
    SEED,
    STEP,
    STRIDE,
    SUMS,
    THREADS,
    UNCLIPPED_COEF,
    as_double,
    as_word,
    locate,
)


@triton.jit
def update_blocks(
    addresses,
    beside,
    sums,
    left,
    coef,
    clip_value,
    scalars,
    random,
    RULE: tl.constexpr,
    GAP: tl.constexpr,
    DTYPES: tl.constexpr,
    PACKINGS: tl.constexpr,
    CODES: tl.constexpr,
    COMPUTE: tl.constexpr,
    FULL: tl.constexpr,
):
    """Updates the elements from `addresses` on: CHUNK of them if FULL, else up to `left`.

    Args:
        addresses: of parameter, gradient and states.
        beside: of the second arrays of their packings.
        sums: of the checksums of a remainder's parameter.
        random: see `packing.random_bits`.
        FULL: all addresses are multiples of 16 bytes, too.
    """
    end = None if FULL else left
    for begin in range(0, CHUNK if FULL else tl.minimum(left, CHUNK).to(tl.int32), BLOCK):
        x = ()
        for i in tl.static_range(len(DTYPES)):
            a, b = addresses[i], beside[i]
            x_i = unpack(a, b, sums, begin, end, PACKINGS[i], CODES, DTYPES[i], COMPUTE, FULL)
            x = x + (x_i,)
        g = x[1] * coef
        g = tl.where(g > clip_value, clip_value, tl.where(g < -clip_value, -clip_value, g))
        if GAP is None:
            new = RULE(x[0], g, *scalars, *x[2:])
        else:
            new = RULE(x[0], g, *scalars, *x[2 : 2 + GAP], None, *x[2 + GAP :])
        for i in tl.static_range(len(DTYPES)):
            a, b = addresses[i], beside[i]
            if i != 1:  # all but the gradient
                x_i = new[i - (i > 1)]
                pack(a, b, sums, begin, end, x_i, random, PACKINGS[i], CODES, DTYPES[i], FULL)


@triton.jit(do_not_specialize=["tensors", "grads", "row_of", "chunks", "scalars", "n"])
def update(
    tensors,  # see `tables`
    grads,  # [n]: addresses
    row_of,  # [n]: in the table of scalars
    chunks,  # [programs]: see `locate`
    scalars,  # [.., OWN + N_SCALARS]; a tensor of clip_value < 0 is left as it is
    n,
    RULE: tl.constexpr,
    N_SCALARS: tl.constexpr,
    GAP: tl.constexpr,  # index of the optional state that is absent; None if there is none
    DTYPES: tl.constexpr,  # of parameter, gradient and states; of the first arrays of a packing
    PACKINGS: tl.constexpr,  # their packings
    CODES: tl.constexpr,  # how many of them share a scale
    PIECE: tl.constexpr,  # "whole"; a "run" of a whole tensor, or several "runs"
):
    """One step of a rule for each chunk of the parameters."""
    tensor, begin, left = locate(chunks, tensors + NUMEL * n)
    COMPUTE: tl.constexpr = tl.float64 if DTYPES[0] == tl.float64 else tl.float32
    addresses = ()
    beside = ()
    bits = begin * 0
    for i in tl.static_range(len(DTYPES)):
        row = tensors + (PARAM + 2 * (i - (i > 1))) * n
        address = tl.load((grads if i == 1 else row) + tensor)
        address += begin * (DTYPES[i].primitive_bitwidth // 8)
        addresses = addresses + (address,)
        bits = bits | address
        other = begin * 0
        if PACKINGS[i] != "plain" and PACKINGS[i] != "stochastic":
            other = tl.load(row + n + tensor) + b_bytes(begin, PACKINGS[i], CODES)
            if PACKINGS[i] == "remainder" or PACKINGS[i] == "master":
                bits = bits | other
        beside = beside + (other,)
    sums = begin * 0
    if PACKINGS[0] == "remainder":
        sums = tl.load(tensors + SUMS * n + tensor) + begin // SUM_BLOCK * 4
    scalars += tl.load(row_of + tensor) * (OWN + N_SCALARS)
    coef = as_double(tl.load(scalars + COEF)).to(COMPUTE)
    clip_value = as_double(tl.load(scalars + CLIP_VALUE)).to(COMPUTE)
    own = ()
    for k in tl.static_range(N_SCALARS):
        own = own + (as_double(tl.load(scalars + OWN + k)).to(COMPUTE),)
    seed = as_double(tl.load(scalars + SEED))
    count = as_double(tl.load(scalars + COUNT))
    key = tensor_key(seed, count, tl.load(tensors + NUMBER * n + tensor))
    if PIECE == "whole":
        random = (chunk_key(key, begin // CHUNK),)
    else:
        offset = tl.load(tensors + OFFSET * n + tensor)
        if PIECE == "run":
            place = begin + offset
            next_key = chunk_key(key, place // CHUNK + 1)
            random = (chunk_key(key, place // CHUNK), next_key, place % CHUNK)
        else:
            run = tl.load(tensors + RUN * n + tensor)
            random = (key, begin, offset, run, tl.load(tensors + STRIDE * n + tensor))
    left = tl.where(clip_value < 0, 0, left)
    # fmt: off
    if (left >= CHUNK) & (bits % 16 == 0):
        update_blocks(addresses, beside, sums, left, coef, clip_value, own, random,
                      RULE, GAP, DTYPES, PACKINGS, CODES, COMPUTE, True)
    else:
        update_blocks(addresses, beside, sums, left, coef, clip_value, own, random,
                      RULE, GAP, DTYPES, PACKINGS, CODES, COMPUTE, False)
    # fmt: on


@triton.jit
def setting(settings, k, group, known, N_SETTINGS: tl.constexpr):
    """The k-th setting of each group: its value, or what is at its address where it has one."""
    settings += group * 2 * N_SETTINGS + k
    value = as_double(tl.load(settings, known, 0))
    address = tl.load(settings + N_SETTINGS, known, 0)
    # Doubles are at odd addresses, by one too high: see `launches.address_of`.
    is_double = known & (address % 2 == 1)
    is_float = known & (address % 2 == 0) & (address != 0)
    double = tl.load((address - 1).to(tl.pointer_type(tl.float64)), is_double, 0.0)
    single = tl.load(address.to(tl.pointer_type(tl.float32)), is_float, 0.0)
    return tl.where(is_double, double, tl.where(is_float, single.to(tl.float64), value))


@triton.jit(
    do_not_specialize=[
        *("tensors", "waves", "settings", "scalars", "partials", "norm", "grad_scale"),
        *("found_inf", "n", "n_partials", "wave"),
    ]
)
def compute_scalars(
    tensors,  # as in `update`
    waves,  # [n]: those of `wave` make a step now
    settings,  # [.., 2, N_SETTINGS]
    scalars,  # [n, OWN + the rule's]: the result
    partials,  # of the norm; None: do not clip
    norm,  # 0-dim: the result; None as above
    grad_scale,  # fp32, 0-dim; or None
    found_inf,  # fp32, 0-dim: nothing is updated where it is not 0; or None
    n,
    n_partials,
    wave,
    RULE_SCALARS: tl.constexpr,
    N_SETTINGS: tl.constexpr,
    FINDS_INF: tl.constexpr,  # found_inf is a result: whether the norm, not None, is not finite
):
    """Counts the tensors' steps and computes the scalars of each, all from the device's memory.

    A program has a tensor for each of its threads.
    """
    inv_scale = tl.full((), 1.0, tl.float64)
    if grad_scale is not None:
        inv_scale = 1.0 / tl.load(grad_scale).to(tl.float64)
    tensor = tl.program_id(0) * THREADS + tl.arange(0, THREADS)
    known = tensor < n
    known = known & (tl.load(waves + tensor, known, -1) == wave)
    group = tl.load(tensors + GROUP * n + tensor, known, 0)
    values = ()
    for k in tl.static_range(N_SETTINGS):
        values = values + (setting(settings, k, group, known, N_SETTINGS),)
    coef = values[UNCLIPPED_COEF] * inv_scale
    if partials is not None:
        squares = reduce_rows(partials, n_partials, 2)
        if FINDS_INF:
            tl.store(found_inf, tl.where(squares < INF, 0.0, 1.0))
        total_norm = tl.sqrt(squares) * inv_scale
        tl.store(norm, total_norm)
        coef = coef * clip_coef(total_norm, values[MAX_NORM])
    clip_value = values[CLIP_VALUE]
    address = tl.load(tensors + STEP * n + tensor, known, 0)
    counts = known & (address != 0)
    at = address.to(tl.pointer_type(tl.float32))
    step = tl.load(at, counts, 0.0).to(tl.float64) + 1
    if found_inf is not None:
        overflow = not (squares < INF) if FINDS_INF else tl.load(found_inf) != 0
        clip_value = tl.where(overflow, -1.0, clip_value)
        counts = tl.where(overflow, False, counts)
    tl.store(at, step.to(tl.float32), counts)
    # What clipping needs has served.
    row = (coef, clip_value, coef, coef, values[SEED], step) + RULE_SCALARS(step, *values[OWN:])
    for k in tl.static_range(len(row)):
        tl.store(scalars + tensor * len(row) + k, as_word(row[k]), known)
