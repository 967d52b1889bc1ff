"""`fastopt.prepare`: 16 bits throughout, but for what must stay in fp32."""

import copy

import pytest
import torch
from helpers import BF16, FP16, FP32, FP64, HALVES, assert_same_bits
from torch import nn

import fastopt

each_half = pytest.mark.parametrize("dtype", HALVES, ids=str)

KEPT = [  # with the shape of an input
    (lambda: nn.BatchNorm1d(4), (8, 4)),
    (lambda: nn.BatchNorm1d(4), (8, 4, 5)),
    (lambda: nn.BatchNorm2d(4), (8, 4, 5, 5)),
    (lambda: nn.BatchNorm3d(4), (8, 4, 3, 3, 3)),
    (lambda: nn.SyncBatchNorm(4), (8, 4, 5, 5)),
    (lambda: nn.InstanceNorm1d(4, affine=True, track_running_stats=True), (8, 4, 5)),
    (lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True), (8, 4, 5, 5)),
    (lambda: nn.InstanceNorm3d(4, track_running_stats=True), (8, 4, 3, 3, 3)),
]
CAST = [
    (lambda: nn.BatchNorm2d(4, track_running_stats=False), (8, 4, 5, 5)),
    (lambda: nn.InstanceNorm2d(4, affine=True), (8, 4, 5, 5)),
    (lambda: nn.LayerNorm(4), (8, 4)),
    (lambda: nn.RMSNorm(4), (8, 4)),
    (lambda: nn.GroupNorm(2, 4), (8, 4, 5)),
    (lambda: nn.Linear(4, 4), (8, 4)),
    (lambda: nn.Conv2d(4, 4, 3), (8, 4, 5, 5)),
    (lambda: nn.LSTM(4, 4, batch_first=True), (8, 5, 4)),
]


def small():
    """A layer that is cast, and one that is kept."""
    torch.manual_seed(0)  # the gradient of a bias before BatchNorm is rounding, and may be 0
    return nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))


def tied():
    embedding, head = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
    head.weight = embedding.weight
    return embedding, head


def tensors(model):
    return [*model.parameters(), *model.buffers()]


def dtypes(model):
    return {tensor.dtype for tensor in tensors(model) if tensor.is_floating_point()}


def forward_and_backward(model, shape, dtype):
    x = torch.linspace(-1, 1, torch.Size(shape).numel(), dtype=dtype).view(shape)
    x.requires_grad_()
    y = model(x)
    y = y[0] if isinstance(y, tuple) else y
    assert y.dtype == dtype
    y.float().square().sum().backward()
    assert x.grad.dtype == dtype
    assert all(param.grad.dtype == param.dtype for param in model.parameters())


@each_half
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("layer", "shape", "kept"),
    [*((*row, True) for row in KEPT), *((*row, False) for row in CAST)],
    ids=lambda value: type(value()).__name__ if callable(value) else str(value),
)
def test_layers(layer, shape, kept, training, dtype):
    model = fastopt.prepare(nn.ModuleList([layer()]), dtype)[0].train(training)
    assert dtypes(model) <= {FP32 if kept else dtype}
    for _ in range(2):
        forward_and_backward(model, shape, dtype)


@each_half
def test_a_network(dtype):
    """Trains, and evaluates after that."""
    model = small()
    optimizer = fastopt.AdamW(model.parameters())  # made before, it has the same parameters
    assert fastopt.prepare(model, dtype) is model
    before = copy.deepcopy(model)
    for _ in range(3):
        forward_and_backward(model, (4, 2), dtype)
        optimizer.step()
    assert not any(map(torch.equal, model.parameters(), before.parameters()))
    assert not torch.equal(model[1].running_mean, before[1].running_mean)
    forward_and_backward(model.eval(), (4, 2), dtype)


@each_half
def test_what_is_not_real_stays(dtype):
    model = nn.Module()
    model.weight = nn.Parameter(torch.full((3,), 1 / 3))
    model.phase = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    model.register_buffer("count", torch.arange(3))
    model.register_buffer("mask", torch.ones(3, dtype=torch.bool))
    model.register_buffer("spectrum", torch.ones(3, dtype=torch.complex64))
    model.register_buffer("table", torch.full((3,), 1 / 3))
    model.register_buffer("scratch", torch.full((3,), 1 / 3), persistent=False)
    model.register_buffer("nothing", None)
    stays = [model.phase, model.count, model.mask, model.spectrum]
    before, keys = [tensor.dtype for tensor in stays], list(model.state_dict())
    fastopt.prepare(model, dtype)
    after = [model.phase, model.count, model.mask, model.spectrum]
    assert all(a is b for a, b in zip(after, stays, strict=True))
    assert [tensor.dtype for tensor in after] == before
    third = torch.full((3,), 1 / 3).to(dtype)
    assert_same_bits([model.weight.detach(), model.table, model.scratch], [third] * 3)
    assert model.nothing is None
    assert list(model.state_dict()) == keys


@each_half
def test_parameters_stay_the_same_objects_and_tied(dtype):
    embedding, head = tied()
    model = nn.Sequential(embedding, nn.LayerNorm(4), head)
    before = list(model.parameters())
    values = [param.detach().to(dtype) for param in before]
    fastopt.prepare(model, dtype)
    after = list(model.parameters())
    assert [*map(id, after)] == [*map(id, before)]
    assert head.weight is embedding.weight
    assert_same_bits([param.detach() for param in after], values)
    model(torch.arange(10)).sum().backward()
    assert head.weight.grad.dtype == dtype


def test_keep_fp32():
    """In addition to what must stay; of a module itself, not of those within it."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)), nn.BatchNorm1d(2))
    seen = []

    def keep_fp32(name, module):
        seen.append((name, module))
        return name in ("0", "1")

    fastopt.prepare(model, keep_fp32=keep_fp32)
    assert seen == list(model.named_modules())[:-1]
    assert [dtypes(layer) for layer in model] == [{FP32}, {BF16}, {FP32}]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_shared_with_a_module_that_is_kept(order):
    layers = embedding, head = tied()
    model = nn.Sequential(*(layers[i] for i in order))
    fastopt.prepare(model, keep_fp32=lambda _, module: module is head)
    assert embedding.weight is head.weight
    assert head.weight.dtype == FP32


@each_half
@pytest.mark.parametrize("before", [FP64, BF16, FP16], ids=str)
def test_other_dtypes_than_fp32_before(before, dtype):
    model = fastopt.prepare(small().to(before), dtype)
    assert [dtypes(layer) for layer in model] == [{dtype}, {FP32}]
    forward_and_backward(model, (4, 2), dtype)


def test_gradients_that_are_there():
    model = small()
    forward_and_backward(model, (4, 2), FP32)
    wanted = [copy.deepcopy(param.grad) for param in model.parameters()]
    fastopt.prepare(model)
    for param, grad in zip(model.parameters(), wanted, strict=True):
        assert_same_bits([param.grad], [grad.to(param.dtype)])


def test_twice_is_once():
    model = fastopt.prepare(small())
    before = [(id(tensor), tensor.data_ptr()) for tensor in tensors(model)]
    fastopt.prepare(model)
    assert [(id(tensor), tensor.data_ptr()) for tensor in tensors(model)] == before


def test_without_data():
    """Meta tensors and lazy layers are cast too."""
    with torch.device("meta"):
        model = fastopt.prepare(small())
    assert [dtypes(layer) for layer in model] == [{BF16}, {FP32}]
    lazy = fastopt.prepare(nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d()))
    forward_and_backward(lazy, (4, 2), BF16)
    assert lazy[1].running_mean.dtype == FP32


@pytest.mark.parametrize("dtype", [FP32, FP64, torch.int8], ids=str)
def test_other_dtypes_are_refused(dtype):
    model = nn.Linear(2, 2)
    message = f"prepare casts to torch.bfloat16 or torch.float16, not to {dtype}: pass one of them"
    with pytest.raises(ValueError, match=message):
        fastopt.prepare(model, dtype)
    assert model.weight.dtype == FP32
