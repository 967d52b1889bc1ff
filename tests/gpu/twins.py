"""The same run by Triton, on a GPU or else in its interpreter, and by the reference on the CPU."""

import functools
import inspect
import math
import os

import pytest
import torch
from helpers import FP32, masked_out, parameters
from hypothesis import strategies as st

from fastopt.step import dispatch

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
COMPILED = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET", "0") == "0"
DEVICE = GPU if COMPILED else CPU

on_a_gpu = pytest.mark.skipif(not COMPILED, reason="needs a GPU, and kernels that are compiled")
#: For tests that run on a GPU or in the interpreter.
on_either = [
    pytest.mark.skipif(
        not dispatch.backends()["triton"].available, reason="Triton does not work here"
    ),
    *masked_out,
]

# 0-dim, empty (last too), one element, odd tails, a chunk of 8192 elements with one of its own.
# Large enough for states of 8 bits, with blocks of 32.
SHAPES = ((), (0,), (1,), (33, 5), (1100,), (8200,), (257, 32), (3, 0))
if COMPILED:
    SHAPES = (*SHAPES, (7,), (33, 65), (8192,), (8193,), (157, 256), (2, 0))
FEW_SHAPES = SHAPES if COMPILED else ((5,), (9, 2))
FLAGS = [
    {},
    {"weight_decay": 0.1},
    {"weight_decay": 0.1, "maximize": True},
    {"weight_decay": 0.1, "max_norm": 0.5},
    {"clip_value": 0.5},
    {"weight_decay": 0.1, "maximize": True, "max_norm": 5.0, "clip_value": 0.01},
]
STEPS = range(1, 4 if COMPILED else 3)


def each(names, rows, few=lambda *row: False):
    """All rows on a GPU; in the interpreter those of ``few``, and the others with ``-m full``."""
    params = [
        pytest.param(*row, marks=[] if COMPILED or few(*row) else pytest.mark.full, id=str(row))
        for row in rows
    ]
    return pytest.mark.parametrize(names, params)


@functools.cache
def draw(seed, kinds):
    """Random tensors on the CPU, one for each shape and dtype, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape, dtype in kinds
    ]


def make_params(device, shapes=SHAPES, dtypes=(FP32,)):
    """Parameters of each shape in each dtype."""
    kinds = tuple((shape, dtype) for dtype in dtypes for shape in shapes)
    return [tensor.to(device, copy=True).requires_grad_() for tensor in draw(0, kinds)]


def make_grads(params, seed):
    grads = draw(seed, tuple((param.shape, param.dtype) for param in params))
    return [grad.to(param.device, copy=True) for param, grad in zip(params, grads, strict=True)]


def give_grads(params, seed):
    for param, grad in zip(params, make_grads(params, seed), strict=True):
        param.grad = grad


def take_steps(optimizer, seeds):
    """A step with the gradients of each seed."""
    for seed in seeds:
        give_grads(dict.fromkeys(parameters(optimizer)), seed)
        optimizer.step()


def results(optimizer):
    """Parameters and their states, then the norm."""
    found = []
    for param in parameters(optimizer):
        state = sorted(optimizer.state.get(param, {}).items())
        counts = optimizer.rule.counts_steps
        found += [param.detach(), *(v for name, v in state if name != "step" or counts)]
    return found + [norm for norm in [optimizer.grad_norm] if norm is not None]


def train(optimizer, seeds=STEPS):
    """What these steps come to."""
    take_steps(optimizer, seeds)
    return results(optimizer)


def assert_bits(found, wanted):
    for a, b in zip(found, wanted, strict=True):
        a, b = a.detach().cpu(), b.detach().cpu()
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        assert torch.all((a.signbit() == b.signbit()) | a.isnan())


def twins(test):
    """Of a test that returns what must have the same bits on a device by Triton, and on the CPU by
    the reference: it is given both."""

    @functools.wraps(test)
    def both(*row, **arguments):
        found = test(DEVICE, "triton", *row, **arguments)
        assert_bits(found, test(CPU, "reference", *row, **arguments))

    _, _, *others = inspect.signature(test).parameters.values()
    both.__signature__ = inspect.Signature(others)
    return both


# Layouts


def laid_out(shape, layout, dtype, generator):
    """A tensor inside a larger one, with strides in another order, and stretched."""
    order, steps, offset = layout
    outer = [shape[d] * steps[d] for d in order]
    base = torch.randn(offset + math.prod(outer), generator=generator, dtype=torch.float64)
    view = base.to(dtype)[offset:].view(outer)[tuple(slice(None, None, steps[d]) for d in order)]
    return view.permute([order.index(d) for d in range(len(shape))])


@st.composite
def layouts(draw):
    """A shape with a layout each for parameter and gradient: of many dimensions, or large."""
    large = draw(st.booleans())
    size = st.integers(0, 2 * 8192 if large else 9)
    shape = draw(st.lists(size, min_size=int(large), max_size=1 if large else 4))
    ndim = len(shape)
    stretched = st.lists(st.integers(1, 1 if large else 3), min_size=ndim, max_size=ndim)
    layout = st.tuples(st.permutations(range(ndim)), stretched, st.integers(0, 7))
    return shape, draw(layout), draw(layout)
