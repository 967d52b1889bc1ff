"""State dicts that no optimizer like this one can have saved are refused by name, and nothing has
changed; what a run may have saved is loaded."""

import copy
import functools
import math

import pytest
import torch
from helpers import (
    BF16,
    FP32,
    STATE_DTYPES,
    assert_same_bits,
    clones,
    each_case,
    each_optimizer,
    entries,
    new_params,
    parameters,
    set_grads,
    take_steps,
    torch_class,
    unchanged,
)
from saved_runs import STATEFUL, assert_same, make, resumed, usable
from saved_runs import trained as trained_in

import fastopt

INF, NAN = math.inf, math.nan
SMALL = [(3,), (9, 512)]


def trained(cls, shapes=SMALL, **settings):
    optimizer = cls(new_params(shapes), **settings)
    take_steps(optimizer, range(3))
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


# --- Groups and settings --------------------------------------------------------------------------


@pytest.mark.parametrize("of_torch", [False, True])
@each_case
def test_clipping_stays_the_scripts(cls, variant, of_torch):
    """So does all that torch's groups have not; older state dicts of ours have it."""
    of, theirs = (torch_class(cls), {}) if of_torch else (cls, {"clip_value": 5.0})
    source = of(new_params(SMALL), lr=0.25, **theirs, **variant)
    own = {"max_norm": 0.5, "clip_value": 0.1, "master_weights": "fp32", "seed": 3}
    optimizer = cls(new_params(SMALL), **own, **variant)
    saved = source.state_dict()
    if cls is not fastopt.Lion:
        assert saved["param_groups"][0].keys() == optimizer.state_dict()["param_groups"][0].keys()
    if not of_torch:
        saved["param_groups"][0].update(theirs, max_norm=None, state_dtype="8bit", seed=-1)
    optimizer.load_state_dict(saved)
    (group,) = optimizer.param_groups
    assert group["lr"] == 0.25
    assert {key: group[key] for key in own} == own
    take_steps(optimizer, [0])
    assert optimizer.grad_norm > 0.5


@pytest.mark.parametrize(
    ("cls", "name", "value", "error", "message"),
    [
        (fastopt.AdamW, "lr", "x", TypeError, r"Invalid learning rate: 'x'"),
        (fastopt.AdamW, "lr", NAN, ValueError, r"Invalid learning rate: nan"),
        (fastopt.AdamW, "lr", torch.tensor(-1.0), ValueError, r"Invalid learning rate: tensor"),
        (fastopt.AdamW, "betas", (2, 0.9), ValueError, r"Invalid beta parameter at index 0: 2"),
        (fastopt.AdamW, "amsgrad", "no", TypeError, r"Invalid amsgrad: 'no'"),
        (fastopt.SGD, "momentum", None, TypeError, r"Invalid momentum value: None"),
        (fastopt.RMSprop, "weight_decay", -0.1, ValueError, r"Invalid weight_decay value: -0\.1"),
    ],
)
def test_settings(cls, name, value, error, message):
    saved = saved_by(cls)
    saved["param_groups"][0][name] = value
    refuses(trained(cls), saved, error, f"^{message}.* group 0")


@each_optimizer
@pytest.mark.parametrize("shapes", [[[(3,)], [(4,)]], [[(3,), (4,)]]], ids=["groups", "parameters"])
def test_another_model(cls, shapes):
    """Raises what torch raises."""
    saved = cls([{"params": new_params(group)} for group in shapes]).state_dict()
    with pytest.raises(ValueError) as wanted:  # noqa: PT011  the message is compared below
        torch_class(cls)(new_params([(3,)])).load_state_dict(saved)
    refuses(trained(cls, [(3,)], lr=0.5), saved, ValueError, str(wanted.value))


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
@each_optimizer
def test_what_is_no_state_dict(cls, changes, message):
    optimizer, saved = trained(cls), saved_by(cls)
    refuses(optimizer, {**saved, **changes}, TypeError, message)
    missing = {key: value for key, value in saved.items() if key not in changes}
    refuses(optimizer, missing, TypeError, r"a state dict has a dict 'state' .*, and this has the")
    for nothing in (None, [], "x", saved["param_groups"]):
        refuses(optimizer, nothing, TypeError, "a state dict has a dict 'state' .*, and this is a")


# --- States of another rule -----------------------------------------------------------------------


def foreign():
    """An optimizer and its settings, and a class of fastopt that does not have its states."""
    for source, variant in STATEFUL:
        for target in fastopt.OPTIMIZERS:
            if source.rule != target.rule:
                yield source, variant, target
                yield torch_class(source), variant, target
    for states in ("8bit", "bfloat16"):
        yield fastopt.AdamW, {"state_dtype": states}, fastopt.SGD
    for name in ("NAdam", "Adamax", "Adadelta", "ASGD", "Rprop"):
        for target in fastopt.OPTIMIZERS:
            yield getattr(torch.optim, name), {}, target


@pytest.mark.parametrize(("source", "variant", "target"), [*foreign()], ids=str)
def test_states_of_another_rule(source, variant, target):
    saved = saved_by(source, **variant)
    if {*saved["state"][0]} < {*target.rule.states}:
        message = r"has no state 'step', but '\w+': load a state dict that is complete"
    else:
        message = r"has a state '\w+', which is not one of .*'s: load a state dict of"
    for own in target.variants:
        refuses(trained(target, **own), saved, ValueError, f"^parameter 0 of group 0, .*{message}")


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
    for states in (saved["state"], {}):
        with_steps = {i: {**states.get(i, {}), "step": copy.deepcopy(step)} for i in range(2)}
        found, wanted = (fastopt.SGD(new_params(SMALL)) for _ in range(2))
        found.load_state_dict({**saved, "state": with_steps})
        wanted.load_state_dict({**saved, "state": states})
        assert_same_bits(take_steps(found, range(3)), take_steps(wanted, range(3)))
        if momentum == 0 or not states:
            assert not any("step" in state for state in found.state.values())


# --- Entries that are missing or too many ---------------------------------------------------------


@pytest.mark.parametrize("state_dtype", STATE_DTYPES, ids=str)
@each_case
def test_a_state_that_is_missing(cls, variant, state_dtype):
    """In whatever form it was."""
    if not usable(cls, variant, state_dtype):
        pytest.skip("the rule needs more precision")
    optimizer = trained(cls, state_dtype=state_dtype, **variant)
    saved = copy.deepcopy(optimizer.state_dict())
    for name in ("step", *cls.rule.states_of(optimizer.param_groups[0])):
        keys = {name, f"{name}_codes", f"{name}_scale"}
        state = saved["state"].get(1, {})
        rest = {key: value for key, value in state.items() if key not in keys}
        incomplete = {**saved, "state": {**saved["state"], 1: rest}}
        if cls.rule.counts_steps:
            message = f"^parameter 1 of group 0, .* has no state '{name}', but '.*: load a state"
            refuses(optimizer, incomplete, ValueError, message)
        else:  # it is made anew, as in torch
            trained(cls, state_dtype=state_dtype, **variant).load_state_dict(incomplete)


def test_more_states_than_the_flags_call_for():
    """AMSGrad switched off: as in torch, its state stays."""
    saved = saved_by(torch.optim.AdamW, amsgrad=True)
    saved["param_groups"][0]["amsgrad"] = False
    ours, theirs = (cls(new_params(SMALL)) for cls in (fastopt.AdamW, torch.optim.AdamW))
    for optimizer in (ours, theirs):
        optimizer.load_state_dict(saved)
        take_steps(optimizer, range(2))
    for a, b in zip(ours.state.values(), theirs.state.values(), strict=True):
        assert a.keys() == b.keys()
    saved = saved_by(fastopt.SGD, momentum=0.9)
    saved["param_groups"][0]["momentum"] = 0
    trained(fastopt.SGD).load_state_dict(saved)


# --- Values that are no states --------------------------------------------------------------------


def damaged(saved, name, value):
    """With a number in the last place of parameter 1's state, or something else for it."""
    saved = copy.deepcopy(saved)
    state = saved["state"][1]
    if isinstance(value, float):
        state[name].view(-1)[-1] = value
    else:
        state[name] = value
    return saved


@pytest.mark.parametrize("state_dtype", [FP32, "8bit"], ids=str)
@each_case
def test_values_that_states_never_have(cls, variant, state_dtype):
    """What a run that diverged has saved is loaded: NaN and infinity, but for infinite scales."""
    if not usable(cls, variant, state_dtype):
        pytest.skip("the rule needs more precision")
    optimizer = trained(cls, state_dtype=state_dtype, **variant)
    saved = copy.deepcopy(optimizer.state_dict())
    for name, state in saved["state"].get(1, {}).items():
        if state.dtype == torch.uint8:
            continue
        message = f"^parameter 1 of group 0, .* has a state '{name}' "
        is_scale = name.endswith("_scale")
        for value in (-1.0, NAN, INF, -INF, -0.0):
            state_dict = damaged(saved, name, value)
            if name == "step" and value != 0:
                refuses(optimizer, state_dict, RuntimeError, f"{message}that is no number of steps")
            elif value < 0 and (is_scale or name in cls.rule.non_negative):
                refuses(optimizer, state_dict, ValueError, f"{message}with negative numbers")
            elif value == INF and is_scale:
                refuses(optimizer, state_dict, ValueError, f"{message}with infinite numbers")
            else:
                optimizer.load_state_dict(state_dict)
                found = optimizer.state[parameters(optimizer)[1]][name]
                assert_same_bits([found], [state_dict["state"][1][name]])
        for dtype in () if name == "step" else (torch.complex64, torch.int64, torch.bool):
            state_dict = damaged(saved, name, state.to(dtype))
            refuses(optimizer, state_dict, RuntimeError, f"{message}that does not fit it .{dtype} ")
        for value in ("x", [1.0], torch.ones(9, 512).to_sparse()):
            refuses(optimizer, damaged(saved, name, value), RuntimeError, f"{message}that")


@pytest.mark.parametrize("state_dtype", STATE_DTYPES, ids=str)
@each_case
def test_a_run_that_diverged_resumes(cls, variant, state_dtype):
    """What was NaN or infinite when it was saved is so again, in every form."""
    if not usable(cls, variant, state_dtype):
        pytest.skip("the rule needs more precision")
    new = functools.partial(cls, state_dtype=state_dtype, **variant)
    optimizer = new(new_params(SMALL))
    params = take_steps(optimizer, range(2))
    for value in (NAN, 1e30, INF):
        params[1].grad[5, 5] = value
        optimizer.step()
        assert_same(entries(resumed(new, params, optimizer.state_dict())), entries(optimizer))


BROKEN = {
    "shape": lambda x: x.reshape(-1)[:-1].clone(),
    "dtype": lambda x: x.to(torch.int32),
    "double": torch.Tensor.double,
    "number": lambda x: 3,
    "words": lambda x: "three",
    "sparse": torch.Tensor.to_sparse,
    "meta": lambda x: x.to("meta"),
    "none": lambda x: None,
}


@pytest.mark.parametrize("fault", BROKEN)
@pytest.mark.parametrize("name", ["param_remainder", "exp_avg_codes", "exp_avg_sq_scale"])
def test_broken_entries(name, fault):
    """In a load and in a step: an error that names the parameter and the state."""
    optimizer = trained_in(BF16, "split", "8bit")
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0][name] = BROKEN[fault](saved["state"][0][name])
    other = make(clones(parameters(optimizer)), "split", "8bit")
    take_steps(other, range(7, 9))
    message = rf"parameter 0 of group 0, of shape .9, 512.,.* has a state ('\w+' without )?'{name}'"
    if name == "param_remainder" and fault in ("dtype", "double", "none"):
        other.load_state_dict(saved)  # as if it were missing
    else:
        refuses(other, saved, RuntimeError, f"^{message}")
    assert all(param.isfinite().all() for param in take_steps(other, range(2)))

    state = optimizer.state[parameters(optimizer)[0]]
    state[name] = BROKEN[fault](state[name])
    set_grads(parameters(optimizer), 4)
    if (name, fault) == ("param_remainder", "none"):
        optimizer.step()
        return
    versions = [param._version for param in parameters(optimizer)]
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()
    assert [param._version for param in parameters(optimizer)] == versions


@pytest.mark.parametrize("mode", [("auto", FP32), ("split", "8bit"), (None, BF16)], ids=str)
def test_without_data(mode):
    """A step, or parameters."""
    optimizer = trained_in(BF16, *mode)
    saved = optimizer.state_dict()
    no_step = damaged(saved, "step", torch.ones((), device="meta"))
    refuses(optimizer, no_step, RuntimeError, "^parameter 1 .* has a state 'step' on the meta devi")
    other = make([torch.nn.Parameter(p.to("meta")) for p in parameters(optimizer)], *mode)
    with pytest.raises(RuntimeError, match="parameter 0 .* is on the meta device and has no data"):
        other.load_state_dict(saved)
    assert not other.state
