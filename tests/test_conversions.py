"""Every precision mode's checkpoints into every other, into torch and out of it; models that change
between steps; parameters that are written from outside."""

from __future__ import annotations

import contextlib
import copy
import io
import itertools

import pytest
import torch
from helpers import (
    BACKENDS,
    CASES,
    assert_same_bits,
    new_params,
    take_steps,
)

import fastopt

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
STATE_DTYPES = (FP32, BF16, "8bit")
MASTERS = {BF16: ("split", "fp32", "stochastic", None), FP16: ("fp32", None), FP32: (None,)}
#: Of a dtype, (master_weights, state_dtype).
MODES = {dtype: list(itertools.product(MASTERS[dtype], STATE_DTYPES)) for dtype in MASTERS}
ALL_MODES = [(dtype, *mode) for dtype, modes in MODES.items() for mode in modes]

SHAPES = [(7, 5), (600,), (), (0,)]
SETTINGS = {"lr": 0.01, "weight_decay": 0.1}

each_mode = pytest.mark.parametrize(("dtype", "master", "states"), ALL_MODES, ids=str)
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def make(params, master="auto", states=FP32, cls=fastopt.AdamW, **settings):
    return cls(params, **{**SETTINGS, "master_weights": master, "state_dtype": states, **settings})


def clones(params):
    return [torch.nn.Parameter(param.detach().clone()) for param in params]


def parameters(optimizer):
    return [param for group in optimizer.param_groups for param in group["params"]]


def through_file(obj):
    file = io.BytesIO()
    torch.save(obj, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def trained(dtype, master, states, cls=fastopt.AdamW, steps=4, shapes=SHAPES, **settings):
    optimizer = make(new_params(shapes, dtype), master, states, cls, **settings)
    take_steps(optimizer, range(steps))
    return optimizer


def entries(optimizer):
    """All that the state holds, in order."""
    return [
        (index, name, value)
        for index, param in enumerate(parameters(optimizer))
        for name, value in sorted(optimizer.state.get(param, {}).items())
    ]


def names_of(optimizer):
    return [(index, name, value.dtype) for index, name, value in entries(optimizer)]


def assert_same_entries(found, wanted):
    found, wanted = entries(found), entries(wanted)
    assert [entry[:2] for entry in found] == [entry[:2] for entry in wanted]
    for a, b in zip(found, wanted, strict=True):
        assert a[2].dtype == b[2].dtype
        assert_same_bits([a[2]], [b[2]])


def decoded(optimizer):
    """The rule's states as fp32 numbers."""
    return [
        state[name].float()
        for _, state in sorted(optimizer.torch_state_dict()["state"].items())
        for name in sorted(state)
    ]


def masters(optimizer):
    return [master.clone() for master in optimizer.master_params()]


@contextlib.contextmanager
def unchanged(optimizer):
    """Asserts that nothing of an optimizer changes."""

    def things():
        groups = [
            (group, {k: v for k, v in group.items() if k != "params"}, group["params"])
            for group in optimizer.param_groups
        ]
        params = [(param, param.detach(), param._version) for param in parameters(optimizer)]
        return optimizer.state, groups, entries(optimizer), params

    state, groups, tensors, params = things()
    identities = [id(group) for group, *_ in groups]
    groups = copy.deepcopy([settings for _, settings, _ in groups])
    values = [(*entry, entry[2].clone()) for entry in tensors]
    numbers = [param.clone() for _, param, _ in params]
    yield
    new_state, new_groups, new_tensors, new_params = things()
    assert new_state is state
    assert [id(group) for group, *_ in new_groups] == identities
    assert [settings for _, settings, _ in new_groups] == groups
    for (*name, tensor, value), (*new_name, new) in zip(values, new_tensors, strict=True):
        assert new_name == name
        assert new is tensor
        assert_same_bits([new], [value])
    for (param, _, version), number, (new, _, new_version) in zip(
        params, numbers, new_params, strict=True
    ):
        assert new is param
        assert new_version == version
        assert_same_bits([new], [number])


# --- Resuming, and the order of loading ----------------------------------------------------------


@pytest.mark.parametrize("order", ["model first", "optimizer first", "by copy_", "by data"])
@each_backend
@each_mode
def test_order_of_loading(dtype, master, states, backend, order):
    """The model before its optimizer or after it, in any way: the same bits."""
    optimizer = trained(dtype, master, states, backend=backend, max_norm=1.0)
    saved = through_file({"model": parameters(optimizer), "optimizer": optimizer.state_dict()})
    other = make(
        [torch.nn.Parameter(param.detach() * 3 - 1) for param in parameters(optimizer)],
        master,
        states,
        backend=backend,
        max_norm=1.0,
    )
    take_steps(other, range(20, 22))  # what is loaded takes the place of all that it has learnt

    def load_model():
        for param, value in zip(parameters(other), saved["model"], strict=True):
            if order == "by data":
                param.data = value.data
            else:
                with torch.no_grad():
                    param.copy_(value)

    if order == "model first":
        load_model()
    other.load_state_dict(saved["optimizer"])
    if order != "model first":
        load_model()
    assert_same_bits(masters(other), masters(optimizer))
    assert_same_entries(other, optimizer)
    for steps in (range(4, 5), range(5, 8)):
        assert_same_bits(take_steps(other, steps), take_steps(optimizer, steps))
        assert_same_entries(other, optimizer)


# --- From mode to mode ---------------------------------------------------------------------------

PAIRS = [
    (dtype, source, target)
    for dtype, modes in MODES.items()
    for source, target in itertools.product(modes, modes)
]


def lost_in(source, target):
    """What cannot be converted exactly."""
    keeps = {"split", "fp32"}
    lost = []
    if source[0] in keeps and target[0] not in keeps:
        lost.append("master weights")
    if target[1] not in (FP32, source[1]):
        lost += ["exp_avg", "exp_avg_sq"]
    return " and ".join(lost)


def assert_within_rounding(found, wanted, states):
    """The states of a parameter after a lossy conversion."""
    for name in ("exp_avg", "exp_avg_sq"):
        a, b = found[name].float(), wanted[name].float()
        error = (a - b).abs()
        if states == BF16:
            assert (error <= b.abs() * 2**-8).all()  # 8 bits of precision
        elif states == "8bit" and b.numel():
            # The number plus the scale, at most (2^4 - 1)-th of the largest of a block for numbers
            # with a sign, has 6 bits of precision; what would be 0 may become the first code.
            scale = b.abs().max() / 14
            assert (error <= (b.abs() + scale) * 2**-5).all()


@pytest.mark.parametrize(("dtype", "source", "target"), PAIRS, ids=str)
def test_from_mode_to_mode(dtype, source, target):
    optimizer = trained(dtype, *source)
    saved = through_file(optimizer.state_dict())
    other = make(clones(parameters(optimizer)), *target)
    take_steps(other, range(9))
    with torch.no_grad():
        for param, value in zip(parameters(other), parameters(optimizer), strict=True):
            param.copy_(value)
    lost = lost_in(source, target)
    if lost:
        with unchanged(other), pytest.raises(ValueError) as error:  # noqa: PT011  see below
            other.load_state_dict(saved)
        message = str(error.value)
        assert message.startswith("parameter 0 of group 0, of shape (7, 5), would lose precision")
        assert f" its {lost}, saved with" in message
        assert f"master_weights={source[0]!r} and state_dtype={source[1]!r}" in message
        assert "lossy=True" in message
        assert "\n" not in message
        assert ". " not in message
        other.load_state_dict(saved, lossy=True)
    else:
        other.load_state_dict(saved)

    if "master" in lost:
        assert_same_bits(masters(other), [param.float() for param in parameters(optimizer)])
    else:
        assert_same_bits(masters(other), masters(optimizer))
    if "exp" in lost:
        theirs = optimizer.torch_state_dict()["state"]
        for index, state in other.torch_state_dict()["state"].items():
            assert_within_rounding(state, theirs[index], target[1])
    else:
        assert_same_bits(decoded(other), decoded(optimizer))

    before = [param.detach().clone() for param in parameters(other)]
    take_steps(other, range(4, 6))
    for param, value in zip(parameters(other), before, strict=True):
        assert param.isfinite().all()
        assert param.numel() == 0 or not torch.equal(param, value)
    assert all(other.state[param]["step"] == 6 for param in parameters(other))
    assert names_of(other) == names_of(trained(dtype, *target))  # nothing is left of the other form


@pytest.mark.parametrize(
    ("cls", "variant"), [case for case in CASES if case[0] is not fastopt.AdamW], ids=str
)
@pytest.mark.parametrize("source", [("split", BF16), (None, "8bit")], ids=str)
def test_other_rules_from_mode_to_mode(cls, variant, source):
    """There and back: exactly into masters and fp32 states, and with a loss back into 8 bits."""
    if cls is fastopt.Adagrad and source[1] == "8bit":
        pytest.skip("has no 8-bit states")
    optimizer = trained(BF16, *source, cls, **variant)
    wide = make(clones(parameters(optimizer)), "fp32", FP32, cls, **variant)
    wide.load_state_dict(optimizer.state_dict())
    assert_same_bits(masters(wide), masters(optimizer))
    names = cls.rule.states(wide.param_groups[0])
    for param in parameters(wide):
        assert all(wide.state[param][name].dtype == FP32 for name in names)
    assert_same_bits(
        [state[name] for state in wide.torch_state_dict()["state"].values() for name in names],
        [
            state[name].float()
            for state in optimizer.torch_state_dict()["state"].values()
            for name in names
        ],
    )
    back = make(clones(parameters(optimizer)), *source, cls, **variant)
    back.load_state_dict(wide.state_dict(), lossy=source[1] == "8bit")
    if source[1] != "8bit":
        assert_same_entries(back, optimizer)
    for each in (wide, back):
        assert all(param.isfinite().all() for param in take_steps(each, range(4, 6)))
