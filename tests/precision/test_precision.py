"""`master_weights` and `state_dtype`: every mode, on every backend, with every rule.

The same bits in all modes: rules/test_hashes.py and test_bits.py; here, what the numbers are.
"""

import math
from copy import deepcopy

import pytest
import torch
from helpers import (
    BACKENDS,
    BF16,
    CASES,
    FP16,
    FP32,
    FP64,
    HALVES,
    MASTERS,
    MODES,
    STATE_DTYPES,
    assert_same_bits,
    clones,
    each_backend,
    each_case,
    interpreted,
    masked_out,
    new_params,
    set_grads,
    take_steps,
    unchanged,
)
from rules.runs import finish, fits

import fastopt
from fastopt import packing

pytestmark = masked_out
CODE_BLOCK, MIN_CODED = packing.CODE_BLOCK, packing.MIN_CODED
#: Every rule in the mode of the fewest bytes.
FEWEST = [
    (*case, BF16, "stochastic", next(d for d in ("8bit", BF16, FP32) if fits(*case, d)))
    for case in CASES
]
IN_TRITON = [
    *((fastopt.AdamW, {}, *mode, False) for mode in MODES),
    *((*case, capturable) for case in FEWEST for capturable in (False, True)),
]


@interpreted
@pytest.mark.parametrize("case", IN_TRITON, ids=str)
def test_same_bits_in_triton(case):
    cls, variant, dtype, master, states, capturable = case
    flags = {"master_weights": master, "state_dtype": states, "max_norm": 0.5, **variant}

    def trained(**how):
        # 0-dim, empty (last too), odd tails, blocks of 256.
        params = new_params([(), (0,), (33, 5), (1100,), (3, 0)], dtype)
        optimizer = cls(params, lr=0.01, seed=3, **flags, **how)
        take_steps(optimizer, range(2))
        return finish(optimizer)

    found, wanted = trained(backend="triton", capturable=capturable), trained(backend="reference")
    if not capturable:
        assert_same_bits(found, wanted)
    # Where the device counts, beta**step may differ in the last bit of a double: a parameter may be
    # rounded otherwise.
    for a, b in zip(found, wanted, strict=True):
        assert (a == b).double().mean() > 0.99 or a.numel() < 100


@each_backend
def test_states_of_another_layout_are_kept(backend):
    """Converting them to the parameter's changes no number, and happens once."""
    (param,) = new_params([(12, 24)], BF16)
    flags = {"lr": 0.0, "betas": (0.0, 0.0), "state_dtype": BF16}
    optimizer = fastopt.AdamW([param], backend=backend, **flags)
    take_steps(optimizer, [0])
    state = optimizer.state[param]
    state["exp_avg"] = state["exp_avg"].t().contiguous().t()
    before = state["exp_avg"].clone()
    take_steps(optimizer, [0])  # exact: the same gradient in bf16
    kept = state["exp_avg"]
    assert kept.stride() == param.stride()
    assert torch.equal(kept, before)
    take_steps(optimizer, [0])
    assert state["exp_avg"] is kept


@pytest.mark.parametrize("grad_dtype", [FP32, *HALVES], ids=str)
@pytest.mark.parametrize("dtype", MASTERS, ids=str)
@each_backend
def test_gradients_of_another_dtype(backend, dtype, grad_dtype):
    """Where torch allows them: the arithmetic takes them as they are."""
    if not hasattr(torch.Tensor, "grad_dtype") and grad_dtype != dtype:
        pytest.skip("torch 2.13 has grad_dtype")
    (start,) = new_params([(700,)], BF16)
    grads = [param.detach().to(grad_dtype) for param in new_params([(700,)] * 3)]

    def masters(dtype, grad_dtype):
        param = torch.nn.Parameter(start.detach().to(dtype, copy=True))
        param.grad_dtype = grad_dtype
        optimizer = fastopt.AdamW([param], lr=0.01, backend=backend)
        for grad in grads:
            param.grad = grad.to(grad_dtype)
            optimizer.step()
        return next(optimizer.master_params())

    # bf16 numbers have more exponents than fp16 has: a few of these begin elsewhere.
    exact = start.to(dtype) == start
    assert exact.sum() > 690
    assert torch.equal(masters(dtype, grad_dtype)[exact], masters(FP32, FP32)[exact])


@pytest.mark.parametrize("master_weights", ["split", "fp32"])
@each_case
@each_backend
def test_masters_are_those_of_fp32_training(backend, cls, variant, master_weights):
    """Bit for bit, while the gradients are the same; the parameter is the master, rounded."""
    params = new_params([(33, 65), (300,)], BF16)
    params.append(torch.nn.Parameter(new_params([(20, 30)], BF16)[0].detach()[:, ::2]))
    wide = [torch.nn.Parameter(param.detach().float()) for param in params]
    flags = {"lr": 0.01, "weight_decay": 0.1, "max_norm": 1.0, "backend": backend, **variant}
    optimizer = cls(params, master_weights=master_weights, **flags)
    truth = cls(wide, **flags)
    for step in range(20):
        set_grads(params, step)
        for param, copy in zip(params, wide, strict=True):
            copy.grad = param.grad.float()
        optimizer.step()
        truth.step()
        assert_same_bits(optimizer.master_params(), [copy.detach() for copy in wide])
        assert_same_bits(params, [packing.nearest_bfloat16(copy.detach()) for copy in wide])


@pytest.mark.parametrize("mode", MASTERS[BF16])
@each_backend
def test_weight_decay_below_the_resolution(backend, mode):
    """lr * weight_decay = 1e-5, and bf16 numbers are 4e-3 apart below 1."""
    param = torch.nn.Parameter(torch.ones(4096, dtype=BF16))
    param.grad = torch.zeros_like(param)
    flags = {"lr": 1e-4, "weight_decay": 0.1, "backend": backend}
    optimizer = fastopt.AdamW([param], master_weights=mode, **flags)
    for _ in range(100):
        optimizer.step()
    mean = next(optimizer.master_params()).double().mean().item()
    # A rounding in each step. Rounded stochastically, of 4096 elements each went down by 2^-8 with
    # a probability of 1e-3 * 2^8: 5 deviations.
    within = 5 * 2.0**-8 * math.sqrt(0.25 / 4096) if mode == "stochastic" else 100 * 2.0**-25
    assert abs(mean - (1 - 1e-5) ** 100) < within if mode else mean == 1


@pytest.mark.parametrize(
    ("cls", "flags"),
    [
        (fastopt.AdamW, {}),
        (fastopt.AdamW, {"betas": (0.9, 0.95)}),
        (fastopt.RMSprop, {}),
        (fastopt.SGD, {"momentum": 0.9}),
    ],
    ids=str,
)
def test_updates_of_reduced_states(cls, flags):
    """Small errors relative to those with fp32 states, and none that build up.

    The gradients' sizes spread over 2 decades in each block, which are 4 for their squares.
    Measured for AdamW: 0.011 and 1.000 with bf16, 0.103 and 1.007 with 8 bits.
    """
    generator = torch.Generator().manual_seed(0)
    sizes = 10 ** (torch.rand(4000, generator=generator) * 2 - 4)
    params = [torch.nn.Parameter(torch.zeros(4000)) for _ in STATE_DTYPES]
    optimizers = [
        cls([param], lr=1.0, state_dtype=states, **flags)
        for param, states in zip(params, STATE_DTYPES, strict=True)
    ]
    for _ in range(300):
        grad = torch.randn(4000, generator=generator) * sizes
        for param, optimizer in zip(params, optimizers, strict=True):
            param.data.zero_()
            param.grad = grad.clone()
            optimizer.step()
    true, *found = (param.detach().double() for param in params)
    for update, allowed in zip(found, (0.03, 0.15), strict=True):
        assert (update - true).norm() / true.norm() < allowed
        assert abs(update @ true / (true @ true) - 1) < allowed / 3  # along the true update


def test_a_small_second_moment_explodes_nothing():
    """Beside an element whose gradients are 1e6 times as large, in one block."""
    param = torch.nn.Parameter(torch.zeros(MIN_CODED // CODE_BLOCK, CODE_BLOCK))
    optimizer = fastopt.AdamW([param], lr=1.0, weight_decay=0, state_dtype="8bit")
    for _ in range(20):
        param.grad = torch.full_like(param, 1e-6)
        param.grad[:, 0] = 1.0
        before = param.detach().clone()
        optimizer.step()
        # Adam's bound for steady gradients is 1. The smallest codes, to which one in 2,000 of the
        # small ones is rounded, are 2.14 apart: 1 / 14.75 / 32, and the root of 1 / 63487 / 16.
        assert (param - before).abs().max() <= 2.2


@pytest.mark.parametrize("state_dtype", STATE_DTYPES, ids=str)
@pytest.mark.parametrize("cls", [fastopt.AdamW, fastopt.SGD, fastopt.RMSprop])
def test_nothing_moves_after_the_last_gradient(cls, state_dtype):
    """Of an element in a block where another one still has gradients, so that the scale stays."""
    param = torch.nn.Parameter(torch.zeros(MIN_CODED // CODE_BLOCK, CODE_BLOCK))
    flags = {"weight_decay": 0.0} if cls is fastopt.AdamW else {"momentum": 0.9}
    optimizer = cls([param], lr=1e-3, state_dtype=state_dtype, **flags)
    generator = torch.Generator().manual_seed(0)
    for step in range(1000):
        param.grad = torch.zeros_like(param)
        param.grad[:, 0] = torch.randn((), generator=generator)
        if step < 50:
            param.grad[:, 1:] = 1.0
        if step == 300:  # fp32 momentum is 1e-12 of what it was
            before = param.detach().clone()
        optimizer.step()
    # Rounded to nearest, 8-bit moments would stay, and move AdamW's parameters by 0.1.
    assert (param - before)[:, 1:].abs().max() <= 0.01


def test_parameters_that_share_a_version_counter():
    """Views and what was detached from them: a step for one counts for all."""
    together = [torch.nn.Parameter(part) for part in torch.ones(600, dtype=BF16).chunk(2)]
    optimizers = [fastopt.AdamW(params, lr=1e-4) for params in (together, clones(together))]
    for optimizer in optimizers:
        take_steps(optimizer, range(10))
    assert_same_bits(*(optimizer.master_params() for optimizer in optimizers))


def test_seeds():
    def after(seed, order=(0, 1), steps=3):
        """Steps of half an ulp."""
        params = [torch.nn.Parameter(torch.ones(300, dtype=BF16)) for _ in order]
        chosen = [params[i] for i in order]
        optimizer = fastopt.SGD(chosen, lr=2.0**-9, master_weights="stochastic", seed=seed)
        for _ in range(steps):
            for param in params:
                param.grad = torch.ones_like(param)
            optimizer.step()
        return params

    one = after(1)
    assert_same_bits(one, after(1))
    assert not torch.equal(one[0], after(2)[0])
    assert not torch.equal(one[0], one[1])  # each parameter has random numbers of its own
    assert torch.equal(after(1, order=(1, 0))[1], one[0])  # by its place
    stayed = after(1, steps=1)[0] == 1
    assert (after(1, steps=2)[0][stayed] < 1).any()  # and so has each step


@pytest.mark.parametrize("backend", [*BACKENDS, pytest.param("triton", marks=interpreted)])
def test_modes_side_by_side(backend):
    """Groups of one optimizer in different modes are as alone, but for the norm."""
    modes = [
        {"master_weights": "split", "state_dtype": "8bit"},
        {"master_weights": "stochastic", "state_dtype": BF16},
        {"master_weights": "fp32"},
        {"master_weights": None, "state_dtype": "8bit", "weight_decay": 0.1},
    ]
    params = new_params([(70, 5)] * len(modes), BF16)
    alone = clones(params)
    groups = [{"params": [param], **mode} for param, mode in zip(params, modes, strict=True)]
    together = fastopt.AdamW(groups, lr=0.01, backend=backend)
    take_steps(together, range(2))
    for i, (param, mode) in enumerate(zip(alone, modes, strict=True)):
        # Its place decides on its random numbers.
        empty = new_params([(0,)] * i, BF16)
        optimizer = fastopt.AdamW([*empty, param], lr=0.01, backend=backend, **mode)
        for step in range(2):
            set_grads(params, step)
            param.grad = params[i].grad
            optimizer.step()
        assert_same_bits([param], [params[i]])
        assert_same_bits(optimizer.state[param].values(), together.state[params[i]].values())


@pytest.mark.parametrize(
    ("master", "names"),
    [
        ("auto", {BF16: {"param_remainder"}, FP16: {"master_param"}}),
        ("fp32", {BF16: {"master_param"}, FP16: {"master_param"}}),
        ("split", {BF16: {"param_remainder"}}),
        ("stochastic", {BF16: set()}),
        (None, {BF16: set(), FP16: set()}),
    ],
)
def test_a_mixed_model(master, names):
    """Whatever the mode is for 16 bits, fp32 and fp64 parameters are their own masters."""
    names = {FP32: set(), FP64: set(), **names}
    params = [param for dtype in names for param in new_params([(9,)], dtype)]
    optimizer = fastopt.AdamW(params, master_weights=master)
    take_steps(optimizer, range(2))
    adams = {"step", "exp_avg", "exp_avg_sq"}
    assert [set(optimizer.state[param]) - adams for param in params] == list(names.values())
    masters = list(optimizer.master_params())
    assert [found.dtype for found in masters] == [FP32, FP64] + [FP32] * (len(names) - 2)
    for param, found in zip(params[:2], masters, strict=False):
        assert found.data_ptr() == param.data_ptr()
        assert not found.requires_grad


@pytest.mark.parametrize(
    ("flags", "dtype", "message"),
    [
        ({"master_weights": "split"}, FP16, r"is torch\.float16, .*'split'.*: use 'auto'"),
        ({"master_weights": "stochastic"}, FP16, r"is torch\.float16, .*'stochastic'"),
        ({"state_dtype": "8bit"}, FP64, r"is torch\.float64, .*'8bit'"),
        ({"state_dtype": BF16}, FP64, r"is torch\.float64, .*bfloat16"),
    ],
    ids=str,
)
@each_backend
def test_modes_that_do_not_fit_a_parameter(backend, flags, dtype, message):
    good, bad = *new_params([(3,)]), *new_params([(4, 2)], dtype)
    optimizer = fastopt.AdamW([good, bad], backend=backend, **flags)
    set_grads([good, bad], 0)
    message = r"parameter 1 of group 0, of shape \(4, 2\), " + message
    with unchanged(optimizer), pytest.raises(ValueError, match=message):
        optimizer.step()
    bad.grad = None  # without a gradient nothing is asked of it
    before = good.detach().clone()
    optimizer.step()
    assert not torch.equal(good, before)


@pytest.mark.parametrize(
    ("cls", "flags", "message"),
    [
        (fastopt.AdamW, {"master_weights": "bf16"}, "Invalid master_weights: 'bf16' .*'split'"),
        (fastopt.AdamW, {"state_dtype": FP16}, r"Invalid state_dtype: torch\.float16"),
        (fastopt.AdamW, {"seed": -1}, "Invalid seed: -1"),
        (fastopt.AdamW, {"seed": 1.5}, "Invalid seed: 1.5"),
        (fastopt.AdamW, {"seed": 2**32}, "Invalid seed"),
        (fastopt.Adagrad, {"state_dtype": "8bit"}, "'8bit' is not for adagrad: .*use torch.float"),
        (
            fastopt.RMSprop,
            {"state_dtype": BF16, "centered": True},
            "bfloat16 is not for rmsprop: centered, .*use torch.float",
        ),
    ],
    ids=str,
)
def test_settings_that_are_none(cls, flags, message):
    """Further ones: test_settings.py."""
    with pytest.raises(ValueError, match=message):
        cls(new_params([(3,)]), **flags)
    optimizer = cls(new_params([(3,)]))
    with unchanged(optimizer), pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": new_params([(2,)]), **flags})


BLOCKS = {
    (16, 256): 256,
    (2, 3, 64, 16): 256,
    (33, 192): 64,
    (130, 32): 32,
    (4095,): 0,
    (8192,): 0,  # rows of one element
    (127, 32): 0,  # few elements
    (300, 48): 0,  # rows of 3 times 16
    (2, 0): 0,
    (): 0,
}


@pytest.mark.parametrize("shape", BLOCKS, ids=str)
def test_which_states_have_8_bits(shape):
    """And how many elements share a scale."""
    (param,) = new_params([shape])
    optimizer = fastopt.AdamW([param], state_dtype="8bit")
    take_steps(optimizer, range(2))
    state, block = optimizer.state[param], BLOCKS[shape]
    if not block:
        assert state.keys() == {"step", "exp_avg", "exp_avg_sq"}
        return
    for name in ("exp_avg", "exp_avg_sq"):
        codes, scale = state[f"{name}_codes"], state[f"{name}_scale"]
        assert (codes.shape, codes.dtype) == (shape, torch.uint8)
        assert (scale.shape, scale.dtype) == ((shape[0], math.prod(shape[1:]) // block), FP32)


def test_rows_that_are_no_runs_of_memory_keep_fp32():
    param = torch.nn.Parameter(torch.ones(256, 512).t())
    optimizer = fastopt.AdamW([param], state_dtype="8bit")
    take_steps(optimizer, range(2))
    assert "exp_avg" in optimizer.state[param]


def test_a_large_parameter_without_8_bits_is_no_secret():
    param = torch.nn.Parameter(torch.zeros(2**20))
    param.grad = torch.ones_like(param)
    with pytest.warns(match="parameter 0 of group 0, .* keeps its states in fp32, not in 8 bits"):
        fastopt.AdamW([param], state_dtype="8bit").step()


def test_bytes_of_a_parameter():
    """Of real storage: 2 + 2 for parameter and remainder, and a byte and 4 / 256 a moment."""
    n = 2**16
    param = torch.nn.Parameter(torch.zeros(2**8, 2**8, dtype=BF16))
    param.grad = torch.zeros_like(param)
    sizes = {}
    for state_dtype in STATE_DTYPES:
        optimizer = fastopt.AdamW([param], state_dtype=state_dtype)
        optimizer.step()
        tensors = [param, *(v for k, v in optimizer.state[param].items() if k != "step")]
        sizes[state_dtype] = sum(t.untyped_storage().nbytes() for t in tensors) / n
    assert sizes == {FP32: 12, BF16: 8, "8bit": 6 + 2 * 4 / 256}


@each_backend
def test_numbering(backend):
    """Some parameters of a model have the random numbers that they have among all."""
    params, twins = new_params([(5, 3)] * 4, BF16), new_params([(5, 3)] * 4, BF16)
    settings = {"master_weights": "stochastic", "state_dtype": BF16, "backend": backend}
    take_steps(fastopt.AdamW(params, **settings), range(3))
    set_grads(twins, 0)
    some = fastopt.AdamW([twins[3], twins[1]], **settings, numbering=twins)
    some.step()
    some = deepcopy(some)
    twins[3], twins[1] = some.param_groups[0]["params"]
    for step in (1, 2):
        set_grads(twins, step)
        some.step()
    for i in (1, 3):
        assert_same_bits([twins[i].detach()], [params[i].detach()])


def test_a_parameter_that_has_no_number():
    first, second = new_params([(2,), (3,)])
    set_grads([first, second], 0)
    optimizer = fastopt.SGD([first, second], numbering=[first])
    with pytest.raises(ValueError, match="parameter 1 of group 0, .* is not in numbering: give"):
        optimizer.step()
    assert torch.equal(first, new_params([(2,)])[0])
    twice = fastopt.SGD([{"params": [first]}, {"params": []}], numbering=[first])
    twice.param_groups[1]["params"].append(first)
    with pytest.raises(ValueError, match="parameter 0 of group 1, .* stands twice"):
        twice.step()
