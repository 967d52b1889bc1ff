import triton
import triton.language as tl  # noqa: F401  Triton's interpreter looks for it


@triton.jit
def update(p, g):
    """Not an optimizer: the parameter becomes the gradient as the driver has scaled and clamped it.

    Clipping gradients in place is this rule with each gradient as its own target.
    """
    return (g,)
