import triton
import triton.language as tl

from .arithmetic import divide, sqrt


@triton.jit
def update(
    p,
    g,
    lr,
    weight_decay,
    alpha,
    one_minus_alpha,
    eps,
    momentum,
    square_avg,
    grad_avg=None,
    momentum_buffer=None,
):
    g = tl.where(weight_decay != 0, g + weight_decay * p, g)
    square_avg = alpha * square_avg + one_minus_alpha * g * g
    variance = square_avg
    states = (square_avg,)
    if grad_avg is not None:
        grad_avg = grad_avg + one_minus_alpha * (g - grad_avg)
        variance = square_avg - grad_avg * grad_avg
        variance = tl.where(variance < 0, 0.0, variance)
        states = states + (grad_avg,)
    denom = sqrt(variance) + eps
    if momentum_buffer is not None:
        momentum_buffer = momentum * momentum_buffer + divide(g, denom)
        states = states + (momentum_buffer,)
        p = p - lr * momentum_buffer
    else:
        p = p - divide(lr * g, denom)
    return (p,) + states


@triton.jit
def scalars(step, lr, alpha, eps, weight_decay, momentum):
    return lr, weight_decay, alpha, 1 - alpha, eps, momentum
