"""What only a GPU shows: CUDA graphs, streams, no waiting for the device, launches and memory.

That its bits are those of the reference: test_triton_bits.py.
"""

import contextlib
import functools
import io
import itertools
import json
import math

import pytest
import torch
from helpers import (
    CASES,
    DTYPES,
    FP32,
    FP64,
    MODES,
    assert_near_torch,
    each_case,
    each_optimizer,
    parameters,
    torch_class,
)
from twins import (
    CPU,
    GPU,
    STEPS,
    assert_bits,
    give_grads,
    make_grads,
    make_params,
    on_a_gpu,
    results,
    take_steps,
    train,
    twins,
)

import fastopt

pytestmark = on_a_gpu

CYCLES = 400_000_000  # to keep the device busy: some tenths of a second
COUNT = torch.cuda.device_count()
each_clip = pytest.mark.parametrize("flags", [{}, {"max_norm": 0.5}], ids=str)
each_scaler = pytest.mark.parametrize("scaler_class", [torch.amp.GradScaler, fastopt.GradScaler])


def assign_grads(params, grads):
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad


def fill_grads(params, seed):
    """As `give_grads`, but in place."""
    for param, grad in zip(params, make_grads(params, seed), strict=True):
        param.grad.copy_(grad)


# Streams, devices and sizes


@each_optimizer
@twins
def test_while_the_device_is_behind(device, backend, cls):
    """What the host writes for one step must not reach the step before it; gradients are read and
    parameters written on the current stream."""
    params = make_params(device)
    grads = [make_grads(params, seed) for seed in range(20)]
    optimizer = cls(params, lr=0.1, max_norm=0.5, backend=backend)
    take_steps(optimizer, [0])
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream() if device == GPU else None):
        if device == GPU:
            torch.cuda._sleep(CYCLES)
        for step, new in enumerate(grads):
            for i, (param, grad) in enumerate(zip(params, new, strict=True)):
                missing = step % 4 == 0 and i == step % len(params)
                param.grad = None if missing else grad * 2  # on this stream
            optimizer.step()
            optimizer.param_groups[0]["lr"] *= 0.9
    torch.cuda.synchronize()
    return results(optimizer)


@each_clip
@each_optimizer
def test_parameters_on_several_devices(cls, flags):
    """One norm for all of them."""

    def run(devices, backend):
        params = [param for device in devices for param in make_params(device)]
        return [tensor.cpu() for tensor in train(cls(params, lr=0.1, backend=backend, **flags))]

    devices = [*(torch.device("cuda", i) for i in range(COUNT)), CPU]
    found, wanted = run(devices, "auto"), run([CPU] * len(devices), "reference")
    if flags:  # the sum of squares is taken by device: its last bit in double may differ
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)
    else:
        assert_bits(found, wanted)


def test_more_than_2_to_the_31_elements():
    n = 2**31 + 12_345
    if torch.cuda.mem_get_info(GPU)[0] < 20e9:
        pytest.skip("needs 20 GB of free memory")
    param = torch.ones(n, dtype=torch.bfloat16, device=GPU, requires_grad=True)
    param.grad = torch.ones_like(param)
    optimizer = fastopt.SGD([param], lr=0.5)
    optimizer.step()
    assert (param == 0.5).all()

    places = [0, 2**31 - 1, 2**31, n - 1]
    param.grad.zero_()
    for place in places:
        param.grad[place] = 4.0
    optimizer.param_groups[0]["max_norm"] = 4.0  # the norm is 8
    optimizer.step()
    assert optimizer.grad_norm == 8
    assert [param[place].item() for place in places] == [-0.5] * 4
    assert (param != 0.5).sum() == 4
    assert fastopt.get_total_norm([param.grad]) == 8


def test_the_same_bits_every_time():
    """With the work distributed over the device as it comes."""

    def run():
        return train(fastopt.AdamW(make_params(GPU, ((2**24 + 1,),)), lr=0.01, max_norm=0.5))

    first = run()
    for _ in range(5):
        assert all(map(torch.equal, run(), first))


# What stays on the device


@contextlib.contextmanager
def no_waiting():
    """Fails where the host waits for the device, which is busy."""
    torch.cuda.synchronize()
    done = torch.cuda.Event()
    torch.cuda._sleep(CYCLES // 2)
    done.record()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
        assert not done.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()


@pytest.mark.parametrize(
    ("settings", "lr_on_device"),
    [
        ({}, False),
        ({"max_norm": 0.5, "clip_value": 0.1}, False),
        ({"capturable": True}, False),
        ({"capturable": True, "max_norm": 0.5}, False),
        ({}, True),
        ({"capturable": True}, True),
    ],
)
@each_case
def test_no_waiting(cls, variant, settings, lr_on_device):
    params = make_params(GPU, dtypes=DTYPES)
    lr = torch.tensor(0.01, device=GPU) if lr_on_device else 0.01
    optimizer = cls(params, lr=lr, **variant, **settings)
    take_steps(optimizer, STEPS)
    grads = [make_grads(params, seed) for seed in (4, 5)]
    with no_waiting():
        for new in grads:
            optimizer.zero_grad(set_to_none=True)
            assign_grads(params, new)
            optimizer.param_groups[0]["lr"] *= 0.5  # a tensor in place
            optimizer.step()
    norm = optimizer.grad_norm
    assert (norm is None) == ("max_norm" not in settings)
    assert norm is None or (norm.device, norm.shape) == (GPU, ())


def test_clipping_does_not_wait():
    params = make_params(GPU, dtypes=DTYPES)
    give_grads(params, 1)

    def clip():
        fastopt.get_total_norm([param.grad for param in params])
        fastopt.clip_grad_norm_(params, 0.5)
        fastopt.clip_grad_value_(params, 0.1)

    clip()
    with no_waiting():
        clip()


# GradScaler


def scaled_step(optimizer, scaler, weights, factor):
    """An iteration whose gradients are the weights times the factor."""
    optimizer.zero_grad()
    pairs = zip(parameters(optimizer), weights, strict=True)
    loss = sum((param * weight).sum() for param, weight in pairs)
    scaler.scale(loss * factor).backward()
    scaler.step(optimizer)
    scaler.update()


@each_clip
@each_scaler
@each_optimizer
def test_grad_scaler_does_not_wait(cls, scaler_class, flags):
    params = make_params(GPU)
    weights = [make_grads(params, seed) for seed in range(5)]
    if scaler_class is torch.amp.GradScaler:
        flags = {"fused": True, **flags}  # else it reads whether to skip
    optimizer = cls(params, lr=0.01, **flags)
    scaler = scaler_class("cuda")
    for weight in weights[:3]:
        scaled_step(optimizer, scaler, weight, 1.0)
    with no_waiting():
        scaled_step(optimizer, scaler, weights[3], 1.0)
        scaled_step(optimizer, scaler, weights[4], math.inf)


@pytest.mark.parametrize("of_scale", [CPU, GPU], ids=str)
@each_clip
@pytest.mark.parametrize(("device", "other"), [(CPU, GPU), (GPU, CPU)], ids=str)
@each_optimizer
def test_an_overflow_on_one_device_skips_all(cls, device, other, flags, of_scale):
    """Parameters on a GPU beside some on the CPU."""

    def run(scaler_class):
        params = make_params(other) + make_params(device)
        optimizer = cls(params, lr=0.01, **flags)
        scaler = scaler_class(of_scale.type, init_scale=2.0**16, growth_interval=2)
        scaler.scale(torch.zeros((), device=of_scale))
        for seed, factor in enumerate([math.inf, math.nan, 1.0, 2.0, math.inf, 0.5, 1.0]):
            for param, grad in zip(params, make_grads(params, seed), strict=True):
                overflow = factor if param.device == device else 1.0
                param.grad = grad * scaler.get_scale() * overflow
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() == 2.0**15  # halved 3 times and doubled twice
        return results(optimizer)

    assert_bits(run(fastopt.GradScaler), run(torch.amp.GradScaler))


# CUDA graphs


def captured(step):
    """A function that replays a graph of the step."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


GRAPHS = [
    (cls, DTYPES, {**variant, **flags})
    for (cls, variant), flags in itertools.product(
        CASES, [{}, {"max_norm": 0.5, "clip_value": 0.1}]
    )
] + [
    (fastopt.AdamW, (dtype,), {"master_weights": master, "state_dtype": states})
    for dtype, master, states in MODES
]


@pytest.mark.parametrize(("cls", "dtypes", "settings"), GRAPHS, ids=str)
def test_graph(cls, dtypes, settings):
    """A replay is an eager step with the gradients and the learning rate of that moment, and rounds
    with the random numbers of its own number."""

    def run(capture):
        params = make_params(GPU, dtypes=dtypes)
        lr = torch.tensor(0.1, device=GPU)
        optimizer = cls(params, lr=lr, capturable=True, seed=7, **settings)
        take_steps(optimizer, range(2))
        step = captured(optimizer.step) if capture else optimizer.step
        norms = []
        for seed in range(2, 22):
            fill_grads(params, seed)
            lr.fill_(0.1 / seed)
            step()
            if optimizer.grad_norm is not None:
                norms.append(optimizer.grad_norm.clone())
            if seed % 5 == 1:
                optimizer.step()  # an eager one between replays, and the last
        return results(optimizer) + norms

    assert_bits(run(capture=True), run(capture=False))


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
@each_optimizer
@twins
def test_capture_needs_capturable(device, backend, cls):
    optimizer = cls(make_params(device), lr=0.01, backend=backend)
    take_steps(optimizer, STEPS)
    if device == GPU:
        before = [tensor.clone() for tensor in results(optimizer)]
        with pytest.raises(RuntimeError, match="capturable=True"):
            captured(optimizer.step)
        assert_bits(results(optimizer), before)
    return train(optimizer, [4])  # and it goes on


# Launches and memory


@pytest.fixture
def launches(tmp_path):
    """A function that counts the kernels that a function launches."""

    def count(run):
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            run()
            torch.cuda.synchronize()
        trace = tmp_path / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
        return sum(event.get("cat") == "kernel" for event in events)

    return count


@pytest.mark.parametrize(
    ("settings", "most"),
    [
        ({}, 1),
        ({"max_norm": 0.5}, 3),
        ({"capturable": True}, 2),
        ({"capturable": True, "max_norm": 0.5}, 3),
    ],
    ids=str,
)
@pytest.mark.parametrize("distinct", [1, 28])
@each_optimizer
def test_launches(cls, distinct, settings, most, launches):
    """Of a thousand tensors, in one group or each in its own, with so many different settings."""
    params = make_params(GPU, shapes=((1000,),) * 1000)
    groups = [{"params": [p], "lr": 0.01 / (1 + i % distinct)} for i, p in enumerate(params)]
    optimizer = cls(groups if distinct > 1 else params, **settings)
    take_steps(optimizer, range(2))
    give_grads(params, 2)  # at other addresses
    assert 1 <= launches(optimizer.step) <= most


@each_optimizer
def test_memory_does_not_grow(cls):
    params = make_params(GPU)
    optimizer = cls(params, lr=0.1, max_norm=0.5)
    grads = [make_grads(params, seed) for seed in range(4)]

    def steps(count):
        for step in range(count):
            assign_grads(params, grads[step % 4])
            params[step % len(params)].grad = None
            optimizer.param_groups[0]["lr"] = 0.1 / (1 + step)
            optimizer.step()
            torch.cuda.synchronize()  # or else what the device has not read yet counts too
        pinned = torch.cuda.host_memory_stats()["allocated_bytes.current"]
        return torch.cuda.memory_allocated(), pinned

    period = 4 * len(params)  # after which there are the same gradients
    assert steps(period) == steps(3 * period)


# Beside torch.optim

SETTINGS = {"lr": 0.01, "weight_decay": 0.1}
#: torch's classes in the forms that they have on a GPU.
FORMS = [
    (cls, variant, {"foreach": False} if cls.__name__ in vars(torch.optim) else {})
    for cls, variant in CASES
] + [
    (cls, variant, {"fused": True})
    for cls, variant in CASES
    if cls in (fastopt.SGD, fastopt.Adam, fastopt.AdamW)
]


def resumed(make, optimizer, device):
    """A new optimizer of copies of the parameters on a device, with the state dict loaded."""
    params = [param.detach().to(device, copy=True) for param in parameters(optimizer)]
    other = make([param.requires_grad_() for param in params])
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, map_location=CPU, weights_only=True))
    return other


@pytest.mark.parametrize("dtype", [FP32, FP64], ids=str)
@pytest.mark.parametrize(("cls", "variant", "form"), FORMS, ids=str)
def test_beside_torch(cls, variant, form, dtype):
    """Near it; and from a checkpoint of either, the other goes on as if nothing had happened."""
    ours = functools.partial(cls, **SETTINGS, **variant)
    theirs = functools.partial(torch_class(cls), **SETTINGS, **variant, **form)
    optimizers = [make(make_params(GPU, dtypes=(dtype,))) for make in (ours, theirs)]
    for optimizer in optimizers:
        take_steps(optimizer, range(5))
    others = [resumed(theirs, optimizers[0], GPU), resumed(ours, optimizers[1], GPU)]
    for optimizer in (*optimizers, *others):
        take_steps(optimizer, range(5, 10))
    trained, torchs = map(parameters, optimizers)
    assert_near_torch(trained, torchs)
    for other, params in zip(others, (trained, torchs), strict=True):
        assert_near_torch(parameters(other), params)


@pytest.mark.parametrize("capturable", [False, True])
@each_case
def test_checkpoints_between_devices(cls, variant, capturable):
    """From the CPU to the GPU and back: the bits of a run that was never interrupted."""
    settings = {"capturable": capturable, "max_norm": 0.5, **SETTINGS, **variant}
    on_cpu = functools.partial(cls, backend="reference", **settings)
    on_gpu = functools.partial(cls, backend="triton", **settings)
    whole = on_cpu(make_params(CPU))
    take_steps(whole, range(9))
    optimizer = on_cpu(make_params(CPU))
    take_steps(optimizer, range(3))
    optimizer = resumed(on_gpu, optimizer, GPU)
    take_steps(optimizer, range(3, 6))
    optimizer = resumed(on_cpu, optimizer, CPU)
    take_steps(optimizer, range(6, 9))
    assert_bits(results(optimizer), results(whole))
