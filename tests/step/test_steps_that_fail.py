"""A step happens for all parameters or changes nothing, and the good step after it is right."""

import threading

import pytest
import torch
from helpers import (
    BF16,
    assert_same_bits,
    each_backend,
    each_optimizer,
    new_params,
    set_grads,
    take_steps,
    unchanged,
)
from rules.runs import finish
from test_runtime import run_python
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

import fastopt
from fastopt.step import backends, plan, table
from fastopt.step.params import Param

FIRST = {"momentum": 0.9, "dampening": 0.5}  # the first step differs from the others


@each_backend
@each_optimizer
@pytest.mark.parametrize("change", ["vanishes", "appears"])
def test_another_pattern_of_gradients_in_a_step_that_raises(change, cls, backend):
    """The schedule belongs to the gradients that there are."""
    results = []
    for raises in (True, False):
        params = new_params([(5,), (7,), (3,)])
        optimizer = cls(params, backend=backend)
        for step in range(2):
            set_grads(params, step)
            if change == "appears":
                params[1].grad = None
            optimizer.step()
        params[1].grad = None if change == "vanishes" else torch.ones(7)
        if raises:
            params[0].grad = torch.zeros(5).to_sparse()
            with unchanged(optimizer), pytest.raises(RuntimeError, match="only dense tensors"):
                optimizer.step()
        for _ in range(2):
            params[0].grad = torch.ones(5)
            optimizer.step()
        results.append(finish(optimizer))
    assert_same_bits(*results)


def test_the_extension_takes_tensors_only(monkeypatch):
    optimizer = fastopt.SGD(new_params([(4,)]))
    take_steps(optimizer, [0])
    optimizer.add_param_group({"params": new_params([(4,)])})
    watched = Param.watched
    with monkeypatch.context() as patch, unchanged(optimizer):
        patch.setattr(Param, "watched", lambda *a, **kw: watched(*a, **kw)._replace(step=5))
        with pytest.raises(TypeError, match="a tensor is wanted, not 5"):
            optimizer.step()


#: Programs that might crash or hang.
PROGRAMS = {
    # With create_graph=True, autograd's thread replaces gradients without the GIL.
    "a backward pass beside steps": """
for size in (10, 20_000):
    params = [torch.ones(size, requires_grad=True) for _ in range(50)]
    for param in params: param.grad = torch.ones(size)
    optimizer = fastopt.SGD(params, lr=1e-9, max_norm=1.0)
    done = time.monotonic() + 2
    def backward():
        while time.monotonic() < done:
            for param in params[::2]: param.grad = torch.ones(size)
            sum((param * param).sum() for param in params).backward(create_graph=True)
    thread = threading.Thread(target=backward)
    thread.start()
    while time.monotonic() < done:
        optimizer.step()
    thread.join()
    assert all(param.isfinite().all() for param in params)
""",
    # One steps after the other, with whatever gradients are there. All of these are kept alive:
    # torch 2.13 itself crashes where one thread replaces gradients that another one reads.
    "two threads step one optimizer": """
params = [torch.zeros(3000, requires_grad=True) for _ in range(20)]
for param in params[2:]: param.grad = torch.ones(3000)
kept = [torch.zeros(3000) for _ in range(2)]
optimizer = fastopt.SGD(params, lr=1.0)
done = time.monotonic() + 2
made = [0, 0]
def steps(thread):
    while time.monotonic() < done:
        params[thread].grad = None if made[thread] % 2 else kept[thread]
        optimizer.step()
        made[thread] += 1
threads = [threading.Thread(target=steps, args=[i]) for i in range(2)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert all((param == -sum(made)).all() for param in params[2:]), made
assert not params[0].any() and not params[1].any()
""",
    # Whose lock nobody would ever open.
    "a step after a fork within another thread's step": """
param = torch.zeros(3, requires_grad=True); param.grad = torch.ones(3)
optimizer = fastopt.SGD([param], lr=1.0)
inside, go = threading.Event(), threading.Event()
def step():
    with optimizer._lock:
        inside.set(); go.wait()
thread = threading.Thread(target=step); thread.start(); inside.wait()
child = os.fork()
if not child:
    optimizer.step()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
go.set(); thread.join()
""",
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_threads(name):
    run_python(PROGRAMS[name], "import os, threading, time, torch, fastopt")


def plain(tensors):
    return [t.a if isinstance(t, TwoTensor) else t.detach() for t in tensors]


@pytest.mark.parametrize("mixed", [True, False], ids=["with C++", "reference alone"])
@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("fails_at", [0, 1])
@pytest.mark.parametrize("when", [0, 2])
def test_the_reference_makes_no_half_steps(when, fails_at, error, mixed, monkeypatch):
    params = new_params([(5,), (7,), (3,)])
    if mixed:  # the first and the last are for the reference, the second for C++
        for k in (0, 2):
            param = params[k].detach()
            params[k] = torch.nn.Parameter(TwoTensor(param, param.clone()))
    optimizer = fastopt.SGD(params, lr=0.1, backend="auto" if mixed else "reference", **FIRST)

    def one_step():
        for param in params:
            param.grad = torch.ones_like(param.detach())
        optimizer.step()

    for _ in range(when):
        one_step()
    update, calls = backends._update, []

    def failing(*args):
        update(*args)
        calls.append(1)
        if len(calls) > fails_at:
            raise error

    states = {*optimizer.state}
    before = [param.clone() for param in plain(params)]
    with monkeypatch.context() as patch:
        patch.setattr(backends, "_update", failing)
        with pytest.raises(error):
            one_step()
    assert_same_bits(plain(params), before)
    assert {*optimizer.state} == states
    one_step()
    expected = (1, 1.4, 1.76)[when] * 0.1  # g, then 0.9 m + 0.5 g
    for param, old in zip(plain(params), before, strict=True):
        torch.testing.assert_close(old - param, torch.full_like(param, expected))


#: Where the first step of an optimizer can be made to fail, after its states were made.
FAILURES = [(Param, "watched"), (plan, "norm_options"), (table.Table, "rows")]
FAILURES += [(plan.Plan, "_divide"), (plan.Plan, "run")]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize(("owner", "name"), FAILURES, ids=lambda value: str(value)[-30:])
def test_a_first_step_that_fails_is_not_the_first(owner, name, error, monkeypatch):
    (param,) = new_params([(4,)])
    optimizer = fastopt.SGD([param], lr=1.0, **FIRST)
    before = param.detach().clone()

    def fails(*args, **kwargs):
        raise error

    with monkeypatch.context() as patch, unchanged(optimizer):
        patch.setattr(owner, name, fails)
        with pytest.raises(error):
            take_steps(optimizer, [0])
    assert not optimizer.state
    optimizer.step()
    assert_same_bits([param], [before - param.grad])


def test_adagrads_group_that_is_not_added(monkeypatch):
    """Its states exist from the start, or not at all."""
    params = new_params([(4,), (5,)])
    optimizer = fastopt.Adagrad(params[:1])
    full, calls = torch.full, []

    def fails(*args, **kwargs):
        calls.append(1)
        if len(calls) > 1:
            raise MemoryError
        return full(*args, **kwargs)

    monkeypatch.setattr(torch, "full", fails)
    with unchanged(optimizer), pytest.raises(MemoryError):
        optimizer.add_param_group({"params": [*new_params([(3,)]), params[1]]})
    assert list(optimizer.state) == params[:1]


@each_backend
def test_fake_tensors_around_a_step(backend):
    """They stand for no change of real parameters."""
    optimizer = fastopt.AdamW(new_params([(4,)]), backend=backend)
    (param,) = take_steps(optimizer, [0])
    refused = pytest.raises(RuntimeError, match="is real, and a FakeTensorMode")
    with unchanged(optimizer), FakeTensorMode(), refused:
        optimizer.step()
    optimizer.step()
    assert optimizer.state[param]["step"] == 2


@each_backend
def test_a_parameter_with_a_gradient_of_its_own(backend):
    class Own(torch.nn.Parameter):
        @property
        def grad(self):
            return torch.full((4,), 2.0)

    param = Own(torch.zeros(4))
    optimizer = fastopt.SGD([param], lr=1.0, backend=backend)
    for step in range(1, 4):
        optimizer.step()
        assert param.tolist() == [-2.0 * step] * 4


@torch.no_grad()
def swap(params):
    """As in an evaluation with averaged weights."""
    kept = [param.clone() for param in params]
    torch._foreach_mul_(params, 0.5)
    torch._foreach_copy_(params, kept)


def load(params):
    model = torch.nn.ParameterList(params)
    model.load_state_dict({key: value.clone() for key, value in model.state_dict().items()})


def relayout(params):
    params[0].data = params[0].data.t().contiguous().t()


@each_backend
@pytest.mark.parametrize("action", [swap, load, relayout])
def test_weights_that_come_back_keep_their_masters(action, backend):
    results = []
    for acts in (True, False):
        optimizer = fastopt.AdamW(new_params([(40, 30), (3,), (700,)], BF16), backend=backend)
        for step in range(6):
            params = take_steps(optimizer, [step])
            kept = optimizer._plan
            if acts:
                action(params)
        if action is not relayout:
            assert optimizer._plan is kept
        results.append(optimizer.master_params())
    assert_same_bits(*results)


@pytest.mark.parametrize("past_the_version", [True, False])
@each_backend
def test_a_written_parameter_costs_its_own_work_only(backend, past_the_version, monkeypatch):
    optimizer = fastopt.AdamW(new_params([(300,)] * 3, BF16), weight_decay=0.0, backend=backend)
    params = take_steps(optimizer, range(3))
    before = [master.clone() for master in optimizer.master_params()]
    optimizer.param_groups[0]["lr"] = 0.0
    with torch.no_grad():
        (params[1].data if past_the_version else params[1])[3] = 7.0
    if backend == "cpp":
        monkeypatch.setattr("fastopt.optimizer.Plan", None)  # no new one
    take_steps(optimizer, [9])
    found = list(optimizer.master_params())
    block, rest = slice(256), slice(256, None)
    assert_same_bits([found[0], found[2], found[1][rest]], [before[0], before[2], before[1][rest]])
    assert_same_bits([found[1][block]], [params[1][block].float()])


def test_a_lock_is_not_saved():
    saved = fastopt.SGD(new_params([(3,)])).__getstate__()
    assert not any(isinstance(value, type(threading.RLock())) for value in saved.values())
