import triton
import triton.language as tl

from .arithmetic import divide, sqrt


@triton.jit
def update(p, g, step_size, weight_decay, eps, sum):
    g = tl.where(weight_decay != 0, g + weight_decay * p, g)
    sum = sum + g * g
    return p - divide(step_size * g, sqrt(sum) + eps), sum


@triton.jit
def scalars(step, lr, lr_decay, weight_decay, eps):
    return lr / (1 + (step - 1) * lr_decay), weight_decay, eps
