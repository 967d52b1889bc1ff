"""Odd ways to hold it, each of which once went wrong."""

import threading
import warnings

import pytest
import torch
from helpers import BF16, FP32, new_params, parameters, take_steps
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastopt
from fastopt.step import checks


def test_gradients_replaced_by_another_thread():
    """The step reads the gradients that it found, whose memory stays."""
    params = [torch.nn.Parameter(torch.ones(100_000)) for _ in range(4)]
    optimizer = fastopt.SGD(params, lr=0.0)
    done = threading.Event()

    def replace():
        while not done.is_set():
            for param in params:
                param.grad = torch.ones(100_000)

    thread = threading.Thread(target=replace)
    thread.start()
    for _ in range(100):
        optimizer.step()
    done.set()
    thread.join()
    assert all(torch.equal(param, torch.ones(100_000)) for param in params)


def test_dense_interleaved_views_do_not_overlap():
    """Strides (3, 2) of a (2, 3) tensor look as if they overlapped, and do not."""
    base = torch.zeros(8)
    param = base.as_strided((2, 3), (3, 2)).requires_grad_()
    param.grad = torch.ones(2, 3)
    fastopt.SGD([param], lr=1.0).step()
    assert base.tolist() == [-1, 0, -1, -1, -1, -1, 0, -1]


class Operators(TorchDispatchMode):
    """Names of torch's operators that are called: by the reference, and not by the C++ backend."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_another_backend_midway():
    """It is kept where gradients come and go, and measures them once."""
    optimizer = fastopt.SGD(new_params([(3,)]), lr=1.0, max_norm=100.0)
    (param,) = parameters(optimizer)
    before = param.detach().clone()
    for backend, grad, measured in (
        ("auto", torch.ones(3), 0),
        ("reference", torch.ones(3), 1),
        ("reference", None, 0),
        ("reference", torch.ones(3), 1),
    ):
        optimizer.backend = backend
        param.grad = grad
        with Operators() as operators:
            optimizer.step()
        assert operators.names.count("abs") == measured
    torch.testing.assert_close(param.detach(), before - 3)


def test_a_groups_own_max_norm_survives_a_torch_checkpoint():
    params = new_params([(3,), (3,)])
    groups = [{"params": params[:1], "max_norm": 0.1}, {"params": params[1:]}]
    optimizer = fastopt.AdamW(groups, max_norm=None, clip_value=3.0)
    theirs = torch.optim.AdamW([{"params": params[:1]}, {"params": params[1:]}], lr=0.5)
    take_steps(theirs, [0])
    optimizer.load_state_dict(theirs.state_dict())
    assert [g["max_norm"] for g in optimizer.param_groups] == [0.1, None]
    assert [g["lr"] for g in optimizer.param_groups] == [0.5, 0.5]
    assert parameters(optimizer) == params


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_shared_memory(dtype):
    optimizer = fastopt.Adagrad(new_params([(3,)], dtype))
    optimizer.share_memory()
    (param,) = take_steps(optimizer, [0])
    state = optimizer.state[param]
    assert all(value.is_shared() for value in state.values())
    assert torch.equal(state["sum"], param.grad.float().square())
    if dtype == BF16:
        assert state["param_remainder"]._checksums.is_shared()


def test_a_state_dict_after_a_cast_to_fp32():
    """The remainder is there until the next step, and belongs to no parameter of 16 bits."""
    optimizer = fastopt.AdamW(new_params([(300,)], BF16))
    (param,) = take_steps(optimizer, [0])
    param.grad = None
    param.data = param.data.float()
    remainder = optimizer.state[param]["param_remainder"].clone()
    saved = optimizer.state_dict()["state"][0]
    assert torch.equal(saved["param_remainder"], remainder)


def test_a_subclass_that_no_kernel_takes():
    """It is said once, with what it costs."""
    checks.warn_once.cache_clear()
    params = [torch.nn.Parameter(TwoTensor(torch.zeros(3), torch.zeros(3))) for _ in range(2)]
    for param in params:
        param.grad = TwoTensor(torch.ones(3), torch.ones(3))
    optimizer = fastopt.SGD(params, lr=1.0)
    with pytest.warns(UserWarning, match="is a TwoTensor .*about a millisecond") as warned:
        optimizer.step()
    assert len(warned) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    assert params[1].a.tolist() == [-2.0] * 3
