"""A step happens for all parameters or changes nothing, and the good step after it is right."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable

import pytest
import torch
from helpers import BACKENDS, CASES, assert_same_bits, new_params, set_grads
from torch.testing._internal.two_tensor import TwoTensor

import fastopt
from fastopt.step import backends, plan, table
from fastopt.step.params import Param

FIRST = {"momentum": 0.9, "dampening": 0.5}  # the first step differs from the others


def everything(optimizer):
    """Copies of all that a step writes."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    states = {
        param: {key: copy(value) for key, value in state.items()}
        for param, state in optimizer.state.items()
    }
    return [copy(param) for param in params], states


def copy(value):
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def assert_nothing_changed(optimizer, before):
    params, states = everything(optimizer)
    assert_same_bits(params, before[0])
    assert states.keys() == before[1].keys()
    for param, state in states.items():
        assert state.keys() == before[1][param].keys()
        assert_same_bits(state.values(), before[1][param].values())


def sparse(shape):
    return torch.zeros(shape).to_sparse()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cls", fastopt.OPTIMIZERS)
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
            params[0].grad = sparse(5)
            before = everything(optimizer)
            with pytest.raises(RuntimeError, match="only dense tensors"):
                optimizer.step()
            assert_nothing_changed(optimizer, before)
        for _ in range(2):
            params[0].grad = torch.ones(5)
            optimizer.step()
        results.append(everything(optimizer))
    assert_same_bits(results[0][0], results[1][0])
    for state, other in zip(results[0][1].values(), results[1][1].values(), strict=True):
        assert_same_bits(state.values(), other.values())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("step", [5, 5.0])
@pytest.mark.parametrize(("cls", "variant"), CASES)
def test_a_step_that_is_a_number(cls, variant, step, backend):
    """As in old checkpoints; also where the rule counts none."""
    (param,) = new_params([(4,)])
    optimizer = cls([param], backend=backend, **variant)
    for number in range(3):
        set_grads([param], number)
        optimizer.step()
        optimizer.state[param]["step"] = step
    set_grads([param], 4)
    optimizer.step()
    assert optimizer.state[param]["step"] == 6


def test_the_extension_takes_tensors_only():
    (param,) = new_params([(4,)])
    optimizer = fastopt.SGD([param])
    set_grads([param], 0)
    optimizer.step()
    watched = Param.watched

    def no_tensor(self, *args, **kwargs):
        return watched(self, *args, **kwargs)._replace(step=5)

    optimizer.add_param_group({"params": new_params([(4,)])})
    before = everything(optimizer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Param, "watched", no_tensor)
        with pytest.raises(TypeError, match="a tensor is wanted, not 5"):
            optimizer.step()
    assert_nothing_changed(optimizer, before)


def run(code: str) -> None:
    """In a process of its own, because a crash is what may happen."""
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120
    )
    assert found.returncode == 0, (found.returncode, found.stderr[-2000:])


@pytest.mark.parametrize("size", [10, 20_000])
def test_a_backward_pass_beside_steps(size):
    """With create_graph=True, autograd's thread replaces gradients, without the GIL."""
    run(f"""
import threading, time, torch, fastopt
params = [torch.ones({size}, requires_grad=True) for _ in range(50)]
for param in params: param.grad = torch.ones({size})
optimizer = fastopt.SGD(params, lr=1e-9, max_norm=1.0)
done = time.monotonic() + 2
def backward():
    while time.monotonic() < done:
        for param in params[::2]: param.grad = torch.ones({size})
        sum((param * param).sum() for param in params).backward(create_graph=True)
thread = threading.Thread(target=backward)
thread.start()
while time.monotonic() < done:
    optimizer.step()
thread.join()
assert all(param.isfinite().all() for param in params)
""")


def test_two_threads_step_one_optimizer():
    """One after the other, with whatever gradients are there.

    All of these are kept alive: torch 2.13 itself crashes where one thread replaces gradients that
    another one reads.
    """
    run("""
import threading, time, torch, fastopt
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
""")


def test_a_step_after_a_fork_within_another_threads_step():
    """Whose lock nobody would ever open."""
    run("""
import os, threading, torch, fastopt
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
""")


def wrapped(param):
    return torch.nn.Parameter(TwoTensor(param.detach(), param.detach().clone()))


@pytest.mark.parametrize("mixed", [True, False], ids=["with C++", "reference alone"])
@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("fails_at", [0, 1])
@pytest.mark.parametrize("when", [0, 2])
def test_the_reference_makes_no_half_steps(when, fails_at, error, mixed, monkeypatch):
    params = new_params([(5,), (7,), (3,)])
    if mixed:  # the first and the last are for the reference, the second for C++
        params = [wrapped(params[0]), params[1], wrapped(params[2])]
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

    before = everything(optimizer)
    with monkeypatch.context() as patch:
        patch.setattr(backends, "_update", failing)
        with pytest.raises(error):
            one_step()
    params_before = [plain(param) for param in before[0]]
    assert_same_bits([plain(param) for param in params], params_before)
    assert optimizer.state.keys() == before[1].keys()
    one_step()
    expected = (1, 1.4, 1.76)[when] * 0.1  # g, then 0.9 m + 0.5 g
    for param, old in zip(params, params_before, strict=True):
        torch.testing.assert_close(old - plain(param), torch.full_like(old, expected))


def plain(tensor):
    return tensor.a if isinstance(tensor, TwoTensor) else tensor.detach()


def failures() -> list[tuple[object, str]]:
    """Where the first step of an optimizer can be made to fail, after its states were made."""
    return [
        (Param, "watched"),
        (plan, "norm_options"),
        (plan.Plan, "_divide"),
        (plan.Plan, "run"),
        (table.Table, "rows"),
    ]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize(("owner", "name"), failures(), ids=lambda value: str(value)[-30:])
def test_a_first_step_that_fails_is_not_the_first(owner, name, error, monkeypatch):
    (param,) = new_params([(4,)])
    optimizer = fastopt.SGD([param], lr=1.0, **FIRST)
    set_grads([param], 0)
    before = param.detach().clone()

    def fails(*args, **kwargs):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fails)
        with pytest.raises(error):
            optimizer.step()
    assert not optimizer.state
    assert torch.equal(param, before)
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
    with pytest.raises(MemoryError):
        optimizer.add_param_group({"params": [*new_params([(3,)]), params[1]]})
    assert len(optimizer.param_groups) == 1
    assert list(optimizer.state) == params[:1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_fake_tensors_around_a_step(backend):
    """Which stands for no change of real parameters."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    (param,) = new_params([(4,)])
    optimizer = fastopt.AdamW([param], backend=backend)
    set_grads([param], 0)
    optimizer.step()
    before = everything(optimizer)
    with FakeTensorMode(), pytest.raises(RuntimeError, match="is real, and a FakeTensorMode"):
        optimizer.step()
    assert_nothing_changed(optimizer, before)
    optimizer.step()
    assert optimizer.state[param]["step"] == 2


@pytest.mark.parametrize("backend", BACKENDS)
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


def swap(params: list[torch.Tensor]) -> None:
    """As in an evaluation with averaged weights."""
    with torch.no_grad():
        kept = [param.clone() for param in params]
        for param in params:
            param.mul_(0.5)
        for param, old in zip(params, kept, strict=True):
            param.copy_(old)


def load(params: list[torch.Tensor]) -> None:
    model = torch.nn.ParameterList(params)
    model.load_state_dict({key: value.clone() for key, value in model.state_dict().items()})


def relayout(params: list[torch.Tensor]) -> None:
    for param in params:
        if param.dim() == 2:
            param.data = param.data.t().contiguous().t()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("action", [swap, load, relayout])
def test_weights_that_come_back_keep_their_masters(
    action: Callable[[list[torch.Tensor]], None], backend
):
    shapes = [(40, 30), (3,), (700,)]
    results = []
    for acts in (True, False):
        params = new_params(shapes, torch.bfloat16)
        optimizer = fastopt.AdamW(params, backend=backend)
        for step in range(6):
            set_grads(params, step)
            optimizer.step()
            kept = optimizer._plan
            if acts:
                action(params)
        if action is not relayout:
            assert optimizer._plan is kept
        results.append([*optimizer.master_params()])
    assert_same_bits(*results)


@pytest.mark.parametrize("past_the_version", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_written_parameter_costs_its_own_work_only(backend, past_the_version):
    params = new_params([(300,)] * 3, torch.bfloat16)
    optimizer = fastopt.AdamW(params, lr=0.0, weight_decay=0.0, backend=backend)
    before = [master.clone() for master in masters_of_steps(optimizer, params)]
    with torch.no_grad():
        (params[1].data if past_the_version else params[1])[3] = 7.0
    with pytest.MonkeyPatch.context() as patch:
        if backend == "cpp":
            patch.setattr("fastopt.optimizer.Plan", None)  # no new one
        set_grads(params, 9)
        optimizer.step()
    found = list(optimizer.master_params())
    assert_same_bits([found[0], found[2]], [before[0], before[2]])
    assert_same_bits([found[1][256:]], [before[1][256:]])  # another block
    assert_same_bits([found[1][:256]], [params[1][:256].float()])


def masters_of_steps(optimizer, params):
    optimizer.param_groups[0]["lr"] = 0.01
    for step in range(3):
        set_grads(params, step)
        optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.0
    return optimizer.master_params()


def test_a_lock_is_not_saved():
    (param,) = new_params([(3,)])
    optimizer = fastopt.SGD([param])
    assert not any(
        isinstance(v, type(threading.RLock())) for v in optimizer.__getstate__().values()
    )
