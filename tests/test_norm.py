"""Norms and clipping: torch's signatures, our accuracy, the same bits for any number of threads."""

import math

import pytest
import torch
from test_bits import DTYPES, ISAS, machine

import fastopt
from fastopt import reference

ORDERS = [1, 2, 3.5, 0.5, math.inf, "inf"]
SHAPES = [(), (0,), (5,), (1024,), (1025,), (333, 77), (100_000,), (3, 0)]


def gradients(dtype=torch.float32, scale=1.0):
    generator = torch.Generator().manual_seed(1)
    return [(scale * torch.randn(s, generator=generator)).to(dtype) for s in SHAPES]


def params_with(grads):
    params = [torch.nn.Parameter(torch.zeros_like(g)) for g in grads]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad.clone()
    return [*params, torch.nn.Parameter(torch.zeros(3))]  # and one without a gradient


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_total_norm(order, dtype):
    grads = gradients(dtype)
    norm = fastopt.get_total_norm(grads, order)
    truth = torch.linalg.vector_norm(torch.cat([g.double().flatten() for g in grads]), float(order))
    assert norm.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert norm.shape == ()
    # Rounding to fp32 is all the error there is; the contract is 1e-6.
    assert abs(norm.double() - truth) <= 1e-7 * truth


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_same_bits_for_any_number_of_threads(order):
    grads = gradients(torch.float64)
    found = set()
    for isa in ISAS:
        for threads in (1, 2, 3):
            with machine(isa, threads):
                found.add(fastopt.get_total_norm(grads, order).item())
    assert len(found) == 1


def test_two_norm_has_the_bits_of_the_reference():
    # fp64, where nothing is rounded away.
    grads = [*gradients(torch.float64), torch.randn(9, 64, 5, dtype=torch.float64).transpose(0, 1)]
    assert fastopt.get_total_norm(grads).item() == reference.power_sum(grads, 2).sqrt().item()


@pytest.mark.parametrize("scale", [1e25, 1e-25])
def test_squares_out_of_fp32s_range(scale):
    grads = gradients(scale=scale)
    truth = torch.cat([g.double().flatten() for g in grads]).norm()
    assert abs(fastopt.get_total_norm(grads).double() - truth) <= 1e-6 * truth
    params = params_with(grads)
    optimizer = fastopt.SGD(params, lr=1.0, max_norm=1.0)
    optimizer.step()
    moved = torch.cat([p.detach().double().flatten() for p in params]).norm()
    assert abs(moved - min(1.0, truth)) <= 1e-6


@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_clip_grad_norm(max_norm, order):
    # In fp64, where torch sums to 1e-14 (in fp32, to 1e-5). And torch refuses the inf-norm of
    # nothing.
    grads = [g for g in gradients(torch.float64) if g.numel() > 0]
    ours, theirs = params_with(grads), params_with(grads)
    found = fastopt.clip_grad_norm_(ours, max_norm, order)
    wanted = torch.nn.utils.clip_grad_norm_(theirs, max_norm, order)
    torch.testing.assert_close(found, wanted, rtol=1e-13, atol=0)
    for a, b in zip(ours[:-1], theirs[:-1], strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-13, atol=0)


def test_clip_grad_norm_of_strided_gradients():
    base = torch.randn(20, 30)
    param = torch.nn.Parameter(torch.zeros(10, 15))
    param.grad = base[::2, ::2]
    before, whole = param.grad.clone(), base.clone()
    norm = fastopt.clip_grad_norm_(param, 1.0)
    torch.testing.assert_close(param.grad, before / (norm + 1e-6))
    whole[::2, ::2] = param.grad
    assert torch.equal(base, whole)


def test_clip_grad_value():
    params = params_with(gradients())
    params[2].grad[:3] = torch.tensor([float("inf"), float("-inf"), float("nan")])
    fastopt.clip_grad_value_(params, 0.25)
    for param, grad in zip(params, gradients(), strict=False):
        if param is not params[2]:
            assert torch.equal(param.grad, grad.clamp(-0.25, 0.25))
    assert params[2].grad[:2].tolist() == [0.25, -0.25]
    assert params[2].grad[2].isnan()


def test_nothing_to_clip():
    assert fastopt.clip_grad_norm_([torch.nn.Parameter(torch.zeros(2))], 1.0) == 0
    assert fastopt.get_total_norm([]) == 0
    fastopt.clip_grad_value_([], 1.0)


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_nonfinite(value, order):
    grads = [g for g in gradients() if g.numel() > 0]
    params, theirs = params_with(grads), params_with(grads)
    params[3].grad[-1] = theirs[3].grad[-1] = value
    with pytest.raises(RuntimeError, match="cannot be clipped"):
        fastopt.clip_grad_norm_(params, 1.0, order, error_if_nonfinite=True)
    assert torch.equal(params[2].grad, grads[2])  # as it was
    norm = fastopt.clip_grad_norm_(params, 1.0, order)
    assert norm.isinf() if math.isinf(value) else norm.isnan()
    torch.nn.utils.clip_grad_norm_(theirs, 1.0, order)
    for a, b in zip(params[:-1], theirs[:-1], strict=True):
        torch.testing.assert_close(a.grad, b.grad, equal_nan=True)


def test_clipping_bumps_the_version_of_gradients():
    params = params_with(gradients())
    before = params[4].grad._version
    fastopt.clip_grad_value_(params, 1.0)
    assert params[4].grad._version > before


@pytest.mark.parametrize("order", [0, -1, -math.inf, math.nan])
def test_orders_that_are_no_norms(order):
    with pytest.raises(ValueError, match="norm_type must be positive"):
        fastopt.get_total_norm(gradients(), order)


def test_sparse_gradient():
    param = torch.nn.Parameter(torch.zeros(3))
    param.grad = torch.zeros(3).to_sparse()
    with pytest.raises(RuntimeError, match=r"gradient 0, of shape \(3,\), is torch.sparse_coo"):
        fastopt.clip_grad_norm_([param], 1.0)
