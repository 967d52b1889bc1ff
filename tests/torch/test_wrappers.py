"""An optimizer that a framework has wrapped: what the wrapper is asked is answered by it.

The wrappers are those of the frameworks, where they are installed, and what they come down to.
"""

import copy
import math

import pytest
import torch
from helpers import BF16, FP32, assert_same_bits, new_params, parameters, set_grads, take_steps

import fastopt

pytestmark = pytest.mark.frameworks


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


class Accelerated(torch.optim.Optimizer):
    """Of no class made from the optimizer's, as in Accelerate."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.optimizer.load_state_dict(self.optimizer.state_dict())
        for name in ("add_param_group", "load_state_dict", "state_dict"):
            setattr(self, name, getattr(optimizer, name))

    param_groups = property(lambda self: self.optimizer.param_groups)

    def step(self, closure=None):
        step = self.optimizer.step
        self.optimizer.step = lambda *args: step(*args)
        result = self.optimizer.step(closure)
        self.optimizer.step = step
        return result


class Strategy:
    """As much of Lightning's as its wrappers need."""

    optimizer_step = staticmethod(lambda optimizer, closure=None: optimizer.step(closure))
    get_optimizer_state = staticmethod(lambda optimizer: optimizer.state_dict())


def lightning(optimizer):
    module = pytest.importorskip("lightning.pytorch.core.optimizer")
    return module.LightningOptimizer._to_lightning_optimizer(optimizer, Strategy)


def fabric(optimizer):
    return pytest.importorskip("lightning.fabric.wrappers")._FabricOptimizer(optimizer, Strategy)


def accelerate(optimizer, **settings):
    pytest.importorskip("accelerate").Accelerator(cpu=True)
    module = pytest.importorskip("accelerate.optimizer")
    return module.AcceleratedOptimizer(optimizer, **settings)


IMITATING = [Delegating, Copying, lightning, fabric]
each_wrapper = pytest.mark.parametrize("wrap", [*IMITATING, Accelerated, accelerate])
each_imitation = pytest.mark.parametrize("wrap", IMITATING)


def new_optimizer(cls=fastopt.AdamW, dtype=BF16, **settings):
    return cls(new_params([(40,), (3, 5)], dtype), lr=0.01, **settings)


def assert_same_state(found, wanted):
    """Of two state dicts."""
    torch.testing.assert_close(found["state"], wanted["state"], rtol=0, atol=0)
    assert found["param_groups"] == wanted["param_groups"]


@pytest.mark.parametrize("state_dtype", [FP32, "8bit"])
@each_wrapper
def test_state_dict(wrap, state_dtype):
    """Remainders are there as the step has left them."""
    optimizer, plain = (new_optimizer(state_dtype=state_dtype) for _ in range(2))
    wrapper = wrap(optimizer)
    for steps in (range(3), range(3, 5)):
        for each in (wrapper, plain):
            take_steps(each, steps)
        assert_same_state(wrapper.state_dict(), plain.state_dict())
        assert_same_state(optimizer.state_dict(), plain.state_dict())
        if isinstance(wrapper, fastopt.Optimizer):
            assert_same_bits(wrapper.master_params(), plain.master_params())
            assert_same_state(wrapper.torch_state_dict(), plain.torch_state_dict())
    assert wrapper.state_dict()["state"][0]["param_remainder"].any()
    with torch.no_grad():
        parameters(optimizer)[0].zero_()  # wins over its remainder
    assert not wrapper.state_dict()["state"][0]["param_remainder"].any()


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
    saved, optimizer = new_optimizer(), new_optimizer()
    take_steps(saved, range(3))
    wrapper = wrap(optimizer)
    calls = []
    optimizer.register_step_post_hook(lambda optimizer, *_: calls.append(optimizer))
    take_steps(wrapper, [7])
    with torch.no_grad():
        for param, value in zip(parameters(optimizer), parameters(saved), strict=True):
            param.copy_(value)
    wrapper.load_state_dict(saved.state_dict())
    for each in (optimizer, wrapper):
        assert_same_state(each.state_dict(), saved.state_dict())
    for step in (3, 4):
        for each in (saved, wrapper):
            take_steps(each, [step])
        assert_same_state(wrapper.state_dict(), saved.state_dict())
    assert calls == [optimizer] * 3


@each_wrapper
@pytest.mark.parametrize("cls", fastopt.OPTIMIZERS)
def test_add_param_group(wrap, cls):
    wrapper = wrap(new_optimizer(cls))
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
@pytest.mark.parametrize("scaler_class", [torch.amp.GradScaler, fastopt.GradScaler])
def test_a_scaler_steps_the_wrapper(wrap, settings, scaler_class):
    """The scale reaches the step; nothing of it stays, nor where the step raises."""
    optimizer, plain = (new_optimizer(dtype=FP32, **settings) for _ in range(2))
    wrapper = wrap(optimizer)
    assert wrapper._step_supports_amp_scaling == bool(settings)
    scaler = scaler_class("cpu", init_scale=2.0**8)
    scaler.scale(torch.zeros(()))
    for step, factor in enumerate([1.0, math.inf, 1.0, 1.0]):
        if factor == 1.0:
            take_steps(plain, [step])
        set_grads(parameters(optimizer), step)
        for param in parameters(optimizer):
            param.grad *= scaler.get_scale() * factor
        scaler.step(wrapper)
        scaler.update()
        assert not hasattr(wrapper, "grad_scale")
        assert not hasattr(wrapper, "found_inf")
        assert_same_state(wrapper.state_dict(), plain.state_dict())
    assert scaler.get_scale() == 2.0**7


def lightning_training(make, precision, **settings):
    """The parameters after 4 batches with `gradient_clip_val`, the second of which may overflow."""
    pl = pytest.importorskip("lightning.pytorch")
    from lightning.pytorch.demos.boring_classes import BoringModel
    from lightning.pytorch.plugins.precision import MixedPrecision

    class Module(BoringModel):
        def configure_optimizers(self):
            return make(self.parameters(), lr=0.1, **settings)

    torch.manual_seed(0)
    module = Module()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0) if precision == "16-mixed" else None
    plugins = [MixedPrecision(precision, "cpu", scaler)]
    trainer = pl.Trainer(accelerator="cpu", plugins=plugins, gradient_clip_val=0.5, fast_dev_run=4)
    batches = [torch.ones(5, 32), torch.full((5, 32), 1e4), -torch.ones(5, 32), torch.ones(5, 32)]
    trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
    if scaler:
        assert scaler.get_scale() == 2.0
    return [param.detach() for param in module.parameters()]


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_lightning_clips(precision):
    found = lightning_training(fastopt.SGD, precision)
    wanted = lightning_training(torch.optim.SGD, precision)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        lightning_training(fastopt.SGD, precision, max_norm=1.0)


def test_accelerate_does_not_schedule_after_a_skipped_step():
    plain = new_optimizer(dtype=FP32)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.zeros(()))
    optimizer = accelerate(plain, scaler=scaler)
    halving = torch.optim.lr_scheduler.StepLR(plain, 1, 0.5)
    module = pytest.importorskip("accelerate.scheduler")
    scheduler = module.AcceleratedScheduler(halving, optimizer, split_batches=True)
    rates = []
    for step, factor in enumerate([1.0, math.inf, 1.0]):
        set_grads(parameters(plain), step)
        parameters(plain)[0].grad *= factor
        optimizer.step()
        scheduler.step()
        rates.append(plain.param_groups[0]["lr"])
        assert optimizer.step_was_skipped == (factor == math.inf)
    assert rates == [0.005, 0.005, 0.0025]
