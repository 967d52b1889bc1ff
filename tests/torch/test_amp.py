"""`fastopt.GradScaler` does what torch's does, and leaves the gradients alone."""

import contextlib
import math
from copy import deepcopy

import pytest
import torch
from helpers import (
    BACKENDS,
    BF16,
    CASES,
    DTYPES,
    FP16,
    FP32,
    FP64,
    NoReads,
    assert_same_bits,
    each_optimizer,
    entries,
    interpreted,
    masked_out,
    new_params,
    parameters,
    set_grads,
    unchanged,
)
from torch.testing._internal.two_tensor import TwoTensor

import fastopt
from fastopt.step import dispatch, table

pytestmark = masked_out
#: The host knows the norm, and skips.
CPU = [{"backend": name, "capturable": flag} for name in BACKENDS for flag in (False, True)]
HOST = {"backend": "triton", "capturable": False}
#: The device does.
DEVICE = {"backend": "triton", "capturable": True}
EVERY_WAY = [*CPU, HOST, DEVICE]
FAULTS = [math.inf, None, math.nan, None, None, -math.inf]
FAULTS_OF_TWO = [(math.inf, None), (None, math.nan), (None, None), (None, None), (math.inf,) * 2]
SHAPES = [(), (3, 5)]
CLIPPING = {"max_norm": 0.5, "clip_value": 0.02}


def each(names, *argvalues):
    """Parametrizes with rows of values, the last of which says which backend."""
    rows = [
        pytest.param(*row, marks=interpreted if row[-1]["backend"] == "triton" else [])
        for row in argvalues
    ]
    return pytest.mark.parametrize(names, rows, ids=str)


each_way = each("how", *((how,) for how in EVERY_WAY))
each_scaler = pytest.mark.parametrize(
    "scaler_class", [fastopt.GradScaler, torch.amp.GradScaler], ids=["fastopt", "torch"]
)


def new_scaler(scaler_class=fastopt.GradScaler):
    scaler = scaler_class("cpu", init_scale=2.0**4, growth_interval=2)
    scaler.scale(torch.zeros(()))
    return scaler


def give_grads(optimizer, scaler, step, fault=None):
    """Scaled gradients, one element of which is the fault; some steps' have gaps."""
    params = parameters(optimizer)
    set_grads(params, step)
    for param in params:
        param.grad *= scaler.get_scale()
        if step // 2 % 2:
            param.grad = torch.stack([param.grad] * 2, -1)[..., 0]
    if fault is not None:
        params[1].grad[(-1,) * params[1].ndim] = fault


def scaled_step(optimizer, scaler, step=0, fault=None):
    give_grads(optimizer, scaler, step, fault)
    scaler.step(optimizer)
    scaler.update()


def train(scaler_class, optimizers, faults=FAULTS, unscale=False):
    """Iterations of several optimizers; a list of faults for each of them.

    Returns:
        after each iteration the scaler's state, parameters and norms; in the end all states.
    """
    scaler = new_scaler(scaler_class)
    history = []
    for step, faults_now in enumerate(faults):
        if not isinstance(faults_now, tuple):
            faults_now = (faults_now,)
        for optimizer, fault in zip(optimizers, faults_now, strict=True):
            give_grads(optimizer, scaler, step, fault)
            if unscale:
                scaler.unscale_(optimizer)
        for optimizer, fault in zip(optimizers, faults_now, strict=True):
            if not isinstance(optimizer, fastopt.Optimizer):
                scaler.step(optimizer)
                continue
            params = parameters(optimizer)
            grads = [param.grad for param in params]
            before = [(grad._version, grad.clone()) for grad in grads]
            # Where the device skips, versions change: the host does not know.
            how = {"backend": optimizer.backend, "capturable": optimizer.defaults["capturable"]}
            skips = fault is not None and how != DEVICE
            with unchanged(optimizer) if skips else contextlib.nullcontext():
                scaler.step(optimizer)
            if isinstance(scaler, fastopt.GradScaler):
                for param, grad, (version, value) in zip(params, grads, before, strict=True):
                    assert param.grad is grad
                    assert grad._version == version
                    assert_same_bits([grad], [value])
        scaler.update()
        history.append(scaler.state_dict())
        for optimizer in optimizers:
            history += [param.detach().clone() for param in parameters(optimizer)]
            norm = getattr(optimizer, "grad_norm", None)
            assert (norm is None) == (optimizer.defaults.get("max_norm") is None)
            # Of a skipped step, whether it is inf or NaN is of no interest.
            history.append(norm if norm is None or norm.isfinite() else math.nan)
    for optimizer in optimizers:
        # Where a rule needs no steps, they are counted for some of our ways only.
        counts = not isinstance(optimizer, fastopt.Optimizer) or optimizer.rule.counts_steps
        history += [value for _, name, value in entries(optimizer) if counts or name != "step"]
    return history


@each(
    ("cls", "settings", "dtype", "unscale", "how"),
    *(
        (cls, {**variant, **flags}, FP32, False, how)
        for cls, variant in CASES
        for flags in ({}, CLIPPING)
        for how in CPU
    ),
    *((cls, {**variant, **CLIPPING}, FP32, False, DEVICE) for cls, variant in CASES),
    (fastopt.SGD, CLIPPING, FP32, False, HOST),
    *((fastopt.AdamW, {}, FP32, True, how) for how in EVERY_WAY),
    *(
        (fastopt.SGD, {"momentum": 0.9, "max_norm": 0.5}, dtype, False, how)
        for dtype in (BF16, FP16, FP64)
        for how in EVERY_WAY
    ),
)
def test_as_torch(cls, settings, dtype, unscale, how):
    """Whether torch's scaler leaves unscaling to the step or not."""

    def run(scaler_class, **how):
        optimizer = cls(new_params(SHAPES, dtype), lr=0.01, **settings, **how)
        return train(scaler_class, [optimizer], FAULTS, unscale)

    found = run(fastopt.GradScaler, **how)
    assert_same_bits(found, run(torch.amp.GradScaler))
    assert_same_bits(found, run(torch.amp.GradScaler, fused=True))
    scales = [entry["scale"] for entry in found if isinstance(entry, dict)]
    assert scales == [8.0, 8.0, 4.0, 4.0, 8.0, 4.0]


@each_scaler
@each_way
def test_momentum_begins_with_the_first_step_that_is_made(how, scaler_class):
    """Also where the plan does not outlive the skipped step: the gradient has another layout."""
    (param,) = new_params([(64,)])
    optimizer = fastopt.SGD([param], lr=0.1, momentum=0.9, dampening=0.5, **how)
    scaler = new_scaler(scaler_class)
    for columns, value in ((1, math.inf), (2, scaler.get_scale() / 2)):
        param.grad = torch.full((64, columns), value)[:, 0]
        scaler.step(optimizer)
        scaler.update()
    assert_same_bits([optimizer.state[param]["momentum_buffer"]], [torch.ones(64)])


@each("how", *((how,) for how in (*CPU, HOST)))
def test_states_that_were_there_in_part(how):
    """A step that is a number, as in old checkpoints, and a parameter that stands twice."""
    (param,) = new_params([(8,)])
    with pytest.warns(UserWarning, match="duplicate"):
        optimizer = fastopt.Adam([param, param], **how)
    scaler = new_scaler()
    scaled_step(optimizer, scaler, fault=math.nan)
    assert param not in optimizer.state
    state = optimizer.state[param] = {"step": 3}
    scaled_step(optimizer, scaler, fault=math.nan)
    assert optimizer.state[param] is state
    assert state == {"step": 3}


@pytest.mark.parametrize(
    ("other", "flags"),
    [
        (fastopt.SGD, {}),
        (fastopt.SGD, {"max_norm": 0.5}),
        (torch.optim.SGD, {"fused": False}),
        (torch.optim.SGD, {"fused": True}),
    ],
    ids=str,
)
@each_way
def test_two_optimizers(how, other, flags):
    """Each skips for itself; the scale is that of both."""

    def run(scaler_class, **how):
        clipping = {"max_norm": flags.get("max_norm")}
        first = fastopt.AdamW(new_params(SHAPES), lr=0.01, **clipping, **how)
        ours = how if other is fastopt.SGD else {}
        second = other(new_params(SHAPES), lr=0.01, **flags, **ours)
        return train(scaler_class, [first, second], FAULTS_OF_TWO)

    assert_same_bits(run(fastopt.GradScaler, **how), run(torch.amp.GradScaler))


@interpreted
@pytest.mark.parametrize("faulty", range(3))
@pytest.mark.parametrize(("capturable", "max_norm"), [(False, None), (True, 0.5)])
def test_several_backends_in_one_optimizer(monkeypatch, capturable, max_norm, faulty):
    """As where some parameters are on a GPU and some on the CPU: they skip together."""
    backend_for = dispatch.backend_for

    def by_size(tensors, backend, *args):
        kind = {5: "cpp", 6: "reference"}.get(tensors[0].numel(), "triton")
        return backend_for(tensors, kind, *args)

    def run(scaler_class, backend, **flags):
        params = new_params([(5,), (6,), (9000,)])
        params.insert(1, params.pop(faulty))  # where the fault will be
        settings = {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "max_norm": max_norm, **flags}
        return train(scaler_class, [fastopt.SGD(params, backend=backend, **settings)])

    wanted = run(torch.amp.GradScaler, "reference")
    monkeypatch.setattr(dispatch, "backend_for", by_size)
    assert_same_bits(run(fastopt.GradScaler, "auto", capturable=capturable), wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_way
def test_large_gradients_are_no_overflow(how, dtype):
    """Their squares would be, in their own dtype."""

    def run(scaler_class, **how):
        optimizer = fastopt.SGD(new_params(SHAPES, dtype), lr=1e-30, **how)
        scaler = new_scaler(scaler_class)
        for param in parameters(optimizer):
            param.grad = torch.full_like(param, torch.finfo(dtype).max)
        scaler.step(optimizer)
        scaler.update()
        assert scaler.state_dict()["_growth_tracker"] == 1
        return parameters(optimizer)

    assert_same_bits(run(fastopt.GradScaler, **how), run(torch.amp.GradScaler))


@each_way
def test_no_gradients_and_empty_ones(how):
    optimizer = fastopt.AdamW(new_params(SHAPES), **how)
    scaler = new_scaler()
    scaler.step(optimizer)
    with pytest.raises(AssertionError, match="No inf checks were recorded prior to update"):
        scaler.update()
    assert not optimizer.state
    scaler = new_scaler()
    first = parameters(optimizer)[0]
    for fault in (None, math.nan):
        give_grads(optimizer, scaler, 0, fault)
        first.grad = None
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 2.0**3
    assert first not in optimizer.state
    scaler, empty = new_scaler(), fastopt.AdamW(new_params([(0,)]), **how)
    for step in range(2):
        scaled_step(empty, scaler, step)
    assert scaler.get_scale() == 2.0**5


def test_tensors_that_may_hold_a_part(monkeypatch):
    """Torch knows how to look into them."""
    seen = []
    check_inf = torch.amp.GradScaler._check_inf_per_device
    monkeypatch.setattr(
        torch.amp.GradScaler,
        "_check_inf_per_device",
        lambda *args: seen.append(check_inf(*args)) or seen[-1],
    )
    param = torch.nn.Parameter(TwoTensor(torch.ones(3), torch.ones(3)))
    param.grad = TwoTensor(torch.ones(3), torch.ones(3))
    scaler = new_scaler()
    scaler.step(fastopt.SGD([param], lr=16.0))
    scaler.update()
    assert len(seen) == 1
    assert_same_bits([param.a.detach()], [torch.zeros(3)])


@each_scaler
def test_closure(scaler_class):
    """As in torch: refused by name; one that is given by position is called."""
    optimizer = fastopt.SGD(new_params(SHAPES))
    scaler = new_scaler(scaler_class)
    give_grads(optimizer, scaler, 0)
    with pytest.raises(RuntimeError, match="Closure use is not currently supported"):
        scaler.step(optimizer, closure=lambda: 5)
    assert scaler.step(optimizer, lambda: 5) == 5
    with pytest.raises(RuntimeError, match="step\\(\\) has already been called"):
        scaler.step(optimizer)


def test_disabled():
    optimizer = fastopt.SGD(new_params(SHAPES), lr=1.0, max_norm=math.inf)
    optimizer.grad_scale = torch.tensor(2.0)
    scaler = fastopt.GradScaler("cpu", enabled=False)
    set_grads(parameters(optimizer), 0)
    norm = fastopt.get_total_norm([param.grad for param in parameters(optimizer)])
    scaler.step(optimizer)
    scaler.update()
    assert optimizer.grad_norm == norm / 2
    assert scaler.state_dict() == {}


def test_state_dict():
    """Goes from and to torch's."""
    scaler = new_scaler()
    scaled_step(fastopt.SGD(new_params(SHAPES)), scaler)
    for scaler_class in (torch.amp.GradScaler, fastopt.GradScaler):
        other = scaler_class("cpu")
        other.load_state_dict(scaler.state_dict())
        assert other.state_dict() == scaler.state_dict()
    assert deepcopy(scaler).state_dict() == scaler.state_dict()


def test_a_step_that_raises_leaves_nothing_behind():
    optimizer = fastopt.AdamW(new_params(SHAPES), lr=1.0, weight_decay=10.0, max_norm=math.inf)
    scaler = new_scaler()
    give_grads(optimizer, scaler, 0)
    optimizer.param_groups[0]["lr"] = 1e308  # whose product with the weight decay is infinite
    with pytest.raises(ValueError, match="nothing was changed"):
        scaler.step(optimizer)
    assert not hasattr(optimizer, "grad_scale")
    assert not hasattr(optimizer, "found_inf")
    optimizer.param_groups[0]["lr"] = 1.0
    norm = fastopt.get_total_norm([param.grad for param in parameters(optimizer)])
    scaler.step(optimizer)
    assert optimizer.grad_norm == norm / scaler.get_scale()
    # Without the scaler nothing is unscaled, and nothing skipped.
    optimizer.step()
    assert optimizer.grad_norm == norm
    parameters(optimizer)[0].grad.fill_(math.inf)
    optimizer.step()
    assert not parameters(optimizer)[0].isfinite()


def test_a_scale_that_has_become_0():
    """torch's scaler halves it at each overflow, for ever."""
    optimizer = fastopt.AdamW(new_params(SHAPES), max_norm=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1e-45)
    for _ in range(3):
        loss = sum(param.sum() for param in parameters(optimizer)) * math.inf
        scaler.scale(loss).backward()
        with unchanged(optimizer):
            scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 0


ASKS = [{"fused": True}, {"max_norm": 0.5}, {"max_norm": math.inf, "clip_value": 1.0}]
ASKS_NOT = [{}, {"fused": False}, {"clip_value": 0.02}, {"foreach": True}]
each_asking = pytest.mark.parametrize("settings", [*ASKS, *ASKS_NOT], ids=str)


@each_asking
@each_optimizer
def test_scaling_is_the_steps_business_where_asked_for(cls, settings):
    """Else torch's scaler does it, as frameworks expect: Lightning clips before the step, and
    Accelerate wants to know that there was none."""
    optimizer = cls(new_params(SHAPES), lr=0.01, **settings)
    asks = settings in ASKS
    made = []
    optimizer.register_step_pre_hook(lambda *_: made.append(True))
    scaler = new_scaler(torch.amp.GradScaler)
    for step, fault in enumerate(FAULTS):
        assert optimizer._step_supports_amp_scaling == asks
        give_grads(optimizer, scaler, step, fault)
        params = parameters(optimizer)
        scaled, scale = [param.grad.clone() for param in params], scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        wanted = scaled if asks else [grad / scale for grad in scaled]
        assert_same_bits([param.grad for param in params], wanted)
    assert len(made) == (len(FAULTS) if asks else FAULTS.count(None))


def test_who_else_asks():
    optimizer = fastopt.SGD(new_params(SHAPES))
    optimizer.add_param_group({"params": new_params([(2,)]), "max_norm": 1.0})
    assert optimizer._step_supports_amp_scaling  # one group asks for all
    optimizer.param_groups[1]["max_norm"] = None
    assert not optimizer._step_supports_amp_scaling
    # Torch's scaler refuses to unscale gradients in fp16, so the step does.
    assert fastopt.SGD(new_params(SHAPES, FP16))._step_supports_amp_scaling
    with pytest.raises(ValueError, match="Attempting to unscale FP16 gradients"):
        train(torch.amp.GradScaler, [torch.optim.SGD(new_params(SHAPES, FP16))])


@each(
    ("settings", "how"),
    *(({}, how) for how in EVERY_WAY),
    *((settings, CPU[0]) for settings in (*ASKS, *ASKS_NOT)),
)
def test_our_scaler_always_leaves_it_to_the_step(monkeypatch, settings, how):
    def forbidden(*_):
        raise AssertionError("torch has read all gradients")

    monkeypatch.setattr(torch, "_amp_foreach_non_finite_check_and_unscale_", forbidden)
    optimizer = fastopt.SGD(new_params(SHAPES), lr=0.01, **settings, **how)
    supports = []
    optimizer.register_step_pre_hook(
        lambda optimizer, *_: supports.append(optimizer._step_supports_amp_scaling)
    )
    train(fastopt.GradScaler, [optimizer])
    assert supports == [True] * len(FAULTS)
    assert optimizer._step_supports_amp_scaling == (settings in ASKS)


@interpreted
@pytest.mark.parametrize("max_norm", [None, 1.0])
@pytest.mark.parametrize("first", [False, True])
def test_no_value_is_read(monkeypatch, max_norm, first):
    monkeypatch.setattr(table, "is_on_device", torch.is_tensor)  # as on a GPU
    optimizer = fastopt.AdamW(new_params(SHAPES), max_norm=max_norm, **DEVICE)
    scaler = new_scaler()
    if not first:
        scaled_step(optimizer, scaler)
    give_grads(optimizer, scaler, 1, math.inf)
    with NoReads():
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 2.0**3
