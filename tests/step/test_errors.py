"""What cannot be done is said in one sentence, and nothing has changed."""

import functools
import math
from types import SimpleNamespace

import pytest
import torch
from helpers import (
    BF16,
    FP32,
    assert_same_bits,
    each_backend,
    each_optimizer,
    new_params,
    parameters,
    set_grads,
    take_steps,
    unchanged,
)
from torch.testing._internal.two_tensor import TwoTensor

import fastopt
from fastopt import optimizer as module
from fastopt.step import backends, dispatch


def assert_refused(optimizer, bad, message, forget=False):
    """Each step is, until one parameter has no gradient, or no state; the others go on then."""
    others = [param for param in parameters(optimizer) if param is not bad]
    known = {*optimizer.state}
    with unchanged(SimpleNamespace(param_groups=[{"params": others}], state=optimizer.state)):
        for _ in range(2):
            with pytest.raises(RuntimeError, match=message) as raised:
                optimizer.step()
            assert "\n" not in str(raised.value)
    assert {*optimizer.state} == known
    if forget:
        del optimizer.state[bad]
    else:
        bad.grad = None
    before = [param.detach().clone() for param in others]
    optimizer.step()
    assert not any(map(torch.equal, others, before))


def param_with(grad, data=None):
    data = torch.ones(grad.shape, dtype=grad.dtype, device=grad.device) if data is None else data
    is_real = grad.dtype.is_floating_point
    param = torch.nn.Parameter(torch.zeros_like(grad.to_dense()), requires_grad=is_real)
    param.grad = grad
    param.data = data
    return param


class WithGradElsewhere(torch.nn.Parameter):
    grad = torch.ones(2, device="meta")


def of_an_inference():
    with torch.inference_mode():
        param, grad = torch.ones(3), torch.ones(3)
    param.grad = grad
    return param


ONES = torch.ones(2)
#: A gradient and, where they do not go together, the data.
BAD_TENSORS = [
    (ONES.to_sparse(), None, "the gradient of {} is torch.sparse_coo, .* dense tensors .*: use "),
    (ONES * 1j, None, "{} is complex, .*view_as_real"),
    (ONES.int(), None, "{} is torch.int32, which is not supported: convert"),
    (ONES.to(torch.float8_e4m3fn), None, "{} is torch.float8_e4m3fn, which is .*: convert"),
    (ONES.to("meta"), None, "{} is on the meta device .* materialize"),
    (ONES, ONES.double(), "{} is torch.float64 and its gradient torch.float32: set it to None"),
    (ONES, torch.ones(3), r"{} has a gradient of shape \(2,\): set it to None"),
    (torch.ones(4, 3), torch.ones(1, 3).expand(4, 3), "{} has several elements in one place"),
    (torch.ones(4, 4), torch.ones(10).as_strided((4, 4), (2, 1)), "{} has several elements in one"),
]
BAD_PARAMETERS = [(functools.partial(param_with, *bad), message) for *bad, message in BAD_TENSORS]
BAD_PARAMETERS += [
    (of_an_inference, "{} was made in inference mode .* clone it"),
    (lambda: WithGradElsewhere(torch.ones(2)), "{} is on cpu and its gradient on meta: move"),
]


@pytest.mark.parametrize(("make", "message"), BAD_PARAMETERS)
@each_backend
@each_optimizer
def test_bad_parameters(cls, backend, make, message):
    bad, good = make(), new_params([(3,)] * 3)
    set_grads(good, 0)
    optimizer = cls([{"params": good[:1]}, {"params": [good[1], bad, good[2]]}], backend=backend)
    shape = str(tuple(bad.shape)).replace("(", r"\(").replace(")", r"\)")
    place = f"parameter 1 of group 1, of shape {shape},"
    assert_refused(optimizer, bad, message.format(place))


TAKE_SPARSE = {
    **{fastopt.SGD: torch.optim.SGD, fastopt.Adagrad: torch.optim.Adagrad, fastopt.RMSprop: None},
    **dict.fromkeys([fastopt.Adam, fastopt.AdamW], torch.optim.SparseAdam),
}


@pytest.mark.parametrize(("cls", "takes_them"), TAKE_SPARSE.items())
def test_who_takes_sparse_gradients(cls, takes_them):
    def sparse():
        return param_with(torch.ones(4, 2).to_sparse())

    cure = f"use torch.optim.{takes_them.__name__}, or sparse" if takes_them else "use sparse"
    with pytest.raises(RuntimeError, match=f": {cure}=False in the embedding$"):
        cls([sparse()]).step()
    if takes_them:
        takes_them([sparse()]).step()


def test_tensor_subclasses():
    """Those that intercept operators, as DTensor does, go to the reference."""
    ones = TwoTensor(torch.ones(3), torch.ones(3))
    param = param_with(ones, TwoTensor(torch.zeros(3), torch.zeros(3)))
    fastopt.SGD([param], lr=1.0).step()
    assert param.a.tolist() == param.b.tolist() == [-1, -1, -1]
    with pytest.raises(RuntimeError, match="is a TwoTensor, which backend='cpp' cannot update"):
        fastopt.SGD([param], backend="cpp").step()


NO_STEPS = [
    *(math.nan, -1.0, "three", None, torch.ones(3), torch.ones(0), torch.tensor(1j)),
    *(torch._neg_view(torch.ones(())), torch.ones(1).to_sparse(), torch.ones(1, device="meta")),
]
MISFIT = "a state 'exp_avg' that does not fit it "
BAD_STATES = [
    *(("", value, "a state that is no dict") for value in (None, [1], torch.ones(3))),
    *(("step", value, "a state 'step' that is no number of steps") for value in NO_STEPS),
    ("exp_avg", torch.zeros(4), MISFIT + r".*\(4,\)"),
    ("exp_avg", lambda exp_avg: exp_avg.resize_(4), MISFIT + r".*\(4,\)"),
    ("exp_avg", torch.zeros(1).expand(8), MISFIT),
    ("exp_avg", "gone", MISFIT + r"\(str\)"),
]


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize(("name", "value", "message"), BAD_STATES)
@each_backend
def test_bad_states(backend, name, value, message, steps):
    optimizer = fastopt.AdamW(new_params([(3,), (8,)]), backend=backend)
    _, bad = take_steps(optimizer, range(steps))
    holder, key = (optimizer.state[bad], name) if name else (optimizer.state, bad)
    holder[key] = value(holder[key]) if callable(value) else value
    message = f"parameter 1 of group 0, .* has {message}"
    assert_refused(optimizer, bad, message, forget=name != "step")


LOST = [(FP32, FP32, name) for name in ("param", "grad", "exp_avg", "step")]
LOST += [(BF16, "8bit", name) for name in ("param_remainder", "exp_avg_codes", "exp_avg_scale")]


@pytest.mark.parametrize("left", [0, 1, -1])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize(("dtype", "state_dtype", "name"), LOST)
@each_backend
def test_memory_taken_away(backend, dtype, state_dtype, name, steps, left):
    """All of a storage, all but a byte, or a byte of it."""
    grad = torch.ones(64 * 65 + 4, dtype=dtype).as_strided((64, 64), (65, 1), 5)
    param = torch.nn.Parameter(torch.ones(8 + 64 * 64, dtype=dtype)[8:].view(64, 64))
    param.grad = grad
    optimizer = fastopt.AdamW([param], state_dtype=state_dtype, backend=backend)
    for _ in range(steps):
        optimizer.step()
    state = optimizer.state[param]
    storage = {"param": param, "grad": grad, **state}[name].untyped_storage()
    size = storage.nbytes()
    storage.resize_(left % size)
    found = rf"(part of )?its memory \(its storage was resized to {left % size} bytes\)"
    message = {
        "param": f"parameter 0 of group 0, .* has lost {found}",
        "grad": f"the gradient of parameter 0 of group 0, .* has lost {found}",
        "step": "a state 'step' that is no number of steps .a tensor that has lost its memory",
    }.get(name, f"a state '{name}' that has lost {found}")
    for _ in range(2):
        with pytest.raises(RuntimeError, match=message):
            optimizer.step()
    storage.resize_(size)
    state["step"].fill_(steps)
    optimizer.step()
    assert state["step"] == steps + 1


def test_gradients_that_cannot_be_clipped():
    param = param_with(torch.full((1,), 8.0).expand(5000))
    assert fastopt.get_total_norm([param.grad]) == pytest.approx(8 * math.sqrt(5000))
    for clip in (fastopt.clip_grad_norm_, fastopt.clip_grad_value_):
        with pytest.raises(RuntimeError, match="gradient 0, of shape .* clone it"):
            clip([param], 1.0)
        assert param.grad[0] == 8
        for nbytes in (4, 0):
            lost = param_with(torch.ones(8))
            lost.grad.untyped_storage().resize_(nbytes)
            with pytest.raises(RuntimeError, match=f"gradient 0, of .* resized to {nbytes} bytes"):
                clip([lost], 1.0)


def test_a_state_on_the_meta_device_is_not_loaded():
    optimizer = fastopt.AdamW(new_params([(3,)]))
    take_steps(optimizer, [0])
    saved = optimizer.state_dict()
    saved["state"][0] = {**saved["state"][0], "exp_avg_sq": torch.ones(3, device="meta")}
    saved["param_groups"][0]["lr"] = 0.5
    message = "a state 'exp_avg_sq' on the meta device, without data"
    with unchanged(optimizer), pytest.raises(RuntimeError, match=message):
        optimizer.load_state_dict(saved)
    (state,) = optimizer.state.values()
    state["exp_avg_sq"] = saved["state"][0]["exp_avg_sq"]
    message = "'exp_avg_sq' that does not fit it .*of shape .* on meta"
    with pytest.raises(RuntimeError, match=message):
        take_steps(optimizer, [1])


def test_unknown_backend(monkeypatch):
    params = new_params([(3,)])
    with pytest.raises(ValueError, match="backend='cuda': the backends are auto, triton, cpp"):
        fastopt.SGD(params, backend="cuda")
    monkeypatch.setenv("FASTOPT_BACKEND", "fast")
    with pytest.raises(ValueError, match="FASTOPT_BACKEND=fast: the backends are"):
        fastopt.SGD(params)
    monkeypatch.setenv("FASTOPT_BACKEND", "reference")
    assert fastopt.SGD(params).backend == "reference"
    assert fastopt.SGD(params, backend="cpp").backend == "cpp"  # an argument comes first


def test_a_backend_that_is_set_later(monkeypatch):
    optimizer = fastopt.SGD(new_params([(3,)]), momentum=0.9)
    take_steps(optimizer, [0])
    with unchanged(optimizer):
        optimizer.backend = "cuda"
        with pytest.raises(ValueError, match="backend='cuda': the backends are auto"):
            optimizer.step()
        monkeypatch.setattr(dispatch, "_load", lambda: (None, "there is none"))
        optimizer.backend = "cpp"
        with pytest.raises(RuntimeError, match="backend='cpp' does not work here: there is none"):
            optimizer.step()


def test_an_interrupt_while_a_step_is_taken_back(monkeypatch):
    """The next call goes on taking it back."""
    optimizer, other = (
        fastopt.SGD(new_params([(3,), (4,)]), momentum=0.9, backend="reference") for _ in range(2)
    )
    set_grads(parameters(optimizer), 0)

    real = backends.Reference.update

    def update(*args):
        real(*args)
        interrupted()

    def interrupted(*args):
        if optimizer._undo:
            raise KeyboardInterrupt

    monkeypatch.setattr(backends.Reference, "update", update)
    monkeypatch.setattr(module, "take_back", interrupted)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    monkeypatch.undo()
    assert optimizer.state
    assert not optimizer.state_dict()["state"]
    take_steps(optimizer, range(2))
    assert_same_bits(parameters(optimizer), take_steps(other, range(2)))


def test_states_that_a_step_in_inference_mode_has_made():
    optimizer, other = (fastopt.Adam(new_params([(3,)])) for _ in range(2))
    with torch.inference_mode():
        take_steps(optimizer, [0])
    take_steps(other, [0])
    optimizer.backend = "reference"
    assert_same_bits(take_steps(optimizer, [1]), take_steps(other, [1]))
