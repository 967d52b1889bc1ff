"""What lies in memory, and the numbers that it stands for.

bf16 is converted bit by bit: that compiles to as little as Triton's own conversion, and is rounded
correctly in Triton's interpreter too.
"""

import triton
import triton.language as tl


@triton.jit
def load(address, at, mask, DTYPE: tl.constexpr, COMPUTE: tl.constexpr, ALIGNED: tl.constexpr):
    """The elements `at` of the tensor at an address, as COMPUTE; 0 where masked out.

    Args:
        mask: None if there is nothing to mask.
        ALIGNED: the address is a multiple of 16 bytes, for 128-bit accesses.
    """
    p = _pointer(address, DTYPE, ALIGNED) + at
    if mask is None:
        x = tl.load(p)
    else:
        x = tl.load(p, mask, 0)
    if DTYPE == tl.bfloat16:
        x = from_bits(x.to(tl.uint32) << 16)
    return x.to(COMPUTE)


@triton.jit
def store(address, at, mask, x, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The opposite of `load`: rounds to nearest, ties to even."""
    if DTYPE == tl.bfloat16 or DTYPE == tl.float16:
        x = x.to(tl.float32)  # as torch: a double is rounded twice
    if DTYPE == tl.bfloat16:
        even = (bits(x) + 0x7FFF + ((bits(x) >> 16) & 1)) >> 16
        x = tl.where(x != x, 0x7FC0, even).to(tl.uint16)
    else:
        x = x.to(DTYPE)
    tl.store(_pointer(address, DTYPE, ALIGNED) + at, x, mask)


@triton.jit
def bits(x):
    """Those of fp32 numbers."""
    return x.to(tl.uint32, bitcast=True)


@triton.jit
def from_bits(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _pointer(address, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    p = address.to(tl.pointer_type(tl.uint16 if DTYPE == tl.bfloat16 else DTYPE))
    if ALIGNED:
        p = tl.multiple_of(p, 16)
    return p
