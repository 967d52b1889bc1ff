"""Where torch keeps things: what is found there, and that a plan sees whatever changes."""

import os
import weakref
from array import array
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.optimizer import register_optimizer_step_post_hook

import fastopt
from fastopt.rule import head
from fastopt.step import dispatch, torch_abi

SHAPES = ((8, 8), (16,), (), (2, 1, 3, 2, 1, 2, 2))


def test_the_layout_is_known_here():
    """Else every step would be planned anew: right, but slow."""
    assert torch_abi.find() is not None


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
def test_a_wrong_field_is_noticed(monkeypatch, name: str, error: int):
    search, right = torch_abi._search, torch_abi.find()
    assert right is not None

    def wrong(tensors: list[Tensor]) -> torch_abi.Fields:
        found = search(tensors)
        return found._replace(**{name: getattr(found, name) + error})

    monkeypatch.setattr(torch_abi, "_search", wrong)
    asked = [names for names in torch_abi.OPTIONAL if name in names]
    if not asked:
        assert torch_abi.find() is None
    for names in asked:  # torch is, in each step
        assert torch_abi.find() == (right[0]._replace(**dict.fromkeys(names, 0)), right[1])


@pytest.mark.parametrize("names", torch_abi.OPTIONAL, ids=str)
def test_a_function_that_torch_lacks(monkeypatch, names: tuple[str, ...]):
    function, right = torch_abi._function, torch_abi.find()
    assert right is not None
    lacks = {"grad": "TensorImpl4grad", "number": "version_counter"}[names[1]]

    def present(library: str, name: str):
        if lacks in name:
            raise AttributeError(name)
        return function(library, name)

    monkeypatch.setattr(torch_abi, "_function", present)
    assert torch_abi.find() == (right[0]._replace(**dict.fromkeys(names, 0)), right[1])


def test_what_lies_behind_an_object_is_no_field(monkeypatch):
    """As large as an object may be, for all that the allocator tells."""
    allocation, found = torch_abi._allocation, torch_abi.find()
    assert found is not None
    monkeypatch.setattr(
        torch_abi, "_allocation", lambda address: allocation(address) + os.urandom(64)
    )
    assert torch_abi.find() == found


def test_only_what_was_allocated_is_read(monkeypatch):
    """Smaller objects than any torch has: fields that do not fit into them are not found."""
    allocation = torch_abi._allocation
    monkeypatch.setattr(torch_abi, "_allocation", lambda address: allocation(address)[:48])
    assert torch_abi.find() is None


@pytest.mark.parametrize(
    "mode",
    [
        torch.inference_mode,
        torch.no_grad,
        FakeTensorMode,
        lambda: torch.device("meta"),
    ],
)
def test_they_are_found_in_any_mode(mode):
    with mode():
        found = torch_abi.find()
    assert found == torch_abi.find()


def test_they_are_found_within_functorch():
    found = []

    def loss(x: Tensor) -> Tensor:
        found.append(torch_abi.find())
        return x.sum()

    torch.func.grad(loss)(torch.ones(2))
    torch.func.functionalize(loss)(torch.ones(2))
    assert found == 2 * [torch_abi.find()]


def pair() -> tuple[list[Tensor], fastopt.AdamW, list[Tensor], fastopt.AdamW]:
    """Parameters with two steps made, of the C++ backend and of the reference."""
    torch.manual_seed(0)
    made = []
    for backend in ("auto", "reference"):
        params = [torch.ones(shape).requires_grad_() for shape in SHAPES]
        made += [params, fastopt.AdamW(params, lr=0.1, backend=backend)]
    ours, optimizer, others, reference = made
    for number in range(2):
        step(ours, optimizer, number)
        step(others, reference, number)
    return ours, optimizer, others, reference


def step(params: list[Tensor], optimizer: fastopt.AdamW, number: int) -> None:
    for k, param in enumerate(params):
        param.grad = torch.linspace(-1, 1, param.numel()).view(param.shape) * (1 + number + k)
    optimizer.step()


def moments(optimizer: fastopt.AdamW, param: Tensor) -> Tensor:
    return optimizer.state[param]["exp_avg"]


def swap(params: list[Tensor], optimizer: fastopt.AdamW, k: int) -> None:
    torch.utils.swap_tensors(params[k], torch.full_like(params[k], 3).requires_grad_())


def swap_state(params: list[Tensor], optimizer: fastopt.AdamW, k: int) -> None:
    state = moments(optimizer, params[k])
    torch.utils.swap_tensors(state, torch.full_like(state, 3))


def replace_data(params: list[Tensor], optimizer: fastopt.AdamW, k: int) -> None:
    params[k].data = torch.full_like(params[k], 3)


def replace_state(params: list[Tensor], optimizer: fastopt.AdamW, k: int) -> None:
    optimizer.state[params[k]]["exp_avg"] = torch.full_like(params[k], 3)


def replace_state_data(params: list[Tensor], optimizer: fastopt.AdamW, k: int) -> None:
    moments(optimizer, params[k]).data = torch.full_like(params[k], 3)


def resize_state_storage(params: list[Tensor], optimizer: fastopt.AdamW, k: int) -> None:
    state = moments(optimizer, params[k])
    state.untyped_storage().resize_(1 << 20)


def turn_state(params: list[Tensor], optimizer: fastopt.AdamW, k: int) -> None:
    state = moments(optimizer, params[k])
    if state.dim() == 2:
        state.t_()


def turn_data(params: list[Tensor], optimizer: fastopt.AdamW, k: int) -> None:
    if params[k].dim() == 2:
        params[k].data = params[k].data.t()


def replace_step(params: list[Tensor], optimizer: fastopt.AdamW, k: int) -> None:
    optimizer.state[params[k]]["step"] = torch.tensor(7.0)


def drop_state(params: list[Tensor], optimizer: fastopt.AdamW, k: int) -> None:
    del optimizer.state[params[k]]


@pytest.mark.parametrize("k", range(len(SHAPES)))
@pytest.mark.parametrize(
    "change",
    [
        *(swap, swap_state, replace_data, replace_state, replace_state_data),
        *(resize_state_storage, turn_state, turn_data, replace_step, drop_state),
    ],
)
def test_a_change_between_steps_is_seen(
    change: Callable[[list[Tensor], fastopt.AdamW, int], None], k: int
):
    ours, optimizer, others, reference = pair()
    for params, of in ((ours, optimizer), (others, reference)):
        change(params, of, k)
        step(params, of, 2)
        step(params, of, 3)
    for param, other in zip(ours, others, strict=True):
        assert torch.equal(param, other)
        assert torch.equal(moments(optimizer, param), moments(reference, other))


@pytest.mark.parametrize("settings", [{}, {"master_weights": "stochastic"}])
@pytest.mark.parametrize("rule", fastopt.OPTIMIZERS)
@pytest.mark.parametrize("pattern", ["1010", "1101", "1001", "0101"])
def test_gradients_that_come_and_go(rule, pattern: str, settings):
    dtype = torch.bfloat16 if settings else torch.float32
    results = []
    for backend in ("cpp", "reference"):
        params = [torch.ones(n, dtype=dtype, requires_grad=True) for n in (5, 7)]
        optimizer = rule(params, lr=0.1, backend=backend, **settings)
        for number in range(12):
            for param in params:
                param.grad = torch.linspace(-1, number, param.numel(), dtype=dtype)
            if pattern[number % 4] == "0":
                params[1].grad = None
            optimizer.step()
        results.append(params)
    for param, other in zip(*results, strict=True):
        assert torch.equal(param, other)


def test_a_state_moved_while_there_is_no_gradient():
    ours, optimizer, others, reference = pair()
    for params, of in ((ours, optimizer), (others, reference)):
        params[0].grad = None
        of.step()
        of.state[params[0]]["step"].data = torch.tensor(7.0)
        of.step()
        step(params, of, 3)
    assert torch.equal(ours[0], others[0])


@pytest.mark.parametrize("what", ["param", "state", "grad"])
def test_memory_that_is_shared_until_it_is_written(what: str):
    ours, optimizer, *_ = pair()
    step(ours, optimizer, 2)
    own = {"param": ours[0], "state": moments(optimizer, ours[0]), "grad": ours[0].grad}[what]
    clone = torch._lazy_clone(own.detach())
    before = own.detach().tolist()
    optimizer.step()
    fastopt.clip_grad_norm_(ours, 1e-3)
    assert clone.tolist() == before


@pytest.mark.parametrize(
    "grad",
    [
        lambda shape: torch.ones(shape[::-1]).permute(tuple(reversed(range(len(shape))))),
        lambda shape: torch._neg_view(torch.ones(shape)),
        lambda shape: torch.ones((2, *shape))[1],
        lambda shape: torch.ones(()).expand(shape),
        lambda shape: torch.full(shape, 1 + 2j).conj().imag,
    ],
    ids=["transposed", "negated", "offset", "expanded", "of a conjugate"],
)
@pytest.mark.parametrize("k", range(len(SHAPES)))
def test_gradients_of_another_kind(grad: Callable[[tuple[int, ...]], Tensor], k: int):
    ours, optimizer, others, reference = pair()
    for params, of in ((ours, optimizer), (others, reference)):
        params[k].grad = grad(SHAPES[k])
        of.step()
        step(params, of, 3)
    assert torch.equal(ours[k], others[k])


def test_plans_hold_with_fresh_gradients_of_any_rank():
    ours, optimizer, *_ = pair()
    plan = optimizer._plan
    for number in range(3):
        sum((param.double() ** 2).sum() for param in ours).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert optimizer._plan is plan, number


@pytest.mark.parametrize("names", [*torch_abi.OPTIONAL, sum(torch_abi.OPTIONAL, ())], ids=str)
def test_a_plan_holds_where_torch_is_asked(names: tuple[str, ...]):
    """Gradients are fresh, not everywhere, and let go; versions are counted."""
    found, extension = torch_abi.find(), dispatch.extension()
    assert found is not None
    fields, functions = found
    extension.use_torch_fields(fields._replace(**dict.fromkeys(names, 0)), *functions)
    try:
        ours, optimizer, others, reference = pair()
        plan = optimizer._plan
        for number in range(2, 6):
            versions = [param._version for param in ours]
            for params, of in ((ours, optimizer), (others, reference)):
                step(params, of, number)
                params[number % 2].grad = None
                of.step()
            assert optimizer._plan is plan
            made = [2 - (k == number % 2) for k in range(len(ours))]
            assert [p._version - v for p, v in zip(ours, versions, strict=True)] == made
        assert all(map(torch.equal, ours, others))
        gone = weakref.ref(ours[3].grad)
        ours[3].grad = None
        assert gone() is None
    finally:
        extension.use_torch_fields(fields, *functions)


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


def test_versions_are_counted_once_a_step():
    param = torch.ones(3, requires_grad=True)
    optimizer = fastopt.AdamW([param])
    for number in range(1, 4):
        param.grad = torch.ones(3)
        optimizer.step()
        assert param._version == number


def test_hooks_and_profilers_see_the_step():
    param = torch.ones(3, requires_grad=True)
    param.grad = torch.ones(3)
    optimizer = fastopt.AdamW([param])
    seen = []
    with torch.profiler.profile() as profile:
        optimizer.step()
    assert "Optimizer.step#AdamW.step" in {event.name for event in profile.events()}
    before = optimizer.register_step_pre_hook(lambda *arguments: seen.append("pre"))
    after = optimizer.register_step_post_hook(lambda *arguments: seen.append("post"))
    optimizer.step()
    before.remove()
    after.remove()
    handle = register_optimizer_step_post_hook(lambda *arguments: seen.append("global"))
    optimizer.step()
    handle.remove()
    optimizer.step()
    assert seen == ["pre", "post", "global"]
