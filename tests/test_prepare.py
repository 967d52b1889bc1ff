"""`fastopt.prepare`: 16 bits throughout, but for what must stay in fp32."""

import copy

import pytest
import torch
from helpers import assert_same_bits
from torch import nn

import fastopt

HALVES = [torch.bfloat16, torch.float16]
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
    (lambda: nn.LSTM(4, 4, batch_first=True), (8, 5, 4)),
]


def tensors(model):
    return [*model.parameters(), *model.buffers()]


def floating(model):
    return [tensor for tensor in tensors(model) if tensor.is_floating_point()]


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
    for tensor in floating(model):
        assert tensor.dtype == (torch.float32 if kept else dtype)
    for _ in range(2):
        forward_and_backward(model, shape, dtype)


@each_half
def test_a_network(dtype):
    """Trains, and evaluates after that."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.GroupNorm(2, 8),
        nn.Flatten(),
        nn.Linear(8 * 16, 4),
        nn.LayerNorm(4),
    )
    optimizer = fastopt.AdamW(model.parameters())  # made before, it has the same parameters
    assert fastopt.prepare(model, dtype) is model
    mean = model[1].running_mean.clone()
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(2, 3, 8, 8, dtype=dtype)).float().square().sum().backward()
        before = [param.detach().clone() for param in model.parameters()]
        optimizer.step()
        assert any((a != b).any() for a, b in zip(before, model.parameters(), strict=True))
    assert (model[1].running_mean != mean).any()
    assert model.eval()(torch.ones(2, 3, 8, 8, dtype=dtype)).dtype == dtype


class Buffers(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.full((3,), 1 / 3))
        self.phase = nn.Parameter(torch.ones(3, dtype=torch.complex64))
        self.register_buffer("count", torch.arange(3))
        self.register_buffer("mask", torch.ones(3, dtype=torch.bool))
        self.register_buffer("spectrum", torch.ones(3, dtype=torch.complex64))
        self.register_buffer("table", torch.full((3,), 1 / 3))
        self.register_buffer("scratch", torch.full((3,), 1 / 3), persistent=False)
        self.register_buffer("nothing", None)


@each_half
def test_what_is_not_real_stays(dtype):
    model = Buffers()
    before = {name: getattr(model, name) for name in ("phase", "count", "mask", "spectrum")}
    keys = list(model.state_dict())
    fastopt.prepare(model, dtype)
    for name, tensor in before.items():
        assert getattr(model, name) is tensor
        assert tensor.dtype == getattr(Buffers(), name).dtype
    for name in ("weight", "table", "scratch"):
        assert_same_bits([getattr(model, name).detach()], [torch.full((3,), 1 / 3).to(dtype)])
    assert model.nothing is None
    assert list(model.state_dict()) == keys


@each_half
def test_parameters_stay_the_same_objects_and_tied(dtype):
    embedding, head = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
    head.weight = embedding.weight
    model = nn.Sequential(embedding, nn.LayerNorm(4), head)
    before = list(model.parameters())
    values = [param.detach().clone() for param in before]
    fastopt.prepare(model, dtype)
    after = list(model.parameters())
    assert len(after) == len(before) == 3
    assert all(a is b for a, b in zip(after, before, strict=True))
    assert head.weight is embedding.weight
    assert_same_bits([param.detach() for param in after], [value.to(dtype) for value in values])
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
    assert {name: param.dtype for name, param in model.named_parameters()} == {
        "0.weight": torch.float32,
        "0.bias": torch.float32,
        "1.0.weight": torch.bfloat16,
        "1.0.bias": torch.bfloat16,
        "2.weight": torch.float32,
        "2.bias": torch.float32,
    }


def test_shared_with_a_module_that_is_kept():
    embedding, head = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
    head.weight = embedding.weight
    for order in ([embedding, head], [head, embedding]):
        fastopt.prepare(nn.Sequential(*order), keep_fp32=lambda _, module: module is head)
        assert embedding.weight is head.weight
        assert head.weight.dtype == torch.float32


@each_half
@pytest.mark.parametrize("before", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes_than_fp32_before(before, dtype):
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).to(before)
    fastopt.prepare(model, dtype)
    assert all(tensor.dtype == dtype for tensor in floating(model[0]))
    assert all(tensor.dtype == torch.float32 for tensor in floating(model[1]))
    forward_and_backward(model, (4, 2), dtype)


def test_gradients_that_are_there():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    forward_and_backward(model, (4, 2), torch.float32)
    wanted = [copy.deepcopy(param.grad) for param in model.parameters()]
    fastopt.prepare(model)
    for param, grad in zip(model.parameters(), wanted, strict=True):
        assert_same_bits([param.grad], [grad.to(param.dtype)])


def test_twice_is_once():
    model = fastopt.prepare(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    before = [(tensor, tensor.data_ptr()) for tensor in tensors(model)]
    fastopt.prepare(model)
    for tensor, (same, address) in zip(tensors(model), before, strict=True):
        assert tensor is same
        assert tensor.data_ptr() == address


def test_without_data():
    """Meta tensors and lazy layers are cast too."""
    with torch.device("meta"):
        model = fastopt.prepare(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    assert [param.dtype for param in model.parameters()] == [torch.bfloat16] * 2 + [
        torch.float32
    ] * 2
    lazy = fastopt.prepare(nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d()))
    forward_and_backward(lazy, (4, 2), torch.bfloat16)
    assert lazy[1].running_mean.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int8], ids=str)
def test_other_dtypes_are_refused(dtype):
    model = nn.Linear(2, 2)
    message = f"prepare casts to torch.bfloat16 or torch.float16, not to {dtype}: pass one of them"
    with pytest.raises(ValueError, match=message):
        fastopt.prepare(model, dtype)
    assert model.weight.dtype == torch.float32
