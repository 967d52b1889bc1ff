"""`step_in_backward`: the bits of ordinary steps, and no gradient left behind."""

import contextlib
import copy
import gc
import itertools
import pickle
import threading
import weakref

import pytest
import torch
from helpers import (
    BACKENDS,
    BF16,
    FP32,
    Interruption,
    assert_same_bits,
    each_backend,
    each_case,
    each_mode,
    entries,
    interpreted,
    masked_out,
    new_params,
    parameters,
    unchanged,
)
from rules.runs import FLAGS, finish
from torch.optim.lr_scheduler import StepLR

import fastopt
from fastopt.step import checks

pytestmark = masked_out
SHAPES = [(7, 5), (300,), (), (0,), (3, 2)]
each_kind = pytest.mark.parametrize(
    "backend", [*BACKENDS, pytest.param("triton", marks=interpreted)]
)


def loss_of(params, step):
    """Each parameter is used twice."""
    generator = torch.Generator().manual_seed(step)
    factors = [torch.randn(p.shape, generator=generator).to(p.dtype) for p in params]
    return sum((p * x + p.sin()).sum() for p, x in zip(params, factors, strict=True) if p.numel())


def two(cls, dtype=FP32, shapes=SHAPES, **settings):
    """An optimizer, and the same again to make its steps in backward."""
    return [cls(new_params(shapes, dtype), **settings) for _ in range(2)]


def train(optimizer, steps, scheduler=None):
    for step in steps:
        optimizer.zero_grad()
        loss_of(parameters(optimizer), step).backward()
        optimizer.step()
        if scheduler:
            scheduler.step()


def assert_same(*optimizers):
    assert_same_bits(*map(finish, optimizers))


# Bits


@pytest.mark.parametrize("flags", [flags for flags in FLAGS if "max_norm" not in flags], ids=str)
@each_kind
@each_case
def test_every_rule(cls, variant, backend, flags):
    plain, other = two(cls, backend=backend, **{"lr": 0.05, **variant, **flags})
    fastopt.step_in_backward(other)
    for optimizer in (plain, other):
        train(optimizer, range(4), StepLR(optimizer, 1, 0.5))
    assert_same(plain, other)
    assert all(param.grad is None for param in parameters(other) if param.numel())


@each_kind
@each_mode
def test_every_mode(dtype, master, states, backend):
    """Random numbers go by the place in the optimizer, in any order of the gradients."""
    settings = {"master_weights": master, "state_dtype": states, "backend": backend, "seed": 3}
    plain, other = two(fastopt.AdamW, dtype, **settings)
    handle = fastopt.step_in_backward(other)
    for optimizer in (plain, other):
        train(optimizer, range(3))
    handle.remove()
    for optimizer in (plain, other):
        train(optimizer, range(3, 5))
    assert_same(plain, other)


@each_kind
def test_clip_each(backend):
    """As if each parameter had an optimizer of its own."""
    settings = {"max_norm": 0.5, "backend": backend}
    other = fastopt.AdamW(new_params(SHAPES), **settings)
    each = [fastopt.AdamW([param], **settings) for param in new_params(SHAPES)]
    fastopt.step_in_backward(other, clip_each=True)
    for step in range(4):
        train(other, [step])
        loss_of([p for optimizer in each for p in parameters(optimizer)], step).backward()
        for optimizer in each:
            optimizer.step()
            optimizer.zero_grad()
    assert_same_bits(parameters(other), [p for optimizer in each for p in parameters(optimizer)])


@each_kind
def test_clip_each_of_what_was_only_accumulated(backend):
    """The optimizer's step clips that one by one, too."""
    params = new_params([(3,)] * 3)
    optimizer = fastopt.SGD(params, lr=1.0, max_norm=1.0, backend=backend)
    handle = fastopt.step_in_backward(optimizer, clip_each=True)
    before = [param.detach().clone() for param in params]
    handle.accumulates = True
    sum(100 * param.sum() for param in params).backward()
    handle.accumulates = False
    (100 * params[0].sum()).backward()
    optimizer.step()
    for param, old in zip(params, before, strict=True):
        torch.testing.assert_close((param - old).norm(), torch.tensor(1.0))


# Which parameters, and when


def test_the_handle_keeps_the_optimizer():
    (param,) = new_params([(3,)])
    handle = fastopt.step_in_backward(fastopt.SGD([param], lr=1.0))
    gc.collect()
    param.sum().backward()
    assert param.grad is None
    with pytest.raises(AttributeError):
        handle.accumulate = True
    del handle
    gc.collect()
    checks.warn_once.cache_clear()
    with pytest.warns(match="optimizer of step_in_backward is no more"):
        param.sum().backward()
    assert param.grad is not None


def test_clip_each_needs_a_bound():
    with pytest.raises(ValueError, match="no group has one: set it"):
        fastopt.step_in_backward(fastopt.SGD(new_params([(3,)])), clip_each=True)


def test_one_gradient_at_a_time():
    optimizer = fastopt.AdamW(new_params([(9,)] * 8))
    fastopt.step_in_backward(optimizer)
    seen = []

    def look(param):
        assert all(each.grad is None for each in parameters(optimizer))
        seen.append(param)

    for param in parameters(optimizer):
        param.register_post_accumulate_grad_hook(look)
    train(optimizer, range(2))
    assert len(seen) == 16


@each_backend
def test_what_has_no_hook_is_left_to_step(backend):
    """Parameters that were frozen, or were added since."""
    optimizers = two(fastopt.AdamW, backend=backend)
    for i, optimizer in enumerate(optimizers):
        frozen = parameters(optimizer)[1].requires_grad_(False)
        if i:
            fastopt.step_in_backward(optimizer)
        train(optimizer, [0])
        frozen.requires_grad_()
        optimizer.add_param_group({"params": new_params([(4,)]), "lr": 0.5})
        train(optimizer, [1, 2])
    assert_same(*optimizers)


@each_backend
def test_a_parameter_that_stands_twice(backend):
    optimizers = []
    for i in range(2):
        (param,) = new_params([(5,)])
        with pytest.warns(UserWarning, match="duplicate parameters"):
            optimizer = fastopt.AdamW([param, param], backend=backend)
        if i:
            fastopt.step_in_backward(optimizer)
        for step in range(4):
            loss_of([param], step).backward()
            optimizer.step()
            optimizer.zero_grad()
        optimizers.append(optimizer)
    assert_same(*optimizers)


def test_a_parameter_that_was_taken_out_keeps_its_gradient():
    optimizer = fastopt.AdamW(new_params(SHAPES))
    fastopt.step_in_backward(optimizer)
    out = optimizer.param_groups[0]["params"].pop(1)
    before = out.detach().clone()
    loss_of([out, *parameters(optimizer)], 0).backward()
    assert out.grad is not None
    assert_same_bits([out], [before])
    assert all(optimizer.state[param] for param in parameters(optimizer) if param.numel())


@each_backend
def test_accumulation(backend):
    plain, other = two(fastopt.AdamW, backend=backend)
    handle = fastopt.step_in_backward(other)
    for step in range(3):
        for optimizer in (plain, other):
            for part in range(3):
                handle.accumulates = part < 2
                loss_of(parameters(optimizer), 10 * step + part).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_same(plain, other)


def test_a_state_dict_between_steps():
    plain, other = two(fastopt.AdamW, BF16, master_weights="stochastic")
    fastopt.step_in_backward(other)
    for optimizer in (plain, other):
        train(optimizer, range(2))
        saved = copy.deepcopy(optimizer.state_dict())
        train(optimizer, [2])
        optimizer.load_state_dict(saved)
        train(optimizer, [3])
        optimizer.state[parameters(optimizer)[0]] = {}
        optimizer.backend = "reference"
        train(optimizer, [4, 5])
    assert_same(plain, other)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_make_ordinary_steps(copied):
    plain, other = two(fastopt.AdamW)
    fastopt.step_in_backward(other)
    train(plain, range(2))
    train(other, range(2))
    twin = copied(other)
    loss_of(parameters(twin), 2).backward()
    assert parameters(twin)[0].grad is not None
    twin.step()
    train(plain, [2])
    train(other, [2])
    assert_same(plain, other)
    assert_same(plain, twin)
    fastopt.step_in_backward(twin)


def test_memory_is_given_back():
    optimizer = fastopt.AdamW(new_params([(5,)]))
    fastopt.step_in_backward(optimizer)
    train(optimizer, range(2))
    (param,) = parameters(optimizer)
    optimizer = weakref.ref(optimizer)
    gc.collect()
    assert optimizer() is None
    checks.warn_once.cache_clear()
    with pytest.warns(match="no more"):
        loss_of([param], 0).backward()  # as any other parameter
    fastopt.step_in_backward(fastopt.SGD([param]))
    param = weakref.ref(param)
    gc.collect()
    assert param() is None


# Ways of backward


def new_model():
    torch.manual_seed(0)
    tied = torch.nn.Linear(4, 4)
    return torch.nn.Sequential(tied, torch.nn.Tanh(), tied, torch.nn.Linear(4, 2))


def checkpointed(model, x):
    return torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)


WAYS = {
    "plain": lambda model, x: model(x).square().sum().backward(),
    "create_graph": lambda model, x: model(x).square().sum().backward(create_graph=True),
    "compiled": lambda model, x: (
        torch.compile(model, backend="aot_eager")(x).square().sum().backward()
    ),
    "checkpoint": lambda model, x: checkpointed(model, x).square().sum().backward(),
    "in a thread": lambda model, x: in_threads(model(x).square().sum().backward),
}


def in_threads(*functions):
    threads = [threading.Thread(target=function) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph:UserWarning")
@pytest.mark.parametrize("way", WAYS)
def test_ways_of_backward(way):
    optimizers = []
    for i in range(2):
        model = new_model()
        optimizer = fastopt.AdamW(model.parameters(), lr=0.1)
        if i:
            fastopt.step_in_backward(optimizer)
        for step in range(3):
            WAYS[way](model, torch.randn(3, 4, generator=torch.Generator().manual_seed(step)))
            assert all((param.grad is None) == bool(i) for param in model.parameters())
            optimizer.step()
            optimizer.zero_grad()
        optimizers.append(optimizer)
    assert_same(*optimizers)


def test_threads():
    """Two at once, on models that share an optimizer but no parameter."""
    plain, other = two(fastopt.AdamW, shapes=[(300,)] * 40)
    fastopt.step_in_backward(other)
    for step in range(5):
        halves = parameters(other)[:20], parameters(other)[20:]
        in_threads(*(loss_of(half, step).backward for half in halves))
        for half in (parameters(plain)[:20], parameters(plain)[20:]):
            loss_of(half, step).backward()
        plain.step()
        plain.zero_grad()
    assert_same(plain, other)


# Steps that raise


@each_backend
def test_a_step_that_raises(backend):
    """Parameters whose gradients came before it were updated; a good step follows."""
    plain, other = two(fastopt.AdamW, shapes=[(3,)] * 4, backend=backend)
    handle = fastopt.step_in_backward(other)
    train(plain, [0])
    train(other, [0])
    bad = parameters(other)[1]
    state = other.state[bad]["exp_avg"]
    other.state[bad]["exp_avg"] = torch.zeros(7)
    before = [param.detach().clone() for param in parameters(other)]
    with pytest.raises(RuntimeError, match=r"parameter 1 of group 0.*'exp_avg'"):
        loss_of(parameters(other), 1).backward()
    changed = [not torch.equal(p, q) for p, q in zip(parameters(other), before, strict=True)]
    assert not changed[1]
    assert changed == [bool(other.state[p]["step"] == 2) for p in parameters(other)]
    other.state[bad]["exp_avg"] = state
    handle.remove()
    plain.zero_grad()
    loss_of(parameters(plain), 1).backward()
    for param, is_changed in zip(parameters(plain), changed, strict=True):
        param.grad = param.grad if is_changed else None
    plain.step()
    fastopt.step_in_backward(other)
    for optimizer in (plain, other):
        train(optimizer, [2, 3])
    assert_same(plain, other)


def test_max_norm_that_is_set_later():
    optimizer = fastopt.AdamW(new_params(SHAPES))
    fastopt.step_in_backward(optimizer)
    train(optimizer, [0])
    optimizer.param_groups[0]["max_norm"] = 1.0
    with unchanged(optimizer), pytest.raises(ValueError, match=r"max_norm=1.0 of group 0"):
        loss_of(parameters(optimizer), 1).backward()
    optimizer.param_groups[0].update(max_norm=None, lr=-1.0)
    with unchanged(optimizer), pytest.raises(ValueError, match="learning rate: -1"):
        loss_of(parameters(optimizer), 1).backward()
    optimizer.param_groups[0]["lr"] = 0.1
    train(optimizer, [1])


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("scaler_class", [fastopt.GradScaler, torch.amp.GradScaler])
def test_scalers_are_refused(scaler_class, unscale):
    optimizer = fastopt.AdamW(new_params(SHAPES))
    handle = fastopt.step_in_backward(optimizer)
    scaler = scaler_class("cpu", init_scale=4.0)
    scaler.scale(loss_of(parameters(optimizer), 0)).backward()
    if unscale:
        scaler.unscale_(optimizer)
    with unchanged(optimizer), pytest.raises(RuntimeError, match=r"a GradScaler cannot.*scaled"):
        scaler.step(optimizer)
    handle.remove()
    scaler.update(4.0)
    scaler.scale(loss_of(parameters(optimizer), 0)).backward()
    scaler.step(optimizer)


def test_what_is_refused():
    clipping = fastopt.AdamW(new_params(SHAPES), max_norm=1.0)
    with pytest.raises(ValueError, match=r"max_norm=1.0 of group 0 .*clip_each=True"):
        fastopt.step_in_backward(clipping)
    with pytest.raises(TypeError, match="takes an optimizer of fastopt, not .*torch.optim"):
        fastopt.step_in_backward(torch.optim.AdamW(new_params(SHAPES)))
    optimizer = fastopt.AdamW(new_params(SHAPES))
    handle = fastopt.step_in_backward(optimizer)
    for one in (optimizer, fastopt.SGD(parameters(optimizer))):
        with pytest.raises(RuntimeError, match=r"parameter 0 .*in backward already: remove"):
            fastopt.step_in_backward(one)
    handle.remove()
    handle.remove()
    parameters(optimizer)[2]._fsdp_flattened = True
    with pytest.raises(RuntimeError, match="parameter 2 .*FullyShardedDataParallel.*fully_shard"):
        fastopt.step_in_backward(optimizer)
    assert not any(param._post_accumulate_grad_hooks for param in parameters(optimizer))
    assert not entries(optimizer)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@each_backend
def test_interrupted(backend):
    """Anywhere in Python: each parameter was updated or not, and steps go on from there."""
    for at in itertools.count(step=23):
        plain, other = two(fastopt.AdamW, BF16, [(3,)] * 3, backend=backend)
        fastopt.step_in_backward(other)
        train(plain, [0])
        train(other, [0])
        interruption = Interruption(at)
        with contextlib.suppress(KeyboardInterrupt), interruption:
            loss_of(parameters(other), 1).backward()
        made = [bool(other.state[param]["step"] == 2) for param in parameters(other)]
        plain.zero_grad()
        loss_of(parameters(plain), 1).backward()
        for param, is_made in zip(parameters(plain), made, strict=True):
            param.grad = param.grad if is_made else None
        plain.step()
        assert_same(plain, other)
        for optimizer in (plain, other):
            train(optimizer, [2])
        assert_same(plain, other)
        if interruption.left is not None:
            break
    assert at > 100


def test_a_parameter_that_backward_needs_afterwards():
    """autograd notices."""
    weight, other = new_params([(3, 3), (3,)])
    optimizer = fastopt.SGD([weight, other])
    fastopt.step_in_backward(optimizer)
    y = torch.ones(3, requires_grad=True) * other
    loss = ((y * other) @ weight.detach() @ weight).sum()
    assert loss.isfinite()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_wrapper():
    """Of the optimizer's own class, as Lightning makes them."""
    plain, other = two(fastopt.AdamW)
    wrapper = type("Wrapper", (type(other),), {"__init__": lambda self: None})()
    vars(wrapper).update(vars(other))
    handle = fastopt.step_in_backward(wrapper)
    for step in range(3):
        loss_of(parameters(wrapper), step).backward()
        wrapper.step()
    handle.remove()
    train(plain, range(3))
    assert_same(plain, other)
