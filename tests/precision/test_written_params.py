"""Parameters that are written from outside, between steps, where there is a master beside them; and
parameters that are no plain tensors."""

import functools
import math

import pytest
import torch
import torch.distributed as dist
from helpers import (
    BACKENDS,
    BF16,
    FP16,
    FP32,
    assert_same_bits,
    clones,
    each_optimizer,
    interpreted,
    masked_out,
    new_params,
    parameters,
    set_grads,
    take_steps,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.testing._internal.two_tensor import TwoTensor

import fastopt
from fastopt import packing

pytestmark = masked_out
N = 300  # more than one block
#: With a master of either form.
each_form = pytest.mark.parametrize(
    ("dtype", "master"), [(BF16, "split"), (BF16, "fp32"), (FP16, "fp32")], ids=str
)


def each_backend_and(names, rows, interpret=1):
    """Each row with each backend; the interpreter, which is slow, has the first of them."""
    names = ("backend", *names.split())
    table = [(backend, *row) for backend in BACKENDS for row in rows]
    table += [pytest.param("triton", *row, marks=interpreted) for row in rows[:interpret]]
    return pytest.mark.parametrize(names, table, ids=str)


def make(params, master="auto", cls=fastopt.AdamW, **settings):
    return cls(params, master_weights=master, lr=0.01, weight_decay=0.1, **settings)


def masters(optimizer):
    return [master.clone() for master in optimizer.master_params()]


def trained(dtype, master, backend="auto", **settings):
    optimizer = make(new_params([(N,), (5,)], dtype), master, backend=backend, **settings)
    take_steps(optimizer, range(3))
    for param, number in zip(parameters(optimizer), masters(optimizer), strict=True):
        assert not torch.equal(param.float(), number)  # what is tested would show
    return optimizer


def stand_still(optimizer, skip=()):
    """A step that moves nothing, with gradients for all parameters but those at ``skip``."""
    for index, param in enumerate(parameters(optimizer)):
        param.grad = None if index in skip else torch.zeros_like(param)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    for group in optimizer.param_groups:
        group["lr"] = 0.01


def new_plan(optimizer):
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))]})


SPECIAL = [0.0, -0.0, math.inf, -math.inf, 1.0, -1.0, 1e-40, -1e-40, 3.3895e38, 2.0**-126]


def values(dtype, n=N, seed=9):
    """Some of them at the edges of the dtype, five times, to meet remainders of both signs."""
    new = torch.randn(n, generator=torch.Generator().manual_seed(seed)).to(dtype)
    if n == N:
        new[50 : 50 + 5 * len(SPECIAL)] = torch.tensor(SPECIAL).to(dtype).repeat(5)
    return new


def wanted_master(before, param, master):
    """The old one where the parameter is what it was; a remainder is dropped with its block."""
    stands = packing.param_of(before, param.dtype).view(torch.int16) == param.view(torch.int16)
    if master == "split":
        stands = torch.cat([block.all().expand_as(block) for block in stands.split(256)])
    return torch.where(stands, before, param.detach().float())


def as_module(param):
    return torch.nn.ParameterDict({"weight": param})


WRITES = {
    "copy_": lambda param, new: param.copy_(new),
    "part": lambda param, new: param[10:20].copy_(new[10:20]),
    # The version counter does not show those of data.
    ".data": lambda param, new: param.data.copy_(new),
    "other .data": lambda param, new: setattr(param, "data", new.clone()),
    ".data of a part": lambda param, new: param.data[40:].copy_(new[40:]),
    "index": lambda param, new: param.__setitem__(slice(None), new),
    "set through a view": lambda param, new: param.view(-1)[:].copy_(new),
    "mul_": lambda param, new: param.mul_(0).add_(new),
    "detached": lambda param, new: param.detach().copy_(new),
    "torch.nn.init": lambda param, new: torch.nn.init.zeros_(param).add_(new),
    "load_state_dict": lambda param, new: as_module(param).load_state_dict({"weight": new}),
}


def failed_load(optimizer):
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict({"state": {}, "param_groups": []})


THEN = {"": lambda optimizer: None, "new plan": new_plan, "failed load": failed_load}
#: A way to write, what happens then, and which parameters have no gradient in the steps after it.
ROWS = [("copy_", then, [[0], []]) for then in ("", "new plan")]
ROWS += [(write, then, [[]]) for write in WRITES for then in ("", "new plan")]
ROWS += [("copy_", "new plan", [[0], [0], []]), ("copy_", "failed load", [[]])]


@each_form
@each_backend_and("write then skips", ROWS, interpret=8)
def test_written(write, then, skips, backend, dtype, master):
    """What was written is the number: at once, in a checkpoint, in the next step, and when the
    parameter has a gradient again."""
    optimizer = trained(dtype, master, backend)
    first, second = parameters(optimizer)
    before = masters(optimizer)
    with torch.no_grad():
        WRITES[write](first, values(dtype))
    now = first.detach().clone()
    wanted = [wanted_master(before[0], now, master), before[1]]
    assert not torch.equal(wanted[0], before[0])
    assert_same_bits(masters(optimizer), wanted)
    resumed = make(clones([first, second]), master, backend=backend)
    resumed.load_state_dict(optimizer.state_dict())
    THEN[then](optimizer)
    for each in (optimizer, resumed):
        for skip in skips:
            stand_still(each, skip)
        assert_same_bits(masters(each)[:2], wanted)
        assert_same_bits(parameters(each)[:2], [now, second])
    take_steps(optimizer, [4])
    assert not first.isnan().any()


@each_backend_and("replanned", [(None,), (0,), (1,), (2,), (3,)])
@each_form
def test_changes_without_values(dtype, master, replanned, backend):
    """Of flags, gradients and names: masters stay, without a gradient too."""
    optimizer = trained(dtype, master, backend)
    before = masters(optimizer)
    for param in parameters(optimizer):
        param.requires_grad_(False)
        param.requires_grad_(True)
        param.grad.mul_(2)
        param.grad = None
        param.retain_grad()
        param.register_hook(lambda grad: grad)
        param.mine = 3
        as_module(param)
        param.data = param.data  # the same memory
        param.data = param.data.clone()  # the same numbers
        assert param.detach().view(-1).sum().isfinite()
    for step, skip in enumerate(([], [0], [1], [])):
        if step == replanned:
            new_plan(optimizer)
        stand_still(optimizer, skip)
        assert_same_bits(masters(optimizer)[:2], before)


SCALERS = [(fastopt.GradScaler, False), (fastopt.GradScaler, True)]
SCALERS += [(torch.amp.GradScaler, False), (torch.amp.GradScaler, True)]


@each_form
@each_backend_and("scaler_class kept_plan", SCALERS)
def test_a_skipped_step_keeps_masters(scaler_class, kept_plan, dtype, master, backend):
    """Whether the scaler of torch skips it or ours; what is written before it counts."""
    optimizer = trained(dtype, master, backend, max_norm=1.0)
    first, second = parameters(optimizer)
    wanted = masters(optimizer)
    scaler = scaler_class("cpu", init_scale=4.0)
    for fault in (math.inf, math.nan, -math.inf):
        versions = [first._version, second._version]
        set_grads([first, second], 4)
        second.grad[2] = fault
        scaler.scale(torch.zeros(()))
        if not kept_plan and fault == math.nan:
            new_plan(optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert_same_bits(masters(optimizer)[:2], wanted)
        assert [first._version, second._version] == versions
        if fault == math.nan:
            stand_still(optimizer)
            assert_same_bits(masters(optimizer)[:2], wanted)
            with torch.no_grad():
                first.copy_(values(dtype))
            wanted[0] = wanted_master(wanted[0], first, master)
    stand_still(optimizer)
    assert_same_bits(masters(optimizer)[:2], wanted)


def test_steps_of_two_optimizers():
    """Each sees what the other has written."""
    params = new_params([(N,)], BF16)
    optimizers = [make(params, "split"), make(params, "fp32")]
    for step in range(6):
        take_steps(optimizers[step % 2], [step])
        for optimizer in optimizers:
            assert_same_bits([packing.param_of(*masters(optimizer), BF16)], [params[0].detach()])
    stand_still(optimizers[0])
    assert_same_bits(masters(optimizers[0]), [params[0].float()])


# --- Parameters that are no plain tensors --------------------------------------------------------


@pytest.fixture(scope="module")
def mesh():
    if dist.is_initialized():
        pytest.skip("there is a process group")
    dist.init_process_group("fake", rank=0, world_size=1, store=FakeStore())
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.fixture(params=["TwoTensor", "DTensor"])
def kind(request):
    return request.param


@pytest.fixture
def wrap(kind, mesh):
    """Of a tensor, one that is no plain tensor; `plain` has what is in it."""
    if kind == "TwoTensor":
        return lambda x: TwoTensor(x, x.clone())
    return lambda x: distribute_tensor(x, mesh, [Shard(0)])


def plain(x):
    if isinstance(x, TwoTensor):
        assert_same_bits([x.a], [x.b])
        return x.a
    return x.to_local() if isinstance(x, DTensor) else x


def wrapped_params(wrap, shapes, dtype=BF16):
    return [torch.nn.Parameter(wrap(param.detach())) for param in new_params(shapes, dtype)]


def step_wrapped(optimizer, wrap, steps):
    for step in steps:
        params = parameters(optimizer)
        like = new_params([param.shape for param in params], params[0].dtype)
        set_grads(like, step)
        for param, other in zip(params, like, strict=True):
            param.grad = wrap(other.grad)
        optimizer.step()


def assert_same_as_plain(wrapped, wanted):
    for a, b in zip(parameters(wrapped), parameters(wanted), strict=True):
        assert_same_bits([plain(a.detach())], [b.detach()])
        assert wrapped.state[a].keys() == wanted.state[b].keys()
        for name, value in wrapped.state[a].items():
            assert_same_bits([plain(value)], [wanted.state[b][name]])
    assert_same_bits(map(plain, masters(wrapped)), masters(wanted))


@each_optimizer
@pytest.mark.parametrize(
    ("dtype", "master"),
    [(dtype, m) for dtype in (BF16, FP16) for m in ("auto", "fp32", None)] + [(FP32, "auto")],
    ids=str,
)
def test_wrapped(kind, wrap, cls, dtype, master):
    """The bits of plain tensors; it resumes too. Not a DTensor by torch operators, with an fp32
    master."""
    shapes = [(7, 5), (300,)]
    same = "fp32" if master == "auto" and kind != "DTensor" else master
    wanted = make(new_params(shapes, dtype), same, cls)
    optimizer = make(wrapped_params(wrap, shapes, dtype), master, cls)
    step_wrapped(optimizer, wrap, range(3))
    take_steps(wanted, range(3))
    assert_same_as_plain(optimizer, wanted)
    for model_first in (True, False):
        zeros = [torch.nn.Parameter(wrap(torch.zeros(shape, dtype=dtype))) for shape in shapes]
        other = make(zeros, master, cls)
        if not model_first:
            other.load_state_dict(optimizer.state_dict())
        with torch.no_grad():
            for a, b in zip(zeros, parameters(optimizer), strict=True):
                a.copy_(b)
        if model_first:
            other.load_state_dict(optimizer.state_dict())
        assert_same_as_plain(other, wanted)
    if kind == "DTensor" and dtype == BF16 and master == "auto":
        return  # a remainder has checksums only after the first step from the load on
    # Written from outside, what is written wins.
    with torch.no_grad():
        for a, b in zip(parameters(other), parameters(wanted), strict=True):
            a.copy_(wrap(torch.full_like(b, 0.3)))
            b.fill_(0.3)
    assert_same_bits(map(plain, masters(other)), masters(wanted))
    step_wrapped(other, wrap, range(3, 5))
    take_steps(wanted, range(3, 5))
    assert_same_as_plain(other, wanted)


NEED_MEMORY = {"master_weights": ("split", "stochastic"), "state_dtype": (BF16, "8bit")}


@pytest.mark.parametrize("kind", ["TwoTensor"], indirect=True)
@pytest.mark.parametrize(
    ("setting", "value"),
    [(name, value) for name, pair in NEED_MEMORY.items() for value in pair],
    ids=str,
)
def test_wrapped_in_modes_that_need_memory(kind, wrap, setting, value):
    """In a step, in a load and in Adagrad's constructor; nothing has changed."""

    def refuses(place="0 of group 0"):
        message = f"parameter {place}, of shape .7, 5., is a {kind}, for which {setting}={value!r}"
        return pytest.raises(ValueError, match=f"{message} does not work: use ")

    params = functools.partial(wrapped_params, wrap, [(7, 5)])
    optimizer = fastopt.AdamW(params(), **{setting: value})
    source = fastopt.AdamW(params())
    step_wrapped(source, wrap, [0])
    with refuses():
        step_wrapped(optimizer, wrap, [0])
    with refuses():
        optimizer.load_state_dict(source.state_dict())
    assert not optimizer.state
    if value != "8bit":
        with refuses():
            fastopt.Adagrad(params(), **{setting: value})
        first, second = new_params([(3,), (2,)])
        optimizer = fastopt.Adagrad([first], **{setting: value})
        with refuses("1 of group 1"):
            optimizer.add_param_group({"params": [second, *params()]})
        assert len(optimizer.param_groups) == 1
        assert list(optimizer.state) == [first]


@pytest.mark.parametrize("master", ["split", "fp32", None])
def test_wrapped_with_plain_states(kind, wrap, master):
    """As when a checkpoint of a model that is not sharded is loaded into one that is."""
    source = make(new_params([(7, 5)], BF16), master)
    take_steps(source, range(2))
    optimizer = make(wrapped_params(wrap, [(7, 5)]))
    with pytest.raises(RuntimeError, match=f"of shape .* is a {kind} .*and its state .* a plain"):
        optimizer.load_state_dict(source.state_dict())
    assert not optimizer.state


def test_fully_sharded(mesh):
    """FSDP2 in bf16 gives the bits of the model alone with fp32 masters."""
    runs = []
    for master in ("auto", "fp32"):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Linear(8, 4)).to(BF16)
        if master == "auto":
            fully_shard(model, mesh=mesh)
        optimizer = make(list(model.parameters()), master, max_norm=1.0)
        norms = []
        for step in range(4):
            optimizer.zero_grad()
            model(values(BF16, 12, step).view(2, 6)).square().sum().backward()
            optimizer.step()
            norms.append(optimizer.grad_norm)
        runs.append((optimizer, norms))
    (ours, norms), (alone, wanted) = runs
    assert all(isinstance(param, DTensor) for param in parameters(ours))
    assert_same_bits(norms, wanted)
    assert_same_bits(map(plain, parameters(ours)), parameters(alone))
    assert_same_bits(map(plain, masters(ours)), masters(alone))
