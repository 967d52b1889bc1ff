"""The recipes, but for those that need more than a run in the place of torch.optim."""

import functools

import pytest
import torch
from recipes import NAMES, check_as_torch

pytestmark = pytest.mark.frameworks

ELSEWHERE = ["Averaged weights", "Stochastic weight averaging", "DeepSpeed"]


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ELSEWHERE])
def test_as_torch(name, monkeypatch):
    if name == "torch.compile":  # which takes 20 s with its default backend
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    check_as_torch(name)
