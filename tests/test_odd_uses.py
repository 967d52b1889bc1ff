"""Odd ways to hold it, each of which once went wrong."""

import io
import math
import threading

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

import fastopt
from fastopt.step import backends

BACKENDS = ["cpp", "reference"]


def param_with(grad, data=None):
    param = torch.nn.Parameter(torch.ones(grad.shape) if data is None else data)
    param.grad = grad
    return param


def test_a_negated_gradient_of_a_strided_parameter():
    param = torch.ones(8, 2)[:, 0].requires_grad_()
    optimizer = fastopt.SGD([param], lr=0.1)
    param.grad = torch.ones(8, 2)[:, 0]
    optimizer.step()
    param.grad = (torch.ones(8, dtype=torch.complex64) * (1 + 1j)).conj().imag
    assert param.grad.stride() == param.stride()
    optimizer.step()
    assert torch.equal(param, torch.ones(8) - 0.1 + 0.1)


def test_clipping_expanded_gradients():
    param = param_with(torch.full((1,), 8.0).expand(5000))
    assert fastopt.get_total_norm([param.grad]) == pytest.approx(8 * math.sqrt(5000))
    for clip in (fastopt.clip_grad_norm_, fastopt.clip_grad_value_):
        with pytest.raises(RuntimeError, match="gradient 0, of shape .* clone it"):
            clip([param], 1.0)
    assert param.grad[0] == 8


def test_gradients_replaced_by_another_thread():
    """The step reads the gradients that it found, whose memory stays."""
    params = [param_with(torch.ones(100_000)) for _ in range(4)]
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


def steps_of_an_inference():
    with torch.inference_mode():
        return torch.tensor(5.0)


STEPS = {
    "int": lambda: 5,
    "int64": lambda: torch.tensor(5),
    "double": lambda: torch.tensor(5.0, dtype=torch.float64),
    "with a dimension": lambda: torch.tensor([5.0]),
    "expanded": lambda: torch.tensor([[5.0]]).expand(1, 1),
    "part of an array": lambda: torch.arange(9.0)[5],
    "negated": lambda: torch._neg_view(torch.tensor(-5.0)),
    "wrapper": lambda: TwoTensor(torch.tensor(5.0), torch.tensor(5.0)),
    "parameter": lambda: torch.nn.Parameter(torch.tensor(5.0)),
    "inference": steps_of_an_inference,
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cls", [fastopt.SGD, fastopt.AdamW])
def test_steps_of_any_kind(cls, backend, step):
    """They count on from there, as fp32 on the CPU; also where the rule has no use for them."""
    param = param_with(torch.ones(3))
    optimizer = cls([param], backend=backend)
    optimizer.step()
    optimizer.state[param]["step"] = STEPS[step]()
    for count in (6, 7):
        optimizer.step()
        found = optimizer.state[param]["step"]
        assert type(found) is torch.Tensor
        assert (found.dtype, found.shape, found.requires_grad) == (torch.float32, (), False)
        assert found == count


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_of_several_parameters(backend):
    """Each counts its own steps."""
    params = [param_with(torch.ones(3)) for _ in range(3)]
    optimizer = fastopt.AdamW(params, backend=backend)
    for param, step in zip(params, torch.tensor([5.0]).expand(3), strict=True):
        optimizer.state[param]["step"] = step
    optimizer.step()
    params[1].grad = None
    optimizer.step()
    assert [optimizer.state[param]["step"] for param in params] == [7, 6, 7]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "step",
    [
        *(math.nan, -1.0, "three", None, torch.ones(3), torch.ones(0), torch.tensor(1j)),
        *(torch._neg_view(torch.ones(())), torch.ones(1).to_sparse(), torch.ones(1, device="meta")),
    ],
)
def test_steps_that_are_no_numbers(backend, step):
    params = [param_with(torch.ones(3)) for _ in range(2)]
    optimizer = fastopt.Adam(params, backend=backend)
    optimizer.step()
    before = params[0].detach().clone()
    optimizer.state[params[1]]["step"] = step
    with pytest.raises(RuntimeError, match="parameter 1 of group 0, .* that is no number of steps"):
        optimizer.step()
    assert torch.equal(params[0], before)
    assert optimizer.state[params[0]]["step"] == 1
    params[1].grad = None
    optimizer.step()  # which does not need it
    assert optimizer.state[params[0]]["step"] == 2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("setting", "value", "error"),
    [
        ("max_norm", math.nan, ValueError),
        ("max_norm", -1, ValueError),
        ("max_norm", "1", TypeError),
        ("clip_value", math.nan, ValueError),
        ("clip_value", -0.5, ValueError),
    ],
)
def test_settings_that_turn_bad(setting, value, error, backend):
    param = param_with(torch.ones(1), torch.zeros(1))
    optimizer = fastopt.SGD([param], lr=1.0, momentum=0.9, dampening=0.5, backend=backend)
    optimizer.param_groups[0][setting] = value
    with pytest.raises(error):
        optimizer.step()
    assert param.item() == 0
    assert not optimizer.state  # or the first step would not be the first any more
    optimizer.param_groups[0][setting] = None
    optimizer.step()
    assert param.item() == -1


def test_the_reference_is_kept_where_gradients_come_and_go(monkeypatch):
    calls = []
    update = backends._update
    monkeypatch.setattr(backends, "_update", lambda *args: (calls.append(1), update(*args)))
    param = param_with(torch.ones(3))
    optimizer = fastopt.Adam([param], backend="reference")
    for grad in (torch.ones(3), None, torch.ones(3)):
        param.grad = grad
        optimizer.step()
    assert len(calls) == 2


def test_a_groups_own_max_norm_survives_a_torch_checkpoint():
    params = [param_with(torch.ones(3)) for _ in range(2)]
    groups = [{"params": params[:1], "max_norm": 0.1}, {"params": params[1:]}]
    optimizer = fastopt.AdamW(groups, max_norm=None, clip_value=3.0)
    theirs = torch.optim.AdamW([{"params": params[:1]}, {"params": params[1:]}], lr=0.5)
    theirs.step()
    optimizer.load_state_dict(theirs.state_dict())
    assert [g["max_norm"] for g in optimizer.param_groups] == [0.1, None]
    assert [g["lr"] for g in optimizer.param_groups] == [0.5, 0.5]
    assert optimizer.param_groups[0]["params"] == params[:1]


def test_a_load_that_fails_changes_nothing():
    param = param_with(torch.ones(3))
    optimizer = fastopt.AdamW([param])
    optimizer.step()
    saved = torch.load(io.BytesIO(_saved(optimizer)))
    saved["state"][0]["exp_avg_sq"] = torch.ones(3, device="meta")
    saved["param_groups"][0]["lr"] = 0.5
    with pytest.raises(RuntimeError, match="a state 'exp_avg_sq' on the meta device, without data"):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 1e-3
    optimizer.step()
    assert optimizer.state[param]["step"] == 2


def _saved(optimizer):
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    return buffer.getvalue()


def test_states_that_overlap_or_were_resized():
    param = param_with(torch.ones(8))
    optimizer = fastopt.AdamW([param])
    optimizer.step()
    optimizer.state[param]["exp_avg"].resize_(4)
    with pytest.raises(RuntimeError, match=r"a state 'exp_avg' that does not fit .*\(4,\)"):
        optimizer.step()
    optimizer.state[param]["exp_avg"] = torch.zeros(1).expand(8)
    with pytest.raises(RuntimeError, match="a state 'exp_avg' that does not fit"):
        optimizer.step()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("nbytes", [0, 4, 60])
@pytest.mark.parametrize("which", ["param", "grad", "exp_avg"])
def test_storages_resized_to_less_than_is_needed(which, nbytes, steps, backend):
    param = torch.nn.Parameter(torch.ones(32)[8:24].view(4, 4).t())  # bytes 32 to 96
    param.grad = torch.ones(24).as_strided((4, 4), (5, 1), 5)  # bytes 20 to 96
    optimizer = fastopt.AdamW([param], backend=backend)
    for _ in range(steps):
        optimizer.step()
    state = optimizer.state[param]
    tensor = {"param": param, "grad": param.grad, "exp_avg": state["exp_avg"]}[which]
    tensor.untyped_storage().resize_(nbytes)
    part = "part of its memory" if nbytes else "its memory"
    found = rf"has lost {part} \(its storage was resized to {nbytes} bytes\)"
    for _ in range(2):
        with pytest.raises(RuntimeError, match=found):
            optimizer.step()
    assert state["step"] == steps
    tensor.untyped_storage().resize_(96)
    optimizer.step()
    assert state["step"] == steps + 1


@pytest.mark.parametrize("key", ["param_remainder", "exp_avg_codes", "exp_avg_scale", "step"])
def test_storages_of_states_resized_to_less_than_is_needed(key):
    ones = torch.ones(600, dtype=torch.bfloat16)
    param = param_with(ones, data=ones.clone())
    optimizer = fastopt.AdamW([param], state_dtype="8bit")
    optimizer.step()
    optimizer.step()
    optimizer.state[param][key].untyped_storage().resize_(1)
    with pytest.raises(RuntimeError, match=f"a state '{key}' that .* lost (part of )?its memory"):
        optimizer.step()


@pytest.mark.parametrize("nbytes", [0, 4])
def test_gradients_to_clip_whose_storage_was_resized(nbytes):
    param = param_with(torch.ones(8))
    param.grad.untyped_storage().resize_(nbytes)
    with pytest.raises(RuntimeError, match=f"gradient 0, of shape .* resized to {nbytes} bytes"):
        fastopt.clip_grad_norm_([param], 1.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_infinite_max_norm_only_measures(backend):
    param = param_with(torch.tensor([math.inf, 1.0]))
    optimizer = fastopt.SGD([param], lr=1.0, max_norm=math.inf, backend=backend)
    optimizer.step()
    assert param.tolist() == [-math.inf, 0.0]
    assert optimizer.grad_norm == math.inf


def test_inference_tensors():
    with torch.inference_mode():
        param = torch.ones(3)
        grad = torch.ones(3)
    param.grad = grad
    with pytest.raises(RuntimeError, match="made in inference mode .* clone it"):
        fastopt.SGD([param]).step()


def test_a_tuple_of_parameters_in_a_group():
    param = param_with(torch.ones(3))
    optimizer = fastopt.SGD([param], lr=1.0)
    optimizer.step()
    optimizer.param_groups[0]["params"] = (param,)
    optimizer.step()
    optimizer.step()
    assert param.tolist() == [-2, -2, -2]


def test_another_backend_midway(monkeypatch):
    param = param_with(torch.ones(3))
    optimizer = fastopt.SGD([param], lr=1.0)
    optimizer.step()
    optimizer.backend = "reference"
    optimizer.step()
    assert optimizer._plan is None  # those of the reference are not kept
    assert param.tolist() == [-1, -1, -1]


def test_shared_memory():
    param = param_with(torch.ones(3))
    optimizer = fastopt.Adagrad([param])
    optimizer.share_memory()
    optimizer.step()
    assert optimizer.state[param]["sum"].is_shared()
    assert optimizer.state[param]["sum"].tolist() == [1, 1, 1]


def test_shared_checksums():
    ones = torch.ones(3, dtype=torch.bfloat16)
    param = param_with(ones, ones.clone())
    optimizer = fastopt.Adagrad([param])
    optimizer.share_memory()
    optimizer.step()
    remainder = optimizer.state[param]["param_remainder"]
    assert remainder.is_shared()
    assert remainder._checksums.is_shared()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("state", [None, [1], torch.ones(3)])
def test_a_state_that_is_no_dict(state, backend):
    param = param_with(torch.ones(3))
    optimizer = fastopt.Adam([param], backend=backend)
    optimizer.step()
    before = param.detach().clone()
    optimizer.state[param] = state
    with pytest.raises(RuntimeError, match="parameter 0 of group 0, .* a state that is no dict"):
        optimizer.step()
    assert torch.equal(param, before)
    del optimizer.state[param]
    optimizer.step()
    assert optimizer.state[param]["step"] == 1


def test_a_state_dict_after_a_cast_to_fp32():
    """The remainder is there until the next step, and belongs to no parameter of 16 bits."""
    param = param_with(torch.ones(300, dtype=torch.bfloat16), torch.ones(300, dtype=torch.bfloat16))
    optimizer = fastopt.AdamW([param])
    optimizer.step()
    param.grad = None
    param.data = param.data.float()
    remainder = optimizer.state[param]["param_remainder"].clone()
    saved = optimizer.state_dict()["state"][0]
    assert torch.equal(saved["param_remainder"], remainder)
