"""What torch 2.13's fused CPU optimizers and other libraries get wrong, against fp64."""

import pytest
import torch
from helpers import (
    DTYPES,
    HALVES,
    assert_near_torch,
    assert_same_bits,
    each_backend,
    each_case,
    each_optimizer,
    new_params,
    set_grads,
    torch_class,
)

import fastopt

SETTINGS = {"lr": 0.1, "weight_decay": 0.1}

each_half = pytest.mark.parametrize("dtype", HALVES, ids=str)


def tensors_of(optimizer, param):
    return {name: value.clone() for name, value in optimizer.state.get(param, {}).items()}


def true_step(cls, param, state, **settings):
    """The parameter and its state after a step of torch's for-loop in fp64 from where they are."""
    wide = torch.nn.Parameter(param.detach().double())
    wide.grad = param.grad.double()
    optimizer = torch_class(cls)([wide], foreach=False, **SETTINGS, **settings)
    for name, value in state.items():
        optimizer.state[wide][name] = value.clone() if name == "step" else value.double()
    optimizer.step()
    return wide.detach(), optimizer.state[wide]


def assert_rounded(found, truth):
    """Every element is the truth, rounded to the dtype of ``found``.

    The arithmetic in fp32 may turn a near tie: to half a spacing come 8 times fp32's eps, relative
    to the largest element, as a momentum buffer sums terms that may cancel.
    """
    info = torch.finfo(found.dtype)
    spacing = info.eps * 2.0 ** (torch.frexp(truth.abs().clamp(min=info.tiny)).exponent - 1)
    slack = 8 * torch.finfo(torch.float32).eps * truth.abs().max().clamp(min=1)
    assert ((found.double() - truth).abs() <= spacing / 2 + slack).all()


@each_backend
@each_case
def test_dtypes(cls, variant, backend):
    """1. torch: SGD(fused=True) never updates a full SIMD block of bf16 or fp16.
    DeepSpeed's FusedAdam advances `step` once for each dtype in a step.
    """
    params = [p for dtype in [*DTYPES, *DTYPES] for p in new_params([(64,), (1000,)], dtype)]
    optimizer = cls(params, master_weights=None, backend=backend, **SETTINGS, **variant)
    for step in range(4):
        set_grads(params, step)
        truths = [true_step(cls, p, tensors_of(optimizer, p), **variant)[0] for p in params]
        optimizer.step()
        for param, truth in zip(params, truths, strict=True):
            if param.dtype == torch.float64:
                assert_near_torch([param.detach()], [truth])
            else:
                assert_rounded(param.detach(), truth)
            if cls.rule.counts_steps:
                assert optimizer.state[param]["step"] == step + 1


def strided(tensor):
    """With a neighbour on each side of every element."""
    others = torch.full_like(tensor, 7.0)
    return torch.stack([others, tensor, others], dim=-1)[..., 1]


# How a tensor of shape (4, 6, 3, 5) may lie in memory.
LAYOUTS = {
    "contiguous": lambda t: t.clone(),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(0, 3).contiguous().transpose(0, 3),
    "strided": strided,
    "offset": lambda t: torch.cat([torch.zeros(3), t.flatten()])[3:].view(t.shape),
}


@pytest.mark.parametrize("grad_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@each_backend
@each_optimizer
def test_layouts(cls, backend, layout, grad_layout):
    """2. torch: a strided parameter's neighbours are overwritten, and wrong elements updated.
    3. torch: a channels_last parameter with a contiguous gradient gets wrong values.
    DeepSpeed: a non-contiguous parameter's update is lost.
    """
    (plain,) = new_params([(4, 6, 3, 5)])
    tensor = LAYOUTS[layout](plain.detach())
    param = torch.nn.Parameter(tensor)
    optimizer = cls([param], backend=backend, **SETTINGS)
    wanted = torch_class(cls)([plain], foreach=False, **SETTINGS)
    for step in range(3):
        set_grads([plain], step)
        param.grad = LAYOUTS[grad_layout](plain.grad)
        optimizer.step()
        wanted.step()
    assert param.stride() == tensor.stride()
    assert param.data_ptr() == tensor.data_ptr()
    assert_near_torch([param.detach()], [plain.detach()])
    for name, state in wanted.state[plain].items():
        if name != "step":  # as torch's: dense, in the parameter's order
            assert optimizer.state[param][name].stride() == torch.empty_like(param).stride()
            assert_near_torch([optimizer.state[param][name]], [state])
    if layout == "strided":
        assert (tensor._base[..., [0, 2]] == 7.0).all()


@each_half
@each_backend
@each_case
def test_16_bit_states_of_fp32_parameters(cls, variant, backend, dtype):
    """6. torch: RuntimeError. They go on in fp32, which is what `state_dtype` asks for."""
    (param,) = new_params([(1000,)])
    optimizer = cls([param], backend=backend, **SETTINGS, **variant)
    set_grads([param], 0)
    optimizer.step()
    state = optimizer.state[param]
    names = [name for name in state if name != "step"]
    for name in names:
        state[name] = state[name].to(dtype)
    for step in range(1, 4):
        set_grads([param], step)
        truth, true_state = true_step(cls, param, tensors_of(optimizer, param), **variant)
        optimizer.step()
        assert_rounded(param.detach(), truth)
        for name in names:
            assert state[name].dtype == torch.float32
            assert_rounded(state[name], true_state[name])


@each_half
@pytest.mark.parametrize("variant", fastopt.AdamW.variants, ids=str)
@each_backend
def test_weight_decay_of_16_bit_parameters(backend, variant, dtype):
    """torch, optimi and bitsandbytes round the decayed parameter, where a small decay is a no-op.

    Here update and decay together just pass the point where 1.0 is rounded to the next value, which
    neither does alone. (L2 decay, which goes through the gradient, is in test_dtypes.)
    """
    half_spacing = torch.finfo(dtype).eps / 4  # below 1.0

    def step(optimizer_class, weight_decay, **others):
        param = torch.nn.Parameter(torch.ones(64, dtype=dtype))
        param.grad = torch.ones(64, dtype=dtype)
        lr = 0.99 * half_spacing  # the first update is lr, as Adam's is
        optimizer_class([param], lr=lr, weight_decay=weight_decay, **variant, **others).step()
        return param.detach()

    ones = torch.ones(64, dtype=dtype)
    assert_same_bits([step(fastopt.AdamW, 0.0, backend=backend)], [ones])
    assert_same_bits([step(torch.optim.AdamW, 0.02)], [ones])  # or else this shows nothing
    assert_same_bits([step(fastopt.AdamW, 0.02, backend=backend)], [ones - 2 * half_spacing])
