"""Where torch keeps things: what is found there, and that a plan sees whatever changes."""

import os
import weakref
from array import array
from contextlib import nullcontext

import pytest
import torch
from helpers import each_optimizer
from torch._subclasses.fake_tensor import FakeTensorMode

import fastopt
from fastopt.rule import head
from fastopt.step import dispatch, torch_abi

SHAPES = ((8, 8), (16,), (), (2, 1, 3, 2, 1, 2, 2))
RIGHT = torch_abi.find()


def test_the_layout_is_known_here():
    """Else every step would be planned anew: right, but slow."""
    assert RIGHT is not None


def without(names):
    """What is found where torch is to be asked, in each step, for these fields."""
    return RIGHT[0]._replace(**dict.fromkeys(names, 0)), RIGHT[1]


@pytest.mark.parametrize("name", ["_search", "_verify", "_allocation", "_function"])
def test_a_layout_that_is_not_found_is_none(monkeypatch, name):
    def fails(*arguments):
        raise torch_abi.NotFoundError

    monkeypatch.setattr(torch_abi, name, fails)
    assert torch_abi.find() is None


def test_a_field_in_two_places_is_not_found():
    with pytest.raises(torch_abi.NotFoundError):
        torch_abi._search([torch.zeros(1)])  # 1 is its size, its stride and what not


@pytest.mark.parametrize("error", [8, -8, 1 << 20])
@pytest.mark.parametrize("name", torch_abi.Fields._fields)
def test_a_wrong_field_is_noticed(monkeypatch, name, error):
    search = torch_abi._search

    def wrong(tensors):
        found = search(tensors)
        return found._replace(**{name: getattr(found, name) + error})

    monkeypatch.setattr(torch_abi, "_search", wrong)
    optional = [names for names in torch_abi.OPTIONAL if name in names]
    assert torch_abi.find() == (without(optional[0]) if optional else None)


@pytest.mark.parametrize(
    ("names", "lacks"),
    [(("autograd_meta", "grad"), "TensorImpl4grad"), (("version", "number"), "version_counter")],
    ids=str,
)
def test_a_function_that_torch_lacks(monkeypatch, names, lacks):
    function = torch_abi._function

    def present(library, name):
        if lacks in name:
            raise AttributeError(name)
        return function(library, name)

    monkeypatch.setattr(torch_abi, "_function", present)
    assert torch_abi.find() == without(names)


#: What the allocator may tell of an object: that it is larger than it is, behind which no field is
#: looked for, or smaller than any torch's, into which fields do not fit.
ALLOCATIONS = [(lambda memory: memory + os.urandom(64), RIGHT), (lambda memory: memory[:48], None)]


@pytest.mark.parametrize(("change", "wanted"), ALLOCATIONS, ids=["larger", "smaller"])
def test_only_what_was_allocated_is_read(monkeypatch, change, wanted):
    allocation = torch_abi._allocation
    monkeypatch.setattr(torch_abi, "_allocation", lambda address: change(allocation(address)))
    assert torch_abi.find() == wanted


MODES = [torch.inference_mode, torch.no_grad, FakeTensorMode, lambda: torch.device("meta")]


@pytest.mark.parametrize("mode", MODES)
def test_they_are_found_in_any_mode(mode):
    with mode():
        found = torch_abi.find()
    assert found == RIGHT


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.functionalize])
def test_they_are_found_within_functorch(transform):
    found = []

    def loss(x):
        found.append(torch_abi.find())
        return x.sum()

    transform(loss)(torch.ones(2))
    assert found == [RIGHT]


def step(optimizer, number):
    params = optimizer.param_groups[0]["params"]
    for k, param in enumerate(params):
        param.grad = torch.linspace(-1, 1, param.numel()).view(param.shape) * (1 + number + k)
    optimizer.step()


def pair():
    """Optimizers with two steps made, of the C++ backend and of the reference, and parameters."""
    optimizers, params = [], []
    for backend in ("auto", "reference"):
        params.append([torch.ones(shape).requires_grad_() for shape in SHAPES])
        optimizers.append(fastopt.AdamW(params[-1], lr=0.1, backend=backend))
        for number in range(2):
            step(optimizers[-1], number)
    return optimizers, params


def moments(optimizer, param):
    return optimizer.state[param]["exp_avg"]


def of_threes(tensor):
    return torch.full_like(tensor, 3).requires_grad_(tensor.requires_grad)


def set_data(tensor, data):
    tensor.data = data


def step_with(optimizer, param, grad):
    param.grad = grad
    optimizer.step()


def move_unseen(optimizer, param, state):
    step_with(optimizer, param, None)
    state["step"].data = torch.tensor(7.0)
    optimizer.step()


def gradient(make):
    return lambda optimizer, param, _: step_with(optimizer, param, make(param.shape))


CHANGES = {
    "parameter swapped": lambda _, p, state: torch.utils.swap_tensors(p, of_threes(p)),
    "state swapped": lambda _, p, state: torch.utils.swap_tensors(
        state["exp_avg"], of_threes(state["exp_avg"])
    ),
    "data replaced": lambda _, p, state: set_data(p, torch.full_like(p, 3)),
    "state replaced": lambda _, p, state: state.update(exp_avg=torch.full_like(p, 3)),
    "data of a state replaced": lambda _, p, state: set_data(
        state["exp_avg"], torch.full_like(p, 3)
    ),
    "storage of a state resized": lambda _, p, state: (
        state["exp_avg"].untyped_storage().resize_(1 << 20)
    ),
    "state turned": lambda _, p, state: p.dim() == 2 and state["exp_avg"].t_(),
    "data turned": lambda _, p, state: p.dim() == 2 and set_data(p, p.data.t()),
    "step replaced": lambda _, p, state: state.update(step=torch.tensor(7.0)),
    "state dropped": lambda optimizer, p, _: optimizer.state.pop(p),
    "step moved while there is no gradient": move_unseen,
    "gradient transposed": gradient(
        lambda shape: torch.ones(shape[::-1]).permute(tuple(reversed(range(len(shape)))))
    ),
    "gradient negated": gradient(lambda shape: torch._neg_view(torch.ones(shape))),
    "gradient with an offset": gradient(lambda shape: torch.ones((2, *shape))[1]),
    "gradient expanded": gradient(lambda shape: torch.ones(()).expand(shape)),
    "gradient of a conjugate": gradient(lambda shape: torch.full(shape, 1 + 2j).conj().imag),
}


@pytest.mark.parametrize("k", range(len(SHAPES)))
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_between_steps_is_seen(change, k):
    """Both backends have the same numbers after it, whichever parameter it was."""
    optimizers, params = pair()
    for optimizer, mine in zip(optimizers, params, strict=True):
        CHANGES[change](optimizer, mine[k], optimizer.state[mine[k]])
        for number in (2, 3):
            step(optimizer, number)
    for param, other in zip(*params, strict=True):
        assert torch.equal(param, other)
        assert torch.equal(moments(optimizers[0], param), moments(optimizers[1], other))


@pytest.mark.parametrize("settings", [{}, {"master_weights": "stochastic"}])
@each_optimizer
@pytest.mark.parametrize("pattern", ["1010", "1101", "1001", "0101"])
def test_gradients_that_come_and_go(cls, pattern, settings):
    dtype = torch.bfloat16 if settings else torch.float32
    results = []
    for backend in ("cpp", "reference"):
        params = [torch.ones(n, dtype=dtype, requires_grad=True) for n in (5, 7)]
        optimizer = cls(params, lr=0.1, backend=backend, **settings)
        for number in range(12):
            for param in params:
                param.grad = torch.linspace(-1, number, param.numel(), dtype=dtype)
            if pattern[number % 4] == "0":
                params[1].grad = None
            optimizer.step()
        results.append(params)
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("what", ["param", "state", "grad"])
def test_memory_that_is_shared_until_it_is_written(what):
    (optimizer, _), (params, _) = pair()
    step(optimizer, 2)
    param = params[0]
    own = {"param": param, "state": moments(optimizer, param), "grad": param.grad}[what]
    clone = torch._lazy_clone(own.detach())
    before = own.detach().tolist()
    optimizer.step()
    fastopt.clip_grad_norm_(params, 1e-3)
    assert clone.tolist() == before


@pytest.mark.parametrize("names", [(), *torch_abi.OPTIONAL, sum(torch_abi.OPTIONAL, ())], ids=str)
def test_a_plan_holds(names):
    """Where torch is asked, too: gradients are fresh, not everywhere, and let go; a step counts as
    one version."""
    extension = dispatch.extension()
    fields, functions = without(names)
    extension.use_torch_fields(fields, *functions)
    try:
        optimizers, params = pair()
        optimizer, ours = optimizers[0], params[0]
        plan = optimizer._plan
        for number in range(2, 6):
            versions = [param._version for param in ours]
            for each, mine in zip(optimizers, params, strict=True):
                step(each, number)
                step_with(each, mine[number % 2], None)
            assert optimizer._plan is plan
            made = [2 - (k == number % 2) for k in range(len(ours))]
            assert [p._version - v for p, v in zip(ours, versions, strict=True)] == made
        assert all(map(torch.equal, *params))
        gone = weakref.ref(ours[3].grad)
        ours[3].grad = None
        assert gone() is None
        for _ in range(3):
            optimizer.zero_grad()
            sum((param.double() ** 2).sum() for param in ours).backward()
            optimizer.step()
            assert optimizer._plan is plan
    finally:
        extension.use_torch_fields(RIGHT[0], *RIGHT[1])


def test_gradients_replaced_between_looking_and_updating():
    """As another thread may: those that were found are used, and kept alive."""
    param = torch.ones(4, requires_grad=True)
    optimizer = fastopt.SGD([param], lr=1.0)
    for _ in range(2):
        param.grad = torch.ones(4)
        optimizer.step()
    native = optimizer._plan._native
    assert native.begin(1)
    param.grad = None
    undo = [None]
    row = array("d", (*head(1.0, step=3), 1.0, *(0.0,) * 5)).tobytes()
    native.step(row, False, False, None, 1.0, False, 1, undo)
    assert torch.equal(param, torch.full((4,), -2.0))
    assert not undo
    with pytest.raises(RuntimeError, match="without its gradients"):
        native.step(row, False, False, None, 1.0, False, 1, undo)


def test_a_step_that_raises_keeps_no_gradient():
    param = torch.ones(10_000, requires_grad=True)  # long: held during a step
    optimizer = fastopt.AdamW([param], lr=1.0, weight_decay=10.0)
    for lr in (1.0, 1.0, 1e308):  # the last one's product with the weight decay is infinite
        optimizer.param_groups[0]["lr"] = lr
        param.grad = torch.ones(10_000)
        gone = weakref.ref(param.grad)
        with pytest.raises(ValueError, match="not finite") if lr > 1 else nullcontext():
            optimizer.step()
    param.grad = None
    assert gone() is None


def test_profilers_see_the_step():
    param = torch.ones(3, requires_grad=True)
    param.grad = torch.ones(3)
    optimizer = fastopt.AdamW([param])
    with torch.profiler.profile() as profile:
        optimizer.step()
    assert "Optimizer.step#AdamW.step" in {event.name for event in profile.events()}
