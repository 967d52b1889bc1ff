"""The update rules in Triton: the same lines as ``fastopt/reference.py``, in the same order.

A rule takes blocks ``p`` and ``g`` in the type of the arithmetic (fp32 or fp64), its scalars and
its states, None for those that the param group's flags do not call for. It returns a tuple of the
new ``p`` and the new states. It knows nothing of memory, dtypes, masks or clipping: ``update.py``
does those.

``<rule>_scalars`` are the functions of the same name in ``fastopt/rules.py``, for hyperparameters
and a step that are known to the device alone.

The arithmetic is rounded as IEEE 754 says, operation by operation: Triton's own fp32 ``/`` and
``sqrt`` are approximations, and the kernels are compiled without contraction to FMA.
"""

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


@triton.jit
def sgd(
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
def sgd_scalars(step, lr, momentum, dampening, weight_decay, nesterov):
    first = (step == 1).to(tl.float64)
    return lr, weight_decay, momentum, 1 - dampening, nesterov, first


@triton.jit
def adagrad(p, g, step_size, weight_decay, eps, sum):
    g = tl.where(weight_decay != 0, g + weight_decay * p, g)
    sum = sum + g * g
    return p - divide(step_size * g, sqrt(sum) + eps), sum


@triton.jit
def adagrad_scalars(step, lr, lr_decay, weight_decay, eps):
    return lr / (1 + (step - 1) * lr_decay), weight_decay, eps


@triton.jit
def rmsprop(
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
def rmsprop_scalars(step, lr, alpha, eps, weight_decay, momentum):
    return lr, weight_decay, alpha, 1 - alpha, eps, momentum


@triton.jit
def adam(
    p,
    g,
    step_size,
    weight_decay,
    decay,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    eps,
    inv_bias_correction2_sqrt,
    exp_avg,
    exp_avg_sq,
    max_exp_avg_sq=None,
):
    g = tl.where(weight_decay != 0, g + weight_decay * p, g)
    exp_avg = exp_avg + one_minus_beta1 * (g - exp_avg)
    exp_avg_sq = beta2 * exp_avg_sq + one_minus_beta2 * g * g
    second_moment = exp_avg_sq
    states = (exp_avg, exp_avg_sq)
    if max_exp_avg_sq is not None:
        max_exp_avg_sq = maximum(max_exp_avg_sq, exp_avg_sq)
        second_moment = max_exp_avg_sq
        states = states + (max_exp_avg_sq,)
    denom = sqrt(second_moment) * inv_bias_correction2_sqrt + eps
    return (p * decay - divide(step_size * exp_avg, denom),) + states


@triton.jit
def adam_scalars(step, lr, beta1, beta2, eps, weight_decay, decoupled_weight_decay):
    # beta**step to a few ulp in double: the host's pow differs from it in the last bits at most.
    bias_correction1 = 1 - tl.exp(step * tl.log(beta1))
    bias_correction2 = 1 - tl.exp(step * tl.log(beta2))
    return (
        lr / bias_correction1,
        tl.where(decoupled_weight_decay != 0, 0.0, weight_decay),
        tl.where(decoupled_weight_decay != 0, 1 - lr * weight_decay, 1.0),
        1 - beta1,
        beta2,
        1 - beta2,
        eps,
        1 / tl.sqrt(bias_correction2),
    )


@triton.jit
def assign(p, g):
    """Not an optimizer: the parameter becomes the gradient as the driver has scaled and clamped it.

    Clipping gradients in place is this rule with each gradient as its own target.
    """
    return (g,)
