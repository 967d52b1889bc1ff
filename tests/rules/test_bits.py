"""The C++ backend gives the same bits as the reference: any instruction set, threads and layout."""

import math

import pytest
import torch
from helpers import (
    BF16,
    CASES,
    DTYPES,
    FP16,
    FP32,
    FP64,
    HALVES,
    ISAS,
    MODES,
    assert_same_bits,
    each_case,
    interpreted,
    masked_out,
    new_params,
    take_steps,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from rules.runs import FLAGS, finish, fits, layouts, machine, special_values, strided

import fastopt

pytestmark = masked_out
# 0-dim, empty (last too), one element, odd tails, a block of 256, more chunks (of 8192) than one
# task takes (4), and two of those for states of 8 bits: with blocks of 256 and of 32.
SHAPES = [(), (0,), (1,), (7,), (33, 65), (256,), (157, 256), (130, 32), (3, 0)]


GENERATOR = torch.Generator().manual_seed(0)
DRAWS = [
    [torch.randn(shape, generator=GENERATOR, dtype=FP64) for shape in SHAPES] for _ in range(4)
]


def run(backend, cls, dtype, **flags):
    start, *steps = ([x.to(dtype, copy=True) for x in draw] for draw in DRAWS)
    params = [torch.nn.Parameter(x) for x in start]
    optimizer = cls(params, lr=0.01, backend=backend, **flags)
    for grads in steps:
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        optimizer.step()
    return finish(optimizer)


PLAIN = [(*case, dtype, flags) for case in CASES for dtype in DTYPES for flags in FLAGS]
IN_MODES = [
    (fastopt.AdamW, {"amsgrad": True}, dtype, {"master_weights": master, "state_dtype": states})
    for dtype, master, states in MODES
]


@pytest.mark.parametrize(("cls", "variant", "dtype", "flags"), [*PLAIN, *IN_MODES], ids=str)
def test_same_bits_as_reference(cls, variant, dtype, flags):
    """On every instruction set; signs of zeros too. Other rules in other modes: test_hashes.py."""
    wanted = run("reference", cls, dtype, **variant, **flags)
    for isa in ISAS:
        for threads in (1, 2, 3) if dtype == FP32 or "state_dtype" in flags else (2,):
            with machine(isa, threads):
                found = run("cpp", cls, dtype, **variant, **flags)
            assert_same_bits(found, wanted)
            assert_same_bits([x.signbit() for x in found], [x.signbit() for x in wanted])


def test_every_instruction_set_of_this_processor_is_tested():
    """On x86-64 with AVX2, at least baseline and v3; elsewhere the baseline alone."""
    assert "baseline" in ISAS
    capability = torch.backends.cpu.get_cpu_capability()
    assert ("x86-64-v3" in ISAS) == (capability in ("AVX2", "AVX512"))
    assert ("x86-64-v4" in ISAS) == (capability == "AVX512")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_case
def test_special_values(cls, variant, dtype):
    """Zeros of both signs, subnormals, infinities, NaN and overflow go the same way."""
    values = special_values(dtype)
    params, grads = torch.meshgrid(values, values, indexing="ij")

    def updated(backend):
        param = torch.nn.Parameter(params.clone())
        optimizer = cls([param], lr=0.01, backend=backend, **variant)
        for _ in range(2):
            param.grad = grads.clone()
            optimizer.step()
        return finish(optimizer)

    wanted = updated("reference")
    for isa in ISAS:
        with machine(isa, 1):
            assert_same_bits(updated("cpp"), wanted)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_16_bit_conversions(dtype, isa):
    """As in torch, for every 16-bit value and for fp32 values around every rounding boundary."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    wide = every.float()
    ties = (wide + wide.roll(-1)) / 2
    up, down = torch.tensor(math.inf), torch.tensor(-math.inf)
    around = [near for x in (wide, ties) for near in (x, x.nextafter(up), x.nextafter(down))]
    # 16-bit parameters with fp32 gradients, and fp32 parameters with 16-bit gradients.
    for grads, kept in ((torch.cat(around), dtype), (every, FP32)):
        param = torch.nn.Parameter(torch.zeros(grads.numel(), dtype=kept))
        param.grad_dtype = grads.dtype
        param.grad = grads
        # With lr = -1 in effect, the parameter becomes the gradient, rounded to its dtype.
        flags = {"lr": 1.0, "maximize": True, "master_weights": None}
        with machine(isa, 1):
            fastopt.SGD([param], backend="cpp", **flags).step()
        assert_same_bits([param.detach()], [grads.to(kept)])


any_run = given(
    tensors=st.lists(layouts(), min_size=1, max_size=4),
    case=st.sampled_from(CASES),
    flags=st.sampled_from(FLAGS),
    mode=st.sampled_from([(FP64, None, FP32), *MODES]),
    moved=st.booleans(),
    threads=st.integers(1, 3),
)


def run_in_layouts(backend, tensors, case, flags, mode, moved):
    """After steps before and after the states got memory of other layouts."""
    (cls, variant), (dtype, master, states) = case, mode
    generator = torch.Generator().manual_seed(0)
    params = [strided(shape, *three[0], dtype, generator) for shape, three in tensors]
    wholes = [param if param._base is None else param._base for param in params]
    params = [param.detach().requires_grad_() for param in params]
    modes = {
        "master_weights": master,
        "state_dtype": states if fits(cls, variant, states) else FP32,
    }
    optimizer = cls(params, lr=0.01, backend=backend, **modes, **variant, **flags)
    for step in range(3):
        for param, (shape, three) in zip(params, tensors, strict=True):
            param.grad = strided(shape, *three[1], dtype, generator)
            for key, value in optimizer.state[param].items() if moved and step == 1 else ():
                if value.shape == shape and key != "step":
                    other = strided(shape, *three[2], value.dtype, generator)
                    optimizer.state[param][key] = other.copy_(value)
        optimizer.step()
    return [*wholes, *finish(optimizer)]  # what lies beside the parameters, too


@settings(deadline=None, max_examples=200)
@any_run
def test_any_strides_and_alignment(threads, **drawn):
    """Random numbers and blocks go by the parameter's memory, whatever that of the states is."""
    with machine(ISAS[-1], threads):
        found = run_in_layouts("cpp", **drawn)
    assert_same_bits(found, run_in_layouts("reference", **drawn))


@interpreted
@settings(deadline=None, max_examples=5)
@any_run
def test_any_strides_and_alignment_in_triton(threads, **drawn):
    assert_same_bits(run_in_layouts("triton", **drawn), run_in_layouts("reference", **drawn))


def test_states_of_any_dtype():
    """Where torch raises, states of fp32 parameters become what `state_dtype` asks for."""

    def updated(backend):
        optimizer = fastopt.AdamW(new_params([(1000,)]), backend=backend)
        state = optimizer.state[optimizer.param_groups[0]["params"][0]]
        state["step"] = torch.tensor(0.0)
        state["exp_avg"] = torch.zeros(1000, dtype=BF16)
        state["exp_avg_sq"] = torch.zeros(1000, dtype=FP16)
        take_steps(optimizer, range(3))
        assert {value.dtype for value in state.values()} == {FP32}
        return finish(optimizer)

    assert_same_bits(updated("cpp"), updated("reference"))
