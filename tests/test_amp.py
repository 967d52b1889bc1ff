"""`fastopt.GradScaler` does what torch's does, and leaves the gradients alone."""

import math
from copy import deepcopy

import pytest
import torch
from helpers import (
    BACKENDS,
    CASES,
    assert_same_bits,
    interpreted,
    masked_out,
    new_params,
    set_grads,
)
from test_triton import NoReads
from torch.testing._internal.two_tensor import TwoTensor

import fastopt
from fastopt.step import dispatch, table

pytestmark = masked_out

#: The host knows the norm, and skips.
CPU = [{"backend": name, "capturable": flag} for name in BACKENDS for flag in (False, True)]
HOST = {"backend": "triton", "capturable": False}
#: The device does.
DEVICE = {"backend": "triton", "capturable": True}


def each(names, *argvalues):
    """Parametrizes with rows of values, the last of which says which backend."""
    rows = [
        pytest.param(*row, marks=interpreted if row[-1]["backend"] == "triton" else [])
        for row in argvalues
    ]
    return pytest.mark.parametrize(names, rows, ids=str)


each_way = each("how", *((how,) for how in (*CPU, HOST, DEVICE)))
each_way_on_host = each("how", *((how,) for how in (*CPU, HOST)))
each_case = pytest.mark.parametrize(("cls", "variant"), CASES, ids=str)
each_scaler = pytest.mark.parametrize(
    "scaler_class", [fastopt.GradScaler, torch.amp.GradScaler], ids=["fastopt", "torch"]
)

FAULTS = [math.inf, None, math.nan, None, None, -math.inf]
SHAPES = [(), (3, 5)]


def parameters(optimizer):
    return [param for group in optimizer.param_groups for param in group["params"]]


def give_grads(optimizer, scaler, step, fault=None):
    """Scaled gradients, one element of which is the fault."""
    params = parameters(optimizer)
    set_grads(params, step)
    for param in params:
        param.grad *= scaler.get_scale()
    if fault is not None:
        params[1].grad.view(-1)[-1] = fault


def new_scaler(scaler_class, **settings):
    settings = {"init_scale": 2.0**4, "growth_interval": 2, **settings}
    scaler = scaler_class("cpu", **settings)
    scaler.scale(torch.zeros(()))
    return scaler


def results(optimizer):
    """Parameters and states; of the steps, those that torch has too."""
    return [
        *(param.detach() for param in parameters(optimizer)),
        *(
            value
            for param in parameters(optimizer)
            for name, value in sorted(optimizer.state.get(param, {}).items())
            if name != "step" or optimizer.rule.counts_steps
        ),
    ]


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
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
        history.append(scaler.state_dict())
        for optimizer in optimizers:
            history += [param.detach().clone() for param in parameters(optimizer)]
            norm = getattr(optimizer, "grad_norm", None)
            # Of a skipped step, whether it is inf or NaN is of no interest.
            history.append(norm if norm is None or norm.isfinite() else "not finite")
    ours = (optimizer for optimizer in optimizers if isinstance(optimizer, fastopt.Optimizer))
    return [*history, *(tensor for optimizer in ours for tensor in results(optimizer))]


def assert_same_history(found, wanted):
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        if isinstance(a, torch.Tensor):
            assert_same_bits([a], [b])
        else:
            assert a == b


def check(cls, how, dtype=torch.float32, unscale=False, **settings):
    """The same as with torch's scaler, whether it leaves unscaling to the step or not."""

    def run(scaler_class, **how):
        optimizer = cls(new_params(SHAPES, dtype), lr=0.01, **settings, **how)
        return train(scaler_class, [optimizer], FAULTS, unscale)

    found = run(fastopt.GradScaler, **how)
    assert_same_history(found, run(torch.amp.GradScaler))
    assert_same_history(found, run(torch.amp.GradScaler, fused=True))
    return found


@pytest.fixture
def no_pass_of_torch(monkeypatch):
    def forbidden(*_):
        raise AssertionError("torch has read all gradients")

    monkeypatch.setattr(torch, "_amp_foreach_non_finite_check_and_unscale_", forbidden)


CLIPPING = {"max_norm": 0.5, "clip_value": 0.02}


@each(
    ("cls", "variant", "flags", "how"),
    *((*case, flags, how) for case in CASES for flags in ({}, CLIPPING) for how in CPU),
    *((*case, CLIPPING, DEVICE) for case in CASES),
    (*CASES[0], CLIPPING, HOST),
)
def test_as_torch(cls, variant, flags, how):
    found = check(cls, how, **variant, **flags)
    scales = [entry["scale"] for entry in found if isinstance(entry, dict)]
    assert scales == [8.0, 8.0, 4.0, 4.0, 8.0, 4.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@each_way
def test_dtypes(how, dtype):
    check(fastopt.SGD, how, dtype, momentum=0.9, max_norm=0.5)


@each_way
def test_after_unscale(how):
    check(fastopt.AdamW, how, unscale=True)


@each_way
def test_torch_makes_no_pass(how, no_pass_of_torch):
    train(fastopt.GradScaler, [fastopt.AdamW(new_params(SHAPES), **how)])


@each(
    ("cls", "variant", "how"),
    *((*case, how) for case in CASES for how in CPU),
    (*CASES[0], HOST),
)
def test_a_skipped_step_changes_nothing(cls, variant, how):
    optimizer = cls(new_params(SHAPES), lr=0.01, **variant, **how)
    params = parameters(optimizer)
    scaler = new_scaler(fastopt.GradScaler)
    for step, fault in enumerate(FAULTS):
        give_grads(optimizer, scaler, step, fault)
        grads = [(param.grad, param.grad.clone(), param.grad._version) for param in params]
        state = {param: dict(values) for param, values in optimizer.state.items()}
        before = [tensor.clone() for tensor in results(optimizer)]
        versions = [param._version for param in params]
        scaler.step(optimizer)
        scaler.update()
        for param, (grad, value, version) in zip(params, grads, strict=True):
            assert param.grad is grad
            assert grad._version == version
            assert_same_bits([grad], [value])
        if fault is not None:
            assert [param._version for param in params] == versions
            assert_same_bits(results(optimizer), before)
            assert optimizer.state.keys() == state.keys()
            for param, values in state.items():
                assert optimizer.state[param].keys() == values.keys()
                assert all(optimizer.state[param][name] is values[name] for name in values)


@interpreted
@each_case
def test_a_step_that_the_device_skips_changes_nothing(cls, variant):
    """But the versions: the host does not know; and new states are made, as they begin."""
    optimizer = cls(new_params(SHAPES), lr=0.01, **variant, **DEVICE)
    scaler = new_scaler(fastopt.GradScaler)
    for step in range(2):
        before = new_params(SHAPES)
        give_grads(optimizer, scaler, step, math.inf)
        grads = [param.grad.clone() for param in parameters(optimizer)]
        scaler.step(optimizer)
        scaler.update()
        assert_same_bits(parameters(optimizer), before)
        assert_same_bits([param.grad for param in parameters(optimizer)], grads)
        for state in optimizer.state.values():
            for name, tensor in state.items():
                start = 0 if name == "step" else cls.rule.initial(optimizer.param_groups[0])
                assert (tensor == start).all()


@each_scaler
@each_way
def test_momentum_begins_with_the_first_step_that_is_made(how, scaler_class):
    """Also where the plan does not outlive the skipped step."""
    (param,) = new_params([(64,)])
    optimizer = fastopt.SGD([param], lr=0.1, momentum=0.9, dampening=0.5, **how)
    scaler = new_scaler(scaler_class)
    for fault in (math.inf, None):
        param.grad = torch.full_like(param, scaler.get_scale() if fault is None else fault)
        optimizer._plan = None
        scaler.step(optimizer)
        scaler.update()
    assert_same_bits([optimizer.state[param]["momentum_buffer"]], [torch.ones(64)])


@each_way_on_host
def test_states_that_were_there_in_part(how):
    """A step that is a number, as in old checkpoints, and a parameter that stands twice."""
    (param,) = new_params([(8,)])
    with pytest.warns(UserWarning, match="duplicate"):
        optimizer = fastopt.Adam([param, param], **how)
    scaler = new_scaler(fastopt.GradScaler)

    def skip():
        param.grad = torch.full_like(param, math.nan)
        scaler.step(optimizer)
        scaler.update()

    skip()
    assert param not in optimizer.state
    state = optimizer.state[param] = {"step": 3}
    skip()
    assert optimizer.state[param] is state
    assert state == {"step": 3}


FAULTS_OF_TWO = [(math.inf, None), (None, math.nan), (None, None), (None, None), (math.inf,) * 2]


@pytest.mark.parametrize("max_norm", [None, 0.5])
@each_way
def test_several_optimizers(how, max_norm):
    """Each skips for itself; the scale is that of all."""

    def run(scaler_class, **how):
        optimizers = [
            cls(new_params(SHAPES), lr=0.01, max_norm=max_norm, **how)
            for cls in (fastopt.AdamW, fastopt.SGD)
        ]
        return train(scaler_class, optimizers, FAULTS_OF_TWO)

    assert_same_history(run(fastopt.GradScaler, **how), run(torch.amp.GradScaler))


@each_way
@pytest.mark.parametrize("fused", [False, True])
def test_beside_an_optimizer_of_torch(how, fused):
    def run(scaler_class, **how):
        ours = fastopt.AdamW(new_params(SHAPES), lr=0.01, **how)
        theirs = torch.optim.SGD(new_params(SHAPES), lr=0.01, fused=fused)
        return train(scaler_class, [ours, theirs], FAULTS_OF_TWO)

    assert_same_history(run(fastopt.GradScaler, **how), run(torch.amp.GradScaler))


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
        optimizer = fastopt.SGD(
            params, lr=0.1, momentum=0.9, dampening=0.5, max_norm=max_norm, backend=backend, **flags
        )
        return train(scaler_class, [optimizer])

    wanted = run(torch.amp.GradScaler, "reference")
    monkeypatch.setattr(dispatch, "backend_for", by_size)
    assert_same_history(run(fastopt.GradScaler, "auto", capturable=capturable), wanted)


@each_way
def test_large_gradients_are_no_overflow(how):
    """Their squares would be, in their own dtype."""

    def run(scaler_class, dtype, **how):
        optimizer = fastopt.SGD(new_params(SHAPES, dtype), lr=1e-30, **how)
        scaler = new_scaler(scaler_class)
        for param in parameters(optimizer):
            param.grad = torch.full_like(param, torch.finfo(dtype).max)
        scaler.step(optimizer)
        scaler.update()
        assert scaler.state_dict()["_growth_tracker"] == 1
        return results(optimizer)

    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        found = run(fastopt.GradScaler, dtype, **how)
        assert_same_bits(found, run(torch.amp.GradScaler, dtype))


@each_way
def test_parameters_without_a_gradient(how):
    optimizer = fastopt.AdamW(new_params(SHAPES), **how)
    scaler = new_scaler(fastopt.GradScaler)
    scaler.step(optimizer)
    with pytest.raises(AssertionError, match="No inf checks were recorded prior to update"):
        scaler.update()
    assert not optimizer.state

    scaler = new_scaler(fastopt.GradScaler)
    for fault in (None, math.nan):
        give_grads(optimizer, scaler, 0, fault)
        parameters(optimizer)[0].grad = None
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 2.0**3
    assert parameters(optimizer)[0] not in optimizer.state


def test_empty_gradients():
    optimizer = fastopt.AdamW(new_params([(0,)]))
    scaler = new_scaler(fastopt.GradScaler)
    for _ in range(2):
        set_grads(parameters(optimizer), 0)
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 2.0**5


def test_strided_gradients():
    def run(scaler_class):
        optimizer = fastopt.AdamW(new_params([(6, 4)]))
        scaler = new_scaler(scaler_class)
        for step, fault in enumerate(FAULTS):
            (param,) = parameters(optimizer)
            param.grad = torch.arange(48.0).view(4, 6, 2).add(step)[..., 0].t()
            if fault is not None:
                param.grad[3, 2] = fault
            scaler.step(optimizer)
            scaler.update()
        return [*results(optimizer), torch.tensor(scaler.get_scale())]

    assert_same_bits(run(fastopt.GradScaler), run(torch.amp.GradScaler))


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
    scaler = new_scaler(fastopt.GradScaler)
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
    scaler = new_scaler(fastopt.GradScaler)
    optimizer = fastopt.SGD(new_params(SHAPES))
    give_grads(optimizer, scaler, 0)
    scaler.step(optimizer)
    scaler.update()
    for scaler_class in (torch.amp.GradScaler, fastopt.GradScaler):
        other = scaler_class("cpu")
        other.load_state_dict(scaler.state_dict())
        assert other.state_dict() == scaler.state_dict()
    assert deepcopy(scaler).state_dict() == scaler.state_dict()


def test_a_step_that_raises_leaves_nothing_behind():
    optimizer = fastopt.AdamW(new_params(SHAPES), lr=1.0, weight_decay=10.0, max_norm=math.inf)
    scaler = new_scaler(fastopt.GradScaler)
    give_grads(optimizer, scaler, 0)
    optimizer.param_groups[0]["lr"] = 1e308  # whose product with the weight decay is infinite
    with pytest.raises(ValueError, match="nothing was changed"):
        scaler.step(optimizer)
    assert not hasattr(optimizer, "grad_scale")
    assert not hasattr(optimizer, "found_inf")
    assert not optimizer._shared.scaled
    assert optimizer._shared.findings is None
    optimizer.param_groups[0]["lr"] = 1.0
    grads = [param.grad for param in parameters(optimizer)]
    scaler.step(optimizer)
    assert optimizer.grad_norm == fastopt.get_total_norm(grads) / scaler.get_scale()


ASKS = [{"fused": True}, {"max_norm": 0.5}, {"max_norm": math.inf, "clip_value": 1.0}]
ASKS_NOT = [{}, {"fused": False}, {"clip_value": 0.02}, {"foreach": True}]


@pytest.mark.parametrize("settings", [*ASKS, *ASKS_NOT], ids=str)
@pytest.mark.parametrize("cls", fastopt.OPTIMIZERS)
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


def test_one_group_asks_for_all():
    optimizer = fastopt.SGD(new_params(SHAPES))
    optimizer.add_param_group({"params": new_params([(2,)]), "max_norm": 1.0})
    assert optimizer._step_supports_amp_scaling
    optimizer.param_groups[1]["max_norm"] = None
    assert not optimizer._step_supports_amp_scaling


def test_gradients_in_fp16():
    """Torch's scaler refuses to unscale them, so the step does."""
    assert fastopt.SGD(new_params(SHAPES, torch.float16))._step_supports_amp_scaling
    with pytest.raises(ValueError, match="Attempting to unscale FP16 gradients"):
        train(torch.amp.GradScaler, [torch.optim.SGD(new_params(SHAPES, torch.float16))])


@pytest.mark.parametrize("settings", [*ASKS, *ASKS_NOT], ids=str)
def test_our_scaler_always_leaves_it_to_the_step(no_pass_of_torch, settings):
    optimizer = fastopt.SGD(new_params(SHAPES), lr=0.01, **settings)
    supports = []
    optimizer.register_step_pre_hook(
        lambda optimizer, *_: supports.append(optimizer._step_supports_amp_scaling)
    )
    train(fastopt.GradScaler, [optimizer])
    assert supports == [True] * len(FAULTS)
    assert optimizer._step_supports_amp_scaling == (settings in ASKS)


@each_way
def test_grad_norm_is_none_without_max_norm(how):
    optimizer = fastopt.AdamW(new_params(SHAPES), **how)
    scaler = new_scaler(fastopt.GradScaler)
    for fault in (None, math.inf):
        give_grads(optimizer, scaler, 0, fault)
        scaler.step(optimizer)
        scaler.update()
        assert optimizer.grad_norm is None


@interpreted
@pytest.mark.parametrize("max_norm", [None, 1.0])
@pytest.mark.parametrize("first", [False, True])
def test_no_value_is_read(monkeypatch, max_norm, first):
    monkeypatch.setattr(table, "is_on_device", torch.is_tensor)  # as on a GPU
    optimizer = fastopt.AdamW(new_params(SHAPES), max_norm=max_norm, **DEVICE)
    scaler = new_scaler(fastopt.GradScaler)
    if not first:
        give_grads(optimizer, scaler, 0)
        scaler.step(optimizer)
        scaler.update()
    give_grads(optimizer, scaler, 1, math.inf)
    with NoReads():
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 2.0**3
