"""What is Lion's own, and what becomes of a rule that a build lacks."""

import math
import warnings

import pytest
import torch
from helpers import BACKENDS, each_backend, interpreted, masked_out, new_params, take_steps

import fastopt
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
    with pytest.warns(UserWarning, match="slow reference .* has no rule 'lion': reinstall"):
        take_steps(lion, range(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        take_steps(lion, range(1, 3))
        take_steps(fastopt.AdamW(new_params([(5,)]), backend="cpp"), range(3))
    wanted = take_steps(fastopt.Lion(new_params([(5,)]), backend="reference"), range(3))
    assert torch.equal(lion.param_groups[0]["params"][0], wanted[0])
    with pytest.raises(RuntimeError, match=r"'cpp' does not work for lion: .*no rule 'lion'"):
        fastopt.Lion(new_params([(5,)]), backend="cpp")


def test_a_rule_of_another_version(without_lion, monkeypatch):
    extension, _ = dispatch._load()
    other = {"adam": ("lr", "eps", "exp_avg")}
    monkeypatch.setattr(type(extension), "rules", lambda self: other)
    with pytest.raises(RuntimeError, match="the compiled extension has another rule 'adam'"):
        fastopt.AdamW(new_params([(5,)]), backend="cpp")
