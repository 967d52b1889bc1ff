"""The recipes of docs/recipes.md, run as they stand there, with fastopt or with torch.optim."""

import re
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT, assert_near_torch, parameters
from torch.optim.optimizer import register_optimizer_step_post_hook

import fastopt

BEFORE, *NAMES = BLOCKS = {
    section.splitlines()[0]: code
    for section in (ROOT / "docs" / "recipes.md").read_text().split("\n## ")
    for code in re.findall(r"```python\n(.*?)```", section, re.DOTALL)
}


class Clipped(torch.optim.AdamW):
    """torch's optimizer after torch's clipping, with fastopt's names."""

    def __init__(self, params, max_norm=None, **settings):
        super().__init__(params, **settings)
        self.max_norm, self.grad_norm = max_norm, None

    def step(self, closure=None):
        loss = closure() if closure else None
        if self.max_norm is not None:
            self.grad_norm = torch.nn.utils.clip_grad_norm_(parameters(self), self.max_norm)
        with torch.no_grad():
            torch.optim.AdamW.step.__wrapped__(self)  # whose hooks are called by this one
        return loss


TORCH = SimpleNamespace(AdamW=Clipped)

#: What each framework must save and restore.
each_mode = pytest.mark.parametrize(
    "settings",
    [{}, {"state_dtype": "8bit"}, {"master_weights": "stochastic", "state_dtype": torch.bfloat16}],
    ids=str,
)


def new_model(dtype=torch.float32):
    """The recipes' model."""
    return run().model.to(dtype)


def loss(model, step):
    """Of the batch of this number; its gradients' norm is more than 0.5."""
    inputs = torch.randn(8, 8, generator=torch.Generator().manual_seed(step))
    return model(inputs.to(next(model.parameters()).dtype)).square().sum()


def run(*recipes, optimizers=fastopt):
    """Runs recipes, after what is before each.

    Returns:
        the names that they set, and ``steps``: learning rates and norm of each.
    """
    torch.manual_seed(0)
    names, steps = {}, []

    def note(optimizer, args, kwargs):
        if isinstance(optimizer, (fastopt.Optimizer, Clipped)):  # no container of several
            rates = [group["lr"] for group in optimizer.param_groups]
            steps.append((rates, optimizer.grad_norm))

    hook = register_optimizer_step_post_hook(note)
    try:
        for name in (BEFORE, *recipes):
            for package in re.findall(r"^(?:from|import) (\w+)", BLOCKS[name], re.MULTILINE):
                pytest.importorskip(package)
            exec(compile(BLOCKS[name], f"recipe: {name}", "exec"), names)
            names["fastopt"] = optimizers
    finally:
        hook.remove()
    return SimpleNamespace(**names, steps=steps)


def check_as_torch(name):
    """What a recipe trains is what it trains with torch.optim and clip_grad_norm_."""
    found, wanted = run(name), run(name, optimizers=TORCH)
    assert_near_torch(weights(found.model), weights(wanted.model))
    for (rates, norm), (its_rates, its_norm) in zip(found.steps, wanted.steps, strict=True):
        assert rates == its_rates
        assert (norm is None) == ("max_norm=" not in BLOCKS[name])
        if norm is not None:
            assert norm > 0.5  # or the framework has clipped, too
            torch.testing.assert_close(norm, its_norm)
    return found, wanted


def weights(model):
    """Without the biases of GPT-2's keys, whose gradients are nothing but rounding."""
    for name, param in model.named_parameters():
        yield torch.cat(param.chunk(3)[::2]) if name.endswith("c_attn.bias") else param
