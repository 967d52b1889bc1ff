"""Lightning's Trainer and Fabric: what they save, and clipping by both sides."""

import pytest
import recipes
import torch
from helpers import BF16, assert_near_torch, assert_same_bits

import fastopt

pl = pytest.importorskip("lightning.pytorch")
pytestmark = pytest.mark.frameworks


class Module(pl.LightningModule):
    def __init__(self, make):
        super().__init__()
        self.model = recipes.new_model()
        self.make = make
        self.norms = []

    def training_step(self, batch, index):
        return recipes.loss(self.model, self.trainer.global_step)

    def configure_optimizers(self):
        optimizer = self.make(self.parameters())
        optimizer.register_step_post_hook(lambda made, *_: self.norms.append(made.grad_norm))
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def fit(make, steps, resume=None, **settings):
    module = Module(make)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        **settings,
    )
    trainer.fit(module, torch.utils.data.DataLoader(range(6)), ckpt_path=resume)
    return trainer, module


@recipes.each_mode
def test_resume(settings):
    def make(params):
        return fastopt.AdamW(params, lr=0.01, max_norm=0.5, **settings)

    _, whole = fit(make, 6, precision="bf16-true")
    trainer, _ = fit(make, 3, precision="bf16-true")
    trainer.save_checkpoint("saved.ckpt")
    trainer, resumed = fit(make, 6, "saved.ckpt", precision="bf16-true")
    assert len(resumed.norms) == 3
    assert_same_bits(resumed.parameters(), whole.parameters())
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.01 / 64


def test_both_clip():
    """The smaller bound holds, and ``grad_norm`` never gets above the trainer's."""

    def make(max_norm):
        return lambda params: fastopt.SGD(params, lr=0.01, max_norm=max_norm)

    for theirs, ours in [(0.5, 0.25), (0.25, 0.5), (0.5, 0.5)]:
        _, both = fit(make(ours), 6, gradient_clip_val=theirs)
        _, once = fit(make(min(ours, theirs)), 6)
        assert_near_torch(both.parameters(), once.parameters())
        assert max(both.norms) <= theirs < min(once.norms)


@recipes.each_mode
def test_fabric_resumes(settings):
    from lightning.fabric import Fabric

    fabric = Fabric(accelerator="cpu", precision="bf16-true")

    def begin():
        model = recipes.new_model()
        optimizer = fastopt.AdamW(model.parameters(), lr=0.01, max_norm=0.5, **settings)
        return fabric.setup(model, optimizer)

    def train(model, optimizer, steps):
        for step in steps:
            optimizer.zero_grad()
            fabric.backward(recipes.loss(model, step))
            optimizer.step()
            assert optimizer.grad_norm > 0.5

    whole, resumed = begin(), begin()
    train(*whole, range(3))
    fabric.save("saved.ckpt", {"model": whole[0], "optimizer": whole[1]})
    train(*whole, range(3, 6))
    train(*resumed, range(7, 9))
    fabric.load("saved.ckpt", {"model": resumed[0], "optimizer": resumed[1]})
    train(*resumed, range(3, 6))
    assert next(whole[0].parameters()).dtype == BF16
    assert_same_bits(resumed[0].parameters(), whole[0].parameters())
