"""What is Lion's own, and what becomes of rules that a build lacks, and of no build."""

import math
import warnings
from typing import NamedTuple

import pytest
import torch
from helpers import BACKENDS, each_backend, interpreted, masked_out, new_params, take_steps

import fastopt
from fastopt.rule import Rule
from fastopt.step import checks, dispatch

EVERYWHERE = [*BACKENDS, pytest.param("triton", marks=[interpreted, *masked_out])]


@pytest.mark.parametrize("backend", EVERYWHERE)
def test_the_sign_of_zero_and_of_nan(backend):
    """A parameter stands still where the direction is 0, and shows where it is NaN."""
    param = torch.nn.Parameter(torch.ones(4))
    param.grad = torch.tensor([0.0, -0.0, math.nan, 5.0])
    fastopt.Lion([param], lr=0.25, backend=backend).step()
    assert param[[0, 1, 3]].tolist() == [1, 1, 0.75]
    assert param[2].isnan()


@each_backend
def test_decoupled_decay(backend):
    """Of a parameter without a direction, lr times weight_decay goes."""
    param = torch.nn.Parameter(torch.ones(4))
    param.grad = torch.zeros(4)
    fastopt.Lion([param], lr=0.5, weight_decay=0.5, backend=backend).step()
    assert param.tolist() == [0.75] * 4


@pytest.fixture
def without_lion(monkeypatch):
    """As an extension that was built before there was Lion, and kernels of the same age."""

    class Old:
        def __init__(self, module):
            self.module = module

        def __getattr__(self, name):
            return getattr(self.module, name)

        def rules(self):
            return {k: v for k, v in self.module.rules().items() if k != "lion"}

    load, load_triton = dispatch._load(), dispatch._load_triton()
    monkeypatch.setattr(dispatch, "_load", lambda: (Old(load[0]), load[1]))
    if load_triton[0]:
        monkeypatch.setattr(dispatch, "_load_triton", lambda: (Old(load_triton[0]), ""))
    for cached in (dispatch._lacks, checks.warn_once):
        cached.cache_clear()
    yield
    for cached in (dispatch._lacks, checks.warn_once):
        cached.cache_clear()


def test_a_rule_that_the_build_lacks(without_lion):
    """It alone is left to the reference, with one warning."""
    lion = fastopt.Lion(new_params([(5,)]))
    with pytest.warns(UserWarning, match="slow reference .* has no rule 'lion': use .* reinstall"):
        take_steps(lion, range(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        take_steps(lion, range(1, 3))
        take_steps(fastopt.AdamW(new_params([(5,)]), backend="cpp"), range(3))
    wanted = take_steps(fastopt.Lion(new_params([(5,)]), backend="reference"), range(3))
    assert torch.equal(lion.param_groups[0]["params"][0], wanted[0])
    with pytest.raises(RuntimeError, match=r"'cpp' does not work for lion: .*no rule 'lion'"):
        fastopt.Lion(new_params([(5,)]), backend="cpp")
    lion = fastopt.Lion(new_params([(5,)]))
    lion.backend = "cpp"
    with pytest.raises(RuntimeError, match=r"'cpp' does not work for lion: .*no rule 'lion'"):
        take_steps(lion, [0])


def test_a_rule_of_another_version(without_lion, monkeypatch):
    extension, _ = dispatch._load()
    other = {"adam": ("lr", "eps", "exp_avg")}
    monkeypatch.setattr(type(extension), "rules", lambda self: other)
    with pytest.raises(RuntimeError, match="the compiled extension has another rule 'adam'"):
        fastopt.AdamW(new_params([(5,)]), backend="cpp")


class SignsScalars(NamedTuple):
    lr: float
    pull: float


class Signs(fastopt.Optimizer):
    """A user's own rule, which no build has, with a hyperparameter that no other rule has."""

    rule = Rule(
        "signs",
        lambda p, g, c: (p - c.lr * g.sign() - c.pull * p, {}),
        lambda step, lr, pull: SignsScalars(lr, pull),
        SignsScalars,
        hyperparameters=("lr", "pull"),
        states=(),
        counts_steps=False,
    )

    def __init__(self, params, lr=0.25, pull=0.5, **common):
        super().__init__(params, {"lr": lr, "pull": pull}, **common)


@pytest.mark.filterwarnings("ignore:fastopt steps:UserWarning")
def test_a_rule_of_the_users_own():
    param = torch.nn.Parameter(torch.ones(2))
    param.grad = torch.tensor([3.0, -3.0])
    optimizer = Signs([param])
    optimizer.step()
    assert param.tolist() == [0.25, 0.75]
    with pytest.raises(ValueError, match="pull of param group 0 must be a finite number"):
        Signs([param], pull=-1)
    with pytest.raises(RuntimeError, match="the compiled extension has no rule 'signs'"):
        Signs([param], backend="cpp")
    optimizer.param_groups[0]["pull"] = math.nan
    with pytest.raises(ValueError, match="pull"):
        optimizer.step()
    assert param.tolist() == [0.25, 0.75]


def test_nothing_to_do_without_the_extension(monkeypatch):
    """The norm of no gradients is 0, whoever takes it."""
    monkeypatch.setattr(dispatch, "_load", lambda: (None, "there is none"))
    optimizer = fastopt.SGD([torch.nn.Parameter(torch.ones(2))], max_norm=1.0)
    optimizer.step()
    assert optimizer.grad_norm == 0
