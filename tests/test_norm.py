"""Norms and clipping: torch's signatures, our accuracy, the same bits for any number of threads."""

import math

import numpy as np
import pytest
import torch
from test_bits import DTYPES, ISAS, machine
from torch.testing._internal.two_tensor import TwoTensor

import fastopt
from fastopt import norm
from fastopt.packing import Stored
from fastopt.step import dispatch
from fastopt.step.params import describe

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


def lanes_reduce(terms, combine):
    """Rows of 1024 one after the other, then the lanes by halving."""
    lanes = np.zeros(1024)
    for begin in range(0, len(terms), 1024):
        row = terms[begin : begin + 1024]
        lanes[: len(row)] = combine(lanes[: len(row)], row)
    for half in (512, 256, 128, 64, 32, 16, 8, 4, 2, 1):
        lanes[:half] = combine(lanes[:half], lanes[half : 2 * half])
    return lanes[0]


def definition(in_memory_order, order):
    """The norm's partition and order, spelled once more."""
    combine = np.maximum if order == math.inf else np.add
    chunks = []
    for tensor in in_memory_order:
        x = np.abs(tensor.double().flatten().numpy())
        terms = x * x if order == 2 else x
        for begin in range(0, len(terms), 8192):
            chunks.append(lanes_reduce(terms[begin : begin + 8192], combine))
    return lanes_reduce(chunks, combine)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", [1, 2, math.inf], ids=str)
def test_bits_of_the_definition(order, dtype):
    sizes = [near + d for near in (512, 1024, 2048, 8192, 16384, 32768) for d in (-1, 0, 1)]
    sizes = [0, 1, 2, 3, 64, *sizes, 100_000]
    generator = torch.Generator().manual_seed(1)
    grads = []
    for n in sizes:
        x, chance = torch.rand(2, n, generator=generator, dtype=torch.float64)
        # Most terms are so small that a sum with a large one loses them: another order shows. (But
        # for fp16's range, in which sums of order 1 are exact.)
        x = torch.where(chance < 1 / 8, 1, 2 ** (-53 / order)) * (1 + x) * 512
        grads.append(x.to(dtype))
    many = [grad[:5] for grad in grads] * 50  # more than 1024 chunks
    spread = grads[-1].view(10, 100, 100)[:, ::2, 1:]
    cases = [([grad], [grad]) for grad in grads]
    cases += [(grads + many, grads + many), ([spread.transpose(0, 2)] * 2, [spread] * 2)]
    for tensors, in_memory_order in cases:
        wanted = definition(in_memory_order, order)
        assert norm.power_sum(tensors, order).item() == wanted
        targets = dispatch.extension().Targets([describe(Stored(tensor)) for tensor in tensors])
        for isa in ISAS:
            for threads in (1, 2, 3):
                with machine(isa, threads):
                    assert targets.power_sum(order, threads) == wanted


def test_plain_tensors_are_looked_at_in_cpp():
    """And nothing else is taken for one."""
    types = (torch.Tensor, torch.nn.Parameter)
    plain = dispatch.extension().Targets.plain
    whole = torch.ones(3, 4)
    good = [
        whole,
        whole.t(),
        torch.ones(()),
        torch.ones(0),
        torch.ones(1, 5)[:, :2],
        whole.bfloat16(),
    ]
    assert plain([*good, torch.nn.Parameter(whole)], types).power_sum(1.0, 1) == 4 * 12 + 1 + 2
    assert plain([], types).power_sum(2.0, 1) == 0
    imaginary = torch.ones(1, dtype=torch.complex64).conj().imag
    freed = torch.ones(3)
    freed.untyped_storage().resize_(0)
    others = [whole[:, :2], whole.int(), whole.to_sparse(), whole.to("meta"), imaginary]
    for other in [*others, freed, TwoTensor(whole, whole), None, 1.0]:
        assert plain([whole, other], types) is None


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


def test_what_is_no_number_or_tensor():
    param = torch.ones(3, requires_grad=True)
    param.grad = torch.full((3,), 2.0)
    for bound in (None, "x", torch.ones(2)):
        with pytest.raises(TypeError, match="max_norm must be a number, not "):
            fastopt.clip_grad_norm_([param], bound)
        with pytest.raises(TypeError, match="norm_type must be a number, not "):
            fastopt.clip_grad_norm_([param], 1.0, bound)
        with pytest.raises(TypeError, match="clip_value must be a number, not "):
            fastopt.clip_grad_value_([param], bound)
    with pytest.raises(TypeError, match="tensor 1 is 'x': give tensors"):
        fastopt.get_total_norm([param, "x"])
    assert param.grad.tolist() == [2, 2, 2]
