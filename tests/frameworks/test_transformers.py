"""Transformers' Trainer: its checkpoints, and ``max_norm`` in place of its clipping."""

import pytest
import recipes
from helpers import BF16, FP32, assert_near_torch, assert_same_bits

import fastopt

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.frameworks


def train(settings, dtype=FP32, resume=None, **arguments):
    """Makes six steps on the recipe's data."""
    names = recipes.run("Transformers")
    trainer = transformers.Trainer(
        transformers.GPT2LMHeadModel(names.model.config).to(dtype),
        transformers.TrainingArguments("run", max_steps=6, report_to="none", **arguments),
        train_dataset=names.tokens,
        optimizer_cls_and_kwargs=(fastopt.AdamW, {"lr": 0.01, **settings}),
    )
    trainer.train(resume)
    return trainer


@recipes.each_mode
def test_resume(settings):
    whole = train(settings, BF16, save_steps=3)
    resumed = train(settings, BF16, "run/checkpoint-3")
    assert_same_bits(resumed.model.parameters(), whole.model.parameters())


def test_max_norm():
    ours = train({"max_norm": 0.25}, max_grad_norm=0.0, logging_steps=1)
    theirs = train({}, max_grad_norm=0.25, logging_steps=1)
    assert_near_torch(recipes.weights(ours.model), recipes.weights(theirs.model))
    norms, wanted = (
        [entry["grad_norm"] for entry in trainer.state.log_history[:6]]
        for trainer in (ours, theirs)
    )
    assert min(norms) > 0.25  # the Trainer's, which it takes without clipping, too
    assert norms == pytest.approx(wanted, rel=1e-5)
    assert ours.optimizer.optimizer.grad_norm.item() == pytest.approx(norms[-1], rel=1e-5)
