"""Under torch.compile, steps and all else stay outside of the graphs: called, never traced."""

import functools
import subprocess
import sys

import pytest
import torch
from helpers import assert_same_bits, new_params, parameters, set_grads, take_steps
from torch._dynamo.utils import counters

import fastopt

#: It computes as uncompiled code does, so that results have the same bits.
compiled = functools.partial(torch.compile, backend="eager")
SHAPES = [(4,), (3, 2)]


@pytest.fixture(autouse=True)
def _nothing_compiled():
    torch._dynamo.reset()
    counters.clear()


def breaks():
    """How often a graph ended."""
    return sum(counters["graph_break"].values())


def iterate(cls, wrap, everything=False, **settings):
    """What 6 iterations of training give, and whether the hooks were traced."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))
    optimizer = cls(model.parameters(), lr=torch.tensor(0.1) if everything else 0.1, **settings)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5 if everything else 1.0)
    called = []
    if everything:
        optimizer.register_step_pre_hook(lambda *_: called.append(torch.compiler.is_compiling()))
        optimizer.register_step_post_hook(lambda *_: called.append(torch.compiler.is_compiling()))

    @wrap
    def train(inputs):
        loss = model(inputs).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss, optimizer.grad_norm

    given = []
    for _ in range(6):
        given += train(torch.ones(2, 4))
        scheduler.step()
    return [*given, *model.parameters()], called


@pytest.mark.parametrize("settings", [{}, {"max_norm": 0.1}, {"everything": True}], ids=str)
@pytest.mark.parametrize("cls", fastopt.OPTIMIZERS)
def test_training(cls, settings):
    """One break at the step, as at `backward` and `zero_grad`, and nothing compiled again."""
    wanted, _ = iterate(cls, lambda function: function, **settings)
    with torch._dynamo.config.patch(error_on_recompile=True):
        found, called = iterate(cls, compiled, **settings)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    assert breaks() == 3, counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 1  # the forward pass
    assert called == ([False] * 12 if settings.get("everything") else [])


def stepped(**settings):
    optimizer = fastopt.AdamW(new_params(SHAPES), lr=0.1, **settings)
    take_steps(optimizer, [0])
    return optimizer


def check_one_break(function, *arguments):
    """Called between two operations that are compiled, it is what ends the one graph."""

    @compiled
    def around(x):
        y = x * 2
        result = function(*arguments)
        return y + 1, result

    for _ in range(2):
        y, result = around(torch.ones(2))
    assert_same_bits([y], [torch.full((2,), 3.0)])
    assert breaks() == 1, counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 2
    return result


@pytest.mark.parametrize(
    "new_call",
    [
        lambda: [stepped().state_dict],
        lambda: [stepped().torch_state_dict],
        lambda: [stepped().load_state_dict, stepped().state_dict()],
        lambda: [stepped().zero_grad],
        lambda: [stepped().master_params],
        lambda: [fastopt.Adagrad(new_params(SHAPES)).share_memory],
        lambda: [fastopt.clip_grad_norm_, parameters(stepped()), 0.5],
        lambda: [fastopt.clip_grad_value_, parameters(stepped()), 0.1],
        lambda: [fastopt.get_total_norm, new_params(SHAPES)],
        lambda: [fastopt.prepare, torch.nn.Linear(3, 2)],
    ],
)
def test_calls(new_call):
    function, *arguments = new_call()
    found = check_one_break(function, *arguments)
    if function.__name__ == "master_params":
        assert_same_bits(list(found), list(function()))


def test_a_subclass_with_its_own_step():
    class Twice(fastopt.SGD):
        def step(self, closure=None):
            super().step()
            super().step()

    (param,) = new_params([(4,)])
    before = param.detach().clone()
    param.grad = torch.ones(4)
    check_one_break(Twice([param], lr=1.0).step)
    torch.testing.assert_close(param.detach(), before - 4)


@pytest.mark.parametrize("settings", [{}, {"max_norm": 1.0}], ids=str)
def test_scaler(settings):
    optimizer = stepped(**settings)
    scaler = fastopt.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.zeros(()))

    @compiled
    def step():
        scaler.step(optimizer)
        scaler.update()

    for _ in range(3):
        step()
    assert [state["step"] for state in optimizer.state.values()] == [4, 4]
    assert breaks() == 1


def test_calls_that_are_all_that_is_compiled():
    params = new_params(SHAPES)
    optimizer = compiled(lambda: fastopt.AdamW(params, lr=0.1))()
    counters.clear()
    set_grads(params, 0)
    compiled(optimizer.step)()
    assert_same_bits(params, parameters(stepped()))
    group = {"params": new_params([(2,)])}
    compiled(optimizer.add_param_group)(group)
    assert optimizer.param_groups[1]["params"] == group["params"]
    assert breaks() == 0


def test_closure():
    """It is called, not traced, but a model in it that is compiled for itself stays so."""
    model = torch.nn.Linear(4, 1)
    optimizer = fastopt.SGD(model.parameters(), lr=0.1)
    compiled_model = compiled(model, fullgraph=True)

    def closure():
        optimizer.zero_grad()
        loss = compiled_model(torch.ones(2, 4)).square().mean()
        loss.backward()
        return loss

    train = compiled(lambda: optimizer.step(closure))
    losses = [train().item() for _ in range(3)]
    assert sorted(losses, reverse=True) == losses
    assert breaks() == 1
    assert counters["stats"]["unique_graphs"] == 1


def test_the_compiler_is_not_imported():
    """It takes a second; optimizers of torch, as ours, import it when they are made."""
    code = (
        "import sys, torch, fastopt\n"
        "p = torch.ones(3, requires_grad=True); p.grad = torch.ones(3)\n"
        "fastopt.clip_grad_norm_([p], 1.0); fastopt.prepare(torch.nn.Linear(2, 2))\n"
        "assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
