"""Numbers that are kept in two arrays: the packings of fastopt/packing.py and csrc/packing.h."""

import contextlib
import itertools
import math
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from helpers import BF16, FP32, ISAS, ROOT, assert_same_bits, interpreted
from hypothesis import given, settings
from hypothesis import strategies as st
from rules.runs import machine

import fastopt
from fastopt.packing import CHUNK, CODE_BLOCK, PACKINGS, WHOLE, Stored, random_bits

each_coded = pytest.mark.parametrize("packing", ["codes", "unsigned_codes"])


def packed(x, packing, random=None):
    """Numbers, stored, codes in one block a row; rounded by 32 random bits for each, or all by the
    same."""
    kind = PACKINGS[packing]
    stored = Stored(torch.empty_like(x, dtype=kind.a), packing, kind.new_b(x, x.shape[-1]))

    def bits(like):
        if random is None:
            return random_bits(0, 1, 0, WHOLE, like)
        return torch.full_like(like, random, dtype=torch.int64)

    stored.pack_(x, bits)
    return stored


def bits(x):
    return x.view(torch.int32)


def patterns(n=2**20):
    """fp32 numbers: random bits, and those around every bf16 number and every tie."""
    generator = torch.Generator().manual_seed(0)
    random = torch.randint(-(2**31), 2**31, (n,), generator=generator, dtype=torch.int64)
    upper = torch.arange(2**16).repeat_interleave(7) << 16
    lower = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFE, 0xFFFF]).repeat(2**16)
    return torch.cat([random, upper | lower]).to(torch.int32).view(FP32)


@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
def test_every_fp32_number_is_a_parameter_and_a_remainder(tmp_path):
    """All 2^32, and all parameters with all remainders.

    A parameter is its master's rounding to nearest. Ties go away from zero: of 65,537 masters that
    ``master.bfloat16()`` makes an even number, 16 bits can tell 65,536 apart. So it differs for one
    tie of each even number: 0x0000, 0x0002, ... 0x7f7e of both signs.
    """
    program = str(tmp_path / "split_exhaustive")
    # -march=native is for the time it takes: csrc/isa.h has other ways.
    compile_it = ["c++", "-std=c++17", "-O3", "-march=native", "-fopenmp", f"-I{ROOT / 'csrc'}"]
    source = str(Path(__file__).with_name("split_exhaustive.cpp"))
    subprocess.run([*compile_it, source, "-o", program], check=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    result = subprocess.run([program], capture_output=True, text=True, env=environment)
    assert (result.returncode, int(result.stdout)) == (0, 2 * (0x7F7E // 2 + 1))


@pytest.mark.parametrize("packing", ["remainder", "master_of_bfloat16", "master_of_float16"])
def test_masters_come_back(packing):
    masters = patterns()
    stored = packed(masters, packing)
    back = stored.unpack(FP32)
    number = ~masters.isnan()
    assert torch.equal(bits(back)[number], bits(masters)[number])
    assert back[~number].isnan().all()
    assert stored.a.float()[~number].isnan().all()
    nearest = masters.to(stored.a.dtype)
    differs = (stored.a.view(torch.int16) != nearest.view(torch.int16)) & number
    if packing == "master_of_float16":
        assert not differs.any()
    else:
        assert ((bits(masters) & 0xFFFF)[differs] == 0x8000).all()
        # As near as the other neighbour.
        with_either = [(masters.double() - x.double()).abs()[differs] for x in (stored.a, nearest)]
        finite = with_either[0].isfinite() & with_either[1].isfinite()
        assert torch.equal(with_either[0][finite], with_either[1][finite])


@pytest.mark.parametrize("value", [0.0, -0.0, math.inf, -math.inf, math.nan, 1.0, -2.0])
def test_a_remainder_of_another_time(value):
    """It does not move a parameter by more than half a bf16 ulp, and makes no NaN."""
    remainders = torch.arange(-(2**15), 2**15).to(torch.int16)
    param = torch.full((2**16,), value, dtype=BF16)
    master = Stored(param, "remainder", remainders).unpack(FP32)
    if math.isnan(value):
        assert master.isnan().all()
        return
    half_ulp = abs(value) * 2**-8 + 2.0**-134
    assert torch.equal(master.signbit(), param.signbit())
    finite = master.isfinite()
    assert ((master.double() - value).abs() <= half_ulp)[finite].all()
    assert finite.all() or math.isinf(value)


def test_masters_that_are_out_of_date():
    """Of each element: one that was written from outside counts."""
    masters = torch.tensor([1.001, 1.001, 0.0, -3.3])
    stored = packed(masters, "master_of_bfloat16")
    stored.a[1:3] = torch.tensor([2.5, -0.0])
    assert torch.equal(bits(stored.unpack(FP32)), bits(torch.tensor([1.001, 2.5, -0.0, -3.3])))


def test_stochastic_rounding_is_unbiased():
    """Over a million draws, of numbers of many sizes; each neighbour as often as it should be."""
    n = 2**20
    for value in (1.001, -3.14159, 1e-30, 3.3e-39, 12345.678, 0.1):
        x = torch.full((n,), value)
        found = packed(x, "stochastic").a.double()
        low, high = found.min(), found.max()
        share = (x[0].double() - low) / (high - low)  # of the upper neighbour
        assert low < x[0] < high
        assert high - low == 2.0 ** max(math.frexp(value)[1] - 8, -133)  # neighbours
        # Within 5 standard deviations of the mean of n draws.
        bound = 5 * math.sqrt(share * (1 - share) / n)
        assert ((found == high).double().mean() - share).abs() < bound


@pytest.mark.parametrize("random", [0, 0x7FFF8000, 0x80008000, 0xFFFFFFFF])
def test_stochastic_rounding_of_what_is_exact_or_not_finite(random):
    exact = torch.tensor([0.0, -0.0, 1.0, -1.5, 3.0e38, math.inf, -math.inf, math.nan, 2.0**-130])
    exact = exact.bfloat16()
    assert_same_bits([packed(exact.float(), "stochastic", random).a], [exact])


def uniform(n=2**20, seed=5, step=7, param=3):
    return random_bits(seed, step, param, WHOLE, torch.empty(n)).double() / 2**32


def correlation(a, b):
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])


def test_random_bits_are_uniform():
    u = uniform()
    n = len(u)
    # 5 standard deviations of the mean, of chi-squared and of a correlation.
    assert abs(u.mean() - 0.5) < 5 * math.sqrt(1 / 12 / n)
    for buckets in (16, 256, 4096):
        counts = torch.histc(u, buckets, 0, 1)
        chi2 = float(((counts - n / buckets) ** 2 / (n / buckets)).sum())
        assert abs(chi2 - (buckets - 1)) < 5 * math.sqrt(2 * (buckets - 1))
    for lag in (1, 2, 3, 4, 5, 7, 8, 16, 31, 32, 64, 100, 128, 256, 768, 1000, 4096, CHUNK):
        # Neighbours may be related by 0.005: of a rounding error's variance, nothing.
        assert abs(correlation(u[:-lag], u[lag:])) < 5 / math.sqrt(n) + 0.005
    # Pairs of neighbours fill the square evenly.
    pairs = (u[:-1:2] * 16).long() * 16 + (u[1::2] * 16).long()
    counts = torch.bincount(pairs, minlength=256).double()
    expected = len(pairs) / 256
    assert ((counts - expected) ** 2 / expected).sum() < 255 + 6 * math.sqrt(2 * 255)


def test_random_bits_depend_on_all_arguments():
    assert torch.equal(uniform(), uniform())
    values = (0, 1, 2, 9, 2**24, 2**31)
    others = [uniform(**{name: v}) for name in ("seed", "step", "param") for v in values]
    for a, b in itertools.combinations([uniform(), *others], 2):
        assert abs(correlation(a, b)) < 6 / math.sqrt(len(a))
    # Successive steps of one element: 2,000 of them.
    over_time = torch.stack([uniform(n=4, step=step) for step in range(2000)])
    for element in over_time.t():
        assert abs(element.mean() - 0.5) < 5 * math.sqrt(1 / 12 / 2000)
        assert abs(correlation(element[:-1], element[1:])) < 5 / math.sqrt(2000)


@each_coded
@settings(deadline=None, max_examples=60)
@given(rows=st.integers(0, 5), block=st.sampled_from([32, 64, 128, CODE_BLOCK]))
def test_codes_in_blocks_of_any_size(packing, rows, block):
    """The error of a code is a small part of the number, or a tiny one of the block's largest;
    signs stay, those of zeros too."""
    generator = torch.Generator().manual_seed(rows)
    decades = torch.rand(rows, block, generator=generator) * 14 - 12
    x = 10**decades * torch.randn(rows, block, generator=generator)
    x.view(-1)[1::97] *= 0.0
    # z - 1 = x / scale has steps of 1 / 32 up to 1, and of z / 32 or less above; squares have
    # 1 / 16, and what is not 0 for the sake of the denominator.
    mantissa, floor = 32, 0
    if packing == "unsigned_codes":
        x, mantissa, floor = x.abs(), 16, 1 / 16
    stored = packed(x, packing)
    assert stored.b.shape == (rows, 1)
    found = stored.unpack(FP32)
    assert torch.equal(found.signbit(), x.signbit())
    assert packing == "unsigned_codes" or not found[x == 0].any()
    for now, wanted, scale in zip(found, x, stored.b, strict=True):
        step = torch.maximum((wanted.abs() + scale) / mantissa, floor * scale)
        assert ((now - wanted).abs() <= step * 1.001).all()
        top = wanted.abs().argmax()
        torch.testing.assert_close(now[top], wanted[top], rtol=1e-6, atol=0)
    again = packed(found, packing, random=0x80008000).unpack(FP32)  # to nearest
    torch.testing.assert_close(again, found, rtol=1e-6, atol=0)


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.floats(0, 2.0**127, width=32), min_size=1, max_size=600), st.integers(0, 2**16 - 1)
)
def test_a_second_moment_never_decodes_to_0(values, random):
    assert (packed(torch.tensor([values]), "unsigned_codes", random).unpack(FP32) > 0).all()


def test_unsigned_codes_are_unbiased():
    """A moving average that moves by less than a code does move, on average."""
    n = 2**20
    x = torch.full((n // CODE_BLOCK, CODE_BLOCK), 1 / 3)
    x[:, 0] = 1.0  # the scale
    found = packed(x, "unsigned_codes").unpack(FP32)[:, 1:]
    # 5 standard deviations, and the 2^-24 of the scale's own rounding.
    bound = 5 * found.std() / math.sqrt(n) + 1e-7
    assert (found.double().mean() - x[0, 1].double()).abs() < bound


@pytest.mark.parametrize("value", [math.inf, math.nan])
@each_coded
def test_a_block_that_is_not_finite(packing, value):
    """It becomes NaN, and its neighbours do not."""
    x = torch.ones(3, CODE_BLOCK)
    x[1, 7] = value
    found = packed(x, packing).unpack(FP32)
    assert found[1].isnan().all()
    torch.testing.assert_close(found[::2], x[::2])


def decoded(codes, scale, backend):
    """What a backend makes of 8-bit states with a sign: the steps p = -0 - 1 * (buffer + -0)."""
    param = torch.full(codes.shape, -0.0).requires_grad_()
    flags = {"lr": 1.0, "momentum": 1.0, "state_dtype": "8bit"}
    optimizer = fastopt.SGD([param], backend=backend, **flags)
    param.grad = torch.full(codes.shape, -0.0)
    optimizer.step()
    state = optimizer.state[param]
    state["momentum_buffer_codes"].copy_(codes)
    state["momentum_buffer_scale"].copy_(scale)
    param.detach().fill_(-0.0)
    optimizer.step()
    return -param.detach()


@pytest.mark.parametrize(
    ("backend", "isa"),
    [
        *(("cpp", isa) for isa in ISAS),
        ("reference", None),
        pytest.param("triton", None, marks=interpreted),
    ],
)
def test_every_code_is_decoded_alike(backend, isa):
    """Of both zeros too: code 128 is -0, and 0 is what new states are filled with."""
    codes = torch.arange(256).to(torch.uint8).repeat(18, 1)
    scale = torch.tensor([1.0, 2.0**-120, 1e30]).repeat(6).view(18, 1)
    wanted = bits(Stored(codes, "codes", scale).unpack(FP32))
    assert (wanted[0, 128], wanted[0, 0]) == (-(2**31), 0)
    assert Stored(codes, "unsigned_codes", scale).unpack(FP32)[0, 0] == 0
    with machine(isa, 1) if isa else contextlib.nullcontext():
        assert torch.equal(bits(decoded(codes, scale, backend)), wanted)
