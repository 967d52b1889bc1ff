"""Triton gives the bits of the reference on the CPU: on a GPU, or else in its interpreter.

torch's own arithmetic on a GPU is no oracle for bits: it contracts to FMA.
"""

import itertools
import math

import pytest
import torch
from helpers import BF16, CASES, DTYPES, FP16, FP32, FP64, MODES, each_optimizer
from hypothesis import given, settings
from hypothesis import strategies as st
from twins import (
    COMPILED,
    CPU,
    DEVICE,
    FEW_SHAPES,
    FLAGS,
    SHAPES,
    STEPS,
    assert_bits,
    each,
    give_grads,
    laid_out,
    layouts,
    make_grads,
    make_params,
    on_a_gpu,
    on_either,
    results,
    take_steps,
    train,
    twins,
)

import fastopt
from fastopt.step import table

pytestmark = on_either

USUAL = ((fastopt.Adam, {}), {"weight_decay": 0.1, "max_norm": 0.5}, FP32)
CLIPS = [{}, {"max_norm": 0.5}]


def product(*columns):
    return [(*case, *row) for case, *row in itertools.product(CASES, *columns)]


def nearly_usual(cls, variant, *row):
    """It differs from the usual in one thing at most."""
    given = ((cls, variant), *row)
    return sum(a != b for a, b in zip(given, USUAL, strict=True)) <= 1


def adamw(cls, variant, *row):
    return cls is fastopt.AdamW and not variant


@each("cls, variant, flags, dtype", product(FLAGS, DTYPES), nearly_usual)
@twins
def test_bits(device, backend, cls, variant, flags, dtype):
    params = make_params(device, dtypes=(dtype,))
    return train(cls(params, lr=0.01, backend=backend, **variant, **flags))


MODE_FLAGS = [{}, {"weight_decay": 0.1, "max_norm": 0.5}]


@each("cls, variant, mode, flags", product(MODES, MODE_FLAGS))
@twins
def test_precision_modes(device, backend, cls, variant, mode, flags):
    dtype, master, states = mode
    if cls.rule.unfit({**cls([torch.ones(1)]).defaults, **variant}, states):
        pytest.skip("the rule needs more precision")
    modes = {"master_weights": master, "state_dtype": states, "seed": 7}
    params = make_params(device, dtypes=(dtype,))
    optimizer = cls(params, lr=0.01, backend=backend, **modes, **variant, **flags)
    return [*train(optimizer), *optimizer.master_params()]


@each(
    "cls, variant, dtype",
    product(DTYPES),
    lambda cls, variant, dtype: variant is cls.variants[-1] and dtype in (FP32, BF16),
)
@twins
def test_special_values(device, backend, cls, variant, dtype):
    """Zeros of both signs, subnormals, infinities, NaN and overflow go the same way."""
    info = torch.finfo(dtype)
    positive = [0.0, 1.0, info.max, info.tiny, info.tiny / 4, info.eps, 1 + info.eps, 1e-7]
    values = [*positive, math.inf, *(-x for x in positive), -math.inf, math.nan]
    grid = torch.meshgrid([torch.tensor(values, dtype=dtype)] * 2, indexing="ij")
    param, grad = (x.repeat(32, 1).to(device) for x in grid)  # more than a chunk
    optimizer = cls([param.requires_grad_()], lr=0.01, backend=backend, **variant)
    for _ in range(2):
        param.grad = grad
        optimizer.step()
    return results(optimizer)


def train_laid_out(device, tensors, cls, dtype, **settings):
    """With parameters and gradients of these shapes, each with a layout."""
    generator = torch.Generator().manual_seed(0)

    def laid(shape, layout):
        tensor = laid_out(shape, layout, dtype, generator)
        base = tensor._base.to(device)
        return base, base.as_strided(shape, tensor.stride(), tensor.storage_offset())

    bases, views = zip(*(laid(shape, layout) for shape, layout, _ in tensors), strict=True)
    params = [view.detach().requires_grad_() for view in views]
    optimizer = cls(params, lr=0.01, **settings)
    for _ in range(2):
        for param, (shape, _, layout) in zip(params, tensors, strict=True):
            param.grad = laid(shape, layout)[1]
        optimizer.step()
    return [*bases, *results(optimizer)]  # whole: what was written beside a parameter shows


IN_ORDER, UNSTRETCHED = [0, 1, 2, 3], [1, 1, 1, 1]
LAYOUTS = [
    *((IN_ORDER, UNSTRETCHED, offset) for offset in (0, 1, 2)),
    ([3, 2, 1, 0], UNSTRETCHED, 0),
    ([0, 2, 3, 1], UNSTRETCHED, 0),  # channels last
    (IN_ORDER, [1, 1, 1, 2], 1),
    (IN_ORDER, [1, 1, 2, 1], 3),  # gaps between rows
]


@on_a_gpu
@each("cls, variant, flags, dtype", product(CLIPS, [FP32, BF16]))
@twins
def test_layouts(device, backend, cls, variant, flags, dtype):
    """Every layout of a parameter with every layout of its gradient, of more than a chunk."""
    tensors = [((6, 13, 10, 11), *pair) for pair in itertools.product(LAYOUTS, LAYOUTS)]
    return train_laid_out(device, tensors, cls, dtype, backend=backend, **variant, **flags)


@settings(deadline=None, max_examples=15)
@given(
    st.lists(layouts(), min_size=1, max_size=3),
    st.sampled_from(CASES),
    st.sampled_from(DTYPES),
    st.booleans(),
)
@twins
def test_any_layout(device, backend, tensors, case, dtype, capturable):
    """Of any strides and alignment."""
    cls, variant = case
    if COMPILED and dtype == FP64:
        capturable = False  # see test_capturable
    flags = {"max_norm": 1.0, "capturable": capturable, "backend": backend, **variant}
    return train_laid_out(device, tensors, cls, dtype, **flags)


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
@each("cls, variant", CASES, adamw)
@twins
def test_parameters_that_share_memory(device, backend, cls, variant):
    """Those that overlap, and one that stands twice, are updated one after the other."""
    (base,) = make_params(device, shapes=((30_000,),))
    base = base.detach()
    views = [base[:20_000], base[10_000:], base, base[1::2], base[500:600], base[500:600]]
    params = [view.requires_grad_() for view in views]
    return [base, *train(cls([*params, params[0]], lr=0.1, backend=backend, **variant))]


@each("cls, variant, flags", product(CLIPS), adamw)
@twins
def test_gradients_that_come_late_and_go(device, backend, cls, variant, flags):
    params = make_params(device)
    optimizer = cls(params, lr=0.01, backend=backend, **variant, **flags)
    for seed in range(6):
        give_grads(params, seed)
        for i, param in enumerate(params):
            if (i + seed) % 3 == 0 or (seed < 3 and i % 2):
                param.grad = None
        optimizer.step()
    return results(optimizer)


@each(
    "cls, variant, capturable",
    product([False, True]),
    lambda cls, variant, _: cls is fastopt.RMSprop and variant is cls.variants[-1],
)
@twins
def test_groups_that_differ_in_everything(device, backend, cls, variant, capturable):
    """In kernels and settings; with parameters of every dtype, that have made other steps."""
    # The first has bias corrections of the device: see test_capturable.
    dtypes = (FP32, BF16, FP16) if capturable else DTYPES
    groups = [
        {"lr": 0.1, **variant},
        {"weight_decay": 0.1, "maximize": True, "max_norm": 0.5, **cls.variants[0]},
        {"clip_value": 0.1, "max_norm": None, **cls.variants[1 % len(cls.variants)]},
    ]
    shapes = SHAPES if COMPILED else ((9, 2),)
    each = [{"params": make_params(device, shapes, dtypes), **group} for group in groups]
    optimizer = cls(each, lr=0.01, max_norm=2.0, capturable=capturable, backend=backend)
    for seed in STEPS:
        for group in optimizer.param_groups:
            give_grads(group["params"], seed)
            group["params"][seed].grad = None
        optimizer.param_groups[0]["lr"] *= 0.5
        optimizer.step()
    return results(optimizer)


@each_optimizer
def test_gradients_stay_and_parameters_are_marked_as_changed(cls):
    params = make_params(DEVICE, FEW_SHAPES, DTYPES)
    give_grads(params, 1)
    versions = [(param._version, param.grad._version) for param in params]
    cls(params, max_norm=0.5, clip_value=0.1, backend="triton").step()
    assert_bits([param.grad for param in params], make_grads(params, 1))
    for param, (version, grad_version) in zip(params, versions, strict=True):
        assert param._version > version
        assert param.grad._version == grad_version


@twins
def test_states_and_gradients_of_other_dtypes(device, backend):
    (param,) = make_params(device, ((1000,),))
    param.grad_dtype = BF16
    optimizer = fastopt.AdamW([param], backend=backend)
    optimizer.state[param] = {
        "step": torch.tensor(0.0),
        "exp_avg": torch.zeros(1000, dtype=BF16, device=device),
        "exp_avg_sq": torch.zeros(1000, dtype=FP16, device=device),
    }
    for seed in STEPS:
        param.grad = make_grads([param], seed)[0].bfloat16()
        optimizer.step()
    return results(optimizer)


def max_norm_alone(cls, variant, flags, lr_dtype):
    return flags == {"max_norm": 0.5} and (lr_dtype == FP32 or adamw(cls, variant))


@each(
    "cls, variant, flags, lr_dtype",
    product([*FLAGS, {"max_norm": 0.5}], [FP32, FP64]),
    max_norm_alone,
)
@twins
def test_capturable(device, backend, cls, variant, flags, lr_dtype, monkeypatch):
    """Steps, scalars and a changing lr in the memory of the device.

    It computes beta**step by exp and log: in double, so that fp32 rounds most differences away.
    """
    if not COMPILED:  # as on a GPU, of which the host would have to wait for a tensor
        monkeypatch.setattr(table, "is_on_device", torch.is_tensor)
    capturable = backend == "triton"
    lr = torch.tensor(0.125, dtype=lr_dtype, device=device) if capturable else 0.125
    params = make_params(device, FEW_SHAPES, (FP32, BF16) if COMPILED else (FP32,))
    made = {"capturable": capturable, "backend": backend, **variant, **flags}
    optimizer = cls(params, lr=lr, **made)
    for seed in range(6 if COMPILED else 3):
        take_steps(optimizer, [seed])
        lr *= 0.5
        optimizer.param_groups[0]["lr"] = lr
    return results(optimizer)


SCALERS = [torch.amp.GradScaler, fastopt.GradScaler]


@each(
    "cls, variant, scaler_class, flags, unscale, capturable",
    product(SCALERS, CLIPS, [False, True], [False, True]),
    lambda cls, variant, scaler, flags, unscale, _: scaler is SCALERS[0] and flags and not unscale,
)
@twins
def test_grad_scaler(device, backend, cls, variant, scaler_class, flags, unscale, capturable):
    """Steps that overflow, the first ones too, those between them, their norms, and the scale."""
    params = make_params(device, FEW_SHAPES)
    made = {"capturable": capturable and backend == "triton", **variant, **flags}
    optimizer = cls(params, lr=0.01, backend=backend, **made)
    scaler = scaler_class(device.type, init_scale=2.0**16, growth_interval=2)
    norms = []
    for seed, factor in enumerate([math.inf, 1.0, math.nan, 2.0, 0.5]):  # they round nothing
        scaler.scale(torch.zeros((), device=device))
        for param, grad in zip(params, make_grads(params, seed), strict=True):
            param.grad = grad * scaler.get_scale() * factor
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        norms += [norm.clone() for norm in [optimizer.grad_norm] if norm is not None]
    assert scaler.get_scale() == 2.0**15  # halved twice and doubled once
    if cls.rule.counts_steps:
        assert all(state["step"] == 3 for state in optimizer.state.values())
    return [*results(optimizer), *norms]


# Norms and clipping by functions


@each(
    "order, dtype", itertools.product([1, 2, math.inf], DTYPES), lambda order, dtype: dtype == FP32
)
@twins
def test_total_norm(device, backend, order, dtype, monkeypatch):
    large = (3_000_000,) if COMPILED else (9000,)
    monkeypatch.setenv("FASTOPT_BACKEND", backend)
    grads = [grad.detach() for grad in make_params(device, (*SHAPES, large), (dtype,))]
    norm = fastopt.get_total_norm(grads, order)
    assert norm.device == device
    return [norm]


@pytest.mark.parametrize("order", [1, 2, 3.5, math.inf])
def test_clip_grad_norm(order, monkeypatch):
    """Strided and unaligned gradients too; those within the norm are not written."""

    def run(device, backend):
        monkeypatch.setenv("FASTOPT_BACKEND", {"reference": "cpp"}.get(backend, backend))
        made = make_params(device, ((9, 2), (8200,))) + make_params(device, FEW_SHAPES, DTYPES)
        unusual = make_grads(made, 2)
        grads = [*make_grads(made, 1), unusual[0].t(), unusual[1][1:]]
        params = [torch.zeros_like(grad, requires_grad=True) for grad in grads]
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        before = [(grad.clone(), grad._version) for grad in grads]
        norm = fastopt.get_total_norm(grads, order)
        assert fastopt.clip_grad_norm_(params, 2 * norm.item(), order) == norm
        assert_bits(grads, [grad for grad, _ in before])
        fastopt.clip_grad_norm_(params, 0.5 * norm.item(), order)
        coef = 0.5 * norm.item() / (norm.item() + 1e-6)
        for grad, (old, version) in zip(grads, before, strict=True):
            torch.testing.assert_close(grad, coef * old)
            assert grad._version > version
        return [norm, *grads]

    found, wanted = run(DEVICE, "triton"), run(CPU, "reference")
    if order == 3.5:  # by torch's operators, of which the power may differ
        torch.testing.assert_close([each.cpu() for each in found], wanted)
    else:
        assert_bits(found, wanted)


@twins
def test_clip_grad_value(device, backend, monkeypatch):
    monkeypatch.setenv("FASTOPT_BACKEND", backend)
    params = make_params(device, ((1100,), *FEW_SHAPES), DTYPES)
    give_grads(params, 1)
    params[0].grad[:2] = torch.tensor([math.nan, -math.inf])
    fastopt.clip_grad_value_(params, 0.25)
    assert params[0].grad[:2].isnan().tolist() == [True, False]
    assert params[0].grad[1:].abs().max() == 0.25
    return [param.grad for param in params]
