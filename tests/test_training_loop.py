"""Around `step`: schedulers, hooks, closures, groups, clipping, tensors that come, go and move."""

import collections
import functools
import gc
import weakref

import pytest
import torch
from helpers import (
    BACKENDS,
    CASES,
    assert_near_torch,
    assert_same_bits,
    new_params,
    set_grads,
    take_steps,
    torch_class,
)
from torch.optim import lr_scheduler
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

import fastopt

STEPS = range(8)
SHAPES = [(7, 5), (300,), (), (0,), (3, 2)]

each_case = pytest.mark.parametrize(("cls", "variant"), CASES, ids=str)
each_class = pytest.mark.parametrize("cls", fastopt.OPTIMIZERS)
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def agrees_with_torch(cls, variant, backend, run, **settings):
    """Calls ``run`` with the constructor of ours and of torch's: both return the same tensors."""
    settings = {"lr": 0.05, "weight_decay": 0.1, **variant, **settings}
    ours = run(functools.partial(cls, backend=backend, **settings))
    theirs = run(functools.partial(torch_class(cls), foreach=False, **settings))
    assert_near_torch([t.detach() for t in ours], [t.detach() for t in theirs])


def all_params(optimizer):
    return [param for group in optimizer.param_groups for param in group["params"]]


# Schedulers


SCHEDULERS = {
    "LambdaLR": lambda opt: lr_scheduler.LambdaLR(opt, lambda step: 1 / (1 + step)),
    "OneCycleLR": lambda opt: lr_scheduler.OneCycleLR(
        opt,
        max_lr=0.1,
        total_steps=10,
        cycle_momentum="momentum" in opt.defaults or "betas" in opt.defaults,
    ),
    "SequentialLR": lambda opt: lr_scheduler.SequentialLR(
        opt,
        [lr_scheduler.LinearLR(opt, total_iters=3), lr_scheduler.CosineAnnealingLR(opt, T_max=5)],
        milestones=[4],
    ),
}


@pytest.mark.filterwarnings("error")  # torch's, of a step that it has not seen
@pytest.mark.parametrize("tensor_lr", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("name", SCHEDULERS)
@each_backend
@each_case
def test_schedulers(cls, variant, backend, name, tensor_lr):
    def run(make):
        optimizer = make(new_params(SHAPES), lr=torch.tensor(0.05) if tensor_lr else 0.05)
        lr = optimizer.param_groups[0]["lr"]
        scheduler = SCHEDULERS[name](optimizer)
        for step in STEPS:
            take_steps(optimizer, [step])
            scheduler.step()
        if tensor_lr:
            assert optimizer.param_groups[0]["lr"] is lr
        return all_params(optimizer)

    agrees_with_torch(cls, variant, backend, run)


@pytest.mark.parametrize("cls", [fastopt.SGD, fastopt.RMSprop, fastopt.Adam, fastopt.AdamW])
def test_one_cycle_moves_momentum(cls):
    """Or else the test above would not notice that it is read at each step."""
    optimizer = cls(new_params([(3,)]))
    scheduler = SCHEDULERS["OneCycleLR"](optimizer)
    seen = set()
    for step in STEPS:
        take_steps(optimizer, [step])
        group = optimizer.param_groups[0]
        seen.add(group["betas"][0] if "betas" in group else group["momentum"])
        scheduler.step()
    assert len(seen) > 3


@each_case
def test_reduce_on_plateau(cls, variant):
    def run(make):
        optimizer = make(new_params(SHAPES))
        scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, patience=1)
        for step in STEPS:
            take_steps(optimizer, [step])
            scheduler.step(1.0)
        assert optimizer.param_groups[0]["lr"] < 0.01
        return all_params(optimizer)

    agrees_with_torch(cls, variant, "auto", run)


@each_backend
@each_case
def test_tensor_lr_changed_in_place(cls, variant, backend):
    def run(optimizer, lr):
        for step, value in enumerate([0.1, 0.01, 0.0, 0.5]):
            lr(value)
            take_steps(optimizer, [step])
        return all_params(optimizer)

    tensor = torch.tensor(1.0, dtype=torch.float64)
    with_tensor = cls(new_params(SHAPES), lr=tensor, backend=backend, **variant)
    found = run(with_tensor, tensor.fill_)
    with_number = cls(new_params(SHAPES), backend=backend, **variant)
    wanted = run(with_number, lambda lr: with_number.param_groups[0].update(lr=lr))
    assert_same_bits(found, wanted)


@each_backend
@each_case
def test_every_setting_is_read_at_each_step(cls, variant, backend):
    """Also those that are tensors."""

    def run(make):
        optimizer = make(new_params(SHAPES))
        group = optimizer.param_groups[0]
        for step in STEPS:
            group["lr"] = 0.1 / (step + 1)
            group["weight_decay"] = 0.1 * (step % 3)
            group["maximize"] = step % 4 == 1
            for name in ("momentum", "alpha"):
                if group.get(name):
                    group[name] *= 0.9
            if "betas" in group:
                group["betas"] = (0.9 ** (step + 1), 0.99 ** (step + 1))
            take_steps(optimizer, [step])
        return all_params(optimizer)

    agrees_with_torch(cls, variant, backend, run)


@each_backend
def test_momentum_comes_and_goes(backend):
    """Buffers start where it becomes non-zero, and stay meanwhile where it is 0."""

    def run(make):
        optimizer = make(new_params(SHAPES))
        for step, momentum in enumerate([0.0, 0.9, 0.9, 0.0, 0.5, 0.0, 0.0, 0.9]):
            optimizer.param_groups[0]["momentum"] = momentum
            take_steps(optimizer, [step])
        return all_params(optimizer)

    agrees_with_torch(fastopt.SGD, {"dampening": 0.1}, backend, run)


# Hooks and closures


@each_class
def test_hooks(cls):
    """Of the optimizer and of all optimizers, before and after, each once a step."""
    optimizer = cls(new_params([(3,)]), max_norm=1.0)
    (param,) = all_params(optimizer)
    calls = []

    def hook(name):
        def called(hooked, args, kwargs):
            assert hooked is optimizer
            calls.append((name, float(param.detach()[0])))

        return called

    handles = [
        optimizer.register_step_pre_hook(hook("pre")),
        optimizer.register_step_post_hook(hook("post")),
        register_optimizer_step_pre_hook(hook("global pre")),
        register_optimizer_step_post_hook(hook("global post")),
    ]
    try:
        before = float(param.detach()[0])
        take_steps(optimizer, range(1))
        after = float(param.detach()[0])
    finally:
        for handle in handles:
            handle.remove()
    assert before != after
    assert calls == [
        ("global pre", before),
        ("pre", before),
        ("post", after),
        ("global post", after),
    ]
    take_steps(optimizer, range(1))
    assert len(calls) == 4


@each_class
def test_a_pre_hook_may_give_the_closure(cls):
    optimizer = cls(new_params([(3,)]))
    optimizer.register_step_pre_hook(lambda opt, args, _: (args, {"closure": lambda: 7.0}))
    assert optimizer.step() == 7.0


@each_backend
@each_case
def test_closures(cls, variant, backend):
    """Called once, with gradients on; the step is taken with the gradients that it leaves."""

    def run(make):
        optimizer = make(new_params([(7, 5)]))
        (param,) = all_params(optimizer)
        losses = []

        def closure():
            assert torch.is_grad_enabled()
            optimizer.zero_grad()
            loss = param.square().sum()
            loss.backward()
            losses.append(loss)
            return loss

        for step in STEPS:
            with torch.set_grad_enabled(step % 2 == 0):
                returned = optimizer.step(closure) if step % 3 else optimizer.step(closure=closure)
                assert torch.is_grad_enabled() == (step % 2 == 0)
            assert returned is losses[step]
        assert len(losses) == len(STEPS)
        return [param]

    agrees_with_torch(cls, variant, backend, run)


@each_class
def test_an_error_in_the_closure_changes_nothing(cls):
    optimizer = cls(new_params([(3,)]))
    (param,) = take_steps(optimizer, range(2))
    before = param.detach().clone()
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)
    assert_same_bits([param.detach()], [before])
    assert optimizer.step() is None


# Gradients


@pytest.mark.parametrize("foreach", [None, True])
@each_class
def test_zero_grad(cls, foreach):
    optimizer = cls(new_params(SHAPES), foreach=foreach)
    params = take_steps(optimizer, range(1))
    grads = [param.grad for param in params]
    optimizer.zero_grad(set_to_none=False)
    assert all(param.grad is grad for param, grad in zip(params, grads, strict=True))
    assert all((grad == 0).all() for grad in grads)
    optimizer.step()
    optimizer.zero_grad()
    assert all(param.grad is None for param in params)
    before = [param.detach().clone() for param in params]
    optimizer.step()
    assert_same_bits([param.detach() for param in params], before)


@pytest.mark.parametrize("set_to_none", [True, False])
@each_backend
@each_case
def test_backward_and_zero_grad(cls, variant, backend, set_to_none):
    """A real model, whose gradients autograd makes anew or accumulates into."""

    def run(make):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
        optimizer = make(model.parameters(), lr=0.01)
        inputs = torch.randn(16, 5)
        for _ in STEPS:
            optimizer.zero_grad(set_to_none)
            # Gradients of order 1: Adam would bring the rounding of smaller ones up to full size.
            (model(inputs).sum() + sum(p.sum() for p in model.parameters())).backward()
            optimizer.step()
        return list(model.parameters())

    agrees_with_torch(cls, variant, backend, run)


@each_backend
@each_case
def test_none_gradients_in_changing_patterns(cls, variant, backend):
    """Late first gradients, none at all in some steps, and none ever for the last parameter."""

    def run(make):
        optimizer = make(new_params([*SHAPES, (4,), (5,)]))
        params = all_params(optimizer)
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

    agrees_with_torch(cls, variant, backend, run)


@each_backend
@each_case
def test_gradients_are_left_as_they_were(cls, variant, backend):
    """Values, identity and version counter, whatever is done with them on the way."""
    params = new_params(SHAPES)
    optimizer = cls(
        params,
        weight_decay=0.1,
        maximize=True,
        max_norm=0.1,
        clip_value=0.05,
        backend=backend,
        **variant,
    )
    for step in range(3):
        set_grads(params, step)
        grads = [param.grad for param in params]
        before = [(grad.clone(), grad._version, grad.data_ptr()) for grad in grads]
        optimizer.step()
        for param, grad, (value, version, address) in zip(params, grads, before, strict=True):
            assert param.grad is grad
            assert (grad._version, grad.data_ptr()) == (version, address)
            assert_same_bits([grad], [value])


@each_backend
@each_case
def test_backward_through_a_graph_older_than_the_step_raises(cls, variant, backend):
    (param,) = new_params([(3,)])
    optimizer = cls([param], backend=backend, **variant)
    for _ in range(3):  # in the first step, and with a plan that is there already
        loss = param.square().sum()
        loss.backward(retain_graph=True)
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@each_class
def test_version_counters(cls):
    """A parameter's goes up where it was written, and only there."""
    first, second = new_params([(3,), (4,)])
    optimizer = cls([first, second])
    for step in range(3):
        set_grads([first], step)
        versions = first._version, second._version
        optimizer.step()
        assert first._version > versions[0]
        assert second._version == versions[1]


@each_backend
@each_class
def test_a_tensor_that_is_no_leaf(cls, backend):
    """torch takes it where it retains its gradient."""

    def run(make):
        source = torch.ones(3, requires_grad=True)
        param = source * 2
        param.retain_grad()
        optimizer = make([param])
        (param * torch.tensor([1.0, -2.0, 3.0])).sum().backward()
        optimizer.step()
        return [param]

    agrees_with_torch(cls, {}, backend, run)


@each_backend
@each_class
def test_a_lazily_negated_gradient(cls, backend):
    """Of complex arithmetic, for instance; also where the plan was made for a plain one."""
    if backend == "cpp":
        backend = "auto"  # "cpp" is refused, in one sentence

    def run(make):
        params = new_params([(3,), (1,), ()])
        optimizer = make(params)
        for step in range(6):
            for param in params:
                pair = torch.complex(torch.zeros(param.shape), torch.full(param.shape, 1.0 + step))
                param.grad = pair.conj().imag if step % 3 == 2 else pair.imag
                assert param.grad.is_neg() == (step % 3 == 2)
            optimizer.step()
        return params

    agrees_with_torch(cls, {}, backend, run)


# Param groups


@each_backend
@each_case
def test_groups_with_settings_of_their_own(cls, variant, backend):
    """Empty ones among them."""

    def run(make):
        params = new_params([(3,), (4,), (5, 2), (6,)])
        optimizer = make(
            [
                {"params": params[:1], "lr": 0.2},
                {"params": []},
                {"params": params[1:3], "weight_decay": 0.5, "maximize": True},
                {"params": params[3:], "lr": torch.tensor(0.3)},
                {"params": []},
            ]
        )
        take_steps(optimizer, STEPS)
        return params

    agrees_with_torch(cls, variant, backend, run)


@each_backend
@each_class
def test_nothing_to_do(cls, backend):
    """All gradients None; groups that are all empty."""
    params = new_params(SHAPES)
    before = [param.detach().clone() for param in params]
    optimizer = cls(params, max_norm=1.0, backend=backend)
    for _ in range(2):
        optimizer.step()
    assert_same_bits([param.detach() for param in params], before)
    assert optimizer.grad_norm == 0

    optimizer = cls([{"params": []}, {"params": []}], max_norm=1.0, backend=backend)
    optimizer.step()
    assert optimizer.grad_norm == 0


@each_backend
@each_class
def test_groups_rearranged(cls, backend):
    """The lists of groups and of their parameters are plain lists: they change and are replaced."""

    def run(make):
        params = new_params([(3,), (4,), (5, 2)])
        optimizer = make([{"params": params[:2]}, {"params": params[2:], "lr": 0.2}])
        take_steps(optimizer, range(2))
        optimizer.param_groups = [dict(group) for group in optimizer.param_groups]
        optimizer.param_groups[0]["lr"] = 0.3
        take_steps(optimizer, range(2, 4))
        # As many groups as before, of other parameters.
        optimizer.param_groups = [
            {**optimizer.param_groups[1], "params": params[:1]},
            {**optimizer.param_groups[0], "params": params[1:]},
        ]
        take_steps(optimizer, range(4, 6))
        moved = optimizer.param_groups[0]["params"].pop()
        optimizer.param_groups[1]["params"].append(moved)
        set_grads(params, 6)
        optimizer.step()
        del optimizer.param_groups[0]
        set_grads(params, 7)
        optimizer.step()
        return params

    agrees_with_torch(cls, {}, backend, run)


@each_backend
@each_class
def test_named_parameters(cls, backend):
    """They are kept, step as others do, and errors say their names."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
    unnamed = [torch.nn.Parameter(param.detach().clone()) for param in model.parameters()]
    optimizer = cls(model.named_parameters(), backend=backend)
    names = ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert optimizer.param_groups[0]["param_names"] == names
    found = take_steps(optimizer, STEPS)
    assert_same_bits(found, take_steps(cls(unnamed, backend=backend), STEPS))

    model[1].weight.grad = model[1].weight.grad.to_sparse()
    with pytest.raises(
        RuntimeError, match=r"parameter 2 '1\.weight' of group 0, of shape \(1, 2\)"
    ):
        optimizer.step()


@each_backend
@each_case
def test_the_same_parameter_twice_in_a_group(cls, variant, backend):
    """torch warns; each occurrence is a step of its own, one after the other."""
    (param,) = new_params([(3,)])
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = cls([param, param], backend=backend, **variant)
    (plain,) = new_params([(3,)])
    theirs = torch_class(cls)([plain], foreach=False, **variant)
    for step in range(4):
        set_grads([param], step)
        set_grads([plain], step)
        optimizer.step()
        theirs.step()
        theirs.step()
    assert_near_torch([param.detach()], [plain.detach()])
    if cls.rule.counts_steps:
        assert optimizer.state[param]["step"] == 8


# Parameters that move


@each_backend
@each_case
def test_data_replaced(cls, variant, backend):
    """By other memory, other strides, a view of the same memory, and other values in place."""

    def run(make):
        optimizer = make(new_params([(4, 4), (5,)]))
        param, other = all_params(optimizer)
        take_steps(optimizer, range(2))
        old = param.data
        param.data = param.data.clone()
        take_steps(optimizer, range(2, 4))
        param.data = param.data.t().contiguous().t()
        take_steps(optimizer, range(4, 5))
        param.data = param.data.t()
        take_steps(optimizer, range(5, 6))
        other.data = param.data[1, :].repeat(3)[2:7]
        take_steps(optimizer, range(6, 8))
        with torch.no_grad():
            other.fill_(0.5)
        take_steps(optimizer, range(8, 10))
        return [param, other, old]  # old: where it was, nothing is written any more

    agrees_with_torch(cls, variant, backend, run)


@each_backend
@each_case
def test_a_parameter_of_another_shape(cls, variant, backend):
    """As when an embedding is enlarged: its state goes, and it starts afresh."""

    def run(make):
        optimizer = make(new_params([(4, 2), (3,)]))
        params = take_steps(optimizer, range(3))
        params[0].data = torch.cat([params[0].data, torch.ones(2, 2)])
        optimizer.state.pop(params[0], None)
        return take_steps(optimizer, range(3, 6))

    agrees_with_torch(cls, variant, backend, run)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@each_backend
@each_case
def test_model_to_another_dtype(cls, variant, backend, dtype):
    """Between steps: the states go on in the type of the arithmetic."""
    model = torch.nn.Linear(5, 3)
    with torch.no_grad():
        for param, value in zip(model.parameters(), new_params([(3, 5), (3,)]), strict=True):
            param.copy_(value)
    optimizer = cls(model.parameters(), weight_decay=0.1, backend=backend, **variant)
    params = take_steps(optimizer, range(3))
    optimizer.zero_grad()
    model.to(dtype)
    assert [param.dtype for param in params] == [dtype, dtype]

    other = cls([torch.nn.Parameter(p.detach().clone()) for p in params], backend=backend)
    other.load_state_dict(optimizer.state_dict())
    found, wanted = take_steps(optimizer, range(3, 7)), take_steps(other, range(3, 7))
    assert_same_bits(found, wanted)
    dtypes = {"param_remainder": torch.int16, "step": torch.float32}
    of_states = torch.float64 if dtype == torch.float64 else torch.float32
    for state in optimizer.state.values():
        assert all(value.dtype == dtypes.get(name, of_states) for name, value in state.items())


@each_backend
@each_class
def test_parameters_that_share_memory(cls, backend):
    """Overlapping views are updated one after the other, in their order, as by torch."""

    def run(make):
        base = torch.linspace(-1, 1, 50_000)  # more than one chunk of the C++ backend
        views = [base[:30_000], base[20_000:], base[::2], base.view(500, 100).t()]
        params = [view.detach().requires_grad_() for view in views]
        optimizer = make(params)
        for step in range(3):
            set_grads(params, step)
            if step == 1:
                params[0].grad = None
            optimizer.step()
        return [base]

    # Without weight decay: it cancels against one or the other of so many gradients, and what
    # remains is rounding that Adam and RMSprop bring up to full size.
    agrees_with_torch(cls, {}, backend, run, weight_decay=0.0)


# States that move


def replaced(state, name):
    state[name] = torch.full_like(state[name], 0.25)


def data_replaced(state, name):
    state[name].data = torch.full_like(state[name], 0.25)


def moved(state, name):
    state[name] = state[name].clone()


def data_moved(state, name):
    state[name].data = state[name].data.clone()


def transposed(state, name):
    state[name].data = state[name].data.t()


def written(state, name):
    state[name].fill_(0.25)


@pytest.mark.parametrize(
    "change", [replaced, data_replaced, moved, data_moved, transposed, written]
)
@each_backend
@each_case
def test_states_changed(cls, variant, backend, change):
    """From outside, between steps; `step` too."""

    def run(make):
        optimizer = make(new_params([(6, 6), (5, 5)]))
        params = take_steps(optimizer, range(3))
        old = []
        for param in params:
            state = optimizer.state[param]
            for name in list(state):
                old.append(state[name])
                if change is transposed and name == "max_exp_avg_sq":
                    continue  # which must not be less than exp_avg_sq
                change(state, name)
        before = [t.clone() for t in old]
        take_steps(optimizer, range(3, 6))
        if change in (replaced, moved):  # what was replaced is not written any more
            assert_same_bits(old, before)
        return params

    agrees_with_torch(cls, variant, backend, run)


@pytest.mark.parametrize("convert", [int, float, torch.Tensor.double], ids=["int", "float", "fp64"])
@each_backend
@pytest.mark.parametrize("cls", [cls for cls in fastopt.OPTIMIZERS if cls.rule.counts_steps])
def test_a_step_set_by_hand(cls, backend, convert):
    """Of another type than torch's: it counts on from there as fp32."""
    optimizer = cls(new_params(SHAPES), backend=backend)
    for state in [optimizer.state[param] for param in take_steps(optimizer, range(3))]:
        state["step"] = convert(state["step"])
    wanted = take_steps(cls(new_params(SHAPES), backend=backend), range(6))
    found = take_steps(optimizer, range(3, 6))
    assert_same_bits(found, wanted)
    for param in found:
        step = optimizer.state[param]["step"]
        assert (step.dtype, float(step)) == (torch.float32, 6.0)


@pytest.mark.parametrize("how", ["clear", "replace", "delete"])
@each_backend
@each_case
def test_states_forgotten(cls, variant, backend, how):
    """As some do between phases of a training: everything starts afresh."""

    def run(make):
        optimizer = make(new_params(SHAPES))
        params = take_steps(optimizer, range(3))
        if how == "clear":
            optimizer.state.clear()
        elif how == "replace":
            optimizer.state = collections.defaultdict(dict)
        else:
            for param in params:
                optimizer.state.pop(param, None)
        take_steps(optimizer, range(3, 6))
        for name, value in optimizer.state[params[0]].items():
            assert name != "step" or value == 3
        return params

    agrees_with_torch(cls, variant, backend, run)


@each_backend
@each_case
def test_a_default_device(cls, variant, backend):
    """It is for the user's new tensors: states belong to their parameters, and steps to the CPU."""
    settings = {"max_norm": 1.0, "backend": backend, **variant}
    wanted = take_steps(cls(new_params(SHAPES), **settings), STEPS)
    optimizer = cls(new_params(SHAPES), **settings)
    for step in STEPS:
        set_grads(all_params(optimizer), step)
        with torch.device("meta"):
            optimizer.step()
    assert_same_bits(all_params(optimizer), wanted)
    for state in optimizer.state.values():
        assert all(value.device.type == "cpu" for value in state.values())
    assert optimizer.grad_norm.device.type == "cpu"


@each_class
def test_an_optimizer_can_be_freed(cls):
    """Its plan keeps neither it nor its parameters and states alive."""
    optimizer = cls(new_params(SHAPES))
    params = take_steps(optimizer, range(2))
    refs = [weakref.ref(optimizer), weakref.ref(params[0])]
    refs += [weakref.ref(value) for value in optimizer.state[params[0]].values()]
    del optimizer, params
    gc.collect()
    assert [ref() for ref in refs] == [None] * len(refs)


# Clipping


@each_backend
@each_case
def test_max_norm(cls, variant, backend):
    """As `torch.nn.utils.clip_grad_norm_` before the step; grad_norm is what that returns."""
    ours = cls(new_params(SHAPES), max_norm=2.0, backend=backend, **variant)
    theirs = torch_class(cls)(new_params(SHAPES), foreach=False, **variant)
    params, wanted = all_params(ours), all_params(theirs)
    assert ours.grad_norm is None
    for step in STEPS:
        set_grads(params, step)
        set_grads(wanted, step)
        if step == 5:  # less than max_norm: nothing is clipped
            for param in [*params, *wanted]:
                param.grad *= 1e-3
        ours.step()
        norm = torch.nn.utils.clip_grad_norm_(wanted, 2.0)
        theirs.step()
        assert (norm > 2.0) == (step != 5)
        # torch sums in fp32; see DESIGN.md for ours.
        torch.testing.assert_close(ours.grad_norm, norm, rtol=1e-6, atol=0)
        truth = torch.cat([p.grad.double().flatten() for p in params]).norm()
        torch.testing.assert_close(ours.grad_norm.double(), truth, rtol=1e-7, atol=0)
    assert_near_torch([p.detach() for p in params], [p.detach() for p in wanted])


@each_class
def test_grad_norm(cls):
    """0-dim; fp64 where a parameter is; None without max_norm; a new tensor at each step."""
    optimizer = cls(new_params([(3,)]), max_norm=1.0)
    norms = []
    for step in range(3):
        take_steps(optimizer, [step])
        norms.append(optimizer.grad_norm)
        assert (norms[-1].dtype, norms[-1].shape) == (torch.float32, ())
        assert not norms[-1].requires_grad
    assert len({float(norm) for norm in norms}) == 3
    optimizer.param_groups[0]["max_norm"] = None
    take_steps(optimizer, [3])
    assert optimizer.grad_norm is None

    for dtypes, wanted in [
        ([torch.bfloat16, torch.float16], torch.float32),
        ([torch.bfloat16, torch.float64], torch.float64),
    ]:
        optimizer = cls([p for dtype in dtypes for p in new_params([(3,)], dtype)], max_norm=1.0)
        take_steps(optimizer, [0])
        assert optimizer.grad_norm.dtype == wanted


@each_backend
@each_case
def test_max_norm_that_does_not_clip(cls, variant, backend):
    """The same bits as without; inf only measures."""
    wanted = take_steps(cls(new_params(SHAPES), backend=backend, **variant), STEPS)
    for max_norm in (1e6, float("inf")):
        optimizer = cls(new_params(SHAPES), backend=backend, max_norm=max_norm, **variant)
        assert_same_bits(take_steps(optimizer, STEPS), wanted)
        assert optimizer.grad_norm > 10


@each_backend
@each_case
def test_max_norm_of_groups(cls, variant, backend):
    """A group's own bound, or none, for the norm of all groups."""
    shapes = [(40,), (30,), (20,)]
    bounds = [2.0, None, 0.5]
    params = new_params(shapes)
    groups = [{"params": [p], "max_norm": bound} for p, bound in zip(params, bounds, strict=True)]
    optimizer = cls(groups, backend=backend, **variant)
    wanted = new_params(shapes)
    theirs = torch_class(cls)(wanted, foreach=False, **variant)
    for step in STEPS:
        set_grads(params, step)
        set_grads(wanted, step)
        optimizer.step()
        norm = torch.nn.utils.get_total_norm([p.grad for p in wanted])
        for param, bound in zip(wanted, bounds, strict=True):
            if bound is not None:
                torch.nn.utils.clip_grads_with_norm_([param], bound, norm)
        theirs.step()
        torch.testing.assert_close(optimizer.grad_norm, norm, rtol=1e-6, atol=0)
    assert_near_torch([p.detach() for p in params], [p.detach() for p in wanted])


@each_backend
@each_case
def test_clip_value(cls, variant, backend):
    """The same bits as after `torch.nn.utils.clip_grad_value_`. With max_norm: after it."""
    optimizer = cls(new_params(SHAPES), clip_value=0.5, backend=backend, **variant)
    plain = cls(new_params(SHAPES), backend=backend, **variant)
    for step in STEPS:
        take_steps(optimizer, [step])
        wanted = all_params(plain)
        set_grads(wanted, step)
        torch.nn.utils.clip_grad_value_(wanted, 0.5)
        plain.step()
    assert_same_bits(all_params(optimizer), wanted)
    assert optimizer.grad_norm is None

    both = cls(new_params(SHAPES), max_norm=10.0, clip_value=0.5, backend=backend, **variant)
    plain = cls(new_params(SHAPES), backend=backend, **variant)
    for step in STEPS:
        take_steps(both, [step])
        wanted = all_params(plain)
        set_grads(wanted, step)
        norm = torch.nn.utils.clip_grad_norm_(wanted, 10.0)
        torch.nn.utils.clip_grad_value_(wanted, 0.5)
        plain.step()
        torch.testing.assert_close(both.grad_norm, norm, rtol=1e-6, atol=0)  # before the clamp
    assert_near_torch([p.detach() for p in all_params(both)], [p.detach() for p in wanted])


@each_backend
@each_case
def test_maximize(cls, variant, backend):
    """The same bits as minimizing with negated gradients."""
    settings = {"weight_decay": 0.1, "max_norm": 5.0, "clip_value": 0.5, "backend": backend}
    found = take_steps(cls(new_params(SHAPES), maximize=True, **settings, **variant), STEPS)
    plain = cls(new_params(SHAPES), **settings, **variant)
    wanted = all_params(plain)
    for step in STEPS:
        set_grads(wanted, step)
        for param in wanted:
            param.grad.neg_()
        plain.step()
    assert_same_bits(found, wanted)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@each_backend
@each_case
def test_max_norm_of_gradients_that_are_not_finite(cls, variant, backend, bad):
    """As torch with error_if_nonfinite=False: parameters become NaN where they do there."""

    def gradients(params):
        set_grads(params, 0)
        params[1].grad[3] = bad

    ours = cls(new_params(SHAPES), max_norm=1.0, backend=backend, **variant)
    theirs = torch_class(cls)(new_params(SHAPES), foreach=False, **variant)
    gradients(all_params(ours))
    ours.step()
    gradients(all_params(theirs))
    norm = torch.nn.utils.clip_grad_norm_(all_params(theirs), 1.0)
    theirs.step()
    assert_same_bits([ours.grad_norm], [norm])
    for a, b in zip(all_params(ours), all_params(theirs), strict=True):
        assert torch.equal(a.isnan(), b.isnan())
