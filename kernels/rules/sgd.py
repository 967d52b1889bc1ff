import triton
import triton.language as tl


@triton.jit
def update(
    p,
    g,
    lr,
    weight_decay,
    momentum,
    one_minus_dampening,
    nesterov,
    first,
    momentum_buffer=None,
):
    states = ()
    g = tl.where(weight_decay != 0, g + weight_decay * p, g)
    if momentum_buffer is not None:
        momentum_buffer = tl.where(
            first != 0, g, momentum * momentum_buffer + one_minus_dampening * g
        )
        g = tl.where(nesterov != 0, g + momentum * momentum_buffer, momentum_buffer)
        states = (momentum_buffer,)
    return (p - lr * g,) + states


@triton.jit
def scalars(step, lr, momentum, dampening, weight_decay, nesterov):
    first = (step == 1).to(tl.float64)
    return lr, weight_decay, momentum, 1 - dampening, nesterov, first
