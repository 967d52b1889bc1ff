"""Accelerate's wrappers: what they save, scale, clip and schedule."""

import math

import pytest
import recipes
import torch
from helpers import BF16, assert_near_torch, assert_same_bits

import fastopt

accelerate = pytest.importorskip("accelerate")
pytestmark = pytest.mark.frameworks


def prepare(make, dtype=torch.float32, scaler=None):
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="fp16" if scaler else "no")
    if scaler:  # which Accelerate itself makes on GPUs only
        accelerator.scaler, accelerator.native_amp = scaler, True
    model = recipes.new_model(dtype)
    optimizer = make(model.parameters())
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    return accelerator, *accelerator.prepare(model, optimizer, schedule)


def train(accelerator, model, optimizer, schedule, steps, max_norm=None, overflow=None):
    """Makes steps, and gives their learning rates."""
    for step in steps:
        optimizer.zero_grad()
        factor = math.inf if step == overflow else 1.0
        accelerator.backward(recipes.loss(model, step) * factor)
        if max_norm is not None:
            accelerator.clip_grad_norm_(model.parameters(), max_norm)
        yield optimizer.param_groups[0]["lr"]
        optimizer.step()
        schedule.step()


@recipes.each_mode
def test_resume(settings):
    def make(params):
        return fastopt.AdamW(params, lr=0.01, max_norm=0.5, **settings)

    whole, resumed = prepare(make, BF16), prepare(make, BF16)
    list(train(*whole, range(3)))
    whole[0].save_state("saved")
    rates = list(train(*whole, range(3, 6)))
    list(train(*resumed, range(7, 9)))
    resumed[0].load_state("saved")
    assert list(train(*resumed, range(3, 6))) == rates == [0.01 / 8, 0.01 / 16, 0.01 / 32]
    assert_same_bits(resumed[1].parameters(), whole[1].parameters())


@pytest.mark.parametrize("max_norm", [None, 0.5])
@pytest.mark.parametrize("scaler_class", [torch.amp.GradScaler, fastopt.GradScaler])
def test_overflow(scaler_class, max_norm):
    """Skipped by torch's scaler; by the step with ``max_norm`` or our scaler: schedules go on."""

    def ours(params):
        return fastopt.AdamW(params, lr=0.01, max_norm=max_norm)

    def theirs(params):
        return torch.optim.AdamW(params, lr=0.01)

    found = prepare(ours, scaler=scaler_class("cpu", init_scale=2.0**8))
    wanted = prepare(theirs, scaler=torch.amp.GradScaler("cpu", init_scale=2.0**8))
    if max_norm is not None or scaler_class is fastopt.GradScaler:
        wanted[3].step_with_optimizer = False
    rates = list(train(*found, range(5), max_norm=None if max_norm else 0.5, overflow=2))
    assert rates == list(train(*wanted, range(5), max_norm=0.5, overflow=2))
    assert_near_torch(found[1].parameters(), wanted[1].parameters())
    assert found[0].scaler.get_scale() == 2.0**7
