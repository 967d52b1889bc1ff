import triton
import triton.language as tl

from .arithmetic import divide, maximum, sqrt


@triton.jit
def update(
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
def scalars(step, lr, beta1, beta2, eps, weight_decay, decoupled_weight_decay):
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
