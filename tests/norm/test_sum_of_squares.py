"""`step(sum_of_squares=...)`: a norm that was taken elsewhere, in backward for instance."""

import math

import pytest
import torch
from helpers import (
    BACKENDS,
    BF16,
    FP32,
    FP64,
    assert_same_bits,
    each_backend,
    interpreted,
    masked_out,
    new_params,
    parameters,
    set_grads,
    unchanged,
)
from rules.runs import finish

import fastopt
from fastopt.norm import power_sum

pytestmark = masked_out
SHAPES = [(7, 5), (300,), (), (0,), (3, 2)]
WAYS = [
    *({"backend": backend} for backend in BACKENDS),
    *(
        pytest.param({"backend": "triton", "capturable": flag}, marks=interpreted)
        for flag in (False, True)
    ),
]
each_way = pytest.mark.parametrize("way", WAYS, ids=str)
each_scaler = pytest.mark.parametrize("scaler_class", [fastopt.GradScaler, torch.amp.GradScaler])


def two(dtype=FP32, max_norm=0.5, **way):
    return [fastopt.AdamW(new_params(SHAPES, dtype), max_norm=max_norm, **way) for _ in range(2)]


def squares(optimizer):
    return power_sum([param.grad for param in parameters(optimizer)], 2)


FORMS = [lambda x: x, float, lambda x: x.view(1, 1), lambda x: x.clone().requires_grad_()]


@pytest.mark.parametrize("dtype", [FP32, FP64, BF16])
@each_way
def test_same_bits(way, dtype):
    """As the step that takes the norm itself, before and after."""
    plain, other = two(dtype, **way)
    for step, form in enumerate([None, *FORMS, None]):
        for optimizer in (plain, other):
            set_grads(parameters(optimizer), step)
        plain.step()
        other.step(**({"sum_of_squares": form(squares(other))} if form else {}))
        assert_same_bits(finish(plain), finish(other))


@each_way
def test_another_norm_than_that_of_the_gradients(way):
    """It is believed."""
    (optimizer, other) = two(**way)
    set_grads(parameters(optimizer), 0)
    for mine, its in zip(parameters(optimizer), parameters(other), strict=True):
        its.grad = mine.grad / 4  # a power of two
    optimizer.step(sum_of_squares=4.0)
    other.param_groups[0]["max_norm"] = None
    other.step()
    assert optimizer.grad_norm == 2
    for mine, its in zip(parameters(optimizer), parameters(other), strict=True):
        # max_norm / (norm + 1e-6) is not quite a quarter
        torch.testing.assert_close(mine, its, rtol=1e-6, atol=0)


@pytest.mark.parametrize("found", [math.inf, math.nan])
@each_way
def test_not_finite(way, found):
    """As a norm that is not finite: 0 or NaN times the gradients."""
    optimizer, other = two(**way)
    for each in (optimizer, other):
        set_grads(parameters(each), 0)
    for param in parameters(other):
        param.grad *= 0 if found == math.inf else math.nan
    optimizer.step(sum_of_squares=found)
    other.step()
    torch.testing.assert_close(optimizer.grad_norm, torch.tensor(found), equal_nan=True)
    assert_same_bits(parameters(optimizer), parameters(other))


@pytest.mark.parametrize("unscale", [False, True])
@each_scaler
@each_way
def test_scaled(way, scaler_class, unscale):
    """The sum is that of the gradients as they are at the step: scaled, unless `unscale_` was."""
    optimizers = two(**way)
    scalers = [scaler_class("cpu", init_scale=2.0**4, growth_interval=2) for _ in optimizers]
    for step, fault in enumerate((None, math.inf, None, None)):
        for optimizer, scaler in zip(optimizers, scalers, strict=True):
            scaler.scale(torch.zeros(()))
            set_grads(parameters(optimizer), step)
            for param in parameters(optimizer):
                param.grad *= scaler.get_scale() if fault is None else fault
            if unscale:
                scaler.unscale_(optimizer)
            given = {"sum_of_squares": squares(optimizer)} if optimizer is optimizers[1] else {}
            scaler.step(optimizer, **given)
            scaler.update()
        assert_same_bits(*map(finish, optimizers))
        assert scalers[0].state_dict() == scalers[1].state_dict()


def test_our_scaler_believes_the_sum():
    optimizer, _ = two(max_norm=None)
    scaler = fastopt.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.zeros(()))
    set_grads(parameters(optimizer), 0)
    with unchanged(optimizer):
        scaler.step(optimizer, sum_of_squares=math.inf)
        scaler.update()
    assert scaler.get_scale() == 2


BAD = [
    *((value, TypeError) for value in ("1", 1j, torch.ones(2), torch.ones(1, dtype=torch.int32))),
    *((value, ValueError) for value in (-1.0, torch.tensor(-1.0))),
]


@pytest.mark.parametrize(("value", "error"), BAD, ids=str)
@each_backend
def test_what_is_refused(value, error, backend):
    optimizer, _ = two(backend=backend)
    set_grads(parameters(optimizer), 0)
    with unchanged(optimizer), pytest.raises(error, match="sum_of_squares is "):
        optimizer.step(sum_of_squares=value)


@each_backend
def test_without_max_norm_it_is_ignored(backend):
    optimizers = two(max_norm=None, backend=backend)
    for optimizer, given in zip(optimizers, ({}, {"sum_of_squares": math.nan}), strict=True):
        set_grads(parameters(optimizer), 0)
        optimizer.step(**given)
    assert_same_bits(*map(finish, optimizers))


def test_gathered_in_backward():
    """As in the README."""
    model = torch.nn.Linear(5, 3)
    optimizer = fastopt.AdamW(model.parameters(), max_norm=0.5)
    squares = []
    for param in model.parameters():
        param.register_post_accumulate_grad_hook(
            lambda param: squares.append(torch.linalg.vector_norm(param.grad, dtype=FP64) ** 2)
        )
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(2, 5)).square().sum().backward()
        optimizer.step(sum_of_squares=sum(squares))
        squares.clear()
        norm = torch.nn.utils.get_total_norm([param.grad for param in model.parameters()])
        torch.testing.assert_close(optimizer.grad_norm, norm)
