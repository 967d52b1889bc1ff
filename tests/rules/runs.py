"""What the tests of bits share: machines, tensors of any layout, and all that a run leaves."""

import contextlib
import inspect
import math

import torch
from helpers import FP32, entries, parameters, torch_class
from hypothesis import strategies as st

from fastopt.step import dispatch

_C = dispatch.extension()
#: What every rule has, beside its own variants.
FLAGS = [
    {},
    {"weight_decay": 0.1},
    {"weight_decay": 0.1, "maximize": True},
    {"weight_decay": 0.1, "max_norm": 0.5},
    {"clip_value": 0.5},
]


@contextlib.contextmanager
def machine(isa, threads):
    before = _C.isa(), torch.get_num_threads()
    _C.use_isa(isa)
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        _C.use_isa(before[0])
        torch.set_num_threads(before[1])


def of_torch(cls, params, **settings):
    """The optimizer of torch or of the textbook that updates one parameter after the other."""
    one = torch_class(cls)
    loop = {"foreach": False} if "foreach" in inspect.signature(one).parameters else {}
    return one(params, **loop, **settings)


def fits(cls, variant, states):
    """Whether a rule takes a state_dtype."""
    try:
        cls([torch.ones(1)], state_dtype=states, **variant)
    except ValueError:
        return states == FP32
    return True


def finish(optimizer):
    """Parameters, all that is in the state, masters and norm."""
    params = [param.detach() for param in parameters(optimizer)]
    states = [value for *_, value in entries(optimizer)]
    norm = [] if optimizer.grad_norm is None else [optimizer.grad_norm]
    return [*params, *states, *optimizer.master_params(), *norm]


def special_values(dtype):
    info = torch.finfo(dtype)
    near_one = (1.0, info.eps, 1 + info.eps, 1e-7)
    positive = [0.0, *near_one, info.max, info.tiny, info.tiny / 4, math.inf]
    return torch.tensor([*positive, *(-x for x in positive), math.nan], dtype=dtype)


def strided(shape, permutation, steps, offset, dtype, generator):
    """A tensor of the given shape inside a larger one, with permuted and stretched strides."""
    outer = [shape[d] * steps[d] for d in permutation]
    size = offset + torch.Size(outer).numel()
    base = torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)
    part = base[offset:].view(outer)[tuple(slice(None, None, steps[d]) for d in permutation)]
    return part.permute(sorted(range(len(shape)), key=lambda i: permutation[i]))


@st.composite
def layouts(draw):
    """A shape with a layout each for parameter, gradient and states."""
    ndim = draw(st.integers(0, 4))
    permutation = st.permutations(range(ndim))
    steps = st.lists(st.integers(1, 3), min_size=ndim, max_size=ndim)
    one = st.tuples(permutation, steps, st.integers(0, 5))
    return tuple(draw(st.integers(0, 9)) for _ in range(ndim)), draw(st.tuples(one, one, one))
