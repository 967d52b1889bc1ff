"""Every precision mode's checkpoints into every other, into torch and out of it; models that change
between steps; parameters that are written from outside."""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import pickle
import re

import pytest
import torch
import torch.distributed.checkpoint.state_dict as dcp
from helpers import (
    BACKENDS,
    CASES,
    assert_same_bits,
    new_params,
    set_grads,
    take_steps,
    torch_class,
)
from test_precision import usable

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


@pytest.mark.parametrize("order", ["model first", "by copy_", "by data"])
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
            # The number plus the scale, at most a 15th of the largest of a block, is rounded to 6
            # bits where it has a sign, to 5 where it has none; 0 may become the first code.
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
        assert f"master_weights={source[0]!r} and state_dtype={str(source[1])!r}" in message
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
    if not usable(cls, variant, {"state_dtype": source[1]}):
        pytest.skip("the rule needs more precision")
    optimizer = trained(BF16, *source, cls, **variant)
    wide = make(clones(parameters(optimizer)), "fp32", FP32, cls, **variant)
    wide.load_state_dict(optimizer.state_dict())
    assert_same_bits(masters(wide), masters(optimizer))
    names = cls.rule.states_of(wide.param_groups[0])
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


DCP_OPTIONS = {
    "plain": None,
    "full": dcp.StateDictOptions(full_state_dict=True),
    "on the CPU": dcp.StateDictOptions(full_state_dict=True, cpu_offload=True),
    "flat": dcp.StateDictOptions(flatten_optimizer_state_dict=True),
}


@pytest.mark.parametrize("options", DCP_OPTIONS)
@pytest.mark.parametrize("target", MODES[BF16], ids=str)
@pytest.mark.parametrize("source", [("split", FP32), ("fp32", "8bit"), (None, BF16)], ids=str)
def test_distributed_checkpoints_from_mode_to_mode(source, target, options):
    """torch.distributed.checkpoint adds what it loads to states that a first step has made, in the
    form of the new optimizer: they are not taken for what was loaded."""
    if options == "flat" and source != target:
        pytest.skip("torch leaves out what the new optimizer has not")
    lost = lost_in(source, target)
    shapes = [(7, 5), (600,)]  # torch has no place for what it adds to a 0-dim parameter
    model, other_model = (
        torch.nn.ParameterDict({str(i): p for i, p in enumerate(new_params(shapes, BF16))})
        for _ in range(2)
    )
    optimizer = make(list(model.parameters()), *source)
    take_steps(optimizer, range(4))
    optimizer.zero_grad()
    options = DCP_OPTIONS[options]
    saved = through_file(dcp.get_optimizer_state_dict(model, optimizer, options=options))
    other = make(list(other_model.parameters()), *target)
    other_model.load_state_dict(model.state_dict())

    def load():
        dcp.set_optimizer_state_dict(other_model, other, saved, options=options)

    if lost:
        with pytest.raises(ValueError, match=f"would lose precision of its {lost}, saved with"):
            load()
    else:
        load()
        assert_same_bits(masters(other), masters(optimizer))
        assert_same_bits(decoded(other), decoded(optimizer))
        assert all(param.isfinite().all() for param in take_steps(other, range(4, 6)))
        assert names_of(other) == names_of(trained(BF16, *target, shapes=shapes))


@pytest.mark.parametrize("order", ["model first", "optimizer first"])
@pytest.mark.parametrize(("source", "target"), [*itertools.permutations(MASTERS[BF16], 2)], ids=str)
def test_masters_wait_for_the_model(source, target, order):
    """A conversion gives the same whether the model is loaded before or after its optimizer."""
    optimizer = trained(BF16, source, FP32)
    other = make([torch.nn.Parameter(-2 * p.detach()) for p in parameters(optimizer)], target)
    lost = lost_in((source, FP32), (target, FP32))
    wanted = [p.float() for p in parameters(optimizer)] if lost else masters(optimizer)
    for load in ["model", "optimizer"] if order == "model first" else ["optimizer", "model"]:
        if load == "model":
            with torch.no_grad():
                for a, b in zip(parameters(other), parameters(optimizer), strict=True):
                    a.copy_(b)
            continue
        if lost:
            with unchanged(other), pytest.raises(ValueError, match="of its master weights"):
                other.load_state_dict(optimizer.state_dict())
        other.load_state_dict(optimizer.state_dict(), lossy=bool(lost))
    assert_same_bits(masters(other), wanted)
    resaved = make(clones(parameters(other)), target)  # before there was a step to convert it
    resaved.load_state_dict(through_file(other.state_dict()), lossy=bool(lost))
    for each in (other, resaved):
        each.param_groups[0]["lr"] = 0.0
        take_steps(each, [4])
        assert_same_bits(masters(each), wanted)
        assert names_of(each) == names_of(trained(BF16, target, FP32))


# --- From torch and to torch ---------------------------------------------------------------------


@pytest.mark.parametrize(("cls", "variant"), CASES, ids=str)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_from_torch(cls, variant, dtype):
    """Into every mode, in which it goes on; what can be exact is."""
    settings = dict(variant)
    if "eps" in cls([torch.ones(1)]).defaults:
        settings["eps"] = 1e-4  # torch computes in fp16, where the default is 0
    theirs = torch_class(cls)(new_params(SHAPES, dtype), lr=0.01, foreach=False, **settings)
    params = take_steps(theirs, range(3))
    saved = through_file(theirs.state_dict())
    for master, states in MODES[dtype]:
        if not usable(cls, variant, {"state_dtype": states}):
            continue
        ours = make(clones(params), master, states, cls, **variant)
        ours.load_state_dict(saved)
        group = ours.param_groups[0]
        assert (group["lr"], group["master_weights"], group["state_dtype"]) == (
            *(0.01, master, states),
        )
        assert_same_bits(masters(ours), [param.float() for param in params])
        for index, param in enumerate(parameters(ours)):
            for name in cls.rule.states_of(group):
                found = ours.torch_state_dict()["state"][index][name].float()
                wanted = saved["state"][index][name].float()
                if states == FP32 or (states == BF16 == dtype):
                    assert_same_bits([found], [wanted])
                elif wanted.numel():
                    # Of the largest, however they are kept: see assert_within_rounding.
                    assert (found - wanted).abs().max() <= wanted.abs().max() * 2**-5
            if cls.rule.counts_steps:
                assert ours.state[param]["step"] == 3
        before = clones(params)
        for a, b in zip(take_steps(ours, range(3, 6)), before, strict=True):
            assert a.isfinite().all()
            assert a.numel() < 2 or not torch.equal(a, b)


@pytest.mark.parametrize(("cls", "variant"), CASES, ids=str)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_to_torch_and_back(cls, variant, dtype):
    """torch's load casts the states, and what it does not know, to the parameter's dtype."""
    for master, states in MODES[dtype]:
        if not usable(cls, variant, {"state_dtype": states}):
            continue
        ours = trained(dtype, master, states, cls, **variant)
        params = parameters(ours)
        dicts = [ours.torch_state_dict()]
        if states != "8bit":
            dicts.append(ours.state_dict())
        names = set(cls.rule.states_of(ours.param_groups[0])) | {"step"}
        assert all(state.keys() <= names for state in dicts[0]["state"].values())
        results = []
        for state_dict in dicts:
            theirs = torch_class(cls)(clones(params), foreach=False, **variant)
            theirs.load_state_dict(through_file(state_dict))
            for index, param in enumerate(parameters(theirs)):
                for name in cls.rule.states_of(ours.param_groups[0]):
                    found = theirs.state[param][name]
                    assert found.dtype == dtype
                    wanted = dicts[0]["state"][index][name]
                    assert_same_bits([found], [wanted.to(dtype)])
            results.append(take_steps(theirs, range(4, 6)))
            assert all(param.isfinite().all() for param in results[-1])
            back = make(clones(results[-1]), master, states, cls, **variant)
            back.load_state_dict(theirs.state_dict(), lossy=True)
            assert_same_bits(masters(back), [param.float() for param in results[-1]])
            assert all(param.isfinite().all() for param in take_steps(back, range(6, 8)))
        for again in results[1:]:
            assert_same_bits(again, results[0])


# --- Models that are not what they were ----------------------------------------------------------


def cast(optimizer, dtype):
    """As ``model.to(dtype)`` does."""
    for param in parameters(optimizer):
        param.grad = None
        param.data = param.data.to(dtype)


@pytest.mark.parametrize("states", STATE_DTYPES, ids=str)
@pytest.mark.parametrize("way", ["cast", "load"])
@pytest.mark.parametrize(
    ("old", "new"), [(BF16, FP16), (FP16, BF16), (BF16, FP32), (FP16, FP32), (FP32, BF16)], ids=str
)
@pytest.mark.parametrize("master", ["auto", "fp32", None])
def test_another_dtype(old, new, master, states, way):
    """In the middle of training, or from a checkpoint: nothing is left of the old master, but for
    an fp32 master as far as the parameter is rounded from it."""
    optimizer = trained(old, master, states)
    old_masters = masters(optimizer)
    if way == "cast":
        cast(optimizer, new)
    else:
        saved = optimizer.state_dict()
        other = make([p.detach().to(new).requires_grad_() for p in parameters(optimizer)],
                     master, states)  # fmt: skip
        drops = (
            master is not None and old != FP32 and (new == FP32 or (old, master) == (BF16, "auto"))
        )
        if drops:
            with unchanged(other), pytest.raises(ValueError, match="of its master weights"):
                other.load_state_dict(saved)
        other.load_state_dict(saved, lossy=drops)
        optimizer = other
    for found, old_master, param in zip(
        masters(optimizer), old_masters, parameters(optimizer), strict=True
    ):
        assert ((found == param.float()) | (found == old_master)).all()
    optimizer.param_groups[0]["lr"] = 0.0
    before = masters(optimizer)
    take_steps(optimizer, [4])
    assert_same_bits(masters(optimizer), before)
    assert names_of(optimizer) == names_of(trained(new, master, states))
    optimizer.param_groups[0]["lr"] = 0.01
    for param in take_steps(optimizer, range(5, 8)):
        assert param.dtype == new
        assert param.isfinite().all()


def test_masters_in_an_fp32_model():
    """Exporting the masters into an fp32 model loses nothing, so it is no error."""
    for master, dtype in (("split", BF16), ("fp32", BF16), ("fp32", FP16)):
        optimizer = trained(dtype, master, FP32)
        for lossy in (False, True):
            other = make([torch.nn.Parameter(value) for value in masters(optimizer)])
            other.load_state_dict(optimizer.state_dict(), lossy=lossy)
            assert_same_bits(parameters(other), masters(optimizer))
            assert_same_bits(decoded(other), decoded(optimizer))
        take_steps(other, [4])
        assert names_of(other) == names_of(trained(FP32, None, FP32))


def test_split_is_not_for_fp16():
    """Neither in a step nor in a load, after which all is as before."""
    optimizer = trained(BF16, "split", FP32)
    saved = optimizer.state_dict()
    cast(optimizer, FP16)
    params = parameters(optimizer)
    set_grads(params, 4)
    message = "parameter 0 of group 0, of shape (7, 5), is torch.float16, which master_weights="
    with unchanged(optimizer), pytest.raises(ValueError, match=re.escape(message)):
        optimizer.step()
    with unchanged(optimizer), pytest.raises(ValueError, match=re.escape(message)):
        optimizer.load_state_dict(saved)


FORMATS = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "contiguous": torch.Tensor.contiguous,
    "transposed": lambda x: x.transpose(0, 2).contiguous().transpose(0, 2),
    "strided": lambda x: torch.stack([x, x], -1)[..., 0],
}


def formatted(params, name):
    return [torch.nn.Parameter(FORMATS[name](param.detach())) for param in params]


@each_backend
@pytest.mark.parametrize("states", STATE_DTYPES, ids=str)
@pytest.mark.parametrize("master", ["split", "fp32"])
@pytest.mark.parametrize(("old", "new"), [*itertools.permutations(FORMATS, 2)])
def test_another_layout(old, new, master, states, backend):
    """Blocks of codes go by the memory order: where that changes, only what is in one is exact."""
    for shape, exact in (((8, 6, 5, 5), states != "8bit"), ((4, 3, 4, 5), True)):
        optimizer = make(formatted(new_params([shape], BF16), old), master, states, backend=backend)
        take_steps(optimizer, range(4))
        same_order = {old, new} == {"contiguous", "strided"}
        for saved in (optimizer.state_dict(), through_file(optimizer.state_dict())):
            other = make(formatted(parameters(optimizer), new), master, states, backend=backend)
            if not exact and not same_order:
                with unchanged(other), pytest.raises(ValueError, match="exp_avg and exp_avg_sq"):
                    other.load_state_dict(saved)
                other.load_state_dict(saved, lossy=True)
                (a,), (b,) = (o.torch_state_dict()["state"].values() for o in (other, optimizer))
                assert_within_rounding(a, b, states)
            else:
                other.load_state_dict(saved)
                assert_same_bits(decoded(other), decoded(optimizer))
            assert_same_bits(masters(other), masters(optimizer))
            if states == FP32:
                # The arithmetic is the same; of the others, random numbers go by memory order.
                wanted = copy.deepcopy(optimizer)
                assert_same_bits(take_steps(other, [4, 5]), take_steps(wanted, [4, 5]))
                assert_same_bits(masters(other), masters(wanted))
            else:
                assert all(p.isfinite().all() for p in take_steps(other, [4, 5]))
            (wanted,) = formatted(parameters(optimizer), new)
            assert parameters(other)[0].stride() == wanted.stride()


@pytest.mark.parametrize("states", STATE_DTYPES, ids=str)
@pytest.mark.parametrize("master", ["split", "fp32"])
def test_another_layout_between_steps(master, states):
    """A kept plan sees it too."""
    optimizer = make(new_params([(4, 3, 4, 5)], BF16), master, states, lr=0.0)
    optimizer.param_groups[0]["lr"] = 0.01
    take_steps(optimizer, range(4))
    optimizer.param_groups[0]["lr"] = 0.0
    wanted = masters(optimizer)
    (param,) = parameters(optimizer)
    for _ in range(2):
        for change in FORMATS.values():
            param.grad = None
            param.data = change(param.data)
            assert_same_bits(masters(optimizer), wanted)
            take_steps(optimizer, [4, 5])
            assert_same_bits(masters(optimizer), wanted)


# --- State dicts that are not what they were -----------------------------------------------------


@each_mode
def test_a_missing_master_is_rebuilt(dtype, master, states):
    """As if it had been trained without one; so is one that something has cast."""
    optimizer = trained(dtype, master, states)
    for change in (lambda x: None, lambda x: x.bfloat16(), torch.Tensor.double):
        saved = copy.deepcopy(optimizer.state_dict())
        for state in saved["state"].values():
            for name in ("param_remainder", "master_param"):
                if name in state and change(state[name]) is None:
                    del state[name]
                elif name in state:
                    state[name] = change(state[name])
        other = make(clones(parameters(optimizer)), master, states)
        other.load_state_dict(saved)
        assert_same_bits(masters(other), [param.float() for param in parameters(optimizer)])
        assert_same_bits(decoded(other), decoded(optimizer))
        before = masters(other)
        other.param_groups[0]["lr"] = 0.0
        take_steps(other, [4])
        assert_same_bits(masters(other), before)
        assert names_of(other) == names_of(optimizer)


@each_mode
def test_entries_that_nobody_knows(dtype, master, states):
    """They are kept as they are, and trained around."""
    optimizer = trained(dtype, master, states)
    extra = {
        "ema": torch.rand(3),
        "exp_avg_bits": torch.ones(2, dtype=torch.uint8),
        "mask": torch.ones(4, dtype=torch.bool),
        "count": torch.tensor(3, dtype=torch.int64),
        "numbers": [1, 2.5, None],
    }
    plain = copy.deepcopy(optimizer)
    for param in parameters(optimizer):
        optimizer.state[param].update(extra)
    other = make(clones(parameters(optimizer)), master, states)
    other.load_state_dict(through_file(optimizer.state_dict()))
    for _ in range(2):
        for param in parameters(other):
            for name, value in extra.items():
                found = other.state[param][name]
                if isinstance(value, torch.Tensor):
                    assert found.dtype == value.dtype
                    assert_same_bits([found], [value])
                else:
                    assert found == value
        assert_same_bits(take_steps(other, [4]), take_steps(plain, [4]))
        plain = copy.deepcopy(plain)


BROKEN = {
    "shape": lambda x: x.reshape(-1)[:-1].clone(),
    "dtype": lambda x: x.to(torch.int32),
    "double": torch.Tensor.double,
    "number": lambda x: 3,
    "words": lambda x: "three",
    "sparse": torch.Tensor.to_sparse,
    "meta": lambda x: x.to("meta"),
    "none": lambda x: None,
}


@pytest.mark.parametrize("fault", BROKEN)
@pytest.mark.parametrize("name", ["param_remainder", "exp_avg_codes", "exp_avg_sq_scale"])
def test_broken_entries(name, fault):
    """An error that names the parameter and the state, and nothing has changed."""
    optimizer = trained(BF16, "split", "8bit")
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][1][name] = BROKEN[fault](saved["state"][1][name])
    other = make(clones(parameters(optimizer)), "split", "8bit")
    take_steps(other, range(7, 9))
    if name == "param_remainder" and fault in ("dtype", "double", "none"):
        other.load_state_dict(saved)  # as if it were missing
    else:
        with unchanged(other), pytest.raises(RuntimeError) as error:
            other.load_state_dict(saved)
        assert re.match(r"parameter 1 of group 0, of shape \(600,\),", str(error.value))
        assert f" has a state {name!r}" in str(error.value) or f" without {name!r}" in str(
            error.value
        )
    take_steps(other, range(2))
    assert all(param.isfinite().all() for param in parameters(other))


def test_broken_entries_in_the_state():
    """Put there by hand: a step raises, before anything has changed."""
    for name, fault in itertools.product(["param_remainder", "exp_avg_scale"], BROKEN):
        optimizer = trained(BF16, "split", "8bit")
        state = optimizer.state[parameters(optimizer)[1]]
        state[name] = BROKEN[fault](state[name])
        set_grads(parameters(optimizer), 4)
        if (name, fault) == ("param_remainder", "none"):
            optimizer.step()
            continue
        versions = [param._version for param in parameters(optimizer)]
        with pytest.raises(RuntimeError, match=f"parameter 1 of group 0, .*{name}"):
            optimizer.step()
        assert [param._version for param in parameters(optimizer)] == versions


def test_a_step_without_data():
    optimizer = trained(BF16, "split", FP32)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][1]["step"] = saved["state"][1]["step"].to("meta")
    with unchanged(optimizer), pytest.raises(RuntimeError, match="parameter 1 .* 'step' on the me"):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize("mode", [("auto", FP32), ("split", "8bit"), (None, BF16)], ids=str)
def test_parameters_without_data(mode):
    optimizer = trained(BF16, *mode)
    other = make([torch.nn.Parameter(p.to("meta")) for p in parameters(optimizer)], *mode)
    with pytest.raises(RuntimeError, match="parameter 0 .* is on the meta device and has no data"):
        other.load_state_dict(optimizer.state_dict())
    assert not other.state


def test_another_number_of_groups():
    """torch's error; nothing has changed."""
    optimizer = trained(BF16, "split", "8bit")
    saved = make([{"params": [param]} for param in new_params(SHAPES, BF16)]).state_dict()
    with unchanged(optimizer), pytest.raises(ValueError, match="different number of parameter gro"):
        optimizer.load_state_dict(saved)


@each_mode
def test_shares_no_memory(dtype, master, states):
    optimizer = trained(dtype, master, states)
    saved = optimizer.state_dict()
    kept = copy.deepcopy(saved)
    others = [make(clones(parameters(optimizer)), master, states) for _ in range(2)]
    for other in others:
        other.load_state_dict(saved)
    take_steps(others[0], range(4, 6))
    for index, state in kept["state"].items():
        for name, value in state.items():
            assert_same_bits([saved["state"][index][name]], [value])
    assert_same_entries(others[1], optimizer)
    places = [{value.data_ptr() for *_, value in entries(each) if value.numel()}
              for each in (optimizer, *others)]  # fmt: skip
    assert len(set.union(*places)) == sum(map(len, places))


def test_hooks():
    """What they change is what is saved and loaded, in packed modes too."""
    optimizer = trained(BF16, "split", "8bit")
    calls = []

    def without_remainder(hooked, state_dict):
        calls.append("pre load")
        assert hooked is other
        assert all(
            type(v) is torch.Tensor for s in state_dict["state"].values() for v in s.values()
        )
        state = {
            index: {k: v for k, v in state.items() if k != "param_remainder"}
            for index, state in state_dict["state"].items()
        }
        return {**state_dict, "state": state}

    def look(hooked):
        calls.append("post load")
        assert_same_bits(masters(hooked), [param.float() for param in parameters(hooked)])

    def rename(hooked, state_dict):
        calls.append("save")
        return {**state_dict, "mine": len(state_dict["state"])}

    optimizer.register_state_dict_post_hook(rename)
    other = make(clones(parameters(optimizer)), "split", "8bit")
    other.register_load_state_dict_pre_hook(without_remainder)
    other.register_load_state_dict_post_hook(look)
    saved = optimizer.state_dict()
    assert saved["mine"] == len(SHAPES)
    assert optimizer.torch_state_dict()["mine"] == len(SHAPES)
    other.load_state_dict(saved)
    assert calls == ["save", "save", "pre load", "post load"]
    assert_same_bits(decoded(other), decoded(optimizer))


# --- Copies, groups and settings -----------------------------------------------------------------


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@each_mode
def test_copies(dtype, master, states, duplicate):
    optimizer = trained(dtype, master, states, max_norm=1.0)
    other = duplicate(optimizer)
    assert_same_entries(other, optimizer)
    assert_same_bits(masters(other), masters(optimizer))
    for steps in (range(4, 5), range(5, 8)):
        assert_same_bits(take_steps(other, steps), take_steps(optimizer, steps))
        assert_same_entries(other, optimizer)


@each_backend
def test_a_group_of_another_mode(backend):
    """Added after some steps; each trains as it would alone, and all resume."""
    params = [new_params([(40,), (3, 4)], dtype) for dtype in (BF16, BF16, FP16, FP32)]
    modes = [("split", "8bit"), ("stochastic", FP32), ("fp32", BF16), ("auto", "8bit")]
    optimizer = make(params[0], *modes[0], backend=backend)
    take_steps(optimizer, range(2))
    for members, (master, states) in zip(params[1:], modes[1:], strict=True):
        optimizer.add_param_group(
            {"params": members, "master_weights": master, "state_dtype": states, "seed": 5}
        )
        take_steps(optimizer, range(2, 4))
    saved = through_file(optimizer.state_dict())
    other = make(
        [
            {"params": clones(members), "master_weights": master, "state_dtype": states}
            for members, (master, states) in zip(params, modes, strict=True)
        ],
        backend=backend,
    )
    other.load_state_dict(saved)
    assert [group["seed"] for group in other.param_groups] == [0, 5, 5, 5]
    assert_same_entries(other, optimizer)
    assert_same_bits(take_steps(other, range(4, 7)), take_steps(optimizer, range(4, 7)))
    assert_same_entries(other, optimizer)
    with pytest.raises(ValueError, match="Invalid state_dtype: torch.float16"):
        optimizer.add_param_group({"params": new_params([(2,)]), "state_dtype": FP16})
    assert len(optimizer.param_groups) == 4


@pytest.mark.parametrize(("dtype", "source", "target"), PAIRS, ids=str)
def test_settings_that_change_between_steps(dtype, source, target):
    """The next step converts, as a lossy load would."""
    backend = BACKENDS[PAIRS.index((dtype, source, target)) % 2]
    optimizer = trained(dtype, *source, backend=backend)
    loaded = make(clones(parameters(optimizer)), *target, backend=backend)
    loaded.load_state_dict(optimizer.state_dict(), lossy=True)
    group = optimizer.param_groups[0]
    group["master_weights"], group["state_dtype"] = target
    assert_same_bits(masters(optimizer), masters(loaded))
    if not lost_in(source, target):
        assert_same_bits(decoded(optimizer), decoded(loaded))
    for steps in (range(4, 5), range(5, 7)):
        assert_same_bits(take_steps(optimizer, steps), take_steps(loaded, steps))
        assert_same_entries(optimizer, loaded)


@each_backend
@each_mode
def test_a_parameter_that_stands_twice(dtype, master, states, backend):
    """Two steps in one, and a resumed run goes on with the same bits."""

    def doubled(params):
        with pytest.warns(UserWarning, match="duplicate"):
            return make([params[0], params[1], params[0]], master, states, backend=backend)

    def steps(optimizer, numbers):
        for number in numbers:
            set_grads(parameters(optimizer), number)
            optimizer.step()

    optimizer = doubled(new_params([(300,), (5,)], dtype))
    steps(optimizer, range(3))
    assert optimizer.state[parameters(optimizer)[0]]["step"] == 6
    first, second, _ = clones(parameters(optimizer))
    other = doubled([first, second])
    other.load_state_dict(through_file(optimizer.state_dict()))
    steps(other, range(3, 6))
    steps(optimizer, range(3, 6))
    assert_same_entries(other, optimizer)
    assert_same_bits(masters(other), masters(optimizer))
    assert all(param.isfinite().all() for param in parameters(other))
