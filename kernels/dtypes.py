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
        x = (x.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(COMPUTE)


@triton.jit
def store(address, at, mask, x, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The opposite of `load`: rounds to nearest, ties to even."""
    if DTYPE.primitive_bitwidth == 16:
        x = x.to(tl.float32)  # as torch: a double is rounded twice
    if DTYPE == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        x = tl.where(x != x, 0x7FC0, rounded).to(tl.uint16)
    else:
        x = x.to(DTYPE)
    tl.store(_pointer(address, DTYPE, ALIGNED) + at, x, mask)


@triton.jit
def _pointer(address, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    p = address.to(tl.pointer_type(tl.uint16 if DTYPE == tl.bfloat16 else DTYPE))
    if ALIGNED:
        p = tl.multiple_of(p, 16)
    return p
