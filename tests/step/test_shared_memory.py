"""Tensors that share memory: the result does not depend on what is written first, or the step
raises before it has changed anything. And thousands of odd ones, in no quadratic time."""

import re

import pytest
import torch
from helpers import BACKENDS, assert_same_bits, interpreted, masked_out, unchanged
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.testing._internal.two_tensor import TwoTensor

import fastopt
from fastopt import _C

pytestmark = masked_out

each_backend = pytest.mark.parametrize(
    "backend", [*BACKENDS, pytest.param("triton", marks=interpreted)]
)


def numbers(*shape):
    return torch.arange(1.0, 1 + torch.Size(shape).numel()).view(shape)


def new_optimizer(backend, cls=fastopt.AdamW, n=2, **settings):
    """And its parameters, after a step: of shape (6, 6)."""
    params = [numbers(6, 6).requires_grad_() for _ in range(n)]
    optimizer = cls(params, backend=backend, **settings)
    for param in params:
        param.grad = torch.ones(6, 6)
    optimizer.step()
    return optimizer, params


def shifted(params, state):
    buffer = numbers(7, 6)
    params[0].data = buffer[:6]
    return buffer[1:]


def interleaved(params, state):
    """The gradient's odd columns are the parameter's even ones."""
    buffer = numbers(6, 14)
    params[0].data = buffer[:, 0:12:2]
    return buffer[:, 2:14:2]


def part_of_another_parameter(params, state):
    buffer = numbers(9, 6)
    params[1].data = buffer[:6]
    return buffer[3:]


def of_two_parameters(params, state):
    """A gradient that is the parameter, which another one overlaps."""
    params[1].data = params[0].data
    return params[0].detach()


ITSELF = "the parameter itself, in another arrangement"
ZERO, ONE = (f"parameter {k} of group 0, of shape (6, 6)" for k in (0, 1))
#: What becomes the gradient or a state of the first parameter, and with what it shares memory.
ILL_DEFINED = [
    ("grad", lambda params, _: params[0].detach().t(), ITSELF),
    ("grad", shifted, ITSELF),
    ("grad", lambda params, _: params[0].detach()[0].expand(6, 6), ITSELF),
    ("grad", interleaved, ITSELF),
    ("grad", lambda params, _: params[1].detach(), ONE),
    ("grad", part_of_another_parameter, ONE),
    ("grad", of_two_parameters, ONE),
    ("grad", lambda params, state: state[params[0]]["exp_avg"].t(), "its state 'exp_avg'"),
    (
        *("grad", lambda params, state: state[params[1]]["exp_avg_sq"]),
        f"the state 'exp_avg_sq' of {ONE}",
    ),
    (
        "exp_avg",
        lambda params, state: state[params[1]]["exp_avg"],
        f"the state 'exp_avg' of {ZERO}",
    ),
    ("exp_avg_sq", lambda params, state: state[params[0]]["exp_avg"], "its state 'exp_avg'"),
    ("exp_avg", lambda params, _: params[1].detach(), ONE),
    ("step", lambda params, _: params[0].detach()[0, 0], "the parameter itself"),
]


@each_backend
@pytest.mark.parametrize(("key", "share", "whose"), ILL_DEFINED)
def test_ill_defined(key, share, whose, backend):
    optimizer, params = new_optimizer(backend)
    shared = share(params, optimizer.state)
    if key == "grad":
        params[0].grad = shared
    else:
        optimizer.state[params[0]][key] = shared
    grads = [param.grad.clone() for param in params]
    what = "a gradient" if key == "grad" else f"a state '{key}'"
    place = ONE if ZERO in whose else ZERO
    message = f"{place}, has {what} that shares memory with {whose}: clone it"
    for _ in range(2):
        with unchanged(optimizer), pytest.raises(RuntimeError, match=re.escape(message)):
            optimizer.step()
        assert_same_bits([param.grad for param in params], grads)


def columns(params, state):
    """Views of one buffer that interleave without sharing an element."""
    buffer = numbers(6, 6, 8)
    for i, param in enumerate(params):
        param.data = buffer[..., i]
        param.grad = buffer[..., 2 + i]
        state[param]["exp_avg"] = buffer[..., 4 + i].zero_()
        state[param]["exp_avg_sq"] = buffer[..., 6 + i].zero_()


def rows(params, state):
    buffer = numbers(4, 6, 6)
    for i, param in enumerate(params):
        param.data, param.grad = buffer[i], buffer[2 + i]


WELL_DEFINED = {
    "the same": lambda params, _: setattr(params[0], "grad", params[0].detach()),
    "the same as a state": lambda params, state: setattr(
        params[0], "grad", state[params[0]]["exp_avg"]
    ),
    "one gradient": lambda params, _: setattr(params[1], "grad", params[0].grad),
    "columns": columns,
    "rows": rows,
}


@each_backend
@pytest.mark.parametrize("name", WELL_DEFINED)
def test_well_defined(name, backend):
    """The same bits as without sharing."""

    def after_steps(shares):
        optimizer, params = new_optimizer(backend, lr=0.1)
        for _ in range(2):
            WELL_DEFINED[name](params, optimizer.state)
            if not shares:
                for param in params:
                    param.grad = param.grad.clone()
                    param.data = param.data.clone()
            optimizer.step()
        states = [optimizer.state[param][key] for param in params for key in ("exp_avg", "step")]
        return [*(param.detach().contiguous() for param in params), *states]

    assert_same_bits(after_steps(True), after_steps(False))


@each_backend
def test_in_a_later_step_of_one_plan(backend):
    """Of the same shape and strides: nothing but the address tells."""
    optimizer, params = new_optimizer(backend, fastopt.SGD, n=3, lr=0.5)
    params[2].grad = None
    optimizer.step()
    for step in range(4):
        for param in params[:2]:
            param.grad = torch.ones(6, 6)
        optimizer.step()
        if step % 2:
            params[2].grad = params[2].detach()
            optimizer.step()
        params[1].grad = params[0].detach()
        refused = pytest.raises(
            RuntimeError, match="parameter 1 .* shares memory with parameter 0 "
        )
        with unchanged(optimizer), refused:
            optimizer.step()


@each_backend
def test_a_parameter_that_stands_twice(backend):
    param = numbers(3).requires_grad_()
    optimizer = fastopt.SGD([{"params": [param]}], lr=0.5, momentum=0.5, backend=backend)
    optimizer.param_groups.append({**optimizer.param_groups[0], "params": [param]})
    param.grad = torch.ones(3)
    for _ in range(2):
        optimizer.step()
    assert param.tolist() == [1 - 0.5 * (1 + 1.5 + 1.75 + 1.875) + i for i in range(3)]


def test_wrappers_without_memory():
    """Where theirs is, is not known."""
    param = torch.nn.Parameter(TwoTensor(numbers(4), numbers(4)))
    param.grad = param.detach()
    fastopt.SGD([param], lr=0.5, backend="reference").step()
    assert torch.equal(param.a, numbers(4) / 2)


@st.composite
def views(draw):
    """Shape, and for two parameters and their gradients strides and offset in one buffer."""
    shape = draw(st.sampled_from([(1,), (3,), (2, 2), (2, 3)]))
    strides = st.tuples(*(st.integers(1, 6) for _ in shape))
    return shape, [(draw(strides), draw(st.integers(0, 30))) for _ in range(4)]


@settings(deadline=None, max_examples=300)
@given(views())
def test_any_views_of_one_buffer(drawn):
    """What raises is what the sets of places say, and the rest has the reference's bits."""
    shape, places = drawn
    indices = torch.arange(80)
    *params, first, second = (
        indices.as_strided(shape, *place).flatten().tolist() for place in places
    )
    assume(all(len(set(places)) == len(places) for places in params))
    others = params[1], params[0]
    well_defined = all(
        not set(grad) & set(other) and (grad == param or not set(grad) & set(param))
        for param, grad, other in zip(params, (first, second), others, strict=True)
    )

    def after_step(backend):
        buffer = numbers(80)
        first, second, *grads = (buffer.as_strided(shape, *place) for place in places)
        first.requires_grad_().grad, second.requires_grad_().grad = grads
        fastopt.SGD([first, second], lr=0.5, max_norm=1.0, backend=backend).step()
        return [buffer]

    if well_defined:
        assert_same_bits(after_step("cpp"), after_step("reference"))
    for backend in () if well_defined else BACKENDS:
        with pytest.raises(RuntimeError, match="has a gradient that shares memory with .*: clone"):
            after_step(backend)


def in_order(extents, active):
    """Waves by their definition: quadratic."""
    found = [-1] * len(extents)
    for k, i in enumerate(active):
        begin, end = extents[i]
        waves = [
            found[j] for j in active[:k] if max(begin, extents[j][0]) < min(end, extents[j][1])
        ]
        found[i] = max(waves, default=-1) + 1
    return found


@settings(deadline=None, max_examples=300)
@given(st.lists(st.tuples(st.integers(1, 30), st.integers(0, 8), st.booleans()), max_size=12))
def test_waves(tensors):
    extents = [(begin, begin + size) for begin, size, _ in tensors]
    active = [i for i, (*_, is_active) in enumerate(tensors) if is_active]
    assert _C.waves(extents, list(active)) == in_order(extents, active)


#: Where one of 20,000 arrays of length 4 begins, and its wave: in pairs, as a chain, apart.
MANY = {
    "pairs": lambda i: (8 * (i // 2) + i % 2, i % 2),
    "chain": lambda i: (3 * i, i),
    "apart": lambda i: (4 * i, 0),
}


@pytest.mark.parametrize("name", MANY)
def test_many_waves(name):
    begins, wanted = zip(*map(MANY[name], range(20_000)), strict=True)
    extents = [(begin, begin + 4) for begin in begins]
    assert _C.waves(extents, list(range(20_000))) == list(wanted)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 9)), min_size=1, max_size=10))
def test_overlapping_parameters(places):
    """They are updated one after the other, as a plain loop would."""

    def after_steps(backend):
        buffer = numbers(30)
        params = [buffer[begin : begin + n].requires_grad_() for begin, n in places]
        optimizer = fastopt.SGD(params, lr=0.5, weight_decay=0.1, backend=backend)
        for param in params:
            param.grad = torch.ones(param.shape)
        for _ in range(2):
            optimizer.step()
        return [buffer]

    assert_same_bits(after_steps("cpp"), after_steps("reference"))


#: Where one of 20,000 parameters begins, and how long each is.
OVERLAPS = {
    "pairs": (lambda i: 3 * (i // 2) + i % 2, 2),
    "chain": (lambda i: i, 2),
    "same": (lambda i: 0, 1),
}


@pytest.mark.parametrize("overlap", OVERLAPS)
def test_many_overlapping_parameters(overlap):
    begin, size = OVERLAPS[overlap]
    places = [slice(begin(i), begin(i) + size) for i in range(20_000)]
    buffer, wanted = torch.zeros(2, places[-1].stop)
    params = [buffer[place].requires_grad_() for place in places]
    grad = torch.ones(size)
    for param, place in zip(params, places, strict=True):
        param.grad = grad
        wanted[place] -= 1
    optimizer = fastopt.SGD(params, lr=1.0)
    for steps in (1, 2):
        optimizer.step()
        assert torch.equal(buffer, steps * wanted)


@pytest.mark.parametrize("backend", ["cpp", pytest.param("triton", marks=interpreted)])
def test_many_steps_of_their_own(backend):
    """20,000 parameters that have all made other numbers of steps."""
    n = 20_000 if backend == "cpp" else 50
    params = [torch.ones(1).requires_grad_() for _ in range(n)]
    optimizer = fastopt.Adam(params, lr=1.0, betas=(0.5, 0.5), eps=0.0, backend=backend)
    for i, param in enumerate(params):
        param.grad = torch.ones(1)
        moments = {key: torch.zeros(1) for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[param] = {"step": torch.tensor(float(i % (n - 10))), **moments}
    optimizer.step()
    optimizer.step()
    steps = torch.arange(n) % (n - 10) + 2.0
    assert torch.equal(torch.stack([optimizer.state[param]["step"] for param in params]), steps)
    # The bias corrections of both moments, 1/2 and then 3/4 of ones.
    wanted = torch.ones(n, dtype=torch.float64)
    for step, moment in ((steps.double() - 1, 0.5), (steps.double(), 0.75)):
        wanted -= moment**0.5 / (1 - 0.5**step) ** 0.5
    torch.testing.assert_close(torch.cat(params).double(), wanted, rtol=1e-6, atol=1e-6)


def test_many_parameters_that_are_their_gradients():
    """20,000 of them: as many stretches of shared memory."""
    params = [torch.ones(3).requires_grad_() for _ in range(20_000)]
    for param in params:
        param.grad = param.detach()
    fastopt.SGD(params, lr=0.5).step()
    assert all(param.tolist() == [0.5] * 3 for param in params)


def test_many_columns():
    """20,000 parameters, gradients and states, all in one stretch of memory."""
    n = 20_000
    buffer = torch.ones(3, 3 * n)
    columns = buffer.unbind(1)
    params = [column.detach().requires_grad_() for column in columns[:n]]
    optimizer = fastopt.SGD(params, lr=0.5, momentum=0.5)
    for param, grad, momentum in zip(params, columns[n : 2 * n], columns[2 * n :], strict=True):
        param.grad = grad
        optimizer.state[param]["momentum_buffer"] = momentum
    optimizer.step()
    assert torch.equal(buffer[:, :n], torch.full((3, n), 0.25))
    assert torch.equal(buffer[:, 2 * n :], torch.full((3, n), 1.5))
