"""DTensor parameters: the bits of one process that is given the same gradients."""

import math

import pytest
import torch
import torch.distributed as dist
from helpers import (
    BACKENDS,
    BF16,
    FP16,
    FP32,
    FP64,
    assert_same_bits,
    clones,
    each_case,
    new_params,
    set_grads,
)
from ranks import run
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_tensor,
    init_device_mesh,
)

import fastopt
from fastopt.packing import in_memory_order
from fastopt.step import dispatch, shards, torch_abi

SHAPES = [(7, 5), (8, 4, 2), (1,), (130, 70), (3, 3)]
CODED = [(9, 512), (2, 8, 512)]  # whose states have 8 bits
S0, S1, S2, R = Shard(0), Shard(1), Shard(2), Replicate()


def distributed(tensor, mesh, placements):
    if tensor.ndim == 1:
        placements = [S0 if p == S1 else p for p in placements]
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None)


def new_pair(cls, mesh, placements, dtype, **settings):
    """An optimizer of DTensors, and one of the same numbers in one process."""
    generator = torch.Generator().manual_seed(0)
    shapes = SHAPES + CODED * (settings.get("state_dtype") == "8bit")
    wholes = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    shards = [torch.nn.Parameter(distributed(whole, mesh, placements)) for whole in wholes]
    plain = [torch.nn.Parameter(whole.clone()) for whole in wholes]
    return cls(shards, **settings), cls(plain, **settings)


def params_of(optimizer):
    return [param for group in optimizer.param_groups for param in group["params"]]


def step_both(pair, step):
    sharded, plain = pair
    set_grads(params_of(plain), step)
    for param, other in zip(params_of(sharded), params_of(plain), strict=True):
        is_shard = isinstance(param, DTensor)
        layout = (param.device_mesh, param.placements) if is_shard else None
        param.grad = distributed(other.grad, *layout) if layout else other.grad.clone()
    for optimizer in pair:
        optimizer.step()


def whole(tensor):
    if not isinstance(tensor, DTensor):
        return tensor
    if tensor.dtype == torch.int16:  # which gloo does not send
        return tensor.int().full_tensor().short()
    return tensor.full_tensor()


def assert_same(sharded, plain):
    for param, other in zip(params_of(sharded), params_of(plain), strict=True):
        assert_same_bits([whole(param)], [other])
        state, other_state = sharded.state[param], plain.state[other]
        assert state.keys() == other_state.keys()
        for name, value in state.items():
            assert isinstance(value, DTensor) == (name != "step" and isinstance(param, DTensor))
            assert_same_bits([whole(value)], [other_state[name]])


def same_bits(shape, placements, cls, dtype, settings):
    mesh = init_device_mesh("cpu", shape)
    pair = new_pair(cls, mesh, placements, dtype, **settings)
    for step in range(4):
        step_both(pair, step)
        if step and settings.get("backend") != "reference":
            assert pair[0]._plan is not None
        if pair[0].grad_norm is not None:
            assert_same_bits([pair[0].grad_norm.float()], [pair[1].grad_norm.float()])
    assert_same(*pair)


def asking_torch():
    """Where it is not known how torch keeps the Python object of a tensor."""
    fields, functions = torch_abi.find()
    use = dispatch.extension().use_torch_fields
    use(fields._replace(object=0), *functions)
    try:
        same_bits((2,), (S0,), fastopt.AdamW, BF16, {"max_norm": 1.0})
    finally:
        use(fields, *functions)


def test_a_plan_that_asks_torch_holds():
    run(2, asking_torch)


LAYOUTS = [((2,), (S0,)), ((3,), (S0,)), ((2,), (S1,)), ((2, 2), (S0, S1)), ((2, 2), (R, S0))]
LAYOUTS += [((2,), (R,)), ((4,), (S0,)), ((2, 2), (S0, S0)), ((2, 2), (S1, S0))]
MODES = [
    *((BF16, {"master_weights": master}) for master in ("split", "fp32", "stochastic", None)),
    (BF16, {"master_weights": "split", "state_dtype": BF16}),
    (BF16, {"master_weights": "stochastic", "state_dtype": "8bit"}),
    (FP32, {"state_dtype": "8bit"}),
    *((FP16, {"master_weights": master}) for master in ("fp32", None)),
    (FP32, {"state_dtype": BF16}),
]


@each_case
@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_every_rule(cls, variant, max_norm):
    run(2, same_bits, (2,), (S0,), cls, FP32, {**variant, "max_norm": max_norm})


@pytest.mark.parametrize(("shape", "placements"), LAYOUTS, ids=str)
@pytest.mark.parametrize(
    ("dtype", "settings"),
    [
        (FP32, {}),
        (BF16, {"master_weights": "stochastic", "state_dtype": BF16}),
        (BF16, {"state_dtype": "8bit"}),
    ],
    ids=str,
)
def test_every_layout(shape, placements, dtype, settings):
    settings = {**settings, "max_norm": 1.0}
    run(math.prod(shape), same_bits, shape, placements, fastopt.AdamW, dtype, settings)


def on_several_meshes(with_the_whole, dtype, settings):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    layouts = [(mesh["dp"], [S0]), (mesh["tp"], [S0]), None, (mesh["dp"], [R]), (mesh["tp"], [S0])]
    if with_the_whole:
        layouts[1] = mesh, [S0, R]
        layouts[4] = mesh, [S0, S0]
    plain = new_params(SHAPES, dtype)
    params = [
        torch.nn.Parameter(distributed(copy.detach(), *layout)) if layout else copy
        for copy, layout in zip(clones(plain), layouts, strict=True)
    ]
    pair = fastopt.AdamW(params, **settings), fastopt.AdamW(plain, **settings)
    for step in range(3):
        step_both(pair, step)
        norm = fastopt.get_total_norm([param.grad for param in params])
        assert_same_bits([pair[0].grad_norm, norm], [pair[1].grad_norm] * 2)
        assert pair[0]._plan is not None
    assert_same(*pair)


@pytest.mark.parametrize(("dtype", "settings"), MODES, ids=str)
@pytest.mark.parametrize("with_the_whole", [False, True])
def test_several_meshes_and_none(with_the_whole, dtype, settings):
    """Meshes side by side, or all within one, beside plain parameters."""
    run(4, on_several_meshes, with_the_whole, dtype, {**settings, "max_norm": 1.0})


def unfinished_gradients():
    """Whose reduction still runs."""
    mesh = init_device_mesh("cpu", (2,))
    param = torch.nn.Parameter(distribute_tensor(torch.zeros(4), mesh, [S0]))
    optimizer = fastopt.SGD([param], lr=1.0, max_norm=100.0)
    for step in range(1, 4):
        mine = torch.arange(4.0) + dist.get_rank()
        partial = DTensor.from_local(mine, mesh, [Partial()], run_check=False)
        param.grad = partial.redistribute(placements=[S0], async_op=True)
        assert type(param.grad._local_tensor) is AsyncCollectiveTensor
        optimizer.step()
        assert whole(param).tolist() == [-step * value for value in (1.0, 3.0, 5.0, 7.0)]
        assert optimizer.grad_norm == torch.tensor(84.0).sqrt()


def test_unfinished_gradients():
    run(2, unfinished_gradients)


def pieces(shape, placements):
    """Of tensors whose elements are numbered."""
    mesh = init_device_mesh("cpu", shape)
    for size in [(8, 3, 4), (7, 2, 3), (5, 1, 6), (3, 4, 2), (1, 6, 3), (1, 1, 8)]:
        whole = torch.arange(math.prod(size)).view(size)
        for order in [(0, 1, 2), (0, 2, 1), (1, 0, 2)]:
            shard = distribute_tensor(whole.permute(order), mesh, placements, src_data_rank=None)
            part = in_memory_order(shards.local(shard))
            found = shards._piece(shard, 0)
            if found is None and R in placements:  # torch makes copies contiguous
                assert order != (0, 1, 2)
                continue
            if found is None:  # two dimensions are cut, neither of which is the outermost
                assert len({*placements} - {R}) == 2
                assert size[0] > 1
                assert order == (1, 0, 2) or S2 in placements
                param = torch.nn.Parameter(shard.float())
                param.grad = param.detach().clone()
                with pytest.raises(ValueError, match="parameter 0 .* too scattered .*: use"):
                    fastopt.AdamW([param], state_dtype=BF16).step()
                continue
            offset, run, stride = found
            places = torch.arange(len(part))
            if run:
                places = places // run * stride + places % run
            assert torch.equal(part, offset + places)


@pytest.mark.parametrize(
    ("shape", "placements"), [*LAYOUTS, ((2,), (S2,)), ((2, 2), (S1, S2))], ids=str
)
def test_where_a_piece_lies(shape, placements):
    run(math.prod(shape), pieces, shape, placements)


def test_fp64():
    """Here the last bit of the norm shows, whose squares each rank adds up first."""
    run(2, same_bits, (2,), (S0,), fastopt.AdamW, FP64, {})
    run(3, same_bits, (3,), (S0,), fastopt.AdamW, FP64, {"max_norm": math.inf})


@pytest.mark.parametrize(("dtype", "settings"), MODES, ids=str)
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_mode(world, dtype, settings, backend):
    settings = {**settings, "max_norm": 1.0, "backend": backend}
    run(world, same_bits, (world,), (S0,), fastopt.AdamW, dtype, settings)
