"""How numbers are kept: the functions of ``fastopt/packing.py``, with the same bits.

``unpack`` makes numbers of BLOCK elements from `begin` on, up to `left`, of the arrays at the
addresses `a` and `b`, and of a remainder's checksums at `sums`; ``pack`` stores them again. `left`
is None if they are all there. PACKING is a name of ``fastopt.packing.PACKINGS``, "master" for both
masters. CODES of codes share a scale.
"""

import triton
import triton.language as tl

from .dtypes import bits, from_bits, load, store
from .tables import BLOCK, CHUNK

SUM_BLOCK = tl.constexpr(256)  # elements that share a checksum
SIGNED_MANTISSA = tl.constexpr(5)  # bits of a code with a sign
MANTISSA = tl.constexpr(4)  # of one without
MIN_SCALE = tl.constexpr(2.0**-120)
NAN = tl.constexpr(0x7FC00000)  # the bits of one
ONE = tl.constexpr(127 << 23)  # the bits of 1.0


@triton.jit
def b_bytes(elements, PACKING: tl.constexpr, CODES: tl.constexpr):
    """The size of the second array of a packing; 0: there is none."""
    if PACKING == "codes" or PACKING == "unsigned_codes":
        return elements // CODES * 4
    elif PACKING == "remainder":
        return elements * 2
    elif PACKING == "master":
        return elements * 4
    else:
        return elements * 0


@triton.jit
def nearest_away(x):
    """The bits of bf16 numbers: to nearest, ties away from zero."""
    return (tl.where(x != x, NAN, bits(x) + 0x8000) >> 16).to(tl.uint16)


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """The bits of the parameters of masters."""
    if DTYPE == tl.bfloat16:
        return nearest_away(x)
    else:
        return x.to(tl.float16).to(tl.uint16, bitcast=True)


@triton.jit
def level(code, MANTISSA: tl.constexpr):
    return from_bits((code.to(tl.uint32) << (23 - MANTISSA)) + ONE) - 1.0


@triton.jit
def in_blocks(x, SIZE: tl.constexpr):
    return tl.reshape(x, (BLOCK // SIZE, SIZE))


@triton.jit
def blocks_at(begin, SIZE: tl.constexpr):
    """The numbers of the blocks that BLOCK elements are in."""
    return begin // SIZE + tl.arange(0, BLOCK // SIZE)


@triton.jit
def checksums(numbers):
    """Those of the bits of BLOCK elements, as int16."""
    x = (tl.arange(0, BLOCK) % SUM_BLOCK + 1).to(tl.uint32) * 0x9E3779B1
    factors = ((x ^ (x >> 16)) * 0x2C1B3C6D >> 17 | 1).to(tl.int32)
    return tl.sum(in_blocks(numbers.to(tl.int32) * factors, SUM_BLOCK), 1)


@triton.jit
def unpack(
    a,
    b,
    sums,
    begin,
    left,
    PACKING: tl.constexpr,
    CODES: tl.constexpr,
    DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    at = begin + tl.arange(0, BLOCK)
    mask = None if left is None else at < left
    if PACKING == "remainder":
        value = load(a, at, mask, tl.bfloat16, COMPUTE, ALIGNED)
        remainder = load(b, at, mask, tl.int16, tl.int32, ALIGNED)
        blocks = blocks_at(begin, SUM_BLOCK)
        known = None if left is None else blocks * SUM_BLOCK < left
        expected = load(sums, blocks, known, tl.int32, tl.int32, False)
        # Else somebody else wrote the parameter, and the remainder is out of date.
        stands = checksums((bits(value) >> 16).to(tl.int16)) == expected
        remainder = tl.where(tl.expand_dims(stands, 1), in_blocks(remainder, SUM_BLOCK), 0)
        remainder = tl.reshape(remainder, (BLOCK,))
        master = from_bits(bits(value) + remainder.to(tl.uint32, bitcast=True))
        return tl.where(master != master, value, master)
    elif PACKING == "master":
        value = load(a, at, mask, DTYPE, COMPUTE, ALIGNED)
        master = load(b, at, mask, tl.float32, COMPUTE, ALIGNED)
        return tl.where(rounded(master, DTYPE) == rounded(value, DTYPE), master, value)
    elif PACKING == "codes" or PACKING == "unsigned_codes":
        code = load(a, at, mask, tl.uint8, tl.uint32, ALIGNED)
        blocks = blocks_at(begin, CODES)
        known = None if left is None else blocks * CODES < left
        scale = load(b, blocks, known, tl.float32, COMPUTE, False)
        if PACKING == "unsigned_codes":
            x = level(code, MANTISSA)
        else:
            x = level(code & 0x7F, SIGNED_MANTISSA)
        x = in_blocks(x, CODES) * tl.expand_dims(scale, 1)
        x = tl.reshape(x, (BLOCK,))
        if PACKING == "codes":
            x = from_bits(bits(x) | (code & 0x80) << 24)
        return x
    else:
        return load(a, at, mask, DTYPE, COMPUTE, ALIGNED)


@triton.jit
def pack(
    a,
    b,
    sums,
    begin,
    left,
    x,
    random,
    PACKING: tl.constexpr,
    CODES: tl.constexpr,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    at = begin + tl.arange(0, BLOCK)
    mask = None if left is None else at < left
    if PACKING == "remainder":
        upper = nearest_away(x)
        store(a, at, mask, upper, tl.uint16, ALIGNED)
        store(b, at, mask, tl.where(x != x, 0, bits(x)).to(tl.uint16), tl.uint16, ALIGNED)
        if mask is not None:
            upper = tl.where(mask, upper, 0)
        # By the thread that has a block's first element, from where the sums are.
        of_blocks = tl.expand_dims(checksums(upper.to(tl.int16, bitcast=True)), 1).broadcast_to(
            BLOCK // SUM_BLOCK, SUM_BLOCK
        )
        of_blocks = tl.reshape(of_blocks, (BLOCK,))
        first = at % SUM_BLOCK == 0
        known = first if mask is None else first & mask
        store(sums, at // SUM_BLOCK, known, of_blocks, tl.int32, False)
    elif PACKING == "master":
        store(a, at, mask, rounded(x, DTYPE), tl.uint16, ALIGNED)
        store(b, at, mask, x, tl.float32, ALIGNED)
    elif PACKING == "stochastic":
        up = tl.where(x != x, NAN, bits(x) + (random_bits(random, at) >> 16))
        store(a, at, mask, (up >> 16).to(tl.uint16), tl.uint16, ALIGNED)
    elif PACKING == "codes" or PACKING == "unsigned_codes":
        sign = (bits(x) >> 24) & 0x80
        magnitude = bits(x) & 0x7FFFFFFF
        if mask is not None:
            magnitude = tl.where(mask, magnitude, 0)
        BITS: tl.constexpr = MANTISSA if PACKING == "unsigned_codes" else SIGNED_MANTISSA
        MAX_CODE: tl.constexpr = 255 if PACKING == "unsigned_codes" else 127
        largest = tl.max(in_blocks(magnitude.to(tl.int32, bitcast=True), CODES), 1)
        scale = tl.div_rn(from_bits(largest), level(tl.full((), MAX_CODE, tl.uint32), BITS))
        scale = tl.where(scale < MIN_SCALE, MIN_SCALE, scale)
        scale = tl.where(largest >= 0x7F800000, from_bits(tl.full((), NAN, tl.uint32)), scale)
        blocks = blocks_at(begin, CODES)
        known = None if left is None else blocks * CODES < left
        store(b, blocks, known, scale, tl.float32, False)
        inverse = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
        z = in_blocks(from_bits(magnitude), CODES) * tl.expand_dims(inverse, 1) + 1.0
        z = tl.reshape(z, (BLOCK,))
        # Both moments round by bits of their own. The last one of 16 is left out where the largest
        # z, with its rounding errors, might get beyond the largest code.
        dither = random_bits(random, at)
        dither = dither >> 16 if PACKING == "unsigned_codes" else dither & 0xFFFE
        dither = dither << (7 - BITS)
        code = ((bits(z) + dither - ONE) >> (23 - BITS)) & MAX_CODE
        code = tl.maximum(code, 1) if PACKING == "unsigned_codes" else code | sign
        store(a, at, mask, code.to(tl.uint8), tl.uint8, ALIGNED)
    else:
        store(a, at, mask, x, DTYPE, ALIGNED)


@triton.jit
def mix(key, word):
    """The finalizer of SplitMix64 (Steele et al. 2014)."""
    z = (key + 0x9E3779B97F4A7C15) ^ word.to(tl.uint64)
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def tensor_key(seed, step, param):
    return mix(mix(mix(tl.full((), 0, tl.uint64), seed), step), param)


@triton.jit
def chunk_key(of_tensor, chunk):
    return (mix(of_tensor, chunk) >> 32).to(tl.uint32)


@triton.jit
def random_bits(random, at):
    """32 bits for each of the elements `at` of a chunk: a Weyl sequence that starts at a key, and
    one round of shift and multiply.

    Args:
        random: the key. Of a chunk that is no chunk of the whole tensor: the keys of the two that
            it lies in, and its place in the first. Of one that is in runs: the tensor's key, the
            chunk's begin, and the piece.
    """
    key = random[0]
    if len(random) == 3:
        at += random[2]
        key = tl.where(at < CHUNK, key, random[1])
        at = at % CHUNK
    elif len(random) == 5:
        begin, offset, run, stride = random[1], random[2], random[3], random[4]
        place = offset + (begin + at) // run * stride + (begin + at) % run
        key = chunk_key(key, place // CHUNK)
        at = place % CHUNK
    x = at.to(tl.uint32) * 0x9E3779B1 + key
    x = (x ^ (x >> 16)) * 0x2C1B3C6D
    return x
