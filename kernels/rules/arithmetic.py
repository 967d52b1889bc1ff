"""What is rounded as IEEE 754 says: Triton's own fp32 ``/`` and ``sqrt`` are approximations."""

import triton
import triton.language as tl


@triton.jit
def divide(a, b):
    if a.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def sqrt(x):
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def maximum(a, b):
    return tl.where((a > b) | (a != a), a, b)  # as torch.maximum: NaN wins
