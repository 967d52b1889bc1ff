"""The C++ backend gives the same bits as the reference: any instruction set, threads and layout."""

import contextlib
import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastopt
from fastopt.step import dispatch

_C = dispatch.extension()
ISAS = _C.supported_isas() if _C else []
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
CASES = [(cls, variant) for cls in fastopt.OPTIMIZERS for variant in cls.variants]
# What every rule has, beside its own variants.
FLAGS = [
    {},
    {"weight_decay": 0.1},
    {"weight_decay": 0.1, "maximize": True},
    {"weight_decay": 0.1, "max_norm": 0.5},
    {"clip_value": 0.5},
]
# 0-dim, empty (last too), one element, odd tails, more chunks (of 8192) than one task takes (4).
SHAPES = [(), (0,), (1,), (7,), (33, 65), (40_000,), (3, 0)]


@contextlib.contextmanager
def machine(isa: str, threads: int):
    before = _C.isa(), torch.get_num_threads()
    _C.use_isa(isa)
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        _C.use_isa(before[0])
        torch.set_num_threads(before[1])


def contiguous(shape, dtype, generator):
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


STEPS = 3


@functools.cache
def draws(dtype):
    """The parameters, then the gradients of each step."""
    generator = torch.Generator().manual_seed(0)
    return [[contiguous(s, dtype, generator) for s in SHAPES] for _ in range(1 + STEPS)]


def run(cls, dtype, **settings):
    """Parameters, states and norm after a few steps."""
    start, *grads = draws(dtype)
    params = [torch.nn.Parameter(t.clone()) for t in start]
    optimizer = cls(params, lr=0.01, **settings)
    for step_grads in grads:
        for param, grad in zip(params, step_grads, strict=True):
            param.grad = grad
        optimizer.step()
    states = [state for p in params for _, state in sorted(optimizer.state[p].items())]
    norm = [] if optimizer.grad_norm is None else [optimizer.grad_norm]
    return [p.detach() for p in params] + states + norm


def assert_same_bits(found, wanted):
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b), (a - b).abs().max()
        assert torch.equal(a.signbit(), b.signbit())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.parametrize(("cls", "variant"), CASES, ids=str)
def test_same_bits_as_reference(cls, variant, flags, dtype):
    wanted = run(cls, dtype, backend="reference", **variant, **flags)
    for isa in ISAS:
        for threads in (1, 2, 3) if dtype == torch.float32 else (2,):
            with machine(isa, threads):
                found = run(cls, dtype, backend="cpp", **variant, **flags)
            assert_same_bits(found, wanted)


def test_every_instruction_set_of_this_processor_is_tested():
    """On x86-64 with AVX2, at least baseline and v3; elsewhere the baseline alone."""
    assert "baseline" in ISAS
    capability = torch.backends.cpu.get_cpu_capability()
    assert ("x86-64-v3" in ISAS) == (capability in ("AVX2", "AVX512"))
    assert ("x86-64-v4" in ISAS) == (capability == "AVX512")


def special_values(dtype):
    info = torch.finfo(dtype)
    positive = [
        0.0,
        1.0,
        info.max,
        info.tiny,
        info.tiny / 4,
        info.eps,
        1 + info.eps,
        1e-7,
        math.inf,
    ]
    return torch.tensor([*positive, *(-x for x in positive), math.nan], dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("cls", "variant"), CASES, ids=str)
def test_special_values(cls, variant, dtype):
    """Zeros of both signs, subnormals, infinities, NaN and overflow go the same way."""
    values = special_values(dtype)
    grid = torch.meshgrid(values, values, indexing="ij")

    def updated(backend):
        param = torch.nn.Parameter(grid[0].clone())
        optimizer = cls([param], lr=0.01, backend=backend, **variant)
        for _ in range(2):
            param.grad = grid[1].clone()
            optimizer.step()
        return [param.detach(), *(s for _, s in sorted(optimizer.state[param].items()))]

    wanted = updated("reference")
    for isa in ISAS:
        with machine(isa, 1):
            for a, b in zip(updated("cpp"), wanted, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_16_bit_conversions(dtype, isa):
    """As in torch, for every 16-bit value and for fp32 values around every rounding boundary."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    wide = every.float()
    neighbours = [torch.nextafter(wide, torch.tensor(s)) for s in (math.inf, -math.inf)]
    ties = (wide + torch.cat([wide[1:], wide[:1]])) / 2
    ties_neighbours = [torch.nextafter(ties, torch.tensor(s)) for s in (math.inf, -math.inf)]
    grads = torch.cat([wide, *neighbours, ties, *ties_neighbours])
    param = torch.nn.Parameter(torch.zeros(grads.numel(), dtype=dtype))
    param.grad_dtype = torch.float32
    # With lr = -1 in effect, the parameter becomes the gradient, rounded to its dtype.
    optimizer = fastopt.SGD([param], lr=1.0, maximize=True, master_weights=None, backend="cpp")
    with machine(isa, 1):
        param.grad = grads
        optimizer.step()
        torch.testing.assert_close(param.detach(), grads.to(dtype), rtol=0, atol=0, equal_nan=True)
        # And 16-bit gradients of an fp32 parameter.
        wide_param = torch.nn.Parameter(torch.zeros(every.numel()))
        wide_param.grad_dtype = dtype
        optimizer = fastopt.SGD([wide_param], lr=1.0, maximize=True, backend="cpp")
        wide_param.grad = every
        optimizer.step()
        torch.testing.assert_close(wide_param.detach(), wide, rtol=0, atol=0, equal_nan=True)


def strided(draw_shape, permutation, steps, offset, dtype, generator):
    """A tensor of the given shape inside a larger one, with permuted and stretched strides."""
    outer = [draw_shape[d] * steps[d] for d in permutation]
    base = contiguous([offset + torch.Size(outer).numel()], dtype, generator)[offset:].view(outer)
    base = base[tuple(slice(None, None, steps[d]) for d in permutation)]
    inverse = sorted(range(len(permutation)), key=lambda i: permutation[i])
    return base.permute(inverse)


@st.composite
def layouts(draw):
    """A shape with a layout each for parameter and gradient."""
    ndim = draw(st.integers(0, 4))
    shape = tuple(draw(st.integers(0, 9)) for _ in range(ndim))
    return shape, [
        (
            draw(st.permutations(range(ndim))),
            [draw(st.integers(1, 3)) for _ in range(ndim)],
            draw(st.integers(0, 5)),
        )
        for _ in range(2)
    ]


@settings(deadline=None, max_examples=150)
@given(
    st.lists(layouts(), min_size=1, max_size=4),
    st.sampled_from(CASES),
    st.sampled_from(FLAGS),
    st.sampled_from(DTYPES),
    st.integers(1, 3),
)
def test_any_strides_and_alignment(tensors, case, flags, dtype, threads):
    cls, variant = case

    def make(generator, which):
        return [strided(shape, *both[which], dtype, generator) for shape, both in tensors]

    def updated(backend):
        generator = torch.Generator().manual_seed(0)
        params = make(generator, 0)
        bases = [p._base if p._base is not None else p for p in params]
        optimizer = cls(
            [p.requires_grad_() for p in map(torch.Tensor.detach, params)],
            lr=0.01,
            backend=backend,
            **variant,
            **flags,
        )
        for _ in range(2):
            for p, g in zip(optimizer.param_groups[0]["params"], make(generator, 1), strict=True):
                p.grad = g
            optimizer.step()
        return bases  # whole, so that an element beside the parameter that was written shows

    with machine(ISAS[-1], threads):
        found = updated("cpp")
    for a, b in zip(found, updated("reference"), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_states_of_any_dtype():
    """fp32 parameters with bf16 states: torch raises. Here they become fp32, which is
    what `state_dtype` asks for."""

    def updated(backend):
        generator = torch.Generator().manual_seed(0)
        param = torch.nn.Parameter(torch.randn(1000, generator=generator))
        optimizer = fastopt.AdamW([param], backend=backend)
        optimizer.state[param] = {
            "step": torch.tensor(0.0),
            "exp_avg": torch.zeros(1000, dtype=torch.bfloat16),
            "exp_avg_sq": torch.zeros(1000, dtype=torch.float16),
        }
        for _ in range(3):
            param.grad = torch.randn(1000, generator=generator)
            optimizer.step()
        assert {state.dtype for state in optimizer.state[param].values()} == {torch.float32}
        return [param.detach(), *optimizer.state[param].values()]

    assert_same_bits(updated("cpp"), updated("reference"))
