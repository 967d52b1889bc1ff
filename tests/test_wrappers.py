"""An optimizer that a framework has wrapped: what the wrapper is asked is answered by it.

The wrappers are those of the frameworks, where they are installed, and what they come down to.
"""

import copy
import math

import pytest
import torch
from helpers import assert_same_bits, new_params, set_grads, take_steps

import fastopt


class Imitating:
    """An object of a class made from the optimizer's, as in Lightning and Fabric."""

    def __init__(self, optimizer):
        self._optimizer = optimizer
        self.__class__ = type("Wrapped", (type(self), type(optimizer)), {})

    def step(self, closure=None):
        return self._optimizer.step(closure)


class Delegating(Imitating):
    """Attributes are the optimizer's."""

    def __getattr__(self, name):
        return getattr(self._optimizer, name)


class Copying(Imitating):
    """Attributes are what the optimizer's were, as in Lightning before 2.2."""

    def __init__(self, optimizer):
        super().__init__(optimizer)
        vars(self).update(vars(optimizer))


class Strategy:
    """As much of Lightning's as its wrappers need."""

    def optimizer_step(self, optimizer, closure=None):
        return optimizer.step(closure)

    def get_optimizer_state(self, optimizer):
        return optimizer.state_dict()


STRATEGY = Strategy()  # Lightning has a weak reference to it


def lightning(optimizer):
    module = pytest.importorskip("lightning.pytorch.core.optimizer")
    return module.LightningOptimizer._to_lightning_optimizer(optimizer, STRATEGY)


def fabric(optimizer):
    return pytest.importorskip("lightning.fabric.wrappers")._FabricOptimizer(optimizer, STRATEGY)


def accelerate(optimizer):
    pytest.importorskip("accelerate").Accelerator(cpu=True)
    return pytest.importorskip("accelerate.optimizer").AcceleratedOptimizer(optimizer)


class Accelerated(torch.optim.Optimizer):
    """Of no class made from the optimizer's, as in Accelerate."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.optimizer.load_state_dict(self.optimizer.state_dict())

    param_groups = property(lambda self: self.optimizer.param_groups)

    def add_param_group(self, group):
        self.optimizer.add_param_group(group)

    def load_state_dict(self, state_dict):
        self.optimizer.load_state_dict(state_dict)

    def state_dict(self):
        return self.optimizer.state_dict()

    def step(self, closure=None):
        step = self.optimizer.step
        self.optimizer.step = lambda *args: step(*args)
        result = self.optimizer.step(closure)
        self.optimizer.step = step
        return result


IMITATING = [Delegating, Copying, lightning, fabric]
each_wrapper = pytest.mark.parametrize("wrap", [*IMITATING, Accelerated, accelerate])
each_imitation = pytest.mark.parametrize("wrap", IMITATING)


def new_optimizer(cls=fastopt.AdamW, dtype=torch.bfloat16, **settings):
    return cls(new_params([(40,), (3, 5)], dtype), lr=0.01, **settings)


def assert_same_state(found, wanted):
    """Of two state dicts."""
    assert found["param_groups"] == wanted["param_groups"]
    assert found["state"].keys() == wanted["state"].keys()
    for index, state in wanted["state"].items():
        assert found["state"][index].keys() == state.keys()
        assert_same_bits(found["state"][index].values(), state.values())


@each_wrapper
def test_state_dict(wrap):
    """Remainders are there as the step has left them."""
    optimizer, plain = new_optimizer(), new_optimizer()
    wrapper = wrap(optimizer)
    for each in (wrapper, plain):
        take_steps(each, range(3))
    assert_same_state(wrapper.state_dict(), plain.state_dict())
    for each in (wrapper, plain):
        take_steps(each, range(3, 5))
    assert_same_state(wrapper.state_dict(), plain.state_dict())
    assert optimizer.state_dict()["state"][0]["param_remainder"].any()
    with torch.no_grad():
        optimizer.param_groups[0]["params"][0].zero_()  # wins over its remainder
    assert not wrapper.state_dict()["state"][0]["param_remainder"].any()


@each_imitation
def test_what_only_fastopt_has(wrap):
    optimizer, plain = (new_optimizer(state_dtype="8bit") for _ in range(2))
    wrapper = wrap(optimizer)
    for each in (wrapper, plain):
        take_steps(each, range(3))
    assert_same_bits(wrapper.master_params(), plain.master_params())
    assert_same_state(wrapper.torch_state_dict(), plain.torch_state_dict())
    assert_same_state(optimizer.state_dict(), plain.state_dict())


@each_imitation
def test_grad_norm(wrap):
    optimizer = new_optimizer(max_norm=math.inf)
    wrapper = wrap(optimizer)
    assert wrapper.grad_norm is None
    for step in range(3):
        take_steps(wrapper, [step])
        assert wrapper.grad_norm is optimizer.grad_norm is not None
    optimizer.param_groups[0]["max_norm"] = None
    take_steps(optimizer, [3])
    assert wrapper.grad_norm is optimizer.grad_norm is None


@each_wrapper
def test_load_state_dict(wrap):
    saved = new_optimizer()
    params = [param.detach().clone() for param in take_steps(saved, range(3))]
    optimizer = new_optimizer()
    wrapper = wrap(optimizer)
    calls = []
    optimizer.register_step_post_hook(lambda optimizer, *_: calls.append(optimizer))
    take_steps(wrapper, [7])
    with torch.no_grad():
        for param, value in zip(optimizer.param_groups[0]["params"], params, strict=True):
            param.copy_(value)
    wrapper.load_state_dict(saved.state_dict())
    for each in (saved, optimizer, wrapper):
        assert_same_state(each.state_dict(), saved.state_dict())
    for step in (3, 4):
        take_steps(saved, [step])
        set_grads(optimizer.param_groups[0]["params"], step)
        wrapper.step()
        assert_same_state(wrapper.state_dict(), saved.state_dict())
    assert calls == [optimizer] * 3


@each_wrapper
@pytest.mark.parametrize("cls", fastopt.OPTIMIZERS)
def test_add_param_group(wrap, cls):
    optimizer = new_optimizer(cls)
    wrapper = wrap(optimizer)
    (param,) = new_params([(7,)])
    before = param.detach().clone()
    wrapper.add_param_group({"params": [param], "lr": 0.5})
    with pytest.raises(ValueError, match="Invalid learning rate"):
        wrapper.add_param_group({"params": new_params([(7,)]), "lr": -0.5})
    param.grad = torch.ones_like(param)
    wrapper.step()
    assert (param != before).all()
    assert [group["lr"] for group in wrapper.param_groups] == [0.01, 0.5]


@each_imitation
def test_copies(wrap):
    optimizer = new_optimizer()
    wrapper = wrap(optimizer)
    take_steps(wrapper, range(2))
    optimizer.load_state_dict(optimizer.state_dict())  # and gets another dict of states
    take_steps(wrapper, [2])
    copied = copy.deepcopy(wrapper)  # which has lost the optimizer, as with one of torch
    assert_same_state(fastopt.Optimizer.state_dict(copied), optimizer.state_dict())
    pickled, wanted = wrapper.__reduce_ex__(4)[2], optimizer.__reduce_ex__(4)[2]
    assert pickled.keys() == wanted.keys()
    assert pickled["state"] is wanted["state"]


@each_imitation
@pytest.mark.parametrize("settings", [{}, {"max_norm": 0.5}, {"fused": True}], ids=str)
@pytest.mark.parametrize(
    "scaler_class", [torch.amp.GradScaler, fastopt.GradScaler], ids=["torch", "fastopt"]
)
def test_a_scaler_steps_the_wrapper(wrap, settings, scaler_class):
    """The scale reaches the step; nothing of it stays, nor where the step raises."""
    optimizer, plain = (new_optimizer(dtype=torch.float32, **settings) for _ in range(2))
    wrapper = wrap(optimizer)
    assert wrapper._step_supports_amp_scaling == bool(settings)
    scaler = scaler_class("cpu", init_scale=2.0**8)
    scaler.scale(torch.zeros(()))
    for step, factor in enumerate([1.0, math.inf, 1.0, 1.0]):
        for each in (optimizer, plain):
            set_grads(each.param_groups[0]["params"], step)
        if factor == 1.0:
            plain.step()
        for param in optimizer.param_groups[0]["params"]:
            param.grad *= scaler.get_scale() * factor
        scaler.step(wrapper)
        scaler.update()
        assert not hasattr(wrapper, "grad_scale")
        assert not hasattr(wrapper, "found_inf")
        assert_same_state(wrapper.state_dict(), plain.state_dict())
    assert scaler.get_scale() == 2.0**7


@pytest.mark.parametrize("scaler_class", [torch.amp.GradScaler, fastopt.GradScaler])
def test_clipping_by_a_framework(scaler_class):
    """What Lightning does for `gradient_clip_val`."""

    def train(optimizer):
        (param,) = optimizer.param_groups[0]["params"]
        scaler = scaler_class("cpu", init_scale=2.0**8)
        for step, factor in enumerate([1.0, math.inf, 2.0, 3.0]):
            set_grads([param], step)
            param.grad *= scaler.scale(torch.tensor(factor))
            if not optimizer._step_supports_amp_scaling:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_([param], 0.5)
            scaler.step(optimizer)
            scaler.update()
        return param.detach()

    found, in_step = (
        train(fastopt.SGD(new_params([(9,)]), lr=0.1, backend="reference", **settings))
        for settings in ({}, {"max_norm": 0.5})
    )
    torch_own = torch.optim.SGD(new_params([(9,)]), lr=0.1)
    torch_own._step_supports_amp_scaling = False
    # The clip coefficient is a number of fp32 in torch, and multiplies before the step.
    torch.testing.assert_close(found, train(torch_own), rtol=1e-6, atol=0)
    torch.testing.assert_close(found, in_step, rtol=1e-6, atol=0)


def lightning_training(make, precision, **settings):
    """The parameters after 4 batches with `gradient_clip_val`, the second of which overflows."""
    pl = pytest.importorskip("lightning.pytorch")
    from lightning.pytorch.plugins.precision import MixedPrecision

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layer = torch.nn.Linear(8, 3)

        def training_step(self, batch, _):
            return self.layer(batch).square().sum()

        def configure_optimizers(self):
            return make(self.parameters(), lr=0.1, **settings)

    module = Module()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0) if precision == "16-mixed" else None
    overflow = torch.full((5, 8), 1e4 if scaler else 1.0)
    batches = [torch.ones(5, 8), overflow, -torch.ones(5, 8), torch.ones(5, 8)]
    trainer = pl.Trainer(
        accelerator="cpu",
        plugins=[MixedPrecision(precision, "cpu", scaler)],
        gradient_clip_val=0.5,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
    if scaler:
        assert scaler.get_scale() == 2.0
    return [param.detach() for param in module.parameters()]


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_lightning_clips(precision):
    found = lightning_training(fastopt.SGD, precision)
    wanted = lightning_training(torch.optim.SGD, precision)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        lightning_training(fastopt.SGD, precision, max_norm=1.0)


def test_accelerate_does_not_schedule_after_a_skipped_step():
    accelerate = pytest.importorskip("accelerate")
    from accelerate.optimizer import AcceleratedOptimizer
    from accelerate.scheduler import AcceleratedScheduler

    accelerate.Accelerator(cpu=True)
    plain = new_optimizer(dtype=torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.zeros(()))
    optimizer = AcceleratedOptimizer(plain, scaler=scaler)
    scheduler = AcceleratedScheduler(
        torch.optim.lr_scheduler.StepLR(plain, 1, 0.5), optimizer, split_batches=True
    )
    rates = []
    for step, factor in enumerate([1.0, math.inf, 1.0]):
        set_grads(plain.param_groups[0]["params"], step)
        plain.param_groups[0]["params"][0].grad *= factor
        optimizer.step()
        scheduler.step()
        rates.append(plain.param_groups[0]["lr"])
        assert optimizer.step_was_skipped == (factor == math.inf)
    assert rates == [0.005, 0.005, 0.0025]
