"""Under torch.compile, steps and all else stay outside of the graphs: called, never traced."""

import subprocess
import sys

import pytest
import torch
from helpers import assert_same_bits, new_params, set_grads, torch_class
from torch._dynamo.utils import counters

import fastopt

# With the backend "eager", which computes as uncompiled code does, results have the same bits.


@pytest.fixture(autouse=True)
def _nothing_compiled():
    torch._dynamo.reset()
    counters.clear()


def breaks():
    """How often a graph ended, by why."""
    return dict(counters["graph_break"])


def iterate(cls, compiled, scheduler=None, hooks=False, **settings):
    """What 6 iterations of training leave, and whether the hooks were traced."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))
    optimizer = cls(model.parameters(), **settings)
    called = []
    if hooks:
        optimizer.register_step_pre_hook(lambda *_: called.append(torch.compiler.is_compiling()))
        optimizer.register_step_post_hook(lambda *_: called.append(torch.compiler.is_compiling()))

    def train(inputs):
        loss = model(inputs).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    if scheduler is not None:
        scheduler = scheduler(optimizer)
    if compiled:
        train = torch.compile(train, backend="eager")
    losses = []
    for _ in range(6):
        losses.append(train(torch.ones(2, 4)).detach())
        if scheduler is not None:
            scheduler.step()
    return [*losses, *(param.detach() for param in model.parameters())], called


def halved(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)


@pytest.mark.parametrize(
    "case",
    [{}, {"max_norm": 0.1}, {"lr": torch.tensor(0.1)}, {"scheduler": halved}, {"hooks": True}],
    ids=str,
)
@pytest.mark.parametrize("cls", fastopt.OPTIMIZERS)
def test_training(cls, case):
    """One break at the step, as at `backward` and `zero_grad`, and nothing compiled again."""
    case = {"lr": 0.1, **case}
    wanted, _ = iterate(cls, compiled=False, **case)
    with torch._dynamo.config.patch(error_on_recompile=True):
        found, called = iterate(cls, compiled=True, **case)
    assert_same_bits(found, wanted)
    assert sum(breaks().values()) == 3, breaks()
    assert counters["stats"]["unique_graphs"] == 1  # the forward pass
    assert called == ([False] * 12 if case.get("hooks") else [])


def test_fewer_breaks_than_with_torch():
    iterate(torch_class(fastopt.AdamW), compiled=True)
    assert sum(breaks().values()) >= 3


def check_one_break(function, *arguments):
    """Called between two operations that are compiled, it is what ends the one graph."""

    @torch.compile(backend="eager")
    def compiled(x):
        y = x * 2
        result = function(*arguments)
        return y + 1, result

    for _ in range(2):
        y, result = compiled(torch.ones(2))
    assert_same_bits([y], [torch.full((2,), 3.0)])
    assert sum(breaks().values()) == 1, breaks()
    assert counters["stats"]["unique_graphs"] == 2
    return result


def stepped(**settings):
    params = new_params([(4,), (3, 2)])
    optimizer = fastopt.AdamW(params, lr=0.1, **settings)
    set_grads(params, 0)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize(
    "name", ["state_dict", "torch_state_dict", "load_state_dict", "zero_grad", "share_memory"]
)
def test_methods(name):
    optimizer = stepped() if name != "share_memory" else fastopt.Adagrad(new_params([(3,)]))
    arguments = [optimizer.state_dict()] if name == "load_state_dict" else []
    check_one_break(getattr(optimizer, name), *arguments)


def test_master_params():
    optimizer = stepped()
    found = check_one_break(optimizer.master_params)
    assert_same_bits(list(found), list(optimizer.master_params()))


def test_grad_norm():
    optimizer = stepped(max_norm=1.0)
    norm = fastopt.get_total_norm([p.grad for p in optimizer.param_groups[0]["params"]])

    @torch.compile(backend="eager")
    def compiled():
        optimizer.step()
        return optimizer.grad_norm + 1

    for _ in range(2):
        assert_same_bits([compiled()], [norm + 1])
    assert sum(breaks().values()) == 1, breaks()


def test_add_param_group():
    optimizer = stepped()
    group = {"params": new_params([(2,)])}
    torch.compile(optimizer.add_param_group, backend="eager")(group)
    assert optimizer.param_groups[1] is group
    assert not breaks()


def test_an_optimizer_made_in_compiled_code():
    params = new_params([(4,)])
    optimizer = torch.compile(lambda: fastopt.AdamW(params, lr=0.1), backend="eager")()
    set_grads(params, 0)
    optimizer.step()
    found = [params[0].detach()]
    params = new_params([(4,)])
    optimizer = fastopt.AdamW(params, lr=0.1)
    set_grads(params, 0)
    optimizer.step()
    assert_same_bits(found, [params[0].detach()])


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (fastopt.clip_grad_norm_, [0.5]),
        (fastopt.clip_grad_value_, [0.1]),
        (fastopt.get_total_norm, []),
        (fastopt.prepare, []),
    ],
)
def test_functions(function, arguments):
    model = torch.nn.Linear(3, 2)
    set_grads(model.parameters(), 0)
    tensors = [param.detach() for param in model.parameters()]
    first = {fastopt.get_total_norm: tensors, fastopt.prepare: model}
    check_one_break(function, first.get(function, list(model.parameters())), *arguments)


@pytest.mark.parametrize("settings", [{}, {"max_norm": 1.0}], ids=str)
def test_scaler(settings):
    optimizer = stepped(**settings)
    scaler = fastopt.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.zeros(()))

    @torch.compile(backend="eager")
    def compiled():
        scaler.step(optimizer)
        scaler.update()

    for _ in range(3):
        compiled()
    (state, _) = optimizer.state.values()
    assert state["step"] == 4
    assert sum(breaks().values()) == 1, breaks()


def test_a_compiled_step():
    params = new_params([(4,)])
    optimizer = fastopt.AdamW(params)
    step = torch.compile(optimizer.step, backend="eager")
    set_grads(params, 0)
    for _ in range(2):
        step()
    assert optimizer.state[params[0]]["step"] == 2
    assert not breaks()


def test_closure():
    """It is called, not traced, but a model in it that is compiled for itself stays so."""
    model = torch.nn.Linear(4, 1)
    optimizer = fastopt.SGD(model.parameters(), lr=0.1)
    compiled = torch.compile(model, backend="eager", fullgraph=True)

    def closure():
        optimizer.zero_grad()
        loss = compiled(torch.ones(2, 4)).square().mean()
        loss.backward()
        return loss

    @torch.compile(backend="eager")
    def train():
        return optimizer.step(closure)

    losses = [train().item() for _ in range(3)]
    assert sorted(losses, reverse=True) == losses
    assert sum(breaks().values()) == 1, breaks()
    assert counters["stats"]["unique_graphs"] == 1


def test_a_subclass_with_its_own_step():
    class Twice(fastopt.SGD):
        def step(self, closure=None):
            super().step()
            super().step()

    params = new_params([(4,)])
    before = params[0].detach().clone()
    params[0].grad = torch.ones(4)
    optimizer = Twice(params, lr=1.0)
    check_one_break(optimizer.step)
    torch.testing.assert_close(params[0].detach(), before - 4)


def test_the_compiler_is_not_imported():
    """It takes a second; optimizers of torch, as ours, import it when they are made."""
    code = (
        "import sys, torch, fastopt\n"
        "p = torch.ones(3, requires_grad=True); p.grad = torch.ones(3)\n"
        "fastopt.clip_grad_norm_([p], 1.0); fastopt.prepare(torch.nn.Linear(2, 2))\n"
        "assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
