"""Settings that cannot be are refused in one sentence: when given, and at the latest in the next
step when changed, before anything has changed."""

import copy
import math
import pickle
import re
from collections import UserList

import pytest
import torch
from helpers import (
    BF16,
    FP32,
    assert_same_bits,
    each_backend,
    each_optimizer,
    new_params,
    parameters,
    set_grads,
    take_steps,
    unchanged,
)

import fastopt
from fastopt import settings
from fastopt.step import checks

#: Of settings that are numbers, in torch's messages.
WORDS = {"lr": "learning rate", "eps": "epsilon value"} | {
    name: f"{name} value" for name in ("momentum", "dampening", "weight_decay", "alpha", "lr_decay")
}
NO_NUMBERS = [None, "1e-3", True, [0.1], 1j, torch.tensor(True), torch.tensor(1j)]
NO_FLAGS = [0.5, "False"]
OUT_OF_RANGE = [-1, math.nan, math.inf, 10**400, torch.tensor(-1.0), torch.tensor(math.nan)]
WRONG = {
    TypeError: {
        **dict.fromkeys(WORDS, NO_NUMBERS[:2]),
        **dict.fromkeys(["max_norm", "clip_value"], NO_NUMBERS[1:2]),
        "lr": NO_NUMBERS,
        **dict.fromkeys(["nesterov", "maximize", "centered", "amsgrad"], NO_FLAGS),
        "capturable": [None, *NO_FLAGS],
        "betas": [0.9, "09", None],
    },
    ValueError: {
        **dict.fromkeys(WORDS, OUT_OF_RANGE),
        "dampening": [math.nan, math.inf],
        "clip_value": OUT_OF_RANGE,
        "max_norm": [-1, math.nan, torch.tensor(-1.0), torch.tensor(math.nan)],  # inf measures
        "betas": [(0.9,), []],
        "seed": ["0", -1, 2**32],
        "master_weights": ["splitt", torch.ones(2)],
        "state_dtype": ["4bit", None],
    },
}
#: With the error's type and how it begins.
MESSAGES = [
    (name, value, error, f"Invalid {WORDS.get(name, name)}: {repr(value)[:9]}")
    for error, names in WRONG.items()
    for name, values in names.items()
    for value in values
]
MESSAGES += [
    ("lr", torch.ones(2), ValueError, "Tensor lr must be 1-element"),
    ("betas", (1.5, 0.9), ValueError, "Invalid beta parameter at index 0: 1.5"),
    ("betas", [0.9, 1.0], ValueError, "Invalid beta parameter at index 1: 1.0"),
    ("betas", (0.9, "x"), TypeError, "Invalid beta parameter at index 1: 'x'"),
    ("betas", (math.nan, 0.9), ValueError, "Invalid beta parameter at index 0"),
]
each_wrong = pytest.mark.parametrize(("name", "value", "error", "message"), MESSAGES)


def classes_with(name):
    return [cls for cls in fastopt.OPTIMIZERS if name in cls([torch.ones(1)]).defaults]


@each_wrong
def test_when_given(name, value, error, message):
    for cls in classes_with(name):
        params = new_params([(3,)])
        with pytest.raises(error, match=f"^{re.escape(message)}") as raised:
            cls(params, **{name: value})
        assert " group 0" in str(raised.value)
        assert "\n" not in str(raised.value)
        with pytest.raises(error, match=f"^{re.escape(message)}"):
            cls([{"params": params, name: value}])
        optimizer = cls(params)
        expected = pytest.raises(error, match=f"^{re.escape(message)}.* group 1")
        with unchanged(optimizer), expected:
            optimizer.add_param_group({"params": new_params([(2,)]), name: value})


@pytest.mark.parametrize("steps", [0, 2])
@each_backend
@each_wrong
def test_when_changed(name, value, error, message, backend, steps):
    """Before the first step, which may differ from others, and where a plan would be used again."""
    cls = classes_with(name)[0]
    variant = {"momentum": 0.9, "dampening": 0.5} if cls is fastopt.SGD else {}
    groups = [[{"params": [p]} for p in new_params([(3,), (4,)])] for _ in range(2)]
    optimizer, other = (cls(of_one, backend=backend, **variant) for of_one in groups)
    take_steps(other, range(steps + 1))
    set_grads(take_steps(optimizer, range(steps)), steps)
    group = optimizer.param_groups[1]
    good = group[name]
    with unchanged(optimizer):
        for _ in range(2):  # not only the first time
            group[name] = value
            with pytest.raises(error, match=f"^{re.escape(message)}.* group 1"):
                optimizer.step()
            group[name] = good
    optimizer.step()
    assert_same_bits(parameters(optimizer), parameters(other))


@pytest.mark.parametrize("value", [-1.0, math.nan])
@each_backend
@each_optimizer
def test_tensors_that_change_in_place(cls, backend, value):
    """Their values are looked at in each step."""
    lr, beta = torch.tensor(0.1), torch.tensor(0.9)
    betas = {"betas": (beta, 0.99)} if cls in classes_with("betas") else {}
    optimizer = cls(new_params([(3,)]), lr=lr, **betas, backend=backend)
    take_steps(optimizer, range(2))
    for tensor, message in ((lr, "learning rate"), (beta, "beta parameter"))[: 1 + len(betas)]:
        good = tensor.clone()
        with unchanged(optimizer):
            tensor.fill_(value)
            with pytest.raises(ValueError, match=rf"Invalid {message}.*tensor\({value:.0f}.*param"):
                optimizer.step()
            tensor.copy_(good)
    optimizer.step()


def test_settings_that_stay_are_checked_once(monkeypatch):
    """A step whose settings are those of the last one costs no check."""
    groups = [{"params": [param]} for param in new_params([(3,), (4,)])]
    optimizer = fastopt.SGD(groups, momentum=0.9)
    take_steps(optimizer, [0])
    checked = []
    monkeypatch.setattr(settings, "check_group", lambda *args: checked.append(args))
    take_steps(optimizer, range(3))
    assert not checked
    optimizer.param_groups[1]["lr"] = 0.5
    take_steps(optimizer, range(3))
    assert len(checked) == 1


@pytest.mark.parametrize("lr", [torch.tensor(0.1), 0.1], ids=str)
def test_only_what_can_change_in_place_is_checked_again(monkeypatch, lr):
    groups = [{"params": [param], "betas": [0.9, 0.99]} for param in new_params([(3,), (4,)])]
    optimizer = fastopt.AdamW(groups, lr=lr)
    take_steps(optimizer, [0])
    checked = []
    monkeypatch.setattr(settings, "check_group", lambda *args: checked.append(args[3]))
    take_steps(optimizer, [1])
    assert checked == [["lr", "betas"] if isinstance(lr, torch.Tensor) else ["betas"]]
    monkeypatch.undo()
    optimizer.param_groups[1]["betas"][1] = 1.5
    with (
        unchanged(optimizer),
        pytest.raises(ValueError, match="beta parameter at index 1.*group 1"),
    ):
        optimizer.step()


TOGETHER = [
    ("dampening", 0.5, ValueError, "Nesterov momentum requires"),
    ("momentum", 0, ValueError, "Nesterov momentum requires"),
    ("differentiable", True, NotImplementedError, "differentiable=True is not supported"),
    ("foreach", True, RuntimeError, "`fused` and `foreach` cannot be `True` together"),
    ("fused", "x", TypeError, "Invalid fused: 'x'"),
]


@pytest.mark.parametrize(("name", "value", "error", "message"), TOGETHER, ids=str)
def test_settings_that_do_not_go_together(name, value, error, message):
    """A plan that holds does not let them pass."""
    optimizer = fastopt.SGD(new_params([(3,)]), momentum=0.9, nesterov=True, fused=True)
    take_steps(optimizer, range(2))
    (group,) = optimizer.param_groups
    good, group[name] = group[name], value
    with unchanged(optimizer), pytest.raises(error, match=message):
        optimizer.step()
    group[name] = good
    optimizer.step()


@pytest.mark.parametrize("first", [0, 1])
def test_equal_values_of_another_type(first):
    groups = [{"params": [param], "lr": 1} for param in new_params([(3,), (4,)])]
    optimizer = fastopt.SGD(groups)
    optimizer.param_groups[first]["lr"] = True
    with pytest.raises(TypeError, match=f"learning rate: True .lr of param group {first} must"):
        take_steps(optimizer, [0])


def test_what_schedulers_of_torch_end_with():
    """LinearLR ends at -2e-18 by rounding."""
    optimizer = fastopt.SGD(new_params([(3,)]), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / 3, 0, total_iters=10)
    for step in range(12):
        take_steps(optimizer, [step])
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] < 0
    fastopt.SGD(new_params([(3,)])).load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("name", ["lr", "betas", "max_norm", "maximize", "state_dtype"])
def test_a_setting_that_is_missing(name):
    optimizer = fastopt.AdamW(new_params([(3,)]))
    take_steps(optimizer, [0])
    del optimizer.param_groups[0][name]
    optimizer.add_param_group({"params": new_params([(3,)])})
    with pytest.raises(ValueError, match=f"param group 0 has no '{name}': add"):
        take_steps(optimizer, [0])


@each_optimizer
def test_every_setting_has_a_check(cls):
    assert cls(new_params([(3,)])).defaults.keys() <= settings._CHECKS.keys()
    assert {*cls.rule.hyperparameters} <= settings._CHECKS.keys()


DTYPES = dict.fromkeys((BF16, "bfloat16", "torch.bfloat16"), BF16)
DTYPES |= dict.fromkeys((FP32, "float32", "torch.float32"), FP32)


@pytest.mark.parametrize("name", ["lr", "max_norm", "state_dtype"])
def test_a_group_that_lacks_a_setting(name):
    """As one that was not added by add_param_group, or is a copy made by iterating."""
    params = new_params([(3,)])
    optimizer = fastopt.AdamW(params)
    set_grads(params, 0)
    del optimizer.param_groups[0][name]
    with pytest.raises(ValueError, match=f"param group 0 has no '{name}': add"):
        optimizer.step()


def test_copies_of_a_group():
    """All but iteration, which skips what torch's optimizers lack, gives every setting."""
    (group,) = fastopt.SGD(new_params([(3,)]), max_norm=1.0).param_groups
    assert "max_norm" not in [*group]
    for other in (
        *(copy.copy(group), copy.deepcopy(group), pickle.loads(pickle.dumps(group))),
        *({**group}, dict(group), group | {}, type(group)(group)),
    ):
        assert other["max_norm"] == 1.0
        assert other.keys() == group.keys()


@pytest.mark.parametrize("word", DTYPES)
def test_words_for_state_dtypes(word):
    def new(state_dtype):
        return fastopt.AdamW(new_params([(3,)], BF16), state_dtype=state_dtype)

    def assert_kept(optimizer):
        assert [state["exp_avg"].dtype for state in optimizer.state.values()] == [dtype]

    dtype = DTYPES[word]
    optimizer, later = new(word), new("8bit")
    take_steps(optimizer, range(2))
    take_steps(later, range(2))
    later.param_groups[0]["state_dtype"] = word
    for other in (later, pickle.loads(pickle.dumps(optimizer)), copy.deepcopy(optimizer)):
        take_steps(other, range(2, 4))
        assert_kept(other)
    saved = optimizer.state_dict()
    for other in (other for other in DTYPES if DTYPES[other] == dtype):
        loaded = new(other)
        loaded.load_state_dict(saved)
        assert_kept(loaded)
        take_steps(loaded, [2])
        assert_kept(loaded)
    fastopt.AdamW([{**saved["param_groups"][0], "params": new_params([(3,)])}])
    if dtype != FP32:
        with pytest.raises(ValueError, match="is not for rmsprop: centered"):
            fastopt.RMSprop(new_params([(3,)]), state_dtype=word, centered=True)


TYPOS = {
    **{"max_nrom": "max_norm", "clipvalue": "clip_value", "weight_decy": "weight_decay"},
    **{"beta": "betas", "master_weight": "master_weights"},
}


@pytest.mark.parametrize(("key", "setting"), TYPOS.items())
def test_typos_warn_once(key, setting):
    checks.warn_once.cache_clear()
    message = f"a param group has '{key}', which AdamW does not read: did you mean '{setting}'?"
    with pytest.warns(UserWarning, match="did you mean") as warned:
        fastopt.AdamW([{"params": [param], key: 1.0} for param in new_params([(3,), (4,)])])
    assert [str(warning.message) for warning in warned] == [message]


@pytest.mark.filterwarnings("error")
def test_keys_of_frameworks_do_not_warn():
    checks.warn_once.cache_clear()
    keys = (
        "name initial_lr max_lr min_lr base_lr swa_lr lr_scale lr_mult base_momentum max_momentum "
        "no_weight_decay weight_decay_mult layer_id fix_step use_weight_decay decay_mult wd_mult "
        "is_expert params_names lr_factor apply_weight_decay wd depth group_name"
    )
    for cls in fastopt.OPTIMIZERS:
        for key in keys.split():
            cls([{"params": new_params([(3,)]), key: 1.0, "param_names": None}])
    for scheduler in (
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=9),
        lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.01, 0.1, cycle_momentum=False),
    ):
        optimizer = fastopt.AdamW(new_params([(3,)]))
        scheduler(optimizer)
        fastopt.AdamW(optimizer.param_groups)


@pytest.mark.filterwarnings("error")
def test_sequences_and_numbers_of_others():
    """As frameworks' configurations have them."""
    np = pytest.importorskip("numpy")
    lr, betas = np.float32(2.0**-10), UserList([0.5, 0.9])
    found = take_steps(fastopt.AdamW(new_params([(3,)]), lr=lr, betas=betas), range(2))
    same = fastopt.AdamW(new_params([(3,)]), lr=2.0**-10, betas=(0.5, 0.9))
    assert_same_bits(found, take_steps(same, range(2)))
