"""Real training on several ranks: FSDP2, tensor parallelism, ZeRO, scalers, checkpoints."""

import copy
import functools
import math
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from helpers import BF16, FP32, assert_near_torch, assert_same_bits
from ranks import run
from test_shards import params_of, whole
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._common_utils import _set_fsdp_flattened
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard
from torch.utils._python_dispatch import TorchDispatchMode

import fastopt
from fastopt.step import shards


def new_model(dtype=FP32):
    """With parameters that two, three or four ranks do not share evenly, one large enough to have
    states of 8 bits, also where its rows are shared."""
    torch.manual_seed(0)
    linear = torch.nn.Linear
    layers = linear(5, 512), torch.nn.GELU(), linear(512, 9), torch.nn.LayerNorm(9)
    return torch.nn.Sequential(*layers).to(dtype)


def sharded_model(kind, world, dtype=FP32):
    model, policy = new_model(dtype), {}
    if kind == "fsdp x tp":
        mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))
        plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
        parallelize_module(model, mesh["tp"], plan)
        mesh = mesh["dp"]
    elif kind == "mixed precision":
        mesh = init_device_mesh("cpu", (world,))
        policy["mp_policy"] = MixedPrecisionPolicy(param_dtype=BF16, reduce_dtype=FP32)
    elif kind == "hsdp":
        mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh("cpu", (world,))
    for layer in model:
        if kind != "one unit" and any(True for _ in layer.parameters()):
            fully_shard(layer, mesh=mesh, **policy)
    return fully_shard(model, mesh=mesh, **policy)


def backward(model, step, rank=0):
    data = torch.randn(8, 5, generator=torch.Generator().manual_seed(100 * rank + step))
    dtype = next(model.parameters()).dtype
    model.zero_grad()
    (model(data.to(dtype)).square().sum() * 9).backward()


def give(source, target):
    """The whole gradients of one optimizer's parameters to another's."""
    for param, other in zip(params_of(source), params_of(target), strict=True):
        other.grad = whole(param.grad)


def training(kind, dtype, settings):
    model = sharded_model(kind, dist.get_world_size(), dtype)
    optimizer = fastopt.AdamW(model.parameters(), **settings)
    other = fastopt.AdamW(new_model(dtype).parameters(), **settings)
    for step in range(4):
        backward(model, step, dist.get_rank())
        give(optimizer, other)
        optimizer.step()
        other.step()
        assert optimizer._plan is not None
        assert optimizer.grad_norm == other.grad_norm
    for param, twin in zip(params_of(optimizer), params_of(other), strict=True):
        assert_same_bits([whole(param)], [twin])
        for name, value in optimizer.state[param].items():
            assert_same_bits([whole(value)], [other.state[twin][name]])


KINDS = [
    ("mixed precision", 2),
    ("fsdp", 2),
    ("fsdp", 3),
    ("one unit", 4),
    ("hsdp", 4),
    ("fsdp x tp", 4),
]


@pytest.mark.parametrize(("dtype", "settings"), [(FP32, {}), (BF16, {}), (FP32, {"max_norm": 0.5})])
@pytest.mark.parametrize(("kind", "world"), KINDS)
def test_training(kind, world, dtype, settings):
    run(world, training, kind, dtype, settings)


def near_torch(cls, settings):
    models = [sharded_model("fsdp", dist.get_world_size()) for _ in range(2)]
    ours = getattr(fastopt, cls)(models[0].parameters(), **settings, max_norm=0.5)
    theirs = getattr(torch.optim, cls)(models[1].parameters(), **settings)
    for step in range(5):
        for model in models:
            backward(model, step, dist.get_rank())
        for mine, its in zip(params_of(ours), params_of(theirs), strict=True):
            mine.grad = its.grad
        ours.step()
        norm = torch.nn.utils.clip_grad_norm_(models[1].parameters(), 0.5)
        theirs.step()
        torch.testing.assert_close(ours.grad_norm, norm.full_tensor(), rtol=1e-6, atol=0)
    assert_near_torch([*map(whole, params_of(ours))], [*map(whole, params_of(theirs))])


@pytest.mark.parametrize("cls", ["SGD", "Adagrad", "RMSprop", "Adam", "AdamW"])
def test_near_torch(cls):
    run(2, near_torch, cls, {"lr": 0.01})


class Collectives(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.counted = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "c10d" in func.namespace:
            self.counted[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def collectives(kind):
    model = sharded_model(kind, dist.get_world_size())
    optimizer = fastopt.AdamW(model.parameters())
    found = []
    for step, max_norm in enumerate((None, None, 1.0, 1.0)):
        backward(model, step)
        optimizer.param_groups[0]["max_norm"] = max_norm
        with Collectives() as collectives:
            optimizer.step()
        found.append(dict(collectives.counted))
    return found


@pytest.mark.parametrize(("kind", "world"), [("fsdp", 2), ("hsdp", 4), ("fsdp x tp", 4)])
def test_collectives(kind, world):
    """None without ``max_norm``, with it one, whatever the number of parameters and meshes."""
    for found in run(world, collectives, kind):
        assert found == [{}, {}, *[{"_allgather_base_": 1}] * 2]


def collectives_on_several_meshes():
    """Side by side, without one of all ranks; of a step and of the free functions."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    params = [
        torch.nn.Parameter(distribute_tensor(torch.ones(4, 6), mesh[name], [Shard(0)]))
        for name in ("dp", "tp", "dp", "tp")
    ]
    optimizer = fastopt.AdamW(params, max_norm=1.0)
    found = []
    calls = optimizer.step, functools.partial(fastopt.clip_grad_norm_, params, 1.0)
    for call in (*calls, lambda: fastopt.get_total_norm([param.grad for param in params])):
        for param in params:
            param.grad = param.detach().clone()
        with Collectives() as collectives:
            call()
        found.append(dict(collectives.counted))
    return found


def test_collectives_on_several_meshes():
    """One for each."""
    for found in run(4, collectives_on_several_meshes):
        assert found == [{"_allgather_base_": 2}] * 3


def missing_gradients(max_norm):
    """Rank 1 has none at all; it takes part in the norm all the same."""
    model = sharded_model("fsdp", 2)
    optimizer = fastopt.SGD(model.parameters(), lr=0.5, max_norm=max_norm)
    backward(model, 0)
    mine = sum(param.grad._local_tensor.double().square().sum() for param in model.parameters())
    if dist.get_rank() == 1:
        model.zero_grad()
    before = [param._local_tensor.clone() for param in model.parameters()]
    optimizer.step()
    same = [
        torch.equal(param._local_tensor, old)
        for param, old in zip(model.parameters(), before, strict=True)
    ]
    return mine.sqrt().item(), optimizer.grad_norm.item(), any(same)


def clip_without_gradients(missing):
    """Rank 1 lacks some or all of them."""
    model = sharded_model("fsdp", 2)
    backward(model, 0)
    params = [*model.parameters()]
    if dist.get_rank() == 1:
        for param in params[:missing]:
            param.grad = None
    mine = sum(p.grad._local_tensor.double().square().sum() for p in params if p.grad is not None)
    norm = fastopt.clip_grad_norm_(params, 0.5)
    after = [p.grad._local_tensor.double().square().sum() for p in params if p.grad is not None]
    return float(mine), float(norm), float(sum(after))


@pytest.mark.parametrize("missing", [1, 6])
def test_clipping_on_a_rank_without_gradients(missing):
    found = run(2, clip_without_gradients, missing)
    squares, norms, after = map(list, zip(*found, strict=True))
    assert norms == [pytest.approx(math.sqrt(sum(squares)), rel=1e-6)] * 2
    assert norms[0] == norms[1]
    assert math.sqrt(sum(after)) == pytest.approx(0.5, rel=1e-5)


def test_a_rank_without_gradients():
    (norm, found, _), (_, other, unchanged) = run(2, missing_gradients, 1.0)
    assert found == other == pytest.approx(norm, rel=1e-6)
    assert unchanged


def scaled(scaler_class, settings, faulty):
    model = sharded_model("fsdp", 2)
    optimizer = fastopt.AdamW(model.parameters(), **settings)
    scaler = scaler_class("cpu", init_scale=2.0**10, growth_interval=1)
    before = [whole(param).clone() for param in model.parameters()]
    found = []
    for step in range(3):
        model.zero_grad()
        scaler.scale(model(torch.ones(2, 5)).square().sum()).backward()
        if step in faulty and dist.get_rank() == 1:
            next(model.parameters()).grad._local_tensor.fill_(math.inf)
        scaler.step(optimizer)
        scaler.update()
        now = [whole(param).clone() for param in model.parameters()]
        found.append((any(map(torch.equal, now, before)), scaler.get_scale()))
        before = now
    return found


@pytest.mark.parametrize("settings", [{}, {"max_norm": 1.0}, {"fused": True}], ids=str)
@pytest.mark.parametrize(
    "scaler_class", [torch.amp.GradScaler, fastopt.GradScaler, ShardedGradScaler]
)
def test_an_overflow_on_one_rank(scaler_class, settings):
    """All skip that step."""
    for found in run(2, scaled, scaler_class, settings, (1,)):
        assert found == [(False, 2.0**11), (True, 2.0**10), (False, 2.0**11)]


def scaled_without_gradients(kind):
    """Rank 1 has no gradient, and rank 0 an overflow in the second step."""
    rank = dist.get_rank()
    if kind == "fsdp":
        model, group = sharded_model("fsdp", 2), None
    else:
        model, group = new_model(), dist.group.WORLD
    optimizer = fastopt.SGD(model.parameters(), lr=0.5, norm_group=group)
    scaler = fastopt.GradScaler("cpu", init_scale=2.0**10, growth_interval=1)
    found = []
    for step in range(3):
        model.zero_grad()
        before = [shards.local(param).clone() for param in model.parameters()]
        scaler.scale(model(torch.ones(2, 5)).square().sum()).backward()
        if rank == 1:
            model.zero_grad()
        elif step == 1:
            shards.local(next(model.parameters()).grad).fill_(math.inf)
        scaler.step(optimizer)
        scaler.update()
        same = map(torch.equal, map(shards.local, model.parameters()), before)
        found.append((any(same), scaler.get_scale()))
    return found


@pytest.mark.parametrize("kind", ["fsdp", "norm_group"])
def test_a_scaler_on_a_rank_without_gradients(kind):
    first, second = run(2, scaled_without_gradients, kind)
    assert first == [(False, 2.0**11), (True, 2.0**10), (False, 2.0**11)]
    assert second == [(True, scale) for _, scale in first]


def mesh_of_one():
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("a", "b"))["b"]
    shard = torch.nn.Parameter(distribute_tensor(torch.ones(3), mesh, [Shard(0)]))
    plain = torch.nn.Parameter(torch.ones(4))
    shard.grad = distribute_tensor(torch.full((3,), 2.0), mesh, [Shard(0)])
    plain.grad = torch.ones(4)
    optimizer = fastopt.SGD([plain, shard], max_norm=1.0)
    optimizer.step()
    assert optimizer.grad_norm == 4
    assert fastopt.get_total_norm([plain.grad, shard.grad]) == 4


def test_a_mesh_of_one_rank():
    run(2, mesh_of_one)


def some_parameters(settings, needs_group):
    """Each rank has other plain parameters, and the norm is that of all."""
    torch.manual_seed(0)
    every = [torch.nn.Parameter(torch.randn(5, 3)) for _ in range(5)]
    mine = every[dist.get_rank() :: dist.get_world_size()]
    optimizer = fastopt.AdamW(
        mine, norm_group=dist.group.WORLD if needs_group else None, **settings
    )
    for _ in range(3):
        for param in every:
            param.grad = torch.randn(5, 3) * 3
        optimizer.step()
    norm = torch.nn.utils.get_total_norm([param.grad for param in every])
    twin = copy.deepcopy(optimizer)
    assert twin.norm_group is optimizer.norm_group
    if needs_group:
        with pytest.raises(TypeError, match="an optimizer with a norm_group cannot be pickled"):
            copy.copy(optimizer).__reduce_ex__(2)[2]["norm_group"].__reduce__()
    return norm.item(), optimizer.grad_norm.item()


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("world", [2, 3])
def test_norm_group(world, backend):
    found = run(world, some_parameters, {"max_norm": 1.0, "backend": backend}, True)
    (norm, first), *_ = found
    assert all(each == (norm, first) for each in found)
    assert first == pytest.approx(norm, rel=1e-6)
    alone = run(world, some_parameters, {"max_norm": 1.0, "backend": backend}, False)
    assert len({norm for _, norm in alone}) == world


def zero(settings, dtype):
    """Against the same optimizer in DDP's place."""
    model, other = new_model(dtype), new_model(dtype)
    ranks = {"norm_group": dist.group.WORLD, "numbering": model.parameters()}
    adamw = functools.partial(fastopt.AdamW, **ranks)
    sharded = ZeroRedundancyOptimizer(model.parameters(), adamw, **settings)
    plain = fastopt.AdamW(other.parameters(), **settings)
    for step in range(3):
        backward(other, step)
        for param, twin in zip(model.parameters(), other.parameters(), strict=True):
            param.grad = twin.grad.clone()
        sharded.step()
        plain.step()
        assert_same_bits(model.parameters(), other.parameters())
    sharded.consolidate_state_dict(0)
    if dist.get_rank() == 0:
        fresh = fastopt.AdamW(other.parameters(), **settings)
        fresh.load_state_dict(sharded.state_dict())
        for found, wanted in zip(fresh.state.values(), plain.state.values(), strict=True):
            assert found.keys() == wanted.keys()
            assert_same_bits(found.values(), wanted.values())


ZERO = [
    (FP32, {"max_norm": 0.5}),
    *((BF16, {"master_weights": m}) for m in ("split", "fp32", "stochastic")),
    *((BF16, {"state_dtype": states}) for states in (BF16, "8bit")),
]


@pytest.mark.parametrize(("dtype", "settings"), ZERO, ids=str)
def test_zero(dtype, settings):
    run(2, zero, settings, dtype)


def test_fsdp1():
    """Its parameters, which need an accelerator, have a mark."""
    param = torch.nn.Parameter(torch.ones(3))
    _set_fsdp_flattened(param)
    param.grad = torch.ones(3)
    optimizer = fastopt.AdamW([param], max_norm=0.5)
    for max_norm in (0.5, None, 0.5):
        optimizer.param_groups[0]["max_norm"] = max_norm
        if max_norm is None:
            optimizer.step()
            continue
        before = param.detach().clone()
        with pytest.raises(ValueError, match="FullyShardedDataParallel.*needs norm_group="):
            optimizer.step()
        assert_same_bits([param], [before])
    with pytest.raises(ValueError, match="use its method clip_grad_norm_"):
        fastopt.clip_grad_norm_([param], 1.0)


def free_functions(kind, norm_type):
    model = sharded_model(kind, dist.get_world_size())
    backward(model, 0)
    other = new_model()
    give_params = zip(model.parameters(), other.parameters(), strict=True)
    for param, twin in give_params:
        twin.grad = whole(param.grad)
    wanted = torch.nn.utils.clip_grad_norm_(other.parameters(), 0.5, norm_type)
    for _ in range(2):
        norm = fastopt.get_total_norm([p.grad for p in model.parameters()], norm_type)
        assert type(norm) is torch.Tensor
    assert_close = torch.testing.assert_close
    assert_close(norm, wanted, rtol=1e-5, atol=0)
    assert fastopt.clip_grad_norm_(model.parameters(), 0.5, norm_type) == norm
    for param, twin in zip(model.parameters(), other.parameters(), strict=True):
        assert_close(whole(param.grad), twin.grad, rtol=1e-5, atol=1e-9)
    fastopt.clip_grad_value_(model.parameters(), 1e-3)
    assert all(
        param.grad._local_tensor.abs().max() <= 1e-3
        for param in model.parameters()
        if param.grad._local_tensor.numel()
    )


@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf, 3.0])
@pytest.mark.parametrize(("kind", "world"), [("fsdp", 2), ("fsdp x tp", 4)])
def test_free_functions(kind, world, norm_type):
    """Also where torch's raise: on parameters of several meshes."""
    run(world, free_functions, kind, norm_type)


def refused():
    mesh = init_device_mesh("cpu", (2,))
    whole_param = torch.ones(4, 3)
    param = torch.nn.Parameter(distribute_tensor(whole_param, mesh, [Shard(0)]))
    optimizer = fastopt.AdamW([param], max_norm=1.0)
    partial = DTensor.from_local(whole_param, mesh, [dist.tensor.Partial()], run_check=False)
    replicated = distribute_tensor(whole_param, mesh, [Replicate()])
    for grad, found in ((partial, "Partial"), (replicated, "Replicate")):
        param.grad = None
        object.__setattr__(param, "grad", grad)
        with pytest.raises(
            RuntimeError, match=rf"parameter 0 .*Shard.* gradient a DTensor.*{found}"
        ):
            optimizer.step()
        assert not optimizer.state
    with pytest.raises(RuntimeError, match="a DTensor with the placements .*Partial.*redistribute"):
        fastopt.get_total_norm([partial])
    param.grad = distribute_tensor(whole_param, mesh, [Shard(0)])
    optimizer.step()
    state = optimizer.state[param]
    state["exp_avg"] = state["exp_avg"]._local_tensor
    with pytest.raises(RuntimeError, match="state 'exp_avg' a plain tensor: load"):
        optimizer.step()
    other = fastopt.AdamW([torch.nn.Parameter(whole_param)])
    other.param_groups[0]["params"][0].grad = whole_param
    other.step()
    del optimizer.state[param]
    optimizer.step()
    states, group = dict(optimizer.state[param]), optimizer.param_groups[0]
    with pytest.raises(RuntimeError, match="parameter 0 .*Shard.*state 'exp_avg' a plain tensor"):
        optimizer.load_state_dict(other.state_dict())
    assert optimizer.param_groups[0] is group
    assert all(optimizer.state[param][name] is value for name, value in states.items())
    optimizer.step()
    damaged = copy.deepcopy(optimizer.state_dict())
    if dist.get_rank() == 1:
        damaged["state"][0]["exp_avg_sq"]._local_tensor[0] = -1.0
        with pytest.raises(ValueError, match="parameter 0 .*'exp_avg_sq' with negative numbers"):
            optimizer.load_state_dict(damaged)
    else:
        optimizer.load_state_dict(damaged)
    optimizer.step()
    across = torch.nn.Parameter(distribute_tensor(torch.ones(40, 7 * 32), mesh, [Shard(1)]))
    across.grad = across.detach().clone()
    with pytest.raises(ValueError, match="parameter 0 .*is a DTensor .* parts of blocks of 32 .*:"):
        fastopt.AdamW([across], state_dtype="8bit").step()
    one = init_device_mesh("cpu", (2, 1))
    deep = distribute_tensor(torch.ones(8, 32, 32), one, [Shard(0), Shard(2)])
    odd = distribute_tensor(torch.ones(16, 512), mesh, [_StridedShard(1, split_factor=2)])
    turned = distribute_tensor(torch.ones(64, 96).t(), mesh, [Replicate()])
    for tensor, settings in ((deep, "8bit"), (odd, "8bit"), (odd, BF16), (turned, BF16)):
        param = torch.nn.Parameter(tensor)
        param.grad = param.detach().clone()
        with pytest.raises(ValueError, match="parameter 0 .*is a DTensor .* too scattered"):
            fastopt.AdamW([param], state_dtype=settings).step()
    saved = fastopt.AdamW([across])
    saved.step()
    other = torch.nn.Parameter(torch.ones(40, 7 * 32))
    with pytest.raises(RuntimeError, match="is a plain tensor and its state 'exp_avg' a DTensor"):
        fastopt.AdamW([other]).load_state_dict(saved.state_dict())


def test_what_is_refused():
    run(2, refused)
