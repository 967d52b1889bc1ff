"""On a GPU: the bits of the reference on the CPU, CUDA graphs, and no waiting for the device.

torch's own arithmetic on a GPU is no oracle for bits: it contracts to FMA.
"""

import contextlib
import functools
import io
import json
import math
import os

import pytest
import torch
from helpers import CASES, assert_near_torch, torch_class
from test_precision import MODES, usable

import fastopt
from fastopt import norm

if not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET", "0") != "0":
    pytest.skip("needs a GPU, and kernels that are compiled", allow_module_level=True)

CPU = torch.device("cpu")
GPU = torch.device("cuda", torch.cuda.current_device())
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
FLAGS = [
    {},
    {"weight_decay": 0.1},
    {"weight_decay": 0.1, "maximize": True},
    {"max_norm": 0.5},
    {"clip_value": 0.5},
    {"weight_decay": 0.1, "maximize": True, "max_norm": 5.0, "clip_value": 0.01},
]
# 0-dim, empty (last too), one element, odd tails, a chunk of 8192 elements and several.
SHAPES = ((), (0,), (1,), (7,), (33, 65), (8192,), (8193,), (40_000,), (3, 0))
STEPS = range(1, 4)
CYCLES = 400_000_000  # to keep the device busy: some tenths of a second

each_case = pytest.mark.parametrize(("cls", "variant"), CASES, ids=str)
each_class = pytest.mark.parametrize("cls", fastopt.OPTIMIZERS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_flags = pytest.mark.parametrize("flags", FLAGS, ids=str)


@functools.cache
def draw(seed, kinds):
    """Random tensors on the CPU, one for each shape and dtype, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape, dtype in kinds
    ]


def make_params(device, shapes=SHAPES, dtypes=(torch.float32,)):
    """Parameters of each shape in each dtype."""
    kinds = tuple((shape, dtype) for dtype in dtypes for shape in shapes)
    return [tensor.to(device, copy=True).requires_grad_() for tensor in draw(0, kinds)]


def make_grads(params, seed):
    grads = draw(seed, tuple((param.shape, param.dtype) for param in params))
    return [grad.to(param.device, copy=True) for param, grad in zip(params, grads, strict=True)]


def assign_grads(params, grads):
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad


def give_grads(params, seed):
    assign_grads(params, make_grads(params, seed))


def all_params(optimizer):
    return [param for group in optimizer.param_groups for param in group["params"]]


def take_steps(optimizer, seeds):
    """A step with the gradients of each seed."""
    for seed in seeds:
        give_grads(all_params(optimizer), seed)
        optimizer.step()


def train(optimizer, seeds=STEPS):
    """What these steps come to."""
    take_steps(optimizer, seeds)
    return results(optimizer)


def results(optimizer):
    """Parameters and their states, then the norm."""
    found = []
    for group in optimizer.param_groups:
        for param in group["params"]:
            state = sorted(optimizer.state.get(param, {}).items())
            counts = optimizer.rule.counts_steps
            found += [param.detach(), *(v for name, v in state if name != "step" or counts)]
    return found + [norm for norm in [optimizer.grad_norm] if norm is not None]


def assert_bits(found, wanted):
    for a, b in zip(found, wanted, strict=True):
        a, b = a.detach().cpu(), b.detach().cpu()
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        assert torch.all((a.signbit() == b.signbit()) | a.isnan())


def assert_same_bits_on_both(run):
    """``run(device, backend)`` returns on the GPU what it does on the CPU."""
    assert_bits(run(GPU, "triton"), run(CPU, "reference"))


# Numerics


@each_dtype
@each_flags
@each_case
def test_bits(cls, variant, flags, dtype):
    def run(device, backend):
        params = make_params(device, dtypes=(dtype,))
        return train(cls(params, lr=0.01, backend=backend, **variant, **flags))

    assert_same_bits_on_both(run)


@pytest.mark.parametrize(("dtype", "mode"), MODES, ids=str)
@pytest.mark.parametrize("flags", [{}, {"weight_decay": 0.1, "max_norm": 0.5}], ids=str)
@each_case
def test_precision_modes(cls, variant, flags, dtype, mode):
    if not usable(cls, variant, mode):
        pytest.skip("the rule needs more precision")

    def run(device, backend):
        params = make_params(device, dtypes=(dtype,))
        optimizer = cls(params, lr=0.01, seed=7, backend=backend, **variant, **flags, **mode)
        return [*train(optimizer), *optimizer.master_params()]

    assert_same_bits_on_both(run)


@pytest.mark.parametrize(("dtype", "mode"), MODES, ids=str)
def test_precision_modes_in_a_graph(dtype, mode):
    """A replayed step rounds with the random numbers of its own number."""

    def run(captured):
        params = make_params(GPU, dtypes=(dtype,))
        grads = make_grads(params, 1)
        assign_grads(params, grads)
        optimizer = fastopt.AdamW(params, lr=0.01, capturable=True, **mode)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            optimizer.step()
        torch.cuda.current_stream().wait_stream(stream)
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                optimizer.step()
            for _ in range(3):
                graph.replay()
        else:
            for _ in range(3):
                optimizer.step()
        torch.cuda.synchronize()
        return results(optimizer)

    assert_bits(run(True), run(False))


@each_dtype
@each_case
def test_special_values(cls, variant, dtype):
    """Zeros of both signs, subnormals, infinities, NaN and overflow go the same way."""
    info = torch.finfo(dtype)
    positive = [0.0, 1.0, info.max, info.tiny, info.tiny / 4, info.eps, 1 + info.eps, math.inf]
    values = torch.tensor([*positive, *(-x for x in positive), math.nan], dtype=dtype)

    def run(device, backend):
        grid = torch.meshgrid(values, values, indexing="ij")
        start, grad = (x.repeat(32, 1).to(device) for x in grid)  # more than a chunk
        param = start.requires_grad_()
        optimizer = cls([param], lr=0.01, backend=backend, **variant)
        for _ in range(2):
            param.grad = grad
            optimizer.step()
        return results(optimizer)

    assert_same_bits_on_both(run)


SHAPE = (6, 13, 10, 11)  # more than a chunk
SIZE = math.prod(SHAPE)
# Of a flat tensor that is a little larger than twice the view.
VIEWS = {
    "contiguous": lambda flat: flat[:SIZE].view(SHAPE),
    "one element off": lambda flat: flat[1 : 1 + SIZE].view(SHAPE),
    "two elements off": lambda flat: flat[2 : 2 + SIZE].view(SHAPE),
    "transposed": lambda flat: flat[:SIZE].view(SHAPE[::-1]).permute(3, 2, 1, 0),
    "channels last": lambda flat: flat[:SIZE].view(6, 10, 11, 13).permute(0, 3, 1, 2),
    "strided": lambda flat: flat[: 2 * SIZE].view(*SHAPE, 2)[..., 1],
    "padded": lambda flat: flat[: SIZE // 11 * 16].view(6, 13, 10, 16)[..., 3:14],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("flags", [{}, {"max_norm": 0.5}], ids=str)
@each_case
def test_layouts(cls, variant, flags, dtype):
    """Every layout of a parameter with every layout of its gradient."""
    pairs = [(a, b) for a in VIEWS.values() for b in VIEWS.values()]

    def flats(device, seed):
        kinds = (((2 * SIZE + 16,), dtype),) * len(pairs)
        return [flat.to(device, copy=True) for flat in draw(seed, kinds)]

    def run(device, backend):
        memory = flats(device, 0)
        params = [
            view(flat).requires_grad_() for flat, (view, _) in zip(memory, pairs, strict=True)
        ]
        optimizer = cls(params, lr=0.01, backend=backend, **variant, **flags)
        for seed in (1, 2):
            grads = zip(params, flats(device, seed), pairs, strict=True)
            for param, flat, (_, view) in grads:
                param.grad = view(flat)
            optimizer.step()
        return memory + results(optimizer)  # all of it: elements beside the parameter stay

    assert_same_bits_on_both(run)


@each_case
def test_parameters_that_share_memory(cls, variant):
    """They are updated one after the other."""

    def run(device, backend):
        (base,) = make_params(device, shapes=((30_000,),))
        base = base.detach()
        views = [base[:20_000], base[10_000:], base, base[1::2], base[500:600]]
        params = [view.requires_grad_() for view in views]
        return train(cls(params, lr=0.01, backend=backend, **variant))

    assert_same_bits_on_both(run)


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
@each_case
def test_the_same_parameter_twice(cls, variant):
    def run(device, backend):
        (param,) = make_params(device, shapes=((10_000,),))
        optimizer = cls([param, param], lr=0.01, backend=backend, **variant)
        for seed in STEPS:
            give_grads([param], seed)
            optimizer.step()
        return results(optimizer)

    assert_same_bits_on_both(run)


@pytest.mark.parametrize("flags", [{}, {"max_norm": 0.5}], ids=str)
@each_case
def test_gradients_that_come_late_and_go(cls, variant, flags):
    def run(device, backend):
        params = make_params(device)
        optimizer = cls(params, lr=0.01, backend=backend, **variant, **flags)
        for seed in range(6):
            give_grads(params, seed)
            for i, param in enumerate(params):
                if (i + seed) % 3 == 0 or (seed < 3 and i % 2):
                    param.grad = None
            optimizer.step()
        return results(optimizer)

    assert_same_bits_on_both(run)


@each_case
def test_groups_and_dtypes(cls, variant):
    """Groups that differ in everything, each with parameters of every dtype."""
    settings = [
        {"lr": 0.1},
        {"lr": 0.01, "weight_decay": 0.1, "maximize": True, "max_norm": 0.5},
        {"lr": 0.02, "clip_value": 0.1, "max_norm": 1.0},
    ]

    def run(device, backend):
        groups = [{"params": make_params(device, dtypes=DTYPES), **each} for each in settings]
        return train(cls(groups, backend=backend, **variant))

    assert_same_bits_on_both(run)


@each_class
def test_while_the_device_is_behind(cls):
    """What the host writes for one step must not reach the step before it."""

    def run(device, backend):
        params = make_params(device)
        grads = [make_grads(params, seed) for seed in range(20)]
        optimizer = cls(params, lr=0.1, max_norm=0.5, backend=backend)
        if device == GPU:
            torch.cuda._sleep(CYCLES)
        for step, new in enumerate(grads):
            assign_grads(params, new)
            if step % 4 == 0:
                params[step % len(params)].grad = None
            optimizer.step()
            optimizer.param_groups[0]["lr"] *= 0.9
        return results(optimizer)

    assert_same_bits_on_both(run)


@each_class
def test_on_another_stream(cls):
    """Gradients are read and parameters written on the current stream."""

    def run(device, backend):
        params = make_params(device)
        optimizer = cls(params, lr=0.1, max_norm=0.5, backend=backend)
        take_steps(optimizer, [0])
        torch.cuda.synchronize()
        stream = torch.cuda.Stream() if device == GPU else None
        with torch.cuda.stream(stream):  # no stream: does nothing
            for seed in STEPS:
                grads = make_grads(params, seed)
                if device == GPU:
                    torch.cuda._sleep(CYCLES // 10)
                for param, grad in zip(params, grads, strict=True):
                    param.grad.copy_(grad)
                optimizer.step()
        torch.cuda.synchronize()
        return results(optimizer)

    assert_same_bits_on_both(run)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
@each_class
def test_on_another_device(cls):
    other = torch.device("cuda", (GPU.index + 1) % torch.cuda.device_count())

    def run(device, backend):
        device = other if device == GPU else device
        return train(cls(make_params(device), lr=0.1, max_norm=0.5, backend=backend))

    assert_same_bits_on_both(run)


@each_class
def test_parameters_on_several_devices(cls):
    """One norm for all of them."""
    devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())] + [CPU]

    def run(devices, backend):
        params = [param for device in devices for param in make_params(device)]
        found = train(cls(params, lr=0.1, max_norm=0.5, backend=backend))
        return [tensor.cpu() for tensor in found]

    # The sum of squares is taken by device, so that its last bit in double may differ.
    found, wanted = run(devices, "auto"), run([CPU] * len(devices), "reference")
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


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
        (param,) = make_params(GPU, shapes=((2**24 + 1,),))
        return train(fastopt.AdamW([param], lr=0.01, max_norm=0.5))

    first = run()
    for _ in range(5):
        assert all(map(torch.equal, run(), first))


# Norms and clipping by functions


@each_dtype
@pytest.mark.parametrize("order", [1, 2, math.inf])
def test_total_norm(order, dtype):
    grads = draw(1, tuple((shape, dtype) for shape in (*SHAPES, (3_000_000,))))
    found = fastopt.get_total_norm([grad.to(GPU) for grad in grads], order)
    root = math.sqrt if order == 2 else float
    wanted = torch.tensor(root(norm.power_sum(grads, order)), dtype=found.dtype)
    assert found.device == GPU
    assert_bits([found], [wanted])


@pytest.mark.parametrize("order", [1, 2, 3.5, math.inf])
@pytest.mark.parametrize("max_norm", [0.5, 1e9])
def test_clip_grad_norm(max_norm, order):
    def run(device, backend):
        params = make_params(device, dtypes=DTYPES)
        give_grads(params, 1)
        norm = fastopt.clip_grad_norm_(params, max_norm, order)
        return [norm, *(param.grad for param in params)]

    if order == 3.5:  # by torch's operators, of which the power may differ
        for a, b in zip(run(GPU, None), run(CPU, None), strict=True):
            torch.testing.assert_close(a.cpu(), b)
    else:
        assert_same_bits_on_both(run)


def test_clip_grad_value():
    def run(device, backend):
        params = make_params(device, dtypes=DTYPES)
        give_grads(params, 1)
        fastopt.clip_grad_value_(params, 0.25)
        return [param.grad for param in params]

    assert_same_bits_on_both(run)


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


KINDS = {
    "plain": {},
    "clip": {"max_norm": 0.5, "clip_value": 0.1},
    "capturable": {"capturable": True},
    "capturable, clip": {"capturable": True, "max_norm": 0.5},
    "lr on the device": {"lr": 0.01},
    "capturable, lr on the device": {"lr": 0.01, "capturable": True},
}


@pytest.mark.parametrize("kind", KINDS)
@each_case
def test_no_waiting(cls, variant, kind):
    settings = dict(KINDS[kind])
    if "lr" in settings:
        settings["lr"] = torch.tensor(settings["lr"], device=GPU)
    params = make_params(GPU, dtypes=DTYPES)
    optimizer = cls(params, **variant, **settings)
    take_steps(optimizer, STEPS)
    grads = [make_grads(params, seed) for seed in (4, 5)]
    with no_waiting():
        for new in grads:
            optimizer.zero_grad(set_to_none=True)
            assign_grads(params, new)
            group = optimizer.param_groups[0]
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].mul_(0.5)
            else:
                group["lr"] *= 0.5
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

each_scaler = pytest.mark.parametrize(
    "scaler_class", [torch.amp.GradScaler, fastopt.GradScaler], ids=["torch", "fastopt"]
)
FACTORS = [math.inf, math.nan, 1.0, 2.0, math.inf, 0.5, 1.0]  # powers of 2: they round nothing


def scaled_step(optimizer, scaler, weights, factor, unscale=False):
    """An iteration whose gradients are the weights times the factor."""
    params = all_params(optimizer)
    optimizer.zero_grad()
    loss = sum((param * weight).sum() for param, weight in zip(params, weights, strict=True))
    scaler.scale(loss * factor).backward()
    if unscale:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("flags", [{}, {"max_norm": 0.5}], ids=str)
@each_scaler
@each_case
def test_grad_scaler(cls, variant, scaler_class, flags, unscale):
    """Steps that overflow, the first ones too, those between them, and the scale."""

    def run(device, backend):
        params = make_params(device)
        optimizer = cls(params, lr=0.01, backend=backend, **variant, **flags)
        scaler = scaler_class(device.type, init_scale=2.0**16, growth_interval=2)
        for seed, factor in enumerate(FACTORS):
            scaled_step(optimizer, scaler, make_grads(params, seed), factor, unscale)
        assert scaler.get_scale() == 2.0**15  # halved 3 times and doubled twice
        return results(optimizer)

    assert_same_bits_on_both(run)


@each_scaler
@each_case
def test_an_overflow_changes_nothing(cls, variant, scaler_class):
    params = make_params(GPU)
    optimizer = cls(params, lr=0.01, max_norm=0.5, **variant)
    scaler = scaler_class("cuda")
    scaled_step(optimizer, scaler, make_grads(params, 0), math.inf)
    assert_bits(params, make_params(CPU))
    initial = cls.rule.initial(optimizer.param_groups[0])
    for state in optimizer.state.values():
        for name, tensor in state.items():
            assert (tensor == (0 if name == "step" else initial)).all()

    scaled_step(optimizer, scaler, make_grads(params, 1), 1.0)
    *before, _ = (tensor.clone() for tensor in results(optimizer))
    scaled_step(optimizer, scaler, make_grads(params, 2), math.nan)
    *after, norm = results(optimizer)
    assert_bits(after, before)
    assert norm.isnan()


@pytest.mark.parametrize("flags", [{}, {"max_norm": 0.5}], ids=str)
@each_scaler
@each_class
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
@pytest.mark.parametrize("flags", [{}, {"max_norm": 0.5}], ids=str)
@each_class
def test_an_overflow_on_one_device_skips_all(cls, flags, of_scale):
    """Parameters on a GPU beside some on the CPU."""

    def run(scaler_class, device, other):
        params = make_params(other) + make_params(device)
        optimizer = cls(params, lr=0.01, **flags)
        scaler = scaler_class(of_scale.type, init_scale=2.0**16, growth_interval=2)
        scaler.scale(torch.zeros((), device=of_scale))
        for seed, factor in enumerate(FACTORS):
            for param, grad in zip(params, make_grads(params, seed), strict=True):
                param.grad = grad * scaler.get_scale()
                if param.device == device:
                    param.grad *= factor
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() == 2.0**15
        return results(optimizer)

    for devices in ((CPU, GPU), (GPU, CPU)):
        found, wanted = (
            run(scaler_class, *devices)
            for scaler_class in (fastopt.GradScaler, torch.amp.GradScaler)
        )
        assert_bits(found, wanted)


# CUDA graphs


def captured(step):
    """A function that replays a graph of the step."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def fill_grads(params, seed):
    """As `give_grads`, but in place."""
    for param, grad in zip(params, make_grads(params, seed), strict=True):
        param.grad.copy_(grad)


@each_flags
@each_case
def test_capturable_bits(cls, variant, flags):
    """The device computes beta**step by exp and log: in double, so that fp32 rounds most
    differences away."""

    def run(device, backend):
        params = make_params(device, dtypes=(torch.float32, torch.bfloat16))
        lr = torch.tensor(0.01, device=device)
        settings = {"lr": lr, "capturable": True, "backend": backend}
        return train(cls(params, **settings, **variant, **flags), range(6))

    assert_same_bits_on_both(run)


@pytest.mark.parametrize("flags", [{}, {"max_norm": 0.5, "clip_value": 0.1}], ids=str)
@each_case
def test_graph(cls, variant, flags):
    """A replay is an eager step with the gradients and the learning rate of that moment."""

    def run(capture):
        params = make_params(GPU, dtypes=DTYPES)
        lr = torch.tensor(0.1, device=GPU)
        optimizer = cls(params, lr=lr, capturable=True, **variant, **flags)
        take_steps(optimizer, range(2))
        step = captured(optimizer.step) if capture else optimizer.step
        for seed in range(2, 22):
            fill_grads(params, seed)
            lr.fill_(0.1 / seed)
            step()
            if seed % 5 == 1:
                optimizer.step()  # an eager one between replays, and the last
        return results(optimizer)

    assert_bits(run(capture=True), run(capture=False))


def test_grad_norm_of_replays():
    params = make_params(GPU)
    optimizer = fastopt.AdamW(params, capturable=True, max_norm=0.5)
    take_steps(optimizer, STEPS)
    step = captured(optimizer.step)
    for seed in (7, 8):
        fill_grads(params, seed)
        step()
        assert_bits([optimizer.grad_norm], [fastopt.get_total_norm([p.grad for p in params])])


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
@each_class
def test_capture_needs_capturable(cls):
    params = make_params(GPU)
    optimizer = cls(params, lr=0.01)
    take_steps(optimizer, STEPS)
    before = [tensor.clone() for tensor in results(optimizer)]
    with pytest.raises(RuntimeError, match="capturable=True"):
        captured(optimizer.step)
    assert_bits(results(optimizer), before)
    take_steps(optimizer, [4])  # and it goes on

    def run(device, backend):
        return train(cls(make_params(device), lr=0.01, backend=backend), range(1, 5))

    assert_bits(results(optimizer), run(CPU, "reference"))


# What a step leaves behind


@each_class
def test_gradients_stay_and_parameters_are_marked_as_changed(cls):
    params = make_params(GPU, dtypes=DTYPES)
    grads = make_grads(params, 1)
    assign_grads(params, [grad.clone() for grad in grads])
    versions = [(param._version, param.grad._version) for param in params]
    cls(params, max_norm=0.5, clip_value=0.1).step()
    assert_bits([param.grad for param in params], grads)
    for param, (version, grad_version) in zip(params, versions, strict=True):
        assert param._version > version
        assert param.grad._version == grad_version


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


def groups_of_settings(count, distinct):
    """Parameters in groups of their own, with so many different settings."""
    params = make_params(GPU, shapes=((100,),) * count)
    return [{"params": [param], "lr": 0.01 / (1 + i % distinct)} for i, param in enumerate(params)]


WORK = {
    "1000 tensors": lambda: make_params(GPU, shapes=((1000,),) * 1000),
    "465 groups": lambda: groups_of_settings(465, 28),
}


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
@pytest.mark.parametrize("work", WORK)
@each_class
def test_launches(cls, work, settings, most, launches):
    optimizer = cls(WORK[work](), **settings)
    take_steps(optimizer, range(2))
    give_grads(all_params(optimizer), 2)  # at other addresses
    assert 1 <= launches(optimizer.step) <= most


@each_class
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

    assert steps(36) == steps(108)  # of which the last has the same gradients


# Beside torch.optim

SETTINGS = {"lr": 0.01, "weight_decay": 0.1}
#: torch's classes in the forms that they have on a GPU.
TORCH_FORMS = [(cls, {"foreach": False}) for cls in fastopt.OPTIMIZERS] + [
    (cls, {"fused": True}) for cls in (fastopt.SGD, fastopt.Adam, fastopt.AdamW)
]
each_form = pytest.mark.parametrize(
    ("cls", "variant", "form"),
    [(cls, variant, form) for cls, form in TORCH_FORMS for variant in cls.variants],
    ids=str,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@each_form
def test_near_torch(cls, variant, form, dtype):
    def trained(make, **settings):
        optimizer = make(make_params(GPU, dtypes=(dtype,)), **SETTINGS, **variant, **settings)
        take_steps(optimizer, range(10))
        return all_params(optimizer)

    assert_near_torch(trained(cls), trained(torch_class(cls), **form))


def resumed(make, optimizer, device):
    """A new optimizer of copies of the parameters on a device, with the state dict loaded."""
    params = [param.detach().to(device, copy=True) for param in all_params(optimizer)]
    other = make([param.requires_grad_() for param in params])
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, map_location=CPU, weights_only=True))
    return other


@each_form
def test_checkpoints_of_torch(cls, variant, form):
    """Both ways: training goes on as if nothing had happened."""

    def ours(params):
        return cls(params, **SETTINGS, **variant)

    def theirs(params):
        return torch_class(cls)(params, **SETTINGS, **variant, **form)

    for source, target in [(theirs, ours), (ours, theirs)]:
        optimizer = source(make_params(GPU))
        take_steps(optimizer, range(5))
        other = resumed(target, optimizer, GPU)
        for each in (optimizer, other):
            take_steps(each, range(5, 10))
        assert_near_torch(all_params(other), all_params(optimizer))


@pytest.mark.parametrize("capturable", [False, True])
@each_case
def test_checkpoints_between_devices(cls, variant, capturable):
    """From the CPU to the GPU and back: the bits of a run that was never interrupted."""

    def make(backend):
        settings = {"capturable": capturable, "max_norm": 0.5, "backend": backend}
        return functools.partial(cls, **SETTINGS, **variant, **settings)

    whole = make("reference")(make_params(CPU))
    take_steps(whole, range(9))
    optimizer = make("reference")(make_params(CPU))
    take_steps(optimizer, range(3))
    optimizer = resumed(make("triton"), optimizer, GPU)
    take_steps(optimizer, range(3, 6))
    optimizer = resumed(make("reference"), optimizer, CPU)
    take_steps(optimizer, range(6, 9))
    assert_bits(results(optimizer), results(whole))
