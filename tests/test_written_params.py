"""Parameters that are written from outside, between steps, where there is a master beside them; and
parameters that are no plain tensors."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from helpers import BACKENDS, assert_same_bits, new_params, set_grads
from test_conversions import BF16, FP16, FP32, clones, make, masters, parameters, take_steps
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.testing._internal.two_tensor import TwoTensor

import fastopt
from fastopt.packing import param_of
from fastopt.step import dispatch

pytestmark = [
    # Lanes that are masked out hold zeros.
    pytest.mark.filterwarnings("ignore:divide by zero encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
]

interpreted = pytest.mark.skipif(
    not dispatch.backends()["triton"].available or not dispatch.triton_kernels().INTERPRETED,
    reason="the kernels are not interpreted",
)
each_backend = pytest.mark.parametrize(
    "backend", [*BACKENDS, pytest.param("triton", marks=interpreted)]
)
#: With a master of either form.
each_form = pytest.mark.parametrize(
    ("dtype", "master"), [(BF16, "split"), (BF16, "fp32"), (FP16, "fp32")], ids=str
)
N = 300


def each_backend_and(name, values):
    """Each value with each backend; the interpreter, which is slow, with the first of them."""
    rows = [(backend, value) for backend in BACKENDS for value in values]
    rows.append(pytest.param("triton", next(iter(values)), marks=interpreted))
    return pytest.mark.parametrize(("backend", name), rows)


def trained(dtype, master, backend="auto", sizes=(N, 5), steps=3, **settings):
    optimizer = make(
        new_params([(size,) for size in sizes], dtype), master, backend=backend, **settings
    )
    take_steps(optimizer, range(steps))
    for param, number in zip(parameters(optimizer), masters(optimizer), strict=True):
        assert not torch.equal(param.float(), number)  # what is tested would show
    return optimizer


def stand_still(optimizer, skip=()):
    """A step that moves nothing, with gradients for all parameters but those at ``skip``."""
    params = parameters(optimizer)
    for index, param in enumerate(params):
        param.grad = None if index in skip else torch.zeros_like(param)
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def new_plan(optimizer):
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))]})


def values(dtype, n=N, seed=9):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed)).to(dtype)


WRITES = {
    "copy_": lambda param, new: param.copy_(new),
    "index": lambda param, new: param.__setitem__(slice(None), new),
    "set through a view": lambda param, new: param.view(-1)[:].copy_(new),
    "mul_": lambda param, new: param.mul_(0).add_(new),
    "detached": lambda param, new: param.detach().copy_(new),
    "torch.nn.init": lambda param, new: (torch.nn.init.zeros_(param), param.add_(new)),
    "load_state_dict": lambda param, new: as_module(param).load_state_dict({"weight": new}),
}


def as_module(param):
    module = torch.nn.Module()
    module.weight = param
    return module


@each_form
@each_backend_and("write", WRITES)
@pytest.mark.parametrize("kept_plan", [True, False])
def test_written(write, kept_plan, backend, dtype, master):
    """The version counter shows it: what was written is the number, without a remainder."""
    optimizer = trained(dtype, master, backend)
    first, second = parameters(optimizer)
    before = masters(optimizer)
    with torch.no_grad():
        WRITES[write](first, values(dtype))
    if not kept_plan:
        new_plan(optimizer)
    stand_still(optimizer)
    found = masters(optimizer)
    assert_same_bits([first], [values(dtype)])
    if master == "split":
        assert_same_bits(found[:1], [values(dtype).float()])
        assert not optimizer.state[first]["param_remainder"].any()
    else:  # an element may have been written with the value that it had
        same = param_of(before[0], dtype) == values(dtype)
        assert_same_bits(found[:1], [torch.where(same, before[0], values(dtype).float())])
    assert_same_bits(found[1:2], before[1:])  # the other parameter keeps its master
    assert_same_bits([second], [param_of(before[1], dtype)])


@each_backend
@each_form
def test_some_elements_written(dtype, master, backend):
    """They win, and the others keep their masters; remainders are dropped by blocks of 256."""
    optimizer = trained(dtype, master, backend)
    (first, _), (before, _) = parameters(optimizer), masters(optimizer)
    with torch.no_grad():
        first[10:20] = values(dtype)[10:20]
    now = first.detach().clone()
    stand_still(optimizer)
    assert_same_bits([first], [now])
    wanted = now.float()
    if master == "fp32":
        wanted = torch.where(param_of(before, dtype) == now, before, wanted)
        assert_same_bits([wanted[:10]], [before[:10]])
    else:
        wanted[256:] = before[256:]
    assert_same_bits(masters(optimizer)[:1], [wanted])


@each_form
@each_backend_and("several", [1, 2])
@pytest.mark.parametrize("kept_plan", [True, False])
def test_written_while_it_has_no_gradient(several, kept_plan, backend, dtype, master):
    """In the step of the others."""
    optimizer = trained(dtype, master, backend)
    first, _ = parameters(optimizer)
    with torch.no_grad():
        first.copy_(values(dtype))
    if not kept_plan:
        new_plan(optimizer)
    for _ in range(several):
        stand_still(optimizer, skip=[0])
    stand_still(optimizer)
    assert_same_bits([first], [values(dtype)])
    assert_same_bits(masters(optimizer)[:1], [values(dtype).float()])


@each_backend_and("when", ["before", "after", "in between"])
@pytest.mark.parametrize("kept_plan", [True, False])
@pytest.mark.parametrize("between", [0, 1])
def test_a_parameter_without_a_gradient_keeps_its_remainder(when, between, kept_plan, backend):
    """Where nobody writes to it, whatever else goes on."""
    optimizer = trained(BF16, "split", backend)
    before = masters(optimizer)
    if when == "before" and not kept_plan:
        new_plan(optimizer)
    stand_still(optimizer, skip=[between])
    if when == "in between" and not kept_plan:
        new_plan(optimizer)
    stand_still(optimizer, skip=[1 - between])
    if when == "after" and not kept_plan:
        new_plan(optimizer)
    stand_still(optimizer)
    assert_same_bits(masters(optimizer)[:2], before)


SPECIAL = [0.0, -0.0, math.inf, -math.inf, 1.0, -1.0, 1e-40, -1e-40, 3.3895e38, 2.0**-126]


@each_form
@each_backend_and("way", [".data", "other .data", ".data of a part"])
@pytest.mark.parametrize("kept_plan", [True, False])
def test_written_past_the_version(kept_plan, way, backend, dtype, master):
    """It moves by at most half a bf16 ulp, is never NaN, and the parameter is what was written."""
    optimizer = trained(dtype, master, backend)
    (first, _), (before, _) = parameters(optimizer), masters(optimizer)
    new = values(dtype)
    new[: len(SPECIAL)] = torch.tensor(SPECIAL).to(dtype)
    # Meets remainders of both signs, as it has them in its state.
    new[50 : 50 + 4 * len(SPECIAL)] = torch.tensor(SPECIAL).to(dtype).repeat(4)
    if way == ".data":
        first.data.copy_(new)
    elif way == "other .data":
        first.data = new.clone()
    else:
        new = torch.cat([first.detach()[:40], new[40:]])
        first.data[40:] = new[40:]
    if not kept_plan:
        new_plan(optimizer)

    def look():
        found = masters(optimizer)[0]
        assert not found.isnan().any()
        assert_same_bits([param_of(found, dtype)], [new])
        if master == "fp32":
            assert_same_bits([found], [torch.where(param_of(before, dtype) == new, before, new)])
        else:
            # To the next bf16 numbers, in the order of their bits; half of that distance.
            bits = new.view(torch.int16).int()
            up, down = ((bits + d).to(torch.int16).view(BF16).double() for d in (1, -1))
            ulp = torch.maximum((up - new).abs(), (down - new).abs())
            near = new.isfinite() & (new != 0)
            assert ((found - new.double()).abs()[near] <= ulp[near] / 2).all()
            assert (found[new == 0].abs() <= 2.0**-134).all()  # half of bf16's smallest
        return found

    look()
    stand_still(optimizer)
    assert_same_bits([first], [new])
    look()
    # And it trains from there as from what was written: by the same update but for the remainder.
    take_steps(optimizer, [4])
    assert not first.isnan().any()


@each_backend
@each_form
def test_changes_without_values(dtype, master, backend):
    """Of flags, gradients and names: masters stay."""
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
        torch.nn.Module().register_parameter("weight", param)
        param.data = param.data  # the same memory
        param.data = param.data.clone()  # the same numbers
        assert param.detach().view(-1).sum().isfinite()
    for skip in ([], [0], []):
        stand_still(optimizer, skip)
    assert_same_bits(masters(optimizer), before)


@each_form
@each_backend_and("kept_plan", [False, True])
def test_a_skipped_step_keeps_masters(kept_plan, dtype, master, backend):
    """Whether the scaler of torch skips it or ours."""
    scalers = [fastopt.GradScaler, torch.amp.GradScaler]
    for scaler_class in scalers[: 1 if backend == "triton" else 2]:  # the interpreter is slow
        optimizer = trained(dtype, master, backend, max_norm=1.0)
        before, versions = masters(optimizer), [p._version for p in parameters(optimizer)]
        scaler = scaler_class("cpu", init_scale=4.0)
        for fault in (math.inf, math.nan):
            set_grads(parameters(optimizer), 4)
            parameters(optimizer)[1].grad[2] = fault
            scaler.scale(torch.zeros(()))
            if not kept_plan:
                new_plan(optimizer)
            scaler.step(optimizer)
            scaler.update()
            assert_same_bits(masters(optimizer)[:2], before)
        assert [p._version for p in parameters(optimizer)[:2]] == versions
        stand_still(optimizer)
        assert_same_bits(masters(optimizer)[:2], before)
        # Written, and then skipped: what was written counts.
        with torch.no_grad():
            parameters(optimizer)[0].copy_(values(dtype))
        set_grads(parameters(optimizer), 5)
        parameters(optimizer)[1].grad[2] = math.inf
        scaler.scale(torch.zeros(()))
        scaler.step(optimizer)
        scaler.update()
        stand_still(optimizer)
        assert_same_bits(masters(optimizer)[:1], [values(dtype).float()])


def test_a_load_that_fails_forgets_nothing():
    """A write before it still shows in the step after it."""
    optimizer = trained(BF16, "split")
    plan = optimizer._plan
    (first, _) = parameters(optimizer)
    with torch.no_grad():
        first.copy_(values(BF16))
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict({"state": {}, "param_groups": []})
    assert optimizer._plan is plan
    stand_still(optimizer)
    assert_same_bits(masters(optimizer)[:1], [values(BF16).float()])


def test_steps_of_two_optimizers():
    """Each sees what the other has written."""
    params = new_params([(N,)], BF16)
    optimizers = [make(params, "split"), make(params, "fp32")]
    for step in range(6):
        set_grads(params, step)
        optimizers[step % 2].step()
        for optimizer in optimizers:
            assert_same_bits([param_of(*masters(optimizer), BF16)], [params[0].detach()])
    stand_still(optimizers[0])
    assert_same_bits(masters(optimizers[0]), [params[0].float()])


def test_saved_after_a_write():
    """A write after the last step before a checkpoint: the remainder is out of date in it, and the
    resumed run is off by at most half a bf16 ulp; an fp32 master is not."""
    for master in ("split", "fp32"):
        optimizer = trained(BF16, master, sizes=(N,))
        with torch.no_grad():
            parameters(optimizer)[0].copy_(values(BF16))
        other = make(clones(parameters(optimizer)), master)
        other.load_state_dict(optimizer.state_dict())
        stand_still(other)
        assert_same_bits(parameters(other), [values(BF16)])
        (found,) = masters(other)
        assert_same_bits([param_of(found, BF16)], [values(BF16)])


# --- Parameters that are no plain tensors --------------------------------------------------------


@pytest.fixture(scope="module")
def mesh():
    if dist.is_initialized():
        pytest.skip("there is a process group")
    dist.init_process_group("fake", rank=0, world_size=1, store=FakeStore())
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def wrappers(mesh):
    """For each kind: what wraps a tensor, and the plain tensors in it."""
    return {
        "TwoTensor": (lambda x: TwoTensor(x, x.clone()), lambda x: [x.a, x.b]),
        "DTensor": (
            lambda x: distribute_tensor(x, mesh, [Shard(0)]),
            lambda x: [x.to_local() if isinstance(x, DTensor) else x],
        ),
    }


each_wrapper = pytest.mark.parametrize("kind", ["TwoTensor", "DTensor"])


def step_wrapped(optimizer, wrap, steps):
    for step in steps:
        params = parameters(optimizer)
        plain = new_params([param.shape for param in params], params[0].dtype)
        set_grads(plain, step)
        for param, like in zip(params, plain, strict=True):
            param.grad = wrap(like.grad)
        optimizer.step()


@each_wrapper
@pytest.mark.parametrize("cls", fastopt.OPTIMIZERS)
@pytest.mark.parametrize(
    ("dtype", "master"),
    [(dtype, m) for dtype in (BF16, FP16) for m in ("auto", "fp32", None)] + [(FP32, "auto")],
    ids=str,
)
def test_wrapped(kind, cls, dtype, master, mesh):
    """By torch operators, with an fp32 master: the bits of plain tensors; it resumes too."""
    wrap, parts = wrappers(mesh)[kind]
    shapes = [(7, 5), (300,)]
    plain = make(new_params(shapes, dtype), "fp32" if master == "auto" else master, cls=cls)
    wrapped = [torch.nn.Parameter(wrap(param.detach())) for param in new_params(shapes, dtype)]
    optimizer = make(wrapped, master, cls=cls)

    def compare(optimizer):
        for a, b in zip(parameters(optimizer), parameters(plain), strict=True):
            for part in parts(a.detach()):
                assert part.dtype == dtype
                assert_same_bits([part], [b.detach()])
            assert optimizer.state[a].keys() == plain.state[b].keys()
            for name, value in optimizer.state[a].items():
                for part in [value] if name == "step" else parts(value):
                    assert_same_bits([part], [plain.state[b][name]])
        for a, b in zip(masters(optimizer), masters(plain), strict=True):
            for part in parts(a):
                assert_same_bits([part], [b])

    step_wrapped(optimizer, wrap, range(3))
    take_steps(plain, range(3))
    compare(optimizer)
    for model_first in (True, False):
        other = make(
            [torch.nn.Parameter(wrap(torch.zeros(shape, dtype=dtype))) for shape in shapes],
            master,
            cls=cls,
        )
        if not model_first:
            other.load_state_dict(optimizer.state_dict())
        with torch.no_grad():
            for a, b in zip(parameters(other), wrapped, strict=True):
                a.copy_(b)
        if model_first:
            other.load_state_dict(optimizer.state_dict())
        compare(other)
    step_wrapped(other, wrap, range(3, 5))
    take_steps(plain, range(3, 5))
    compare(other)


@each_wrapper
@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("master_weights", "split"),
        ("master_weights", "stochastic"),
        ("state_dtype", BF16),
        ("state_dtype", "8bit"),
    ],
    ids=str,
)
def test_wrapped_in_modes_that_need_memory(kind, setting, value, mesh):
    """In a step, in a load and in Adagrad's constructor; nothing has changed."""
    wrap, _ = wrappers(mesh)[kind]

    def param():
        return torch.nn.Parameter(wrap(new_params([(7, 5)], BF16)[0].detach()))

    message = (
        f"parameter 0 of group 0, of shape \\(7, 5\\), is a {kind}, for which {setting}={value!r} "
        "does not work: use "
    )
    optimizer = fastopt.AdamW([param()], **{setting: value})
    with pytest.raises(ValueError, match=message):
        step_wrapped(optimizer, wrap, [0])
    assert not optimizer.state
    source = fastopt.AdamW([param()])
    step_wrapped(source, wrap, [0])
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(source.state_dict())
    assert not optimizer.state
    if value != "8bit":
        with pytest.raises(ValueError, match=message):
            fastopt.Adagrad([param()], **{setting: value})
        plain = new_params([(3,), (2,)])
        optimizer = fastopt.Adagrad(plain[:1], **{setting: value})
        with pytest.raises(ValueError, match=message.replace("r 0 of group 0", "r 1 of group 1")):
            optimizer.add_param_group({"params": [plain[1], param()]})
        assert len(optimizer.param_groups) == 1
        assert list(optimizer.state) == plain[:1]


@each_wrapper
def test_wrapped_with_plain_states(kind, mesh):
    """As when a checkpoint of a model that is not sharded is loaded into one that is."""
    wrap, _ = wrappers(mesh)[kind]
    for master in ("split", "fp32", None):
        plain = make(new_params([(7, 5)], BF16), master)
        take_steps(plain, range(2))
        optimizer = make([torch.nn.Parameter(wrap(new_params([(7, 5)], BF16)[0].detach()))])
        with pytest.raises(RuntimeError, match=f"of shape .* is a {kind} and its state .* a plain"):
            optimizer.load_state_dict(plain.state_dict())
        assert not optimizer.state


@each_wrapper
def test_wrapped_and_written(kind, mesh):
    """What is written wins, by its bits: there is nothing to watch."""
    wrap, parts = wrappers(mesh)[kind]
    optimizer = make([torch.nn.Parameter(wrap(new_params([(N,)], BF16)[0].detach()))])
    step_wrapped(optimizer, wrap, range(3))
    (param,) = parameters(optimizer)
    with torch.no_grad():
        param.copy_(wrap(values(BF16)))
    optimizer.param_groups[0]["lr"] = 0.0
    step_wrapped(optimizer, wrap, [3])
    for part in [*parts(param.detach()), *parts(*masters(optimizer))]:
        assert_same_bits([part.float()], [values(BF16).float()])


def test_fully_sharded(mesh):
    """FSDP2 in bf16 gives the bits of the model alone with fp32 masters."""

    def model():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Linear(8, 4)).to(BF16)

    sharded, alone = model(), model()
    fully_shard(sharded, mesh=mesh)
    ours = make(list(sharded.parameters()), max_norm=1.0)
    plain = make(list(alone.parameters()), "fp32", max_norm=1.0)
    assert all(isinstance(param, DTensor) for param in parameters(ours))
    for step in range(4):
        x = values(BF16, 12, step).view(2, 6)
        for module, optimizer in ((sharded, ours), (alone, plain)):
            optimizer.zero_grad()
            module(x).square().sum().backward()
            optimizer.step()
        assert_same_bits([ours.grad_norm], [plain.grad_norm])
    assert_same_bits([param.to_local() for param in parameters(ours)], parameters(plain))
    assert_same_bits([param.to_local() for param in masters(ours)], masters(plain))
