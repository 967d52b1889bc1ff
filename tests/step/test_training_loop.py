"""Around `step`: schedulers, hooks, closures, groups, clipping, tensors that come, go and move."""

import collections
import contextlib
import functools
import gc
import itertools
import math
import weakref

import pytest
import torch
from helpers import (
    BACKENDS,
    FP32,
    FP64,
    HALVES,
    assert_near_torch,
    assert_same_bits,
    clones,
    each_backend,
    each_case,
    each_optimizer,
    entries,
    interpreted,
    masked_out,
    new_params,
    parameters,
    set_grads,
    take_steps,
    torch_class,
    unchanged,
)
from torch.optim import lr_scheduler
from torch.optim import optimizer as torch_optimizer
from torch.testing._internal.two_tensor import TwoTensor

import fastopt

STEPS = range(8)
SHAPES = [(7, 5), (300,), (), (0,), (3, 2)]
#: Functions that make an optimizer with a constructor, step it, and return its tensors.
LIVES = {}


def life(run, *args):
    LIVES[" ".join(map(str, (run.__name__, *args)))] = lambda make: run(make, *args)


def assert_agrees_with_torch(run, cls, variant, backend):
    """A life returns the same tensors for our constructor as for torch's."""
    settings = {"lr": 0.05, "weight_decay": 0.1, **variant}
    ours = run(functools.partial(cls, backend=backend, **settings))
    theirs = run(functools.partial(torch_class(cls), foreach=False, **settings))
    assert_near_torch([t.detach() for t in ours], [t.detach() for t in theirs])


# Settings that change


def scheduled(make, scheduler, is_tensor):
    optimizer = make(new_params(SHAPES), lr=torch.tensor(0.05) if is_tensor else 0.05)
    lr = optimizer.param_groups[0]["lr"]
    if scheduler == "OneCycleLR":
        cycles = not optimizer.defaults.keys().isdisjoint(("momentum", "betas"))
        scheduler = lr_scheduler.OneCycleLR(optimizer, 0.1, 10, cycle_momentum=cycles)
    else:
        first = lr_scheduler.LinearLR(optimizer, total_iters=3)
        then = lr_scheduler.CosineAnnealingLR(optimizer, T_max=5)
        scheduler = lr_scheduler.SequentialLR(optimizer, [first, then], milestones=[4])
    for step in STEPS:
        take_steps(optimizer, [step])
        scheduler.step()
    assert (optimizer.param_groups[0]["lr"] is lr) == is_tensor
    return parameters(optimizer)


for args in itertools.product(("OneCycleLR", "SequentialLR"), (False, True)):
    life(scheduled, *args)


@life
def every_setting_is_read_at_each_step(make):
    optimizer = make(new_params(SHAPES))
    group = optimizer.param_groups[0]
    for step in STEPS:
        group["lr"] = 0.1 / (step + 1)
        group["weight_decay"] = 0.1 * (step % 3)
        group["maximize"] = step % 4 == 1
        for name in ("momentum", "alpha"):
            if group.get(name):
                group[name] *= 0.9
        # SGD's buffers start where momentum becomes non-zero, and stay meanwhile where it is 0.
        if "dampening" in group and not group["nesterov"]:
            group["momentum"] = (0.0, 0.9, 0.9, 0.0, 0.5, 0.0, 0.0, 0.9)[step]
        if "betas" in group:
            group["betas"] = (0.9 ** (step + 1), 0.99 ** (step + 1))
        take_steps(optimizer, [step])
    return parameters(optimizer)


# Hooks and closures


@each_optimizer
def test_hooks(cls):
    """Hooks of this optimizer and of all optimizers run once a step, be it one hook or several."""
    (param,) = new_params([()])
    optimizer = cls([param], max_norm=1.0)
    hooks = {
        "global pre": torch_optimizer.register_optimizer_step_pre_hook,
        "pre": optimizer.register_step_pre_hook,
        "post": optimizer.register_step_post_hook,
        "global post": torch_optimizer.register_optimizer_step_post_hook,
    }
    calls = []

    def hook(name, hooked, args, kwargs):
        assert hooked is optimizer
        calls.append((name, param.item()))

    for names in ([*hooks], *([name] for name in hooks), []):
        before = param.item()
        with contextlib.ExitStack() as handles:
            for name in reversed(names):
                handles.callback(hooks[name](functools.partial(hook, name)).remove)
            take_steps(optimizer, [0])
        assert before != param.item()
        assert calls == [(name, before if "pre" in name else param.item()) for name in names]
        calls.clear()
    optimizer.register_step_pre_hook(lambda opt, args, _: (args, {"closure": lambda: 7.0}))
    assert optimizer.step() == 7.0


# Gradients


@life
def of_a_model(make):
    """A closure, called once with gradients on, makes gradients anew or accumulates into them."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    optimizer = make(model.parameters(), lr=0.01)
    inputs = torch.randn(16, 5)
    losses = []

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad(set_to_none=len(losses) < 4)
        # Gradients of order 1: Adam would bring the rounding of smaller ones up to full size.
        losses.append(model(inputs).sum() + sum(p.sum() for p in model.parameters()))
        losses[-1].backward()
        return losses[-1]

    for step in STEPS:
        with torch.set_grad_enabled(step % 2 == 0):
            returned = optimizer.step(closure) if step % 3 else optimizer.step(closure=closure)
            assert torch.is_grad_enabled() == (step % 2 == 0)
        assert returned is losses[step]
    assert len(losses) == len(STEPS)
    return list(model.parameters())


@life
def none_gradients_in_changing_patterns(make):
    """Late first gradients, none at all in some steps, and none ever for the last parameter."""
    optimizer = make(new_params([*SHAPES, (4,), (5,)]))
    params = parameters(optimizer)
    generator = torch.Generator().manual_seed(0)
    for step in range(10):
        set_grads(params, step)
        missing = torch.rand(len(params), generator=generator) < 0.4
        for i, param in enumerate(params):
            if missing[i] or step == 4 or i == len(params) - 1:
                param.grad = None
        optimizer.step()
    if not isinstance(optimizer, (fastopt.Adagrad, torch.optim.Adagrad)):  # states at the start
        assert params[-1] not in optimizer.state
    return params


@each_backend
@each_case
def test_version_counters(cls, variant, backend):
    """A parameter's goes up by one where a step writes it, so that older graphs are refused."""
    param, without_gradient = new_params([(3,), (4,)])
    optimizer = cls([param, without_gradient], backend=backend, **variant)
    for _ in range(3):  # in the first step, and with a plan that is there already
        loss = param.square().sum()
        loss.backward(retain_graph=True)
        versions = param._version, without_gradient._version
        optimizer.step()
        assert (param._version, without_gradient._version) == (versions[0] + 1, versions[1])
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@life
def a_tensor_that_is_no_leaf(make):
    """torch takes it where it retains its gradient."""
    param = torch.ones(3, requires_grad=True) * 2
    param.retain_grad()
    optimizer = make([param])
    (param * torch.tensor([1.0, -2.0, 3.0])).sum().backward()
    optimizer.step()
    return [param]


@pytest.mark.parametrize("backend", ["auto", "reference"])
@each_optimizer
def test_lazily_negated_gradients(cls, backend):
    """Complex arithmetic makes them, also where the plan was made for plain ones."""

    def run(make):
        params = [*new_params([(3,), (1,), ()]), torch.ones(8, 2)[:, 0].requires_grad_()]
        optimizer = make(params)
        for step in range(6):
            for param in params:
                pair = torch.complex(torch.zeros_like(param), torch.full_like(param, 1.0 + step))
                param.grad = pair.conj().imag if step % 3 == 2 else pair.imag
                assert param.grad.is_neg() == (step % 3 == 2)
            assert param.grad.stride() == param.stride()
            optimizer.step()
        return params

    assert_agrees_with_torch(run, cls, {}, backend)
    with pytest.raises(RuntimeError, match="is a lazily negated view, which backend='cpp' cannot"):
        run(functools.partial(cls, backend="cpp"))


# Param groups


@life
def groups_rearranged(make):
    """The lists of groups and of their parameters are plain lists: they change and are replaced."""
    params = new_params([(3,), (4,), (5, 2), (6,)])
    optimizer = make(
        [
            {"params": params[:2], "lr": 0.2},
            {"params": []},
            {"params": params[2:3], "weight_decay": 0.5, "maximize": True},
            {"params": params[3:], "lr": torch.tensor(0.3)},
        ]
    )
    take_steps(optimizer, range(2))
    groups = optimizer.param_groups = [dict(group) for group in optimizer.param_groups]
    groups[0]["lr"] = 0.3
    take_steps(optimizer, range(2, 4))
    # As many groups as before, of other parameters.
    groups = [{**group, "params": [p]} for group, p in zip(groups, reversed(params), strict=True)]
    optimizer.param_groups = groups
    take_steps(optimizer, range(4, 6))
    groups[1]["params"].append(groups[0]["params"].pop())
    take_steps(optimizer, [6])
    del groups[0]
    take_steps(optimizer, [7])
    groups[:] = [{**groups[0], "params": tuple(params)}]
    return take_steps(optimizer, [8, 9])


@each_backend
@each_optimizer
def test_named_parameters(cls, backend):
    """They are kept, step as others do, and errors say their names."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
    unnamed = cls(clones(model.parameters()), backend=backend)
    optimizer = cls(model.named_parameters(), backend=backend)
    names = ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert optimizer.param_groups[0]["param_names"] == names
    assert_same_bits(take_steps(optimizer, STEPS), take_steps(unnamed, STEPS))
    model[1].weight.grad = model[1].weight.grad.to_sparse()
    place = r"parameter 2 '1\.weight' of group 0, of shape \(1, 2\),"
    with pytest.raises(RuntimeError, match=place):
        optimizer.step()


@each_backend
@each_case
def test_the_same_parameter_twice_in_a_group(cls, variant, backend):
    """torch warns; each occurrence is a step of its own, one after the other."""
    (param,), (plain,) = new_params([(3,)]), new_params([(3,)])
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = cls([param, param], backend=backend, **variant)
    theirs = torch_class(cls)([plain], foreach=False, **variant)
    for step in range(4):
        set_grads([param], step)
        optimizer.step()
        take_steps(theirs, [step, step])
    assert_near_torch([param.detach()], [plain.detach()])
    if cls.rule.counts_steps:
        assert optimizer.state[param]["step"] == 8


# Parameters that move


@life
def data_replaced(make):
    """By other memory, other strides, a view of the same memory, other values in place, and by more
    of it, as when an embedding is enlarged: its state is deleted, and starts afresh."""
    optimizer = make(new_params([(4, 4), (5,)]))
    param, other = take_steps(optimizer, range(2))
    old = param.data
    param.data = param.data.clone()
    take_steps(optimizer, [2])
    param.data = param.data.t().contiguous().t()
    take_steps(optimizer, [3])
    param.data = param.data.t()
    take_steps(optimizer, [4])
    other.data = param.data[1, :].repeat(3)[2:7]
    take_steps(optimizer, [5, 6])
    with torch.no_grad():
        other.fill_(0.5)
    take_steps(optimizer, [7])
    param.data = torch.cat([param.data, torch.ones(2, 4)])
    optimizer.state.pop(param, None)
    take_steps(optimizer, [8, 9])
    return [param, other, old]  # old: where it was, nothing is written any more


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@each_backend
@each_case
def test_model_to_another_dtype(cls, variant, backend, dtype):
    """Between steps: the states go on in the type of the arithmetic."""
    model = torch.nn.ParameterList(new_params([(3, 5), (3,)]))
    optimizer = cls(model.parameters(), weight_decay=0.1, backend=backend, **variant)
    params = take_steps(optimizer, range(3))
    optimizer.zero_grad()
    model.to(dtype)
    assert [param.dtype for param in params] == [dtype, dtype]

    other = cls(clones(params), backend=backend)
    other.load_state_dict(optimizer.state_dict())
    assert_same_bits(take_steps(optimizer, range(3, 7)), take_steps(other, range(3, 7)))
    dtypes = {"param_remainder": torch.int16, "step": FP32}
    of_states = FP64 if dtype == FP64 else FP32
    for state in optimizer.state.values():
        assert all(value.dtype == dtypes.get(name, of_states) for name, value in state.items())


@life
def parameters_that_share_memory(make):
    """Overlapping views are updated one after the other, in their order, as by torch."""
    base = torch.linspace(-1, 1, 20_000)  # more than one chunk of the C++ backend
    views = [base[:12_000], base[8_000:], base[::2], base.view(200, 100).t()]
    params = [view.detach().requires_grad_() for view in views]
    # Without weight decay: it cancels against one or the other of so many gradients, and what
    # remains is rounding that Adam and RMSprop bring up to full size.
    optimizer = make(params, weight_decay=0.0)
    for step in range(3):
        set_grads(params, step)
        if step == 1:
            params[0].grad = None
        optimizer.step()
    return [base]


# States that move


#: What each state becomes between steps, `step` too,
VALUES = {"0.25": lambda x: torch.full_like(x, 0.25), "same": torch.clone, "transposed": torch.t}
#: by which way;
WAYS = {
    "replaced": lambda state, name, value: state.update({name: value.clone()}),
    "data replaced": lambda state, name, value: setattr(state[name], "data", value),
    "written": lambda state, name, value: state[name].copy_(value.clone()),
}
#: or all of it is lost, and everything starts afresh.
LOSSES = {
    "cleared": lambda optimizer: optimizer.state.clear(),
    "exchanged": lambda optimizer: setattr(optimizer, "state", collections.defaultdict(dict)),
    "deleted": lambda optimizer: [optimizer.state.pop(p, None) for p in parameters(optimizer)],
}


def states(make, way, new=None):
    """What was replaced is not written any more."""
    optimizer = make(new_params([(6, 6), (5, 5)]))
    params = take_steps(optimizer, range(3))
    old = entries(optimizer)
    if way in LOSSES:
        LOSSES[way](optimizer)
    else:
        for index, name, tensor in old:
            if name != "max_exp_avg_sq" or new != "transposed":  # not to be less than exp_avg_sq
                WAYS[way](optimizer.state[params[index]], name, VALUES[new](tensor))
    before = [value.clone() for *_, value in old]
    take_steps(optimizer, range(3, 6))
    kept = {id(value) for *_, value in entries(optimizer)}
    assert all(
        id(tensor) in kept or torch.equal(tensor, copy)
        for (*_, tensor), copy in zip(old, before, strict=True)
    )
    return [*params, *(value for _, name, value in entries(optimizer) if name == "step")]


for args in (*itertools.product(WAYS, VALUES), *zip(LOSSES)):
    life(states, *args)


@pytest.mark.filterwarnings("error")  # torch's, of a step that a scheduler has not seen
@pytest.mark.parametrize("name", LIVES)
@each_backend
@each_case
def test_as_with_torch(cls, variant, backend, name):
    assert_agrees_with_torch(LIVES[name], cls, variant, backend)


STEPS_BY_HAND = {
    "int": int,
    "float": float,
    "int64": torch.Tensor.long,
    "double": torch.Tensor.double,
    "with a dimension": lambda step: step.view(1),
    "expanded": lambda step: step.view(1, 1).expand(1, 1),
    "part of an array": lambda step: torch.arange(9.0)[int(step)],
    "negated": lambda step: torch._neg_view(-step),
    "wrapper": lambda step: TwoTensor(step, step.clone()),
    "parameter": torch.nn.Parameter,
    "inference": torch.inference_mode()(torch.clone),
}


@pytest.mark.parametrize("kind", STEPS_BY_HAND)
@each_backend
@each_optimizer
def test_steps_of_any_kind(cls, backend, kind):
    """They count on from there, as fp32 on the CPU; also where the rule has no use for them."""
    optimizer = cls(new_params(SHAPES), backend=backend)
    params = take_steps(optimizer, range(3))
    for param in params:
        step = optimizer.state[param].get("step", torch.tensor(3.0))
        optimizer.state[param]["step"] = STEPS_BY_HAND[kind](step)
    for count in (4, 5):
        take_steps(optimizer, [count - 1])
        for param in params:
            found = optimizer.state[param]["step"]
            kept = (type(found), found.dtype, found.shape, found.requires_grad, found)
            assert kept == (torch.Tensor, FP32, (), False, count)
    assert_same_bits(params, take_steps(cls(new_params(SHAPES), backend=backend), range(5)))


@each_backend
def test_steps_of_several_parameters(backend):
    """Each counts its own, also where they were one number in memory."""
    optimizer = fastopt.AdamW(new_params([(3,)] * 3), backend=backend)
    params = parameters(optimizer)
    for param, step in zip(params, torch.tensor([5.0]).expand(3), strict=True):
        optimizer.state[param]["step"] = step
    take_steps(optimizer, [0])
    params[1].grad = None
    optimizer.step()
    assert [optimizer.state[param]["step"] for param in params] == [7, 6, 7]


@each_backend
@each_optimizer
def test_memory_is_given_back(cls, backend):
    """A step keeps no gradient alive, and a plan neither its optimizer nor parameters or states."""
    optimizer = cls(new_params(SHAPES), backend=backend)
    params = take_steps(optimizer, range(2))
    grads = [weakref.ref(param.grad) for param in params]
    optimizer.zero_grad()
    assert not any(grad() is not None for grad in grads)
    refs = [*map(weakref.ref, (optimizer, *params, *optimizer.state[params[0]].values()))]
    del optimizer, params
    gc.collect()
    assert not any(ref() is not None for ref in refs)


# Clipping


def negate(optimizer, value):
    for param in parameters(optimizer):
        param.grad.neg_()


CLIPPED = {"weight_decay": 0.1, "max_norm": 5.0, "clip_value": 0.5}
LR = torch.tensor(1.0, dtype=FP64)
#: Pairs of settings, with what is done before each step of the second or the first.
EQUIVALENT = {
    "maximize": [CLIPPED | {"maximize": True}, CLIPPED, None, negate],
    "clip_value": [
        *({"clip_value": 0.5}, {}, None),
        lambda optimizer, value: torch.nn.utils.clip_grad_value_(parameters(optimizer), 0.5),
    ],
    "a large max_norm": [{"max_norm": 1e6}, {}, None, None],
    "an infinite max_norm": [{"max_norm": math.inf}, {}, None, None],
    "a tensor that changes in place": [
        *({"lr": LR}, {}, lambda optimizer, value: LR.fill_(value)),
        lambda optimizer, value: optimizer.param_groups[0].update(lr=value),
    ],
}


@pytest.mark.parametrize("name", EQUIVALENT)
@each_backend
@each_case
def test_same_bits(cls, variant, backend, name):
    """Gradients are left as they were, and all that is made is where parameters are.

    A default device, which is for new tensors, changes nothing of that.
    """
    *both, before, after = EQUIVALENT[name]
    results = []
    for settings, act, device in ((both[0], before, "meta"), (both[1], after, "cpu")):
        params = new_params(SHAPES)
        optimizer = cls(params, backend=backend, **settings, **variant)
        for step, value in zip(STEPS, [0.1, 0.01, 0.0, 0.5] * 2, strict=True):
            set_grads(params, step)
            if act:
                act(optimizer, value)
            grads = [(p.grad, p.grad._version, p.grad.data_ptr()) for p in params]
            copies = [grad.clone() for grad, *_ in grads]
            with torch.device(device):
                optimizer.step()
            for param, (grad, *others), copy in zip(params, grads, copies, strict=True):
                assert param.grad is grad
                assert [grad._version, grad.data_ptr()] == others
                assert torch.equal(grad, copy)
        norm = optimizer.grad_norm
        assert norm is None if "max_norm" not in settings else norm > 10
        made = [*(value for *_, value in entries(optimizer)), *filter(None, [norm])]
        assert all(value.device.type == "cpu" for value in made)
        results.append(params)
    assert_same_bits(*results)


@pytest.mark.parametrize(
    ("bounds", "clip_value"), [([2.0] * 3, None), ([2.0, None, 0.5], None), ([10.0] * 3, 0.5)]
)
@each_backend
@each_case
def test_max_norm(cls, variant, backend, bounds, clip_value):
    """As `torch.nn.utils.clip_grad_norm_` before the step; grad_norm is what that returns.

    Each group has its own bound, or none, for the norm of all groups. clip_value comes after it.
    """
    params, copies = new_params(SHAPES), new_params(SHAPES)
    places = [slice(2), slice(2, 4), slice(4, 5)]
    groups = [{"params": params[k], "max_norm": b} for k, b in zip(places, bounds, strict=True)]
    ours = cls(groups, clip_value=clip_value, backend=backend, **variant)
    theirs = torch_class(cls)(copies, foreach=False, **variant)
    assert ours.grad_norm is None
    for step in STEPS:
        for tensors in (params, copies):
            set_grads(tensors, step)
            if step == 5:  # less than max_norm: nothing is clipped
                for param in tensors:
                    param.grad *= 1e-3
        ours.step()
        norm = torch.nn.utils.get_total_norm([p.grad for p in copies])
        for k, bound in zip(places, bounds, strict=True):
            if bound is not None:
                torch.nn.utils.clip_grads_with_norm_(copies[k], bound, norm)
        if clip_value is not None:
            torch.nn.utils.clip_grad_value_(copies, clip_value)
        theirs.step()
        assert (norm > max(filter(None, bounds))) == (step != 5)
        # torch sums in fp32; see DESIGN.md for ours.
        torch.testing.assert_close(ours.grad_norm, norm, rtol=1e-6, atol=0)
        truth = torch.cat([p.grad.double().flatten() for p in params]).norm()
        torch.testing.assert_close(ours.grad_norm.double(), truth, rtol=1e-7, atol=0)
    assert_near_torch([p.detach() for p in params], [p.detach() for p in copies])


@each_optimizer
def test_grad_norm(cls):
    """It is None without max_norm, else a new 0-dim tensor, of fp64 where a parameter is."""
    for dtypes, wanted in [([FP32], FP32), (HALVES, FP32), ([HALVES[0], FP64], FP64)]:
        optimizer = cls([p for dtype in dtypes for p in new_params([(3,)], dtype)], max_norm=1.0)
        norms = [take_steps(optimizer, [step]) and optimizer.grad_norm for step in range(3)]
        assert {(x.dtype, x.shape, x.requires_grad) for x in norms} == {(wanted, (), False)}
        assert len({float(norm) for norm in norms}) == 3
    optimizer.param_groups[0]["max_norm"] = None
    take_steps(optimizer, [3])
    assert optimizer.grad_norm is None


IN_TRITON = pytest.param(fastopt.AdamW, "triton", marks=[interpreted, *masked_out])


@pytest.mark.parametrize("dtype", [FP32, FP64], ids=str)
@pytest.mark.parametrize(("steps", "foreach"), [(0, None), (2, True)])
@pytest.mark.parametrize(
    ("cls", "backend"), [*itertools.product(fastopt.OPTIMIZERS, BACKENDS), IN_TRITON]
)
def test_no_gradients(cls, backend, steps, foreach, dtype):
    """zero_grad takes them; the norm is 0, and nothing changes; so too where groups are empty."""
    params = new_params([(3,), (4,)], dtype)
    optimizer = cls(params, max_norm=1.0, backend=backend, foreach=foreach)
    take_steps(optimizer, range(steps))
    grads = [param.grad for param in params]
    optimizer.zero_grad(set_to_none=False)
    assert all(param.grad is grad for param, grad in zip(params, grads, strict=True))
    assert all(grad is None or (grad == 0).all() for grad in grads)
    optimizer.step()
    optimizer.zero_grad()
    for _ in range(2):
        optimizer.grad_norm = None
        with unchanged(optimizer):
            optimizer.step()
        norm = optimizer.grad_norm
        assert (norm.item(), norm.dtype, norm.shape, norm.device.type) == (0, dtype, (), "cpu")

    optimizer = cls([{"params": []}, {"params": []}], max_norm=1.0, backend=backend)
    optimizer.step()
    assert optimizer.grad_norm == 0


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@each_backend
@each_case
def test_max_norm_of_gradients_that_are_not_finite(cls, variant, backend, bad):
    """As torch with error_if_nonfinite=False: parameters become NaN where they do there."""
    ours = cls(new_params(SHAPES), max_norm=1.0, backend=backend, **variant)
    theirs = torch_class(cls)(new_params(SHAPES), foreach=False, **variant)
    for optimizer in (ours, theirs):
        params = parameters(optimizer)
        set_grads(params, 0)
        params[1].grad[3] = bad
        norm = torch.nn.utils.clip_grad_norm_(params, 1.0) if optimizer is theirs else None
        optimizer.step()
    assert_same_bits([ours.grad_norm], [norm])
    assert_same_bits(*([param.isnan() for param in parameters(opt)] for opt in (ours, theirs)))


@each_backend
def test_an_infinite_max_norm_of_infinite_gradients(backend):
    """It only measures: nothing becomes NaN."""
    (param,) = new_params([(2,)])
    optimizer = fastopt.SGD([param], lr=1.0, max_norm=math.inf, backend=backend)
    wanted = [-math.inf, param[1].item() - 1]
    param.grad = torch.tensor([math.inf, 1.0])
    optimizer.step()
    assert param.tolist() == wanted
    assert optimizer.grad_norm == math.inf
