"""What one rank does wrong: it says so, no other waits for ever, and nothing has changed."""

import math
import re
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from ranks import run
from test_shards import distributed
from torch.distributed.tensor import (
    DeviceMesh,
    DTensor,
    Partial,
    Shard,
    distribute_tensor,
    init_device_mesh,
)

import fastopt
from fastopt.step import shards

UNLIKE = (
    "the norm of the gradients could not be exchanged between the ranks (0, 1): each of them must "
    "take part, with the same parameters in the same order, the same meshes and max_norm"
)


def new_optimizer(mesh, shapes=((4, 3), (5,), (3,)), n_plain=1):
    """The last ``n_plain`` parameters are plain."""
    params = []
    for number, shape in enumerate(shapes):
        data, is_plain = torch.ones(shape), number >= len(shapes) - n_plain
        data = data if is_plain else distributed(data, mesh, [Shard(0)])
        params.append(torch.nn.Parameter(data))
        params[-1].grad = torch.ones_like(data)
    return fastopt.AdamW(params, max_norm=1.0)


def has_a_partial_gradient(optimizer, mesh):
    grad = DTensor.from_local(torch.ones(4, 3), mesh, [Partial()], run_check=False)
    object.__setattr__(optimizer.param_groups[0]["params"][0], "grad", grad)


def has_a_sparse_gradient(optimizer, mesh):
    optimizer.param_groups[0]["params"][-1].grad = torch.ones(3).to_sparse()


def has_a_bad_setting(optimizer, mesh):
    optimizer.param_groups[0]["lr"] = math.nan


def has_no_max_norm(optimizer, mesh):
    optimizer.param_groups[0]["max_norm"] = None


def alone(fault):
    """What each rank is told, and whether it has changed nothing; only rank 1 has the fault."""
    mesh = init_device_mesh("cpu", (2,))
    optimizer = new_optimizer(mesh)
    if dist.get_rank() == 1:
        fault(optimizer, mesh)
    dist.barrier()
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=1))
    told = try_step(optimizer)
    store = dist.distributed_c10d._get_default_store()
    if dist.get_rank() == 0:
        store.set("is over", "")
    store.wait(["is over"], timedelta(seconds=60))  # else the end of rank 1 is what rank 0 sees
    return told


def try_step(optimizer):
    params = [shards.local(param) for param in optimizer.param_groups[0]["params"]]
    before = [param.clone() for param in params]
    try:
        optimizer.step()
    except Exception as error:
        assert all(map(torch.equal, params, before))
        assert not optimizer.state
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (has_a_partial_gradient, "parameter 0 of group 0, .*Partial"),
        (has_a_sparse_gradient, "the gradient of parameter 2 of group 0, .*sparse"),
        (has_a_bad_setting, "Invalid learning rate: nan"),
        (has_no_max_norm, "^$"),
    ],
)
def test_one_rank_refuses(fault, message):
    """The others are told when the time of their collective is over: a rank that took part in it
    all the same would have to wait for ranks that refuse, too."""
    told, reason = run(2, alone, fault)
    assert told == UNLIKE
    assert re.search(message, reason)


def unlike(shapes):
    """Then a good step, with the same parameters."""
    mesh = init_device_mesh("cpu", (2,))
    told = try_step(new_optimizer(mesh, *shapes[dist.get_rank()]))
    good = new_optimizer(mesh)
    good.step()
    return told, good.grad_norm.item()


UNLIKES = {
    "number": [[((4, 3), (5,), (3,))], [((4, 3), (3,))]],
    "order": [[((4, 3), (5,), (3,))], [((5,), (4, 3), (3,))]],
    "shapes": [[((4, 3), (5,), (3,))], [((4, 3), (6,), (3,))]],
}


@pytest.mark.parametrize("what", UNLIKES)
def test_other_parameters(what):
    """All ranks are told at once."""
    for told, norm in run(2, unlike, UNLIKES[what]):
        assert told == UNLIKE
        assert norm == pytest.approx(math.sqrt(20))


def destroyed(max_norm):
    mesh = init_device_mesh("cpu", (2,))
    old = new_optimizer(mesh)
    old.step()
    new = new_optimizer(mesh)
    dist.destroy_process_group()
    for optimizer in (old, new):
        optimizer.param_groups[0]["max_norm"] = max_norm
        optimizer.state.clear()
    return [try_step(optimizer) for optimizer in (old, new)]


@pytest.mark.parametrize(("max_norm", "told"), [(1.0, UNLIKE), (None, "")])
def test_a_destroyed_process_group(max_norm, told):
    """Only the norm needs it."""
    assert run(2, destroyed, max_norm) == [[told, told]] * 2


def elsewhere(ranks, max_norm):
    mesh = DeviceMesh("cpu", ranks)
    whole = torch.ones(5, 3)
    params = [torch.nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)])) for _ in range(2)]
    if len(ranks) > 1:
        everywhere = init_device_mesh("cpu", (dist.get_world_size(),))
        params.append(torch.nn.Parameter(distribute_tensor(whole, everywhere, [Shard(0)])))
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer = fastopt.AdamW(params, max_norm=max_norm)
    told = try_step(optimizer)
    grads = [param.grad for param in params]
    fastopt.clip_grad_value_(params, 1.0)
    if dist.get_rank() not in ranks and len(ranks) == 1:
        with pytest.raises(ValueError, match="is none of the mesh"):
            fastopt.get_total_norm(grads)
        return told, None
    return told, fastopt.get_total_norm(grads).item()


def test_a_mesh_without_this_rank():
    """The norm is known where all ranks of it are in another mesh that this rank is one of."""
    (told, norm), (other, _) = run(2, elsewhere, [0], 1.0)
    assert (told, norm) == ("", pytest.approx(math.sqrt(30)))
    assert re.match("the norm .* none of the mesh .* of a parameter: leave the parameter", other)
    assert [told for told, _ in run(2, elsewhere, [0], None)] == ["", ""]
    for told, norm in run(3, elsewhere, [0, 1], 1.0):
        assert (told, norm) == ("", pytest.approx(math.sqrt(45)))
