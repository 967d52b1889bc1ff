"""Settings that cannot be are refused in one sentence: when given, and at the latest in the next
step when changed, before anything has changed."""

import copy
import math
import pickle
import warnings
from collections import UserList

import pytest
import torch
from helpers import BACKENDS, interpreted, masked_out, new_params, set_grads, take_steps
from test_conversions import unchanged

import fastopt
from fastopt import settings
from fastopt.step import checks

each_backend = pytest.mark.parametrize("backend", BACKENDS)

#: Each with the error's type and how it begins.
WRONG = [
    (fastopt.SGD, "lr", None, TypeError, r"Invalid learning rate: None"),
    (fastopt.SGD, "lr", "1e-3", TypeError, r"Invalid learning rate: '1e-3'"),
    (fastopt.SGD, "lr", True, TypeError, r"Invalid learning rate: True"),
    (fastopt.SGD, "lr", [0.1], TypeError, r"Invalid learning rate: \[0\.1\]"),
    (fastopt.SGD, "lr", 1j, TypeError, r"Invalid learning rate: 1j"),
    (fastopt.SGD, "lr", -1, ValueError, r"Invalid learning rate: -1"),
    (fastopt.SGD, "lr", 10**400, ValueError, r"Invalid learning rate: 1000"),
    (fastopt.SGD, "lr", torch.tensor(-1.0), ValueError, r"Invalid learning rate: tensor\(-1"),
    (fastopt.SGD, "lr", torch.tensor(True), TypeError, r"Invalid learning rate: tensor\(True"),
    (fastopt.SGD, "lr", torch.tensor(1j), TypeError, r"Invalid learning rate: tensor"),
    (fastopt.SGD, "lr", torch.ones(2), ValueError, r"Tensor lr must be 1-element"),
    (fastopt.SGD, "momentum", -0.5, ValueError, r"Invalid momentum value: -0\.5"),
    (fastopt.SGD, "dampening", math.inf, ValueError, r"Invalid dampening value: inf"),
    (fastopt.SGD, "nesterov", "yes", TypeError, r"Invalid nesterov: 'yes'"),
    (fastopt.SGD, "maximize", 0.5, TypeError, r"Invalid maximize: 0\.5"),
    (fastopt.SGD, "capturable", None, TypeError, r"Invalid capturable: None"),
    (fastopt.SGD, "seed", "0", ValueError, r"Invalid seed: '0'"),
    (fastopt.SGD, "max_norm", "x", TypeError, r"Invalid max_norm: 'x'"),
    (fastopt.SGD, "max_norm", -1.0, ValueError, r"Invalid max_norm: -1\.0"),
    (fastopt.SGD, "max_norm", math.nan, ValueError, r"Invalid max_norm: nan"),
    (fastopt.SGD, "clip_value", "x", TypeError, r"Invalid clip_value: 'x'"),
    (fastopt.SGD, "clip_value", math.inf, ValueError, r"Invalid clip_value: inf"),
    (fastopt.SGD, "master_weights", "splitt", ValueError, r"Invalid master_weights: 'splitt'"),
    (fastopt.SGD, "master_weights", torch.ones(2), ValueError, r"Invalid master_weights: tensor"),
    (fastopt.SGD, "state_dtype", "4bit", ValueError, r"Invalid state_dtype: '4bit'"),
    (fastopt.SGD, "state_dtype", None, ValueError, r"Invalid state_dtype: None"),
    (fastopt.Adagrad, "lr_decay", "0", TypeError, r"Invalid lr_decay value: '0'"),
    (fastopt.RMSprop, "alpha", None, TypeError, r"Invalid alpha value: None"),
    (fastopt.RMSprop, "centered", "no", TypeError, r"Invalid centered: 'no'"),
    (fastopt.AdamW, "weight_decay", None, TypeError, r"Invalid weight_decay value: None"),
    (fastopt.AdamW, "eps", "1e-8", TypeError, r"Invalid epsilon value: '1e-8'"),
    (fastopt.AdamW, "betas", 0.9, TypeError, r"Invalid betas: 0\.9"),
    (fastopt.AdamW, "betas", (0.9,), ValueError, r"Invalid betas: \(0\.9,\)"),
    (fastopt.AdamW, "betas", (1.5, 0.9), ValueError, r"Invalid beta parameter at index 0: 1\.5"),
    (fastopt.AdamW, "betas", [0.9, 1.0], ValueError, r"Invalid beta parameter at index 1: 1\.0"),
    (fastopt.AdamW, "betas", (0.9, "x"), TypeError, r"Invalid beta parameter at index 1: 'x'"),
    (fastopt.AdamW, "betas", (math.nan, 0.9), ValueError, r"Invalid beta parameter at index 0"),
    (fastopt.AdamW, "amsgrad", "False", TypeError, r"Invalid amsgrad: 'False'"),
]
each_wrong = pytest.mark.parametrize(("cls", "name", "value", "error", "message"), WRONG)


@each_wrong
def test_when_given(cls, name, value, error, message):
    params = new_params([(3,)])
    with pytest.raises(error, match=f"^{message}") as raised:
        cls(params, **{name: value})
    assert " group 0" in str(raised.value)
    assert "\n" not in str(raised.value)
    with pytest.raises(error, match=f"^{message}"):
        cls([{"params": params, name: value}])
    optimizer = cls(params)
    with unchanged(optimizer), pytest.raises(error, match=f"^{message}.* group 1"):
        optimizer.add_param_group({"params": new_params([(2,)]), name: value})


@pytest.mark.parametrize("steps", [0, 2])
@each_backend
@each_wrong
def test_when_changed(cls, name, value, error, message, backend, steps):
    """Before the first step, and where a plan would be used again."""
    params = new_params([(3,), (4,)])
    optimizer = cls(
        [{"params": params[:1]}, {"params": params[1:], "weight_decay": 0.1}], backend=backend
    )
    take_steps(optimizer, range(steps))
    set_grads(params, 3)
    group = optimizer.param_groups[1]
    good = group[name]
    with unchanged(optimizer):
        for _ in range(2):  # not only the first time
            group[name] = value
            with pytest.raises(error, match=f"^{message}.* group 1"):
                optimizer.step()
            group[name] = good
    before = [param.detach().clone() for param in params]
    optimizer.step()
    assert not any(map(torch.equal, params, before))


@each_backend
def test_tensors_that_change_in_place(backend):
    """Their values are looked at in each step."""
    params = new_params([(3,)])
    lr, beta = torch.tensor(0.1), torch.tensor(0.9)
    optimizer = fastopt.AdamW(params, lr=lr, betas=(beta, 0.99), backend=backend)
    take_steps(optimizer, range(2))
    for tensor, message in ((lr, "Invalid learning rate"), (beta, "Invalid beta parameter")):
        good = tensor.clone()
        with unchanged(optimizer):
            tensor.fill_(-1)
            with pytest.raises(ValueError, match=message):
                optimizer.step()
            tensor.copy_(good)
    optimizer.step()


@each_backend
def test_settings_that_stay_are_checked_once(backend, monkeypatch):
    """A step whose settings are those of the last one costs no check."""
    params = new_params([(3,), (4,)])
    optimizer = fastopt.SGD([{"params": [param]} for param in params], momentum=0.9)
    take_steps(optimizer, range(1))
    checked = []
    monkeypatch.setattr(settings, "check", lambda rule, group, *_: checked.append(group["lr"]))
    take_steps(optimizer, range(3))
    assert not checked
    optimizer.param_groups[1]["lr"] = 0.5
    take_steps(optimizer, range(3))
    assert checked == [0.5]


def test_what_schedulers_of_torch_end_with():
    """LinearLR ends at -2e-18 by rounding."""
    optimizer = fastopt.SGD(new_params([(3,)]), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / 3, 0, total_iters=10)
    for step in range(12):
        take_steps(optimizer, [step])
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] < 0
    other = fastopt.SGD(new_params([(3,)]))
    other.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("name", ["lr", "betas", "max_norm", "maximize", "state_dtype"])
def test_a_setting_that_is_missing(name):
    optimizer = fastopt.AdamW(new_params([(3,)]))
    take_steps(optimizer, range(1))
    del optimizer.param_groups[0][name]
    optimizer.add_param_group({"params": new_params([(3,)])})
    with pytest.raises(ValueError, match=f"param group 0 has no '{name}': add"):
        take_steps(optimizer, range(1))


@pytest.mark.parametrize("cls", fastopt.OPTIMIZERS)
def test_every_setting_has_a_check(cls):
    assert cls(new_params([(3,)])).defaults.keys() <= settings._CHECKS.keys()
    assert {*cls.rule.hyperparameters} <= settings._CHECKS.keys()


@pytest.mark.parametrize(
    ("words", "meaning"),
    [
        (("bfloat16", "torch.bfloat16"), torch.bfloat16),
        (("float32", "torch.float32"), torch.float32),
    ],
)
def test_words_for_state_dtypes(words, meaning):
    def dtypes(optimizer):
        return [state["exp_avg"].dtype for state in optimizer.state.values()]

    for word in words:
        optimizer = fastopt.AdamW(new_params([(3,)], torch.bfloat16), state_dtype=word)
        take_steps(optimizer, range(2))
        assert dtypes(optimizer) == [meaning]
        for other in (pickle.loads(pickle.dumps(optimizer)), copy.deepcopy(optimizer)):
            take_steps(other, range(2, 4))
            assert dtypes(other) == [meaning]
        saved = optimizer.state_dict()
        for value in (*words, meaning):
            loaded = fastopt.AdamW(new_params([(3,)], torch.bfloat16), state_dtype=value)
            loaded.load_state_dict(saved)
            assert dtypes(loaded) == [meaning]
            take_steps(loaded, range(2, 3))
            assert dtypes(loaded) == [meaning]
    later = fastopt.AdamW(new_params([(3,)], torch.bfloat16), state_dtype="8bit")
    take_steps(later, range(2))
    later.param_groups[0]["state_dtype"] = words[0]
    take_steps(later, range(2))
    assert dtypes(later) == [meaning]
    # What a state dict calls it.
    (group,) = saved["param_groups"]
    fastopt.AdamW([{**group, "params": new_params([(3,)])}])
    if meaning != torch.float32:
        with pytest.raises(ValueError, match="is not for rmsprop: centered"):
            fastopt.RMSprop(new_params([(3,)]), state_dtype=words[0], centered=True)


@pytest.mark.parametrize(
    ("key", "setting"),
    [
        ("max_nrom", "max_norm"),
        ("weight_decy", "weight_decay"),
        ("beta", "betas"),
        ("master_weight", "master_weights"),
        ("clipvalue", "clip_value"),
    ],
)
def test_typos_warn_once(key, setting):
    checks.warn_once.cache_clear()
    message = f"a param group has '{key}', which AdamW does not read: did you mean '{setting}'?"
    with pytest.warns(UserWarning, match="did you mean") as warned:
        fastopt.AdamW([{"params": [param], key: 1.0} for param in new_params([(3,), (4,)])])
    assert [str(warning.message) for warning in warned] == [message]


def test_keys_of_frameworks_do_not_warn():
    checks.warn_once.cache_clear()
    keys = [
        *("name", "param_names", "initial_lr", "max_lr", "min_lr", "base_lr", "swa_lr", "lr_scale"),
        *("lr_mult", "base_momentum", "max_momentum", "no_weight_decay", "weight_decay_mult"),
        *("layer_id", "fix_step", "use_weight_decay", "decay_mult", "wd_mult", "is_expert"),
        *("params_names", "lr_factor", "apply_weight_decay", "wd", "depth", "group_name"),
    ]
    for cls in fastopt.OPTIMIZERS:
        for key in keys:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                cls([{"params": new_params([(3,)]), key: None if key == "param_names" else 1.0}])
    for scheduler in (
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=9),
        lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.01, 0.1, cycle_momentum=False),
    ):
        optimizer = fastopt.AdamW(new_params([(3,)]))
        scheduler(optimizer)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fastopt.AdamW(optimizer.param_groups)


@pytest.mark.parametrize(
    "backend",
    [*BACKENDS, pytest.param("triton", marks=[interpreted, *masked_out])],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("steps", [0, 2])
def test_grad_norm_of_no_gradients(backend, dtype, steps):
    """0, where all parameters are."""
    params = new_params([(3,), (4,)], dtype)
    optimizer = fastopt.AdamW(params, max_norm=1.0, backend=backend)
    take_steps(optimizer, range(steps))
    optimizer.zero_grad()
    before = [param.detach().clone() for param in params]
    for _ in range(2):
        optimizer.grad_norm = None
        optimizer.step()
        found = optimizer.grad_norm
        assert (found.item(), found.dtype, found.shape, found.device) == (
            0,
            dtype,
            (),
            before[0].device,
        )
    assert all(map(torch.equal, params, before))


def test_sequences_and_numbers_of_others():
    """As frameworks' configurations have them, without a warning."""
    np = pytest.importorskip("numpy")
    results = []
    for betas, lr in (((0.5, 0.9), 2.0**-10), (UserList([0.5, 0.9]), np.float32(2.0**-10))):
        param = torch.nn.Parameter(torch.ones(3))
        optimizer = fastopt.AdamW([param], lr=lr, betas=betas)
        for _ in range(2):
            param.grad = torch.ones(3)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                optimizer.step()
        results.append(param)
    assert torch.equal(*results)
