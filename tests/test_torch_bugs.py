"""What torch 2.13's fused CPU optimizers and other libraries get wrong, against fp64."""

import pytest
import torch
from helpers import (
    BACKENDS,
    CASES,
    assert_near_torch,
    assert_same_bits,
    new_params,
    set_grads,
    take_steps,
    torch_class,
)

import fastopt

HALVES = [torch.bfloat16, torch.float16]
SETTINGS = {"lr": 0.1, "weight_decay": 0.1}

each_case = pytest.mark.parametrize(("cls", "variant"), CASES, ids=str)
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def true_step(cls, param, state, **settings):
    """The parameter and its state after a step of torch's for-loop in fp64 from where they are."""
    wide = torch.nn.Parameter(param.detach().double())
    wide.grad = param.grad.double()
    optimizer = torch_class(cls)([wide], foreach=False, **settings)
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


def copied_state(optimizer, param):
    return {name: value.clone() for name, value in optimizer.state.get(param, {}).items()}


@pytest.mark.parametrize("numel", [64, 1000])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@each_backend
@each_case
def test_16_bit_parameters(cls, variant, backend, dtype, numel):
    """1. torch: SGD(fused=True) never updates a full SIMD block of bf16 or fp16."""
    (param,) = new_params([(numel,)], dtype)
    optimizer = cls([param], master_weights=None, backend=backend, **SETTINGS, **variant)
    for step in range(3):
        set_grads([param], step)
        truth, _ = true_step(cls, param, copied_state(optimizer, param), **SETTINGS, **variant)
        optimizer.step()
        assert_rounded(param.detach(), truth)


# How a tensor of shape (4, 6, 3, 5) may lie in memory.
LAYOUTS = {
    "contiguous": lambda t: t.clone(),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(0, 3).contiguous().transpose(0, 3),
    "strided": lambda t: torch.stack([t, torch.full_like(t, 7.0)], dim=-1)[..., 0],
    "offset": lambda t: torch.cat([torch.zeros(3), t.flatten()])[3:].view(t.shape),
}


@pytest.mark.parametrize("grad_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@each_backend
@pytest.mark.parametrize("cls", fastopt.OPTIMIZERS)
def test_layouts(cls, backend, layout, grad_layout):
    """2. torch: a strided parameter's neighbours are overwritten.
    3. torch: a channels_last parameter with a contiguous gradient gets wrong values.
    DeepSpeed: a non-contiguous parameter's update is lost.
    """
    (plain,) = new_params([(4, 6, 3, 5)])
    tensor = LAYOUTS[layout](plain.detach())
    base = tensor if tensor._base is None else tensor._base
    param = torch.nn.Parameter(tensor)
    untouched = base.clone()
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
        assert_same_bits([base[..., 1]], [untouched[..., 1]])


@each_backend
@each_case
def test_column(cls, variant, backend):
    """2. torch: with `base[:, 0]` the neighbours are overwritten and wrong elements updated."""
    base = torch.ones(50, 3)
    param = base[:, 0].requires_grad_()
    base = base.detach()
    param.grad = torch.linspace(-1, 1, 50)
    optimizer = cls([param], backend=backend, **SETTINGS, **variant)
    truth, _ = true_step(cls, param, copied_state(optimizer, param), **SETTINGS, **variant)
    optimizer.step()
    assert_rounded(base[:, 0], truth)
    assert (base[:, 1:] == 1).all()


@each_backend
@each_case
def test_late_first_gradient(cls, variant, backend):
    """4. torch: SGD with momentum raises TypeError when a first gradient arrives late."""

    def run(optimizer):
        params = optimizer.param_groups[0]["params"]
        for step in range(6):
            set_grads(params, step)
            if step < 3:
                params[1].grad = None
            optimizer.step()
        return params

    shapes = [(40,), (30, 2), (50,)]
    ours = cls(new_params(shapes), backend=backend, **SETTINGS, **variant)
    theirs = torch_class(cls)(new_params(shapes), foreach=False, **SETTINGS, **variant)
    assert_near_torch(run(ours), run(theirs))


@each_backend
@each_case
def test_overflow_in_the_first_amp_step(cls, variant, backend):
    """5. torch: the momentum buffer is left as uninitialised memory, used in the next step."""

    def run(optimizer):
        (param,) = optimizer.param_groups[0]["params"]
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=2)
        before = param.detach().clone(), copied_state(optimizer, param)
        inputs = torch.linspace(-1, 1, param.numel())
        for step, factor in enumerate([torch.inf, torch.nan, 1.0, 2.0, torch.inf, 3.0]):
            optimizer.zero_grad()
            scaler.scale((param * param * inputs * factor).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
            if step < 2:  # nothing but skipped steps so far
                assert_same_bits([param.detach()], [before[0]])
                state = copied_state(optimizer, param)
                assert state.keys() == before[1].keys()
                assert_same_bits(state.values(), before[1].values())
        assert scaler.get_scale() == 2.0**14  # halved 3 times, doubled once: the steps were counted
        return [param.detach(), *copied_state(optimizer, param).values()]

    ours = cls(new_params([(64,)]), backend=backend, **SETTINGS, **variant)
    theirs = torch_class(cls)(new_params([(64,)]), foreach=False, **SETTINGS, **variant)
    found, wanted = run(ours), run(theirs)
    assert_near_torch(found[:1], wanted[:1])
    if cls.rule.counts_steps:
        (state,) = ours.state.values()
        assert state["step"] == 3


@each_backend
def test_the_momentum_buffer_is_the_first_gradient_that_was_not_skipped(backend):
    """5., and with max_norm: the norm of a skipped step's gradients is of no consequence."""
    (param,) = new_params([(64,)])
    optimizer = fastopt.SGD(
        [param], lr=0.1, momentum=0.9, dampening=0.5, max_norm=1e6, backend=backend
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for factor in (torch.inf, 1.0):
        optimizer.zero_grad()
        scaler.scale((param * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    assert_same_bits([optimizer.state[param]["momentum_buffer"]], [torch.ones(64)])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@each_backend
@each_case
def test_16_bit_states_of_fp32_parameters(cls, variant, backend, dtype):
    """6. torch: RuntimeError. They go on in fp32, which is what `state_dtype` asks for."""
    (param,) = new_params([(1000,)])
    optimizer = cls([param], backend=backend, **SETTINGS, **variant)
    take_steps(optimizer, range(1))
    state = optimizer.state[param]
    names = [name for name in state if name != "step"]
    for name in names:
        state[name] = state[name].to(dtype)
    for step in range(1, 4):
        set_grads([param], step)
        truth, true_state = true_step(
            cls, param, copied_state(optimizer, param), **SETTINGS, **variant
        )
        optimizer.step()
        assert_rounded(param.detach(), truth)
        for name in names:
            assert state[name].dtype == torch.float32
            assert_rounded(state[name], true_state[name])


@each_backend
@each_case
def test_groups_added_later(cls, variant, backend):
    """Apex never steps them."""

    def run(optimizer):
        first, second, third = all_params = new_params([(40,), (30, 2), (5,)])
        optimizer.add_param_group({"params": first})
        take_steps(optimizer, range(3))
        optimizer.add_param_group({"params": second, "lr": 0.2})
        take_steps(optimizer, range(3, 6))
        optimizer.add_param_group({"params": [third], "maximize": True})
        take_steps(optimizer, range(6, 9))
        return all_params

    ours = cls([{"params": []}], backend=backend, **SETTINGS, **variant)
    theirs = torch_class(cls)([{"params": []}], foreach=False, **SETTINGS, **variant)
    assert_near_torch(run(ours), run(theirs))


@each_backend
@each_case
def test_mixed_dtypes(cls, variant, backend):
    """DeepSpeed's FusedAdam advances `step` once for each dtype in a step."""
    dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.float32]
    params = [p for dtype in dtypes for p in new_params([(40,)], dtype)]
    optimizer = cls(params, master_weights=None, backend=backend, **SETTINGS, **variant)
    for step in range(4):
        set_grads(params, step)
        truths = [
            true_step(cls, param, copied_state(optimizer, param), **SETTINGS, **variant)[0]
            for param in params
        ]
        optimizer.step()
        for param, truth in zip(params, truths, strict=True):
            if param.dtype == torch.float64:
                assert_near_torch([param.detach()], [truth])
            else:
                assert_rounded(param.detach(), truth)
            if cls.rule.counts_steps:
                assert optimizer.state[param]["step"] == step + 1


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("variant", fastopt.AdamW.variants, ids=str)
@each_backend
def test_weight_decay_of_16_bit_parameters(backend, variant, dtype):
    """torch, optimi and bitsandbytes round the decayed parameter, where a small decay is a no-op.

    Here update and decay together just pass the point where 1.0 is rounded to the next value, which
    neither does alone. (L2 decay, which goes through the gradient, is in test_16_bit_parameters.)
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
