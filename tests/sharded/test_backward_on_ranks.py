"""`step_in_backward` under FSDP2, HSDP and tensor parallelism, and where it is refused: DDP."""

import gc

import pytest
import torch
import torch.distributed as dist
from helpers import BF16, FP32, assert_same_bits, unchanged
from ranks import run
from test_shards import params_of, whole
from test_training import backward, sharded_model
from torch.nn.parallel import DistributedDataParallel

import fastopt


def assert_same(*optimizers):
    for mine, its in zip(*map(params_of, optimizers), strict=True):
        assert_same_bits([whole(mine)], [whole(its)])
        states = [optimizer.state[p] for optimizer, p in zip(optimizers, (mine, its), strict=True)]
        assert_same_bits(*([whole(state[key]) for key in states[0]] for state in states))


def two(kind, dtype, settings):
    models = [sharded_model(kind, dist.get_world_size(), dtype) for _ in range(2)]
    return models, [fastopt.AdamW(model.parameters(), **settings) for model in models]


def training(kind, dtype, settings):
    models, optimizers = two(kind, dtype, settings)
    handle = fastopt.step_in_backward(optimizers[1])
    for step in range(4):
        for model, optimizer in zip(models, optimizers, strict=True):
            backward(model, step, dist.get_rank())
            assert all((p.grad is None) == (model is models[1]) for p in model.parameters())
            optimizer.step()
    assert_same(*optimizers)
    assert all(plan is not None for plan in handle.plans.values())


@pytest.mark.parametrize(
    ("dtype", "settings"), [(FP32, {}), (BF16, {}), (BF16, {"master_weights": "stochastic"})]
)
@pytest.mark.parametrize(
    ("kind", "world"), [("fsdp", 2), ("fsdp", 3), ("one unit", 2), ("hsdp", 4)]
)
def test_training(kind, world, dtype, settings):
    run(world, training, kind, dtype, settings)


def test_tensor_parallelism():
    run(4, training, "fsdp x tp", FP32, {})


def clip_each():
    models, optimizers = two("fsdp", FP32, {"max_norm": 0.5})
    fastopt.step_in_backward(optimizers[1], clip_each=True)
    each = [fastopt.AdamW([p], max_norm=0.5) for p in models[0].parameters()]
    for step in range(3):
        for model in models:
            backward(model, step, dist.get_rank())
        for optimizer in each:
            optimizer.step()
    for mine, its in zip(*(model.parameters() for model in models), strict=True):
        assert_same_bits([whole(mine)], [whole(its)])


def test_clip_each():
    run(2, clip_each)


def accumulation():
    """FSDP2 calls no hook before the last part."""
    models, optimizers = two("fsdp", FP32, {})
    fastopt.step_in_backward(optimizers[1])
    for step in range(2):
        for model, optimizer in zip(models, optimizers, strict=True):
            for is_last in (False, True):
                model.set_requires_gradient_sync(is_last)
                data = torch.full((2, 5), 1.0 + step + is_last + dist.get_rank())
                model(data).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_same(*optimizers)


def test_accumulation():
    run(2, accumulation)


def raises():
    """With the first gradient. FSDP2 is not fit for another backward, whoever raises in one."""
    model = sharded_model("fsdp", 2)
    optimizer = fastopt.AdamW(model.parameters())
    fastopt.step_in_backward(optimizer)
    optimizer.param_groups[0]["lr"] = -1.0
    with unchanged(optimizer), pytest.raises(ValueError, match="learning rate"):
        backward(model, 0)


def test_a_step_that_raises():
    run(2, raises)


def ddp(wrapped_first):
    model = torch.nn.Linear(5, 3)
    optimizer = fastopt.AdamW(model.parameters())
    if not wrapped_first:
        fastopt.step_in_backward(optimizer)
    wrapped = DistributedDataParallel(model)
    gc.freeze()  # as some do before they train: frozen objects are not listed
    if wrapped_first:
        fastopt.step_in_backward(optimizer)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="before DistributedDataParallel has averaged them"):
        wrapped(torch.ones(2, 5)).sum().backward()
    assert_same_bits(model.parameters(), before)
    assert gc.get_freeze_count()
    gc.unfreeze()


@pytest.mark.parametrize("wrapped_first", [False, True])
def test_ddp_is_refused(wrapped_first):
    run(2, ddp, wrapped_first)
