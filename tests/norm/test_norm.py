"""Norms and clipping: torch's signatures, our accuracy, the same bits for any number of threads."""

import itertools
import math

import numpy as np
import pytest
import torch
from helpers import BACKENDS, DTYPES, FP32, FP64, ISAS, assert_same_bits
from rules.runs import machine
from torch.testing._internal.two_tensor import TwoTensor

import fastopt
from fastopt import norm, packing
from fastopt.step import dispatch
from fastopt.step.params import describe

SHAPES = [(), (0,), (5,), (1024,), (1025,), (333, 77), (100_000,), (3, 0)]
MACHINES = list(itertools.product(ISAS, (1, 2, 3)))
each_order = pytest.mark.parametrize("order", [1, 2, 3.5, 0.5, math.inf, "inf"], ids=str)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def gradients(dtype=FP32, scale=1.0):
    generator = torch.Generator().manual_seed(1)
    return [(scale * torch.randn(s, generator=generator)).to(dtype) for s in SHAPES]


def params_with(grads):
    params = [torch.nn.Parameter(torch.zeros_like(g)) for g in grads]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad.clone()
    return [*params, torch.nn.Parameter(torch.zeros(3))]  # and one without a gradient


def assert_near(params, others, tolerance):
    for a, b in zip(params[:-1], others[:-1], strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=tolerance, atol=0, equal_nan=True)


@each_dtype
@each_order
def test_total_norm(order, dtype):
    grads = gradients(dtype)
    truth = torch.linalg.vector_norm(torch.cat([g.double().flatten() for g in grads]), float(order))
    found = set()
    for isa, threads in MACHINES:
        with machine(isa, threads):
            norm = fastopt.get_total_norm(grads, order)
        assert norm.dtype == (FP64 if dtype == FP64 else FP32)
        assert norm.shape == ()
        found.add(norm.item())
    assert len(found) == 1
    # Rounding to fp32 is all the error there is; the contract is 1e-6.
    assert abs(norm.double() - truth) <= 1e-7 * truth


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


@each_dtype
@pytest.mark.parametrize("order", [1, 2, math.inf], ids=str)
def test_bits_of_the_definition(order, dtype):
    sizes = [near + d for near in (512, 1024, 2048, 8192, 16384, 32768) for d in (-1, 0, 1)]
    generator = torch.Generator().manual_seed(1)
    grads = []
    for n in [0, 1, 2, 3, 64, *sizes, 100_000]:
        x, chance = torch.rand(2, n, generator=generator, dtype=FP64)
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
        targets = dispatch.extension().Targets(
            [describe(packing.Stored(tensor)) for tensor in tensors]
        )
        for isa, threads in MACHINES:
            with machine(isa, threads):
                assert targets.power_sum(order, threads) == wanted


def test_plain_tensors_are_looked_at_in_cpp():
    """And nothing else is taken for one."""
    plain, types = dispatch.extension().Targets.plain, (torch.Tensor, torch.nn.Parameter)
    whole = torch.ones(3, 4)
    good = [whole, whole.t(), whole.bfloat16(), torch.nn.Parameter(whole)]
    good += [torch.ones(()), torch.ones(0), torch.ones(1, 5)[:, :2]]
    assert plain(good, types).power_sum(1.0, 1) == 4 * 12 + 1 + 2
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
    fastopt.SGD(params, lr=1.0, max_norm=1.0).step()
    moved = torch.cat([p.detach().double().flatten() for p in params]).norm()
    assert abs(moved - min(1.0, truth)) <= 1e-6


@pytest.mark.parametrize("value", [1.0, math.inf, math.nan])
@pytest.mark.parametrize("max_norm", [0.5, 1e6])
@each_order
def test_clip_grad_norm(order, max_norm, value):
    # In fp64, where torch sums to 1e-14 (in fp32, to 1e-5). And torch refuses the inf-norm of
    # nothing.
    grads = [g for g in gradients(FP64) if g.numel() > 0]
    grads[3][-1] = value
    ours, theirs = params_with(grads), params_with(grads)
    if not math.isfinite(value):
        with pytest.raises(RuntimeError, match="cannot be clipped"):
            fastopt.clip_grad_norm_(ours, max_norm, order, error_if_nonfinite=True)
        assert_near(ours, theirs, 0)  # as they were
    found = fastopt.clip_grad_norm_(ours, max_norm, order)
    wanted = torch.nn.utils.clip_grad_norm_(theirs, max_norm, order)
    torch.testing.assert_close(found, wanted, rtol=1e-13, atol=0, equal_nan=True)
    assert_near(ours, theirs, 1e-13)


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
    params[2].grad[:3] = torch.tensor([math.inf, -math.inf, math.nan])
    before = [(param.grad.clone(), param.grad._version) for param in params[:-1]]
    fastopt.clip_grad_value_(params, 0.25)
    for param, (grad, version) in zip(params, before, strict=False):
        assert torch.allclose(param.grad, grad.clamp(-0.25, 0.25), rtol=0, atol=0, equal_nan=True)
        assert param.grad._version > version or not grad.numel()


def test_nothing_to_clip():
    assert fastopt.clip_grad_norm_([torch.nn.Parameter(torch.zeros(2))], 1.0) == 0
    assert fastopt.get_total_norm([]) == 0
    fastopt.clip_grad_value_([], 1.0)


@pytest.mark.parametrize("order", [0, -1, -math.inf, math.nan])
def test_orders_that_are_no_norms(order):
    with pytest.raises(ValueError, match="norm_type must be positive"):
        fastopt.get_total_norm(gradients(), order)


def test_what_is_no_number_or_dense_tensor():
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
    param.grad = torch.zeros(3).to_sparse()
    with pytest.raises(RuntimeError, match=r"gradient 0, of shape \(3,\), is torch.sparse_coo"):
        fastopt.clip_grad_norm_([param], 1.0)


def test_a_gradient_of_no_dimension_is_clipped_in_fp32():
    """Beside a coefficient of no dimension, torch would multiply in double."""
    grads = [torch.tensor(0.7 + i / 97) for i in range(50)]
    clipped = []
    for backend in BACKENDS:
        params = [torch.nn.Parameter(torch.zeros(())) for _ in grads]
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.clone()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("FASTOPT_BACKEND", backend)
            fastopt.clip_grad_norm_(params, 0.3)
        clipped.append([param.grad for param in params])
    assert_same_bits(*clipped)
