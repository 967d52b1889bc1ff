import triton
import triton.language as tl


@triton.jit
def update(p, g, lr, decay, beta1, one_minus_beta1, beta2, one_minus_beta2, exp_avg):
    interpolated = beta1 * exp_avg + one_minus_beta1 * g
    direction = tl.where(interpolated > 0, 1.0, tl.where(interpolated < 0, -1.0, interpolated))
    exp_avg = beta2 * exp_avg + one_minus_beta2 * g
    return p * decay - lr * direction, exp_avg


@triton.jit
def scalars(step, lr, beta1, beta2, weight_decay):
    return lr, 1 - lr * weight_decay, beta1, 1 - beta1, beta2, 1 - beta2
