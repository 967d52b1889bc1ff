"""What the Triton backend does on the host around its kernels, here in Triton's interpreter."""

import math
import os
import subprocess
import sys
import weakref
from types import SimpleNamespace

import pytest
import torch
from helpers import (
    NoReads,
    assert_same_bits,
    each_case,
    interpreted,
    masked_out,
    new_params,
    parameters,
    set_grads,
    take_steps,
    unchanged,
)
from torch.testing._internal.two_tensor import TwoTensor
from twins import results

import fastopt
from fastopt.step import checks, dispatch, table

pytestmark = [interpreted, *masked_out]

each_capturable = pytest.mark.parametrize("capturable", [False, True])


def assert_same_results(optimizer, other):
    assert_same_bits(results(optimizer), results(other))


@each_capturable
@pytest.mark.parametrize("order", [slice(None), slice(1, None, -1)], ids=["all", "reversed"])
def test_groups_of_several_backends(monkeypatch, capturable, order):
    """They have one norm, and a setting each."""
    backend_for = dispatch.backend_for

    def by_size(tensors, backend, *args):
        kind = {5: "cpp", 6: "reference"}.get(tensors[0].numel(), "triton")
        return backend_for(tensors, kind, *args)

    def updated(backend):
        params = new_params([(5,), (4,), (6,), (9000,)])
        groups = [{"params": [param], "lr": 0.1 / (1 + i)} for i, param in enumerate(params)]
        settings = {"max_norm": 0.5, "capturable": capturable, "backend": backend}
        optimizer = fastopt.AdamW(groups[order], **settings)
        take_steps(optimizer, range(3))
        return results(optimizer)

    wanted = updated("reference")
    monkeypatch.setattr(dispatch, "backend_for", by_size)
    found = updated("auto")
    # The sums of the backends are added in another order than all chunks.
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("first", [False, True])
@each_case
def test_no_value_is_read(cls, variant, first, monkeypatch):
    """Not even by the first step, which makes the plan."""
    if first and cls is fastopt.Adagrad:
        pytest.skip("its states are there from the start, and their steps on the host")
    monkeypatch.setattr(table, "is_on_device", torch.is_tensor)  # as on a GPU
    params = new_params([(5,), (3, 3)])
    settings = {"capturable": True, "max_norm": 1.0, "clip_value": 0.5, "backend": "triton"}
    optimizer = cls(params, **settings, **variant)
    optimizer.grad_scale, optimizer.found_inf = torch.full((1,), 4.0), torch.zeros(1)
    if not first:
        take_steps(optimizer, [0])
    set_grads(params, 1)
    with NoReads():
        optimizer.step()
        fastopt.get_total_norm([p.grad for p in params])
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoReads():
        torch.ones(1).item()


def test_plan_is_kept():
    params = new_params([(5,), (3, 3)])
    optimizer = fastopt.AdamW(params, backend="triton", max_norm=1.0)
    take_steps(optimizer, [0])
    plan = optimizer._plan
    for step in range(3):
        set_grads(params, step)
        params[0].grad = None if step == 1 else params[0].grad
        optimizer.step()
        assert optimizer._plan is plan
    optimizer.state[params[0]]["exp_avg"].data = torch.zeros(5)
    optimizer.step()
    assert optimizer._plan is not plan


def test_steps_move_with_capturable():
    """And a momentum buffer that was made without counting is not taken for a new one."""
    flags = {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}
    optimizer = fastopt.SGD(new_params([(5,)]), **flags, backend="triton")
    other = fastopt.SGD(new_params([(5,)]), **flags, backend="reference")
    for step in range(4):
        optimizer.param_groups[0]["capturable"] = step >= 2
        take_steps(optimizer, [step])
    take_steps(other, range(4))
    assert_same_results(optimizer, other)
    (state,) = optimizer.state.values()
    assert state["step"] == 3  # two, and one for all before


def test_a_deleted_momentum_buffer_starts_anew():
    (param,) = new_params([(3,)])
    flags = {"lr": 1.0, "momentum": 0.9, "dampening": 0.5, "backend": "triton"}
    optimizer = fastopt.SGD([param], **flags, capturable=True)
    for _ in range(2):
        take_steps(optimizer, [0])
        optimizer.state[param].pop("momentum_buffer")
    before = param.detach().clone()
    optimizer.step()
    assert_same_bits([param], [before - param.grad])


@pytest.mark.parametrize("backend", ["triton", "cpp"])
@each_capturable
@pytest.mark.parametrize("lr", [math.nan, math.inf])
def test_non_finite_settings_change_nothing(backend, capturable, lr):
    params = new_params([(3,)])
    set_grads(params, 0)
    optimizer = fastopt.SGD(params, momentum=0.9, capturable=capturable, backend=backend)
    optimizer.param_groups[0]["lr"] = lr
    with pytest.raises(ValueError, match="Invalid learning rate"):
        optimizer.step()
    assert_same_bits(params, new_params([(3,)]))
    assert not optimizer.state


@each_capturable
def test_no_gradient_at_all(capturable):
    """The norm is 0 then, on the device too."""
    params = new_params([(3,), ()])
    optimizer = fastopt.AdamW(params, max_norm=1.0, backend="triton", capturable=capturable)
    take_steps(optimizer, [0])
    optimizer.zero_grad()
    optimizer.step()
    assert optimizer.grad_norm == 0


def test_gradients_are_not_kept():
    """Neither those that a plan is made with, nor those that had to be copied."""
    param = torch.nn.Parameter(torch.zeros(3, 5))
    optimizer = fastopt.SGD([param], max_norm=1.0, backend="triton")
    for _ in range(2):
        param.grad = torch.ones(5, 3).t()
        grad = weakref.ref(param.grad.untyped_storage())
        optimizer.step()
        optimizer.zero_grad()
        assert grad() is None


def test_default_device():
    """What the kernels read is made on the host, whatever torch.set_default_device says."""
    params = new_params([(3,), (4, 4)])
    params[1].grad = torch.ones(4, 4).t()
    params[0].grad = torch.ones(3)
    optimizer = fastopt.AdamW(params, max_norm=1.0, backend="triton")
    with torch.device("meta"):
        optimizer.step()
        fastopt.clip_grad_norm_(params, 1.0)


# What it cannot update


def test_tensor_subclasses_are_refused():
    param = TwoTensor(torch.zeros(3), torch.zeros(3)).requires_grad_()
    param.grad = TwoTensor(torch.ones(3), torch.ones(3))
    with pytest.raises(RuntimeError, match="is a TwoTensor, which backend='triton' cannot update"):
        fastopt.SGD([param], backend="triton").step()


@pytest.mark.parametrize(
    ("device", "warning"),
    [
        ("mps", "mps parameters with its slow reference backend"),
        ("cuda:1", "cuda parameters .* because TRITON_INTERPRET=1 is set"),
    ],
)
def test_other_devices(monkeypatch, device, warning):
    """They are updated by the reference, and that is said once."""
    checks.warn_once.cache_clear()
    monkeypatch.setattr(dispatch, "is_wrapper", lambda tensor: False)
    tensor = SimpleNamespace(device=torch.device(device), is_neg=lambda: False)
    with pytest.warns(UserWarning, match=warning):
        assert dispatch.backend_for([tensor], "auto", "a parameter") == "reference"
    assert dispatch.backend_for([tensor], "auto", "a parameter") == "reference"
    told = f"a parameter is on {device}, which backend='triton' cannot update"
    with pytest.raises(RuntimeError, match=told):
        dispatch.backend_for([tensor], "triton", "a parameter")
    checks.warn_once.cache_clear()


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


WITH_TRITON = "import torch, fastopt; fastopt.SGD([torch.zeros(1)], backend='triton')"


def test_no_triton():
    told = "print(fastopt.backends()['triton'])"
    found = run_python(f"sys.modules['triton'] = None; import fastopt; {told}; {WITH_TRITON}")
    assert "pip install 'triton>=3.6'" in found.stdout
    assert "backend='triton' does not work here: triton 3.6 or later" in found.stderr


def test_cpu_tensors_without_the_interpreter():
    assert "TRITON_INTERPRET=1 is not set" in run_python(WITH_TRITON, TRITON_INTERPRET="0").stderr


def test_kernels_are_imported_on_demand():
    """Not by a step on the CPU, which does not start CUDA either."""
    found = run_python(
        "import torch, fastopt\n"
        "p = torch.nn.Parameter(torch.ones(1)); p.grad = torch.ones(1)\n"
        "fastopt.AdamW([p], max_norm=1.0).step()\n"
        "print('fastopt.kernels' in sys.modules, torch.cuda.is_initialized())"
    )
    assert found.stdout == "False False\n"


# CUDA graphs; their replays are left to test_gpu.py


@pytest.fixture
def capture(monkeypatch):
    """Turns on and off that launches become part of a graph."""

    def switch(on):
        for name, module in list(sys.modules.items()):
            if name.startswith("fastopt") and hasattr(module, "capturing"):
                monkeypatch.setattr(module, "capturing", lambda device: on)

    return switch


def test_captured_steps_have_tables_of_their_own(capture):
    def step(optimizer, number):
        first, second = parameters(optimizer)
        first.grad = None
        set_grads([second] if number == 1 else [first, second], number)  # 1: another pattern
        optimizer.step()

    shapes = [(3,), (5,)]
    optimizer = fastopt.AdamW(new_params(shapes), max_norm=1.0, capturable=True, backend="triton")
    step(optimizer, 0)
    tensors = optimizer._plan._devices[0].tensors
    before = tensors.words_there, tensors.words_there.clone()
    capture(True)
    step(optimizer, 1)
    assert tensors.words_there is before[0]
    assert torch.equal(*before)
    kept = [item for item in optimizer._captured if isinstance(item, tuple)]
    assert any(item[0] is tensors and item[1] is not before[0] for item in kept)
    capture(False)
    step(optimizer, 2)
    other = fastopt.AdamW(new_params(shapes), max_norm=1.0, backend="reference")
    for number in range(3):
        step(other, number)
    assert_same_results(optimizer, other)


def test_a_plan_made_in_a_capture_is_not_kept(capture):
    """Its tables are there only after a replay."""
    optimizer = fastopt.SGD(new_params([(3,)]), capturable=True, backend="triton")
    capture(True)
    take_steps(optimizer, [0])
    assert optimizer._plan is None
    assert optimizer._captured


@pytest.mark.parametrize(
    ("cls", "flags", "message"),
    [
        (fastopt.SGD, {"backend": "triton"}, "needs capturable=True"),
        (fastopt.AdamW, {"backend": "triton", "capturable": True}, "make one step before"),
        (fastopt.SGD, {"backend": "reference"}, "reference backend cannot become part of a CUDA"),
    ],
)
def test_what_cannot_be_captured(capture, cls, flags, message):
    params = new_params([(3,)])
    set_grads(params, 0)
    optimizer = cls(params, **flags)
    capture(True)
    with unchanged(optimizer), pytest.raises(RuntimeError, match=message):
        optimizer.step()
