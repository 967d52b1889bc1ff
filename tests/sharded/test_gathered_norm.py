"""`step(sum_of_squares=...)` on several ranks: a DDP communication hook, and FSDP2."""

import pytest
import torch
import torch.distributed as dist
from helpers import FP32, FP64, assert_same_bits
from ranks import run
from test_training import Collectives, backward, give, new_model, params_of, sharded_model, whole
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

import fastopt


def ddp():
    """As in the README: of each bucket, when all ranks have its average."""
    model, other = (DistributedDataParallel(new_model(), bucket_cap_mb=1e-4) for _ in range(2))
    optimizer = fastopt.AdamW(model.parameters(), max_norm=0.5)
    squares = []

    def hook(group, bucket):
        def measured(future):
            squares.append(torch.linalg.vector_norm(future.value(), dtype=FP64) ** 2)
            return future.value()

        return allreduce_hook(group, bucket).then(measured)

    model.register_comm_hook(dist.group.WORLD, hook)
    plain = fastopt.AdamW(other.parameters(), max_norm=0.5)
    for step in range(3):
        for each in (model, other):
            backward(each, step, dist.get_rank())
        assert len(squares) > (step > 0)  # buckets are made anew after the first backward
        total = sum(squares)
        squares.clear()
        optimizer.step(sum_of_squares=total)
        plain.step(sum_of_squares=total)
        assert_same_bits(model.parameters(), other.parameters())
        # The gradients of this rank are those of all.
        norm = fastopt.get_total_norm([param.grad for param in other.parameters()])
        torch.testing.assert_close(optimizer.grad_norm, norm, rtol=1e-6, atol=0)
    return optimizer.grad_norm, [*map(torch.Tensor.detach, model.parameters())]


def test_ddp():
    first, second = run(2, ddp)
    assert first[0] == second[0]
    assert_same_bits(first[1], second[1])


def fsdp():
    """Of the gradients of all ranks: then the step itself asks none of them."""
    optimizer = fastopt.AdamW(sharded_model("fsdp", 2).parameters(), max_norm=0.5)
    other = fastopt.AdamW(new_model().parameters(), max_norm=0.5)
    model = params_of(optimizer)
    for step in range(3):
        for param in model:
            param.grad = None
        generator = torch.Generator().manual_seed(step)
        for param in model:
            grad = torch.randn(param.shape, generator=generator)
            param.grad = dist.tensor.distribute_tensor(grad, param.device_mesh, param.placements)
        give(optimizer, other)
        total = sum(param.grad.double().square().sum() for param in params_of(other))
        with Collectives() as collectives:
            optimizer.step(sum_of_squares=total)
        assert not collectives.counted
        other.step(sum_of_squares=total)
        for mine, its in zip(model, params_of(other), strict=True):
            assert_same_bits([whole(mine)], [its])
    partial = model[0].grad.square().sum()
    with pytest.raises(TypeError, match="sum_of_squares is DTensor.*: give a float"):
        optimizer.step(sum_of_squares=partial)
    assert partial.full_tensor().dtype == FP32


def test_fsdp():
    run(2, fsdp)
