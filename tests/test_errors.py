"""What cannot be done is said in one sentence, and nothing has changed."""

import math
import warnings

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

import fastopt
from fastopt.step import checks, dispatch

BACKENDS = ["cpp", "reference"]


def bad_sparse():
    param = torch.nn.Parameter(torch.ones(4, 2))
    param.grad = torch.ones(4, 2).to_sparse()
    return param


def bad_complex():
    param = torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))
    param.grad = torch.ones(2, dtype=torch.complex64)
    return param


def bad_integer():
    param = torch.nn.Parameter(torch.ones(2, dtype=torch.int32), requires_grad=False)
    param.grad = torch.ones(2, dtype=torch.int32)
    return param


def bad_float8():
    param = torch.nn.Parameter(torch.ones(2).to(torch.float8_e4m3fn))
    param.grad = torch.ones(2).to(torch.float8_e4m3fn)
    return param


def bad_meta():
    param = torch.nn.Parameter(torch.ones(2, device="meta"))
    param.grad = torch.ones(2, device="meta")
    return param


def bad_dtype():
    param = torch.nn.Parameter(torch.ones(2))
    param.grad = torch.ones(2)
    param.data = torch.ones(2, dtype=torch.float64)
    return param


def bad_shape():
    param = torch.nn.Parameter(torch.ones(2))
    param.grad = torch.ones(2)
    param.data = torch.ones(3)
    return param


def bad_expanded():
    param = torch.ones(1, 3).expand(4, 3).requires_grad_()
    param.grad = torch.ones(4, 3)
    return param


def bad_overlapping():
    param = torch.ones(10).as_strided((4, 4), (2, 1)).requires_grad_()
    param.grad = torch.ones(4, 4)
    return param


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cls", fastopt.OPTIMIZERS)
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (bad_sparse, "the gradient of {place} is torch.sparse_coo, .* dense tensors .*: use "),
        (bad_complex, r"{place} is complex, .*view_as_real"),
        (bad_integer, r"{place} is torch.int32, which is not supported: convert"),
        (bad_float8, r"{place} is torch.float8_e4m3fn, which is not supported: convert"),
        (bad_meta, r"{place} is on the meta device .* materialize"),
        (bad_dtype, r"{place} is torch.float64 and its gradient torch.float32: set it to None"),
        (bad_shape, r"{place} has a gradient of shape \(2,\): set it to None"),
        (bad_expanded, r"{place} has several elements in one place"),
        (bad_overlapping, r"{place} has several elements in one place"),
    ],
)
def test_bad_parameters(cls, backend, make, message):
    bad = make()
    shape = str(tuple(bad.shape)).replace("(", r"\(").replace(")", r"\)")
    place = f"parameter 1 of group 1, of shape {shape},"
    good = [torch.nn.Parameter(torch.ones(3)) for _ in range(3)]
    for param in good:
        param.grad = torch.ones(3)
    optimizer = cls([{"params": good[:1]}, {"params": [good[1], bad, good[2]]}], backend=backend)
    before = {k: dict(v) for k, v in optimizer.state.items()}
    with pytest.raises(RuntimeError, match=message.format(place=place)):
        optimizer.step()
    assert all(torch.equal(param, torch.ones(3)) for param in good)
    assert optimizer.state == before
    bad.grad = None
    optimizer.step()  # and it goes on once the cause is gone
    assert not any(torch.equal(param, torch.ones(3)) for param in good)


@pytest.mark.parametrize(
    ("cls", "cure"),
    [
        (fastopt.SGD, "use torch.optim.SGD, or sparse=False in the embedding"),
        (fastopt.Adagrad, "use torch.optim.Adagrad, or sparse=False in the embedding"),
        (fastopt.RMSprop, "use sparse=False in the embedding"),
        (fastopt.Adam, "use torch.optim.SparseAdam, or sparse=False in the embedding"),
        (fastopt.AdamW, "use torch.optim.SparseAdam, or sparse=False in the embedding"),
    ],
)
def test_who_takes_sparse_gradients(cls, cure):
    with pytest.raises(RuntimeError, match=f": {cure}$"):
        cls([bad_sparse()]).step()
    if "torch" in cure:  # it does
        getattr(torch.optim, cure.split(",")[0].split(".")[-1])([bad_sparse()]).step()


def test_gradient_on_another_device():
    with pytest.raises(RuntimeError, match="^it is on cpu and its gradient on meta: move"):
        checks.check(torch.zeros(2), torch.zeros(2, device="meta"), "it")


def test_names_of_parameters_are_said():
    model = torch.nn.Linear(2, 2)
    optimizer = fastopt.AdamW(model.named_parameters())
    model.bias.grad = torch.ones(2).to_sparse()
    with pytest.raises(RuntimeError, match=r"parameter 1 'bias' of group 0, of shape \(2,\),"):
        optimizer.step()


def test_dense_interleaved_views_do_not_overlap():
    """Strides (3, 2) of a (2, 3) tensor look as if they overlapped, and do not."""
    base = torch.zeros(8)
    param = base.as_strided((2, 3), (3, 2)).requires_grad_()
    param.grad = torch.ones(2, 3)
    fastopt.SGD([param], lr=1.0).step()
    assert base.tolist() == [-1, 0, -1, -1, -1, -1, 0, -1]


def test_states_that_do_not_fit():
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    optimizer = fastopt.AdamW([param])
    optimizer.step()
    optimizer.state[param]["exp_avg"] = torch.zeros(4)
    with pytest.raises(RuntimeError, match=r"a state 'exp_avg' that does not fit it .*\(4,\)"):
        optimizer.step()
    optimizer.state[param]["exp_avg"] = "gone"
    with pytest.raises(RuntimeError, match=r"'exp_avg' that does not fit it \(str\)"):
        optimizer.step()


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf, torch.tensor(math.nan)], ids=str)
@pytest.mark.parametrize("cls", fastopt.OPTIMIZERS)
def test_settings_out_of_range(cls, value):
    params = [torch.nn.Parameter(torch.ones(1))]
    for name in ("lr", "weight_decay", "eps", "momentum", "alpha", "lr_decay", "clip_value"):
        if name in cls(params).defaults:
            with pytest.raises(ValueError, match="Invalid .*: "):
                cls(params, **{name: value})
            with pytest.raises(ValueError, match="Invalid .*: "):  # a group's own, too
                cls([{"params": params, name: value}])
    if value != math.inf:  # which measures without clipping
        with pytest.raises(ValueError, match="Invalid max_norm"):
            cls(params, max_norm=value)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cls", fastopt.OPTIMIZERS)
def test_a_learning_rate_that_becomes_nan(cls, backend):
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = cls(params, lr=torch.tensor(0.1), backend=backend)
    for param in params:
        param.grad = torch.ones(3)
    optimizer.step()
    before = [p.detach().clone() for p in params]
    steps = [float(s["step"]) for s in optimizer.state.values() if "step" in s]
    optimizer.param_groups[0]["lr"].fill_(math.nan)
    with pytest.raises(ValueError, match=r"Invalid learning rate: tensor\(nan\) \(lr of param"):
        optimizer.step()
    assert all(map(torch.equal, params, before))
    assert steps == [float(s["step"]) for s in optimizer.state.values() if "step" in s]


def test_a_failed_first_step_leaves_the_first_step_to_come():
    """With dampening, a momentum_buffer starts as the gradient itself."""
    param = torch.nn.Parameter(torch.zeros(1))
    optimizer = fastopt.SGD([param], lr=1.0, momentum=0.9, dampening=0.5)
    param.grad = torch.ones(1)
    optimizer.param_groups[0]["lr"] = math.nan
    with pytest.raises(ValueError, match="Invalid learning rate: nan"):
        optimizer.step()
    assert not optimizer.state
    optimizer.param_groups[0]["lr"] = 1.0
    optimizer.step()
    assert param.item() == -1.0


def test_refused_settings():
    params = [torch.nn.Parameter(torch.ones(1))]
    for cls in fastopt.OPTIMIZERS:
        with pytest.raises(NotImplementedError, match="differentiable=True is not supported"):
            cls(params, differentiable=True)


def test_unknown_backend(monkeypatch):
    params = [torch.nn.Parameter(torch.ones(1))]
    with pytest.raises(ValueError, match="backend='cuda': the backends are auto, triton, cpp"):
        fastopt.SGD(params, backend="cuda")
    monkeypatch.setenv("FASTOPT_BACKEND", "fast")
    with pytest.raises(ValueError, match="FASTOPT_BACKEND=fast: the backends are"):
        fastopt.SGD(params)
    monkeypatch.setenv("FASTOPT_BACKEND", "reference")
    assert fastopt.SGD(params).backend == "reference"
    assert fastopt.SGD(params, backend="cpp").backend == "cpp"  # an argument comes first


def test_tensor_subclasses_go_to_the_reference():
    """Those that intercept operators, as DTensor does, have no memory of their own."""
    param = TwoTensor(torch.zeros(3), torch.zeros(3)).requires_grad_()
    param.grad = TwoTensor(torch.ones(3), torch.ones(3))
    fastopt.SGD([param], lr=1.0).step()
    assert param.a.tolist() == param.b.tolist() == [-1, -1, -1]
    with pytest.raises(RuntimeError, match="is a TwoTensor, which backend='cpp' cannot update"):
        fastopt.SGD([param], backend="cpp").step()


def test_negated_views():
    z = torch.zeros(3, dtype=torch.complex64)
    param = torch.nn.Parameter(torch.zeros(3))
    param.grad = torch.complex(torch.zeros(3), torch.ones(3)).conj().imag
    assert param.grad.is_neg()
    optimizer = fastopt.SGD([param], lr=1.0)
    optimizer.step()
    assert param.tolist() == [1, 1, 1]
    param.grad = torch.ones(3)
    optimizer.step()
    assert param.tolist() == [0, 0, 0]
    param.grad = torch.complex(z.real, torch.ones(3)).conj().imag  # noticed by a plan that exists
    optimizer.step()
    assert param.tolist() == [1, 1, 1]


def test_a_missing_extension_warns_once(monkeypatch):
    monkeypatch.setattr(dispatch, "_load", lambda: (None, "there is none"))
    checks.warn_once.cache_clear()
    param = torch.nn.Parameter(torch.zeros(1))
    param.grad = torch.ones(1)
    optimizer = fastopt.SGD([param], lr=1.0)
    with pytest.warns(UserWarning, match="slow reference backend: there is none"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    assert param.item() == -2
    assert fastopt.backends()["cpp"] == (False, "there is none")
    with pytest.raises(RuntimeError, match="backend='cpp' does not work here: there is none"):
        fastopt.SGD([param], backend="cpp")
    checks.warn_once.cache_clear()
