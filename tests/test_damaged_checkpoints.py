"""State dicts that no optimizer like this one can have saved are refused by name, and nothing has
changed; what a run may have saved is loaded."""

import copy
import math

import pytest
import torch
from helpers import CASES, assert_same_bits, new_params, take_steps, torch_class
from test_conversions import unchanged

import fastopt

INF, NAN = math.inf, math.nan
each_case = pytest.mark.parametrize(("cls", "variant"), CASES, ids=str)


def trained(cls, steps=3, **settings):
    optimizer = cls(new_params([(3,), (600,)]), **settings)
    take_steps(optimizer, range(steps))
    return optimizer


def saved_by(cls, **settings):
    return copy.deepcopy(trained(cls, **settings).state_dict())


def refuses(optimizer, state_dict, error, message):
    """In one sentence; a good load and a good step follow."""
    good = copy.deepcopy(optimizer.state_dict())
    with unchanged(optimizer), pytest.raises(error, match=message) as raised:
        optimizer.load_state_dict(state_dict)
    assert "\n" not in str(raised.value)
    assert ". " not in str(raised.value)
    optimizer.load_state_dict(good)
    take_steps(optimizer, range(1))


# --- Settings -------------------------------------------------------------------------------------


@each_case
def test_clipping_stays_the_scripts(cls, variant):
    """So does how numbers are kept; copies are as they were."""
    saved = saved_by(cls, **variant, max_norm=None, clip_value=5.0)
    own = {"max_norm": 0.5, "clip_value": None, "master_weights": "fp32"}
    optimizer = cls(
        [{"params": new_params([(3,)])}, {"params": new_params([(600,)]), "max_norm": 2.0}],
        **variant,
        **own,
    )
    saved["param_groups"] = [
        {**saved["param_groups"][0], "params": [0], "lr": 0.25},
        {**saved["param_groups"][0], "params": [1]},
    ]
    optimizer.load_state_dict(saved)
    assert [group["max_norm"] for group in optimizer.param_groups] == [0.5, 2.0]
    for group in optimizer.param_groups:
        assert group["clip_value"] is None
        assert group["master_weights"] == "fp32"
    assert optimizer.param_groups[0]["lr"] == 0.25
    take_steps(optimizer, range(2))
    assert optimizer.grad_norm > 0.5
    other = copy.deepcopy(optimizer)
    assert [group["max_norm"] for group in other.param_groups] == [0.5, 2.0]


@pytest.mark.parametrize(
    ("cls", "name", "value", "error", "message"),
    [
        (fastopt.AdamW, "lr", "x", TypeError, r"Invalid learning rate: 'x'"),
        (fastopt.AdamW, "lr", NAN, ValueError, r"Invalid learning rate: nan"),
        (fastopt.AdamW, "lr", torch.tensor(-1.0), ValueError, r"Invalid learning rate: tensor"),
        (fastopt.AdamW, "betas", (2, 0.9), ValueError, r"Invalid beta parameter at index 0: 2"),
        (fastopt.AdamW, "amsgrad", "no", TypeError, r"Invalid amsgrad: 'no'"),
        (fastopt.AdamW, "seed", -1, ValueError, r"Invalid seed: -1"),
        (fastopt.SGD, "momentum", None, TypeError, r"Invalid momentum value: None"),
        (fastopt.RMSprop, "weight_decay", -0.1, ValueError, r"Invalid weight_decay value: -0\.1"),
    ],
)
def test_settings(cls, name, value, error, message):
    saved = saved_by(cls)
    saved["param_groups"][0][name] = value
    refuses(trained(cls), saved, error, f"^{message}.* group 0")


# --- Their form -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"state": [1]}, "here 'state' is a list"),
        ({"state": None}, "here 'state' is a NoneType"),
        ({"param_groups": None}, "here 'param_groups' is"),
        ({"param_groups": [1]}, "here 'param_groups' is"),
        ({"param_groups": {"lr": 1}}, "here 'param_groups' is"),
        ({"param_groups": [{"lr": 1}]}, "here 'param_groups' is"),
        ({"param_groups": [{"params": 3}]}, "here 'param_groups' is"),
        ({"state": {0: [1]}}, "parameter 0 of group 0, of shape .*, has a state that is a list"),
        ({"state": {1: None}}, "parameter 1 of group 0, of shape .*, has a state that is a None"),
    ],
    ids=str,
)
@pytest.mark.parametrize("cls", fastopt.OPTIMIZERS)
def test_what_is_no_state_dict(cls, changes, message):
    optimizer, saved = trained(cls), saved_by(cls)
    refuses(optimizer, {**saved, **changes}, TypeError, message)
    missing = {key: value for key, value in saved.items() if key not in changes}
    refuses(optimizer, missing, TypeError, r"a state dict has a dict 'state' .*, and this has the")
    for nothing in (None, [], "x", saved["param_groups"]):
        refuses(optimizer, nothing, TypeError, "a state dict has a dict 'state' .*, and this is a")


# --- States of another rule -----------------------------------------------------------------------

PAIRS = [
    (source, variant, target)
    for source, variant in CASES
    for target in fastopt.OPTIMIZERS
    if source.rule != target.rule and trained(source, **variant).state_dict()["state"]
]


@pytest.mark.parametrize("of_torch", [False, True])
@pytest.mark.parametrize(("source", "variant", "target"), PAIRS, ids=str)
def test_states_of_another_rule(source, variant, target, of_torch):
    saved = saved_by(torch_class(source) if of_torch else source, **variant)
    if {*source.rule.states} < {*target.rule.states}:
        message = r"has no state 'step', but '\w+': load a state dict that is complete"
    else:
        message = r"has a state '\w+', which is not one of .*'s: load a state dict of"
    for own in target.variants:
        refuses(trained(target, **own), saved, ValueError, f"^parameter 0 of group 0, .*{message}")


@pytest.mark.parametrize("state_dtype", ["8bit", "bfloat16"])
def test_states_of_another_rule_in_other_forms(state_dtype):
    saved = saved_by(fastopt.AdamW, state_dtype=state_dtype)
    refuses(trained(fastopt.SGD), saved, ValueError, r"has a state 'exp_avg\w*', which is not one")


@pytest.mark.parametrize("name", ["NAdam", "Adamax", "Adadelta", "ASGD", "Rprop"])
@pytest.mark.parametrize("cls", fastopt.OPTIMIZERS)
def test_states_of_torchs_other_rules(cls, name):
    refuses(trained(cls), saved_by(getattr(torch.optim, name)), ValueError, "which is not one of")


def test_no_buffer_of_another_rule():
    """What torch.optim.SGD saved, once, without a momentum."""
    saved = saved_by(fastopt.SGD)
    saved["state"] = {0: {"momentum_buffer": None}, 1: {"momentum_buffer": None}}
    refuses(trained(fastopt.AdamW), saved, ValueError, "a state 'momentum_buffer', which is not")
    trained(fastopt.SGD).load_state_dict(saved)


@pytest.mark.parametrize("momentum", [0, 0.9])
@pytest.mark.parametrize("step", [5, 5.0, torch.tensor(5.0)], ids=["int", "float", "tensor"])
def test_steps_that_nobody_counts(momentum, step):
    """SGD counts none, unless it needs random numbers."""
    saved = saved_by(fastopt.SGD, momentum=momentum)
    for i in range(2):
        saved["state"].setdefault(i, {})["step"] = copy.deepcopy(step)
    alone = {**saved, "state": {i: {"step": step} for i in range(2)}}
    for state_dict in (saved, alone):
        optimizer = fastopt.SGD(new_params([(3,), (600,)]), momentum=momentum)
        plain = fastopt.SGD(new_params([(3,), (600,)]), momentum=momentum)
        optimizer.load_state_dict(state_dict)
        for i, state in state_dict["state"].items():
            state = {key: value for key, value in state.items() if key != "step"}
            plain.state[plain.param_groups[0]["params"][i]].update(copy.deepcopy(state))
        assert_same_bits(take_steps(optimizer, range(3)), take_steps(plain, range(3)))
        if momentum == 0 or state_dict is alone:
            assert not any("step" in state for state in optimizer.state.values())
    random = fastopt.SGD(new_params([(3,)], torch.bfloat16), master_weights="stochastic")
    take_steps(random, range(5))
    other = fastopt.SGD(new_params([(3,)], torch.bfloat16), master_weights="stochastic")
    other.load_state_dict(random.state_dict())
    assert [float(state["step"]) for state in other.state.values()] == [5]


# --- States that are incomplete -------------------------------------------------------------------


@each_case
def test_a_state_that_is_missing(cls, variant):
    saved = saved_by(cls, **variant)
    for name in saved["state"].get(1, {}):
        incomplete = copy.deepcopy(saved)
        del incomplete["state"][1][name]
        if cls.rule.counts_steps:
            message = f"^parameter 1 of group 0, .* has no state '{name}', but '.*: load a state"
            refuses(trained(cls, **variant), incomplete, ValueError, message)
        else:  # it is made anew, as in torch
            trained(cls, **variant).load_state_dict(incomplete)


def test_a_state_in_8_bits_that_is_missing():
    for name in ("exp_avg", "exp_avg_sq"):
        saved = saved_by(fastopt.AdamW, state_dtype="8bit")
        for key in (f"{name}_codes", f"{name}_scale"):
            del saved["state"][1][key]
        optimizer = trained(fastopt.AdamW, state_dtype="8bit")
        refuses(optimizer, saved, ValueError, f"has no state '{name}', but 'exp_avg")


def test_more_states_than_the_flags_call_for():
    """AMSGrad switched off: as in torch, its state stays."""
    saved = saved_by(torch.optim.AdamW, amsgrad=True)
    saved["param_groups"][0]["amsgrad"] = False
    ours, theirs = (cls(new_params([(3,), (600,)])) for cls in (fastopt.AdamW, torch.optim.AdamW))
    for optimizer in (ours, theirs):
        optimizer.load_state_dict(saved)
        take_steps(optimizer, range(2))
    for a, b in zip(ours.state.values(), theirs.state.values(), strict=True):
        assert a.keys() == b.keys()
    saved = saved_by(fastopt.SGD, momentum=0.9)
    saved["param_groups"][0]["momentum"] = 0
    trained(fastopt.SGD).load_state_dict(saved)


# --- Values ---------------------------------------------------------------------------------------


@each_case
def test_values_that_states_never_have(cls, variant):
    saved = saved_by(cls, **variant)
    for name, state in saved["state"].get(1, {}).items():
        for value in (-1.0, NAN, INF, -INF, -0.0):
            damaged = copy.deepcopy(saved)
            damaged["state"][1][name].view(-1)[-1] = value
            if name == "step":
                if value == 0:
                    continue
                error, message = RuntimeError, "a state 'step' that is no number of steps"
            elif name in cls.rule.non_negative and value < 0:
                error, message = ValueError, f"a state '{name}' with negative numbers"
            else:  # a run that diverged has saved NaN and infinity
                optimizer = trained(cls, **variant)
                optimizer.load_state_dict(damaged)
                found = optimizer.state[optimizer.param_groups[0]["params"][1]][name]
                assert_same_bits([found], [damaged["state"][1][name]])
                continue
            message = f"^parameter 1 of group 0, .* has {message}"
            refuses(trained(cls, **variant), damaged, error, message)
        for dtype in (torch.complex64, torch.int64, torch.bool):
            damaged = copy.deepcopy(saved)
            damaged["state"][1][name] = state.to(dtype)
            if name != "step":
                message = f"has a state '{name}' that does not fit it .{dtype} of"
                refuses(trained(cls, **variant), damaged, RuntimeError, message)
        for value in ("x", [1.0], torch.ones(600).to_sparse()):
            damaged = copy.deepcopy(saved)
            damaged["state"][1][name] = value
            refuses(trained(cls, **variant), damaged, RuntimeError, f"has a state '{name}' that")


@pytest.mark.parametrize("cls", [fastopt.AdamW, fastopt.RMSprop])
def test_scales_that_8_bit_states_never_have(cls):
    optimizer = trained(cls, state_dtype="8bit")
    saved = copy.deepcopy(optimizer.state_dict())
    for name in [name for name in saved["state"][1] if name.endswith("_scale")]:
        for value, found in ((-1.0, "negative"), (INF, "infinite"), (-INF, "negative")):
            damaged = copy.deepcopy(saved)
            damaged["state"][1][name][1] = value
            refuses(optimizer, damaged, ValueError, f"has a state '{name}' with {found} numbers")


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "8bit"])
@each_case
def test_a_run_that_diverged_resumes(cls, variant, state_dtype):
    """What was NaN or infinite when it was saved is so again, in every form."""
    try:
        optimizer = cls(new_params([(3,), (600,)]), state_dtype=state_dtype, **variant)
    except ValueError:
        return pytest.skip("the rule needs more precision")
    params = take_steps(optimizer, range(2))
    for value in (NAN, 1e30, INF):
        params[1].grad[5] = value
        optimizer.step()
        copies = [param.detach().clone() for param in params]
        other = cls(copies, state_dtype=state_dtype, **variant)
        other.load_state_dict(optimizer.state_dict())
        for param, copied in zip(params, copies, strict=True):
            found, wanted = other.state.get(copied, {}), optimizer.state.get(param, {})
            assert found.keys() == wanted.keys()
            assert_same_bits(found.values(), wanted.values())
    return None
