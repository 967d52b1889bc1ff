"""The Triton backend gives the bits of the reference, here in Triton's interpreter."""

import math
import weakref
from types import SimpleNamespace

import pytest
import torch
from helpers import CASES, assert_same_bits, interpreted, masked_out, new_params, set_grads
from hypothesis import given, settings
from hypothesis import strategies as st
from test_bits import FLAGS, layouts, special_values, strided
from test_runtime import run_python
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastopt
from fastopt.step import backends, checks, dispatch, plan, table
from fastopt.step import params as params_module

pytestmark = [interpreted, *masked_out]

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# 0-dim, empty (last too), one element, a block of 1024 elements and a tail.
SHAPES = [(), (0,), (1,), (33, 5), (1100,), (3, 0)]


def finish(optimizer):
    """Parameters, states and norm."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    states = [
        value
        for param in params
        for name, value in sorted(optimizer.state[param].items())
        if name != "step" or optimizer.rule.counts_steps
    ]
    norm = [] if optimizer.grad_norm is None else [optimizer.grad_norm]
    return [*(param.detach() for param in params), *states, *norm]


def train(cls, backend, dtype=torch.float32, shapes=SHAPES, steps=2, **flags):
    params = new_params(shapes, dtype)
    optimizer = cls(params, lr=0.01, backend=backend, **flags)
    for step in range(steps):
        set_grads(params, step)
        if step == 1:
            params[0].grad = None
        optimizer.step()
    return finish(optimizer)


def check_same_bits(cls, **flags):
    assert_same_bits(train(cls, "triton", **flags), train(cls, "reference", **flags))


@pytest.mark.parametrize(("cls", "variant"), CASES, ids=str)
def test_same_bits_as_reference(cls, variant):
    """Each kernel; in the other tests, a few of them with each flag and dtype."""
    check_same_bits(cls, **variant, weight_decay=0.1, max_norm=0.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype):
    check_same_bits(fastopt.AdamW, dtype=dtype, max_norm=0.5)


@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_flags(flags):
    check_same_bits(fastopt.SGD, momentum=0.9, **flags)


@pytest.mark.full
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("flags", [*FLAGS, {"capturable": True, "max_norm": 0.5}], ids=str)
@pytest.mark.parametrize(("cls", "variant"), CASES, ids=str)
def test_all_same_bits(cls, variant, flags, dtype):
    check_same_bits(cls, dtype=dtype, **variant, **flags)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cls", fastopt.OPTIMIZERS)
def test_special_values(cls, dtype):
    """Zeros of both signs, subnormals, infinities, NaN and overflow go the same way."""
    params, grads = torch.meshgrid([special_values(dtype)] * 2, indexing="ij")

    def updated(backend):
        param = torch.nn.Parameter(params.clone())
        optimizer = cls([param], lr=0.01, backend=backend, **cls.variants[-1])
        for _ in range(2):
            param.grad = grads.clone()
            optimizer.step()
        return finish(optimizer)

    assert_same_bits(updated("triton"), updated("reference"))


@settings(deadline=None, max_examples=10)
@given(
    st.lists(layouts(), min_size=1, max_size=3),
    st.sampled_from(CASES),
    st.sampled_from(DTYPES),
    st.booleans(),
)
def test_any_strides_and_alignment(tensors, case, dtype, capturable):
    cls, variant = case

    def updated(backend):
        generator = torch.Generator().manual_seed(0)
        params = [strided(shape, *both[0], dtype, generator) for shape, both in tensors]
        bases = [p._base if p._base is not None else p for p in params]
        params = [p.detach().requires_grad_() for p in params]
        optimizer = cls(
            params, lr=0.01, backend=backend, max_norm=1.0, capturable=capturable, **variant
        )
        for _ in range(2):
            for p, (shape, both) in zip(params, tensors, strict=True):
                p.grad = strided(shape, *both[1], dtype, generator)
            optimizer.step()
        # Whole bases, so that an element beside the parameter that was written shows.
        return [*bases, optimizer.grad_norm]

    assert_same_bits(updated("triton"), updated("reference"))


@pytest.mark.parametrize(("cls", "variant"), CASES, ids=str)
def test_full_chunks(cls, variant):
    """They are read and written without a mask: 8192 elements, and then a tail."""
    check_same_bits(cls, shapes=[(1,), (8200,)], steps=1, **variant)


@settings(deadline=None, max_examples=10)
@given(
    st.lists(st.integers(0, 2 * 8192), min_size=1, max_size=3),
    st.lists(st.integers(0, 7), min_size=6, max_size=6),
    st.sampled_from(DTYPES),
)
def test_any_size_and_offset(sizes, offsets, dtype):
    """Several chunks, aligned and not."""

    def updated(backend):
        generator = torch.Generator().manual_seed(0)

        def draw(n, offset):
            data = torch.randn(n + offset, generator=generator, dtype=torch.float64)
            return data.to(dtype)[offset:]

        params = [torch.nn.Parameter(draw(*n)) for n in zip(sizes, offsets[:3], strict=False)]
        optimizer = fastopt.Adagrad(params, lr=0.01, backend=backend, max_norm=1.0)
        for p, offset in zip(params, offsets[3:], strict=False):
            p.grad = draw(p.numel(), offset)
        optimizer.step()
        return finish(optimizer)

    assert_same_bits(updated("triton"), updated("reference"))


def mixed_groups(backend, **flags):
    """Dtypes, flags and settings that take several kernels; a gradient of another dtype."""
    params = [p for dtype in DTYPES for p in new_params([(5,), (9, 2)], dtype)]
    optimizer = fastopt.RMSprop(
        [
            {"params": params[:3], "lr": 0.1},
            {"params": params[3:6], "momentum": 0.9, "max_norm": None},
            {"params": params[6:], "centered": True, "weight_decay": 0.1, "clip_value": 0.3},
        ],
        max_norm=2.0,
        backend=backend,
        **flags,
    )
    return optimizer, params


@pytest.mark.parametrize("flags", [{}, {"capturable": True}], ids=str)
def test_groups_of_several_kinds(flags):
    def updated(backend):
        optimizer, params = mixed_groups(backend, **flags)
        for step in range(3):
            set_grads(params, step)
            params[step].grad = None  # steps that differ between parameters of a group
            optimizer.param_groups[0]["lr"] *= 0.5
            optimizer.step()
        return finish(optimizer)

    assert_same_bits(updated("triton"), updated("reference"))


def test_groups_that_another_backend_updates(monkeypatch):
    """The table of settings has them all the same."""
    backend_for = dispatch.backend_for
    monkeypatch.setattr(
        dispatch,
        "backend_for",
        lambda tensors, *args: backend_for(
            tensors, "cpp" if tensors[0].numel() == 3 else "triton", "a parameter"
        ),
    )
    params = new_params([(2,), (3,), (4,)])
    groups = [
        {"params": param, "lr": lr} for param, lr in zip(params, (0.1, 0.2, 0.3), strict=True)
    ]
    for order in (groups, groups[1::-1]):
        optimizer = fastopt.SGD(order, capturable=True)
        before = [group["params"][0].detach().clone() for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["params"][0].grad = torch.ones_like(group["params"][0])
        optimizer.step()
        for group, old in zip(optimizer.param_groups, before, strict=True):
            assert_same_bits(group["params"], [old - torch.tensor(group["lr"])])


def test_states_and_gradients_of_other_dtypes():
    def updated(backend):
        generator = torch.Generator().manual_seed(0)
        param = torch.nn.Parameter(torch.randn(1000, generator=generator))
        param.grad_dtype = torch.bfloat16
        optimizer = fastopt.AdamW([param], backend=backend)
        optimizer.state[param] = {
            "step": torch.tensor(0.0),
            "exp_avg": torch.zeros(1000, dtype=torch.bfloat16),
            "exp_avg_sq": torch.zeros(1000, dtype=torch.float16),
        }
        for _ in range(2):
            param.grad = torch.randn(1000, generator=generator).bfloat16()
            optimizer.step()
        return finish(optimizer)

    assert_same_bits(updated("triton"), updated("reference"))


def test_shared_memory():
    """Parameters that overlap, and one that stands twice, are updated one after the other."""

    def updated(backend):
        base = torch.randn(100, generator=torch.Generator().manual_seed(0))
        views = [base[:60], base[40:], base[50:70], base[:60]]
        params = [view.detach().requires_grad_() for view in views]
        params.append(params[0])
        with pytest.warns(UserWarning, match="duplicate"):
            optimizer = fastopt.AdamW(params, lr=0.1, backend=backend)
        for step in range(2):
            set_grads(params[:4], step)
            optimizer.step()
        return [base, *finish(optimizer)]

    assert_same_bits(updated("triton"), updated("reference"))


@pytest.mark.parametrize(("cls", "variant"), CASES, ids=str)
def test_capturable(cls, variant):
    """Steps and scalars on the device. In double, a power by exp and log may differ in its last
    bits, which fp32 does not show here."""
    assert_same_bits(
        train(cls, "triton", steps=3, capturable=True, max_norm=0.5, **variant),
        train(cls, "reference", steps=3, max_norm=0.5, **variant),
    )


class NoReads(TorchDispatchMode):
    """Raises where the host asks for a tensor's value, for which it would wait for a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "is_nonzero", "equal", "nonzero"), name
        return func(*args, **(kwargs or {}))


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Tensors that the host need not wait for are treated as if it had to."""
    monkeypatch.setattr(table, "is_on_device", torch.is_tensor)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize(("cls", "variant"), CASES, ids=str)
def test_no_value_is_read(cls, variant, first, as_on_a_gpu):
    """Not even by the first step, which makes the plan."""
    if first and cls is fastopt.Adagrad:
        pytest.skip("its states are there from the start, and their steps on the host")
    params = new_params([(5,), (3, 3)])
    optimizer = cls(
        params, capturable=True, max_norm=1.0, clip_value=0.5, backend="triton", **variant
    )
    optimizer.grad_scale, optimizer.found_inf = torch.full((1,), 4.0), torch.zeros(1)
    if not first:
        set_grads(params, 0)
        optimizer.step()
    set_grads(params, 1)
    with NoReads():
        optimizer.step()
        fastopt.get_total_norm([p.grad for p in params])


def test_a_read_value_would_show():
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoReads():
        torch.ones(1).item()


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize(("cls", "variant"), CASES, ids=str)
def test_grad_scaler(cls, variant, capturable):
    """Unscaled, clipped and, where a gradient is not finite, skipped; the first steps too."""

    def updated(backend, **flags):
        params = new_params([(7,), (40,)])
        optimizer = cls(params, lr=0.1, backend=backend, max_norm=0.5, **flags, **variant)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=2)
        norms = []
        for step, factor in enumerate([math.inf, 1.0, math.nan, 2.0, 3.0]):
            set_grads(params, step)
            for param in params:
                param.grad *= scaler.get_scale() * factor
            scaler.scale(torch.zeros(()))
            scaler.step(optimizer)
            scaler.update()
            norms.append(optimizer.grad_norm)
        assert scaler.get_scale() == 2.0**15
        if optimizer.rule.counts_steps:
            assert all(state["step"] == 3 for state in optimizer.state.values())
        return [*finish(optimizer), *norms[1::2]]

    wanted = updated("reference")
    assert_same_bits(updated("triton", capturable=capturable), wanted)
    assert_same_bits(updated("cpp"), wanted)


def test_scaled_gradients_unscaled_by_hand():
    params = new_params([(7,)])
    set_grads(params, 0)
    optimizer = fastopt.SGD(params, lr=1.0, max_norm=1.0, backend="triton", capturable=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    wanted = fastopt.get_total_norm(params[0].grad)
    params[0].grad *= 8
    scaler.scale(torch.zeros(()))
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    assert optimizer.grad_norm == wanted


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_settings_in_the_memory_of_the_device(dtype, as_on_a_gpu):
    """An lr that a CUDA graph would find changed at its next replay."""

    def updated(backend, lr, capturable):
        params = new_params([(5,)])
        optimizer = fastopt.AdamW(
            params, lr=lr, betas=(0.8, 0.9), backend=backend, capturable=capturable
        )
        for step in range(3):
            set_grads(params, step)
            lr *= 0.5
            if backend == "reference":
                optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
        return finish(optimizer)

    found = updated("triton", torch.tensor(0.125, dtype=dtype), True)
    assert_same_bits(found, updated("reference", 0.125, False))


@pytest.mark.parametrize("capturable", [False, True])
def test_one_norm_for_several_backends(monkeypatch, capturable):
    """Parameters on a GPU beside some on the CPU."""
    backend_for = dispatch.backend_for

    def by_size(tensors, backend, *args):
        kind = {5: "cpp", 6: "reference"}.get(tensors[0].numel(), "triton")
        return backend_for(tensors, kind, *args)

    def updated(backend):
        params = new_params([(5,), (4,), (6,), (9000,)])
        optimizer = fastopt.AdamW(
            params, lr=0.1, max_norm=0.5, backend=backend, capturable=capturable
        )
        for step in range(3):
            set_grads(params, step)
            optimizer.step()
        return finish(optimizer)

    wanted = updated("reference")
    monkeypatch.setattr(dispatch, "backend_for", by_size)
    found = updated("auto")
    # The sums of the backends are added in another order than all chunks.
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)


@pytest.fixture
def triton_by_default(monkeypatch):
    monkeypatch.setenv("FASTOPT_BACKEND", "triton")


@pytest.mark.parametrize("order", [1.0, 2.0, 3.0, math.inf])
def test_clip_grad_norm(triton_by_default, order):
    """Strided and unaligned gradients too; gradients within the norm are not written."""
    grads = [torch.randn(9000), torch.randn(3, 4).t(), torch.randn(9)[1:], torch.randn(())]
    params = [torch.nn.Parameter(torch.zeros_like(g)) for g in grads]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    wanted = fastopt.norm.power_sum(grads, order)
    wanted = wanted if order == math.inf else wanted ** (1 / order)
    norm = fastopt.get_total_norm(grads, order)
    torch.testing.assert_close(norm, wanted.float(), rtol=1e-7, atol=0)
    before = [grad.clone() for grad in grads]
    assert fastopt.clip_grad_norm_(params, 2 * norm.item(), order) == norm
    assert_same_bits(grads, before)
    versions = [grad._version for grad in grads]
    fastopt.clip_grad_norm_(params, 0.5 * norm.item(), order)
    assert all(g._version > v for g, v in zip(grads, versions, strict=True))
    torch.testing.assert_close(grads, [0.5 * grad for grad in before])


def test_clip_grad_value(triton_by_default):
    param = torch.nn.Parameter(torch.zeros(4))
    param.grad = torch.tensor([-2.0, 0.5, math.nan, 3.0])
    fastopt.clip_grad_value_(param, 1.0)
    assert_same_bits([param.grad], [torch.tensor([-1.0, 0.5, math.nan, 1.0])])


def test_plan_is_kept():
    params = new_params([(5,), (3, 3)])
    optimizer = fastopt.AdamW(params, backend="triton", max_norm=1.0)
    set_grads(params, 0)
    optimizer.step()
    plan = optimizer._plan
    for step in range(3):
        set_grads(params, step)
        params[0].grad = None if step == 1 else params[0].grad
        optimizer.step()
        assert optimizer._plan is plan
    optimizer.state[params[0]]["exp_avg"].data = torch.zeros(5)
    optimizer.step()
    assert optimizer._plan is not plan


def test_steps_move_with_capturable():
    """And a momentum buffer that was made without counting is not taken for a new one."""
    params = new_params([(5,)])
    flags = {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}
    optimizer = fastopt.SGD(params, **flags, backend="triton")
    other = fastopt.SGD(new_params([(5,)]), **flags, backend="reference")
    for step in range(4):
        optimizer.param_groups[0]["capturable"] = step >= 2
        for o in (optimizer, other):
            set_grads(o.param_groups[0]["params"], step)
            o.step()
    assert_same_bits(finish(optimizer), finish(other))
    assert optimizer.state[params[0]]["step"] == 3  # two, and one for all before


def test_versions_are_bumped():
    params = new_params([(3,)])
    set_grads(params, 0)
    version, grad_version = params[0]._version, params[0].grad._version
    fastopt.SGD(params, backend="triton").step()
    assert params[0]._version > version
    assert params[0].grad._version == grad_version


def test_non_finite_settings_change_nothing():
    for capturable in (False, True):
        params = new_params([(3,)])
        set_grads(params, 0)
        optimizer = fastopt.SGD(params, momentum=0.9, capturable=capturable, backend="triton")
        optimizer.param_groups[0]["lr"] = math.nan
        with pytest.raises(ValueError, match="Invalid learning rate"):
            optimizer.step()
        assert_same_bits(params, new_params([(3,)]))


def test_tensor_subclasses_are_refused():
    param = TwoTensor(torch.zeros(3), torch.zeros(3)).requires_grad_()
    param.grad = TwoTensor(torch.ones(3), torch.ones(3))
    with pytest.raises(RuntimeError, match="is a TwoTensor, which backend='triton' cannot update"):
        fastopt.SGD([param], backend="triton").step()


def test_no_triton():
    found = run_python(
        "import sys; sys.modules['triton'] = None\n"
        "import torch, fastopt\n"
        "print(fastopt.backends()['triton'])\n"
        "fastopt.SGD([torch.zeros(1)], backend='triton')",
    )
    assert "pip install 'triton>=3.6'" in found.stdout
    assert "backend='triton' does not work here: triton 3.6 or later" in found.stderr


def test_cpu_tensors_without_the_interpreter():
    found = run_python(
        "import torch, fastopt\nfastopt.SGD([torch.zeros(1)], backend='triton')",
        TRITON_INTERPRET="0",
    )
    assert "TRITON_INTERPRET=1 is not set" in found.stderr


def test_other_devices(monkeypatch):
    """They are updated by the reference, and that is said once."""
    checks.warn_once.cache_clear()
    tensor = SimpleNamespace(device=torch.device("mps"), is_neg=lambda: False)
    monkeypatch.setattr(dispatch, "is_wrapper", lambda tensor: False)
    cuda = SimpleNamespace(device=torch.device("cuda:1"), is_neg=lambda: False)
    with pytest.warns(UserWarning, match="cuda parameters .* because TRITON_INTERPRET=1 is set"):
        assert dispatch.backend_for([cuda], "auto", "a parameter") == "reference"
    with pytest.raises(RuntimeError, match="is on cuda:1, which backend='triton' cannot update"):
        dispatch.backend_for([cuda], "triton", "a parameter")
    with pytest.warns(UserWarning, match="mps parameters with its slow reference backend"):
        assert dispatch.backend_for([tensor], "auto", "a parameter") == "reference"
    with pytest.raises(RuntimeError, match="a parameter is on mps, which backend='triton' cannot"):
        dispatch.backend_for([tensor], "triton", "a parameter")
    checks.warn_once.cache_clear()


def test_no_gradient_at_all():
    """The norm is 0 then, on the device too."""
    for capturable in (False, True):
        params = new_params([(3,), ()])
        optimizer = fastopt.AdamW(params, max_norm=1.0, backend="triton", capturable=capturable)
        set_grads(params, 0)
        optimizer.step()
        optimizer.zero_grad()
        optimizer.step()
        assert optimizer.grad_norm == 0


def test_gradients_are_not_kept():
    """Neither those that a plan is made with, nor those that had to be copied."""
    param = torch.nn.Parameter(torch.zeros(3, 5))
    optimizer = fastopt.SGD([param], max_norm=1.0, backend="triton")
    for _ in range(2):
        param.grad = torch.ones(5, 3).t()
        grad = weakref.ref(param.grad.untyped_storage())
        optimizer.step()
        optimizer.zero_grad()
        assert grad() is None


def test_default_device():
    """What the kernels read is made on the host, whatever torch.set_default_device says."""
    params = new_params([(3,), (4, 4)])
    params[1].grad = torch.ones(4, 4).t()
    params[0].grad = torch.ones(3)
    optimizer = fastopt.AdamW(params, max_norm=1.0, backend="triton")
    with torch.device("meta"):
        optimizer.step()
        fastopt.clip_grad_norm_(params, 1.0)


def test_kernels_are_imported_on_demand():
    """Not by a step on the CPU, which does not start CUDA either."""
    found = run_python(
        "import sys, torch, fastopt\n"
        "p = torch.nn.Parameter(torch.ones(1)); p.grad = torch.ones(1)\n"
        "fastopt.AdamW([p], max_norm=1.0).step()\n"
        "print('fastopt.kernels' in sys.modules, torch.cuda.is_initialized())"
    )
    assert found.stdout == "False False\n"


@pytest.fixture
def capture(monkeypatch):
    """Turns on and off that launches become part of a graph; its replays are left to GPU tests."""

    def switch(on):
        for module in (params_module, plan, backends, dispatch.triton_kernels()):
            monkeypatch.setattr(module, "capturing", lambda device: on)

    return switch


def test_captured_steps_have_tables_of_their_own(capture):
    params = new_params([(3,), (5,)])
    optimizer = fastopt.AdamW(params, max_norm=1.0, capturable=True, backend="triton")
    set_grads(params, 0)
    optimizer.step()
    tensors = optimizer._plan._devices[0].tensors
    before = tensors.words_there, tensors.words_there.clone()
    capture(True)
    params[0].grad = None  # another pattern
    set_grads(params[1:], 1)
    optimizer.step()
    assert tensors.words_there is before[0]
    assert torch.equal(*before)
    kept = [item for item in optimizer._captured if isinstance(item, tuple)]
    assert any(item[0] is tensors and item[1] is not before[0] for item in kept)
    capture(False)
    set_grads(params, 2)
    optimizer.step()
    other = fastopt.AdamW(new_params([(3,), (5,)]), max_norm=1.0, backend="reference")
    for step in range(3):
        set_grads(other.param_groups[0]["params"], step)
        if step == 1:
            other.param_groups[0]["params"][0].grad = None
            set_grads(other.param_groups[0]["params"][1:], 1)
        other.step()
    assert_same_bits(finish(optimizer), finish(other))


def test_a_plan_made_in_a_capture_is_not_kept(capture):
    """Its tables are there only after a replay."""
    params = new_params([(3,)])
    optimizer = fastopt.SGD(params, capturable=True, backend="triton")
    set_grads(params, 0)
    capture(True)
    optimizer.step()
    assert optimizer._plan is None
    assert optimizer._captured


def test_what_cannot_be_captured(capture):
    capture(True)
    for capturable, message in ((False, "needs capturable=True"), (True, "make one step before")):
        params = new_params([(3,)])
        set_grads(params, 0)
        cls = fastopt.AdamW if capturable else fastopt.SGD
        optimizer = cls(params, capturable=capturable, backend="triton")
        with pytest.raises(RuntimeError, match=message):
            optimizer.step()
        assert_same_bits(params, new_params([(3,)]))
    optimizer = fastopt.SGD(params, backend="reference")
    with pytest.raises(RuntimeError, match="reference backend cannot become part of a CUDA graph"):
        optimizer.step()


def test_a_deleted_momentum_buffer_starts_anew():
    params = new_params([(3,)])
    flags = {"lr": 1.0, "momentum": 0.9, "dampening": 0.5, "backend": "triton"}
    optimizer = fastopt.SGD(params, **flags, capturable=True)
    for _ in range(2):
        set_grads(params, 0)
        optimizer.step()
        optimizer.state[params[0]].pop("momentum_buffer")
    before = params[0].detach().clone()
    optimizer.step()
    assert_same_bits(params, [before - params[0].grad])


def test_invalid_settings_make_no_states():
    for backend in ("triton", "cpp"):
        params = new_params([(3,)])
        set_grads(params, 0)
        optimizer = fastopt.SGD(params, momentum=0.9, capturable=True, backend=backend)
        optimizer.param_groups[0]["lr"] = math.inf
        with pytest.raises(ValueError, match="Invalid learning rate"):
            optimizer.step()
        assert not optimizer.state
