"""Optimizers that go on from a state dict, deepcopy or pickle, with the same bits; what else users
put into a state dict."""

import copy
import functools
import pickle

import pytest
import torch
from helpers import (
    BF16,
    FP32,
    assert_near_torch,
    assert_same_bits,
    clones,
    each_backend,
    each_case,
    entries,
    new_params,
    parameters,
    take_steps,
    through_file,
    torch_class,
)
from saved_runs import (
    RUNS,
    SHAPES,
    STATEFUL,
    assert_go_on_alike,
    assert_same,
    copy_model,
    decoded,
    make,
    masters,
    resumed,
    trained,
    usable,
)

import fastopt

NAMES = ("cls", "variant", "dtype", "master", "states")
each_run = pytest.mark.parametrize(NAMES, RUNS, ids=str)


def states_of(optimizer):
    return [value for *_, value in entries(optimizer)]


def settings_of(optimizer):
    return [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]


# --- Going on -------------------------------------------------------------------------------------


def loaded(optimizer, make, by_data=False):
    """Into an optimizer that has learnt something else, before its model is loaded or after."""
    other = make([torch.nn.Parameter(param.detach() * 3 - 1) for param in parameters(optimizer)])
    take_steps(other, range(20, 22))
    if not by_data:
        copy_model(optimizer, other)
    other.load_state_dict(optimizer.state_dict())
    if by_data:
        for param, value in zip(parameters(other), clones(parameters(optimizer)), strict=True):
            param.data = value.data
    return other


WAYS = {
    "load": loaded,
    "load, then data": functools.partial(loaded, by_data=True),
    "deepcopy": lambda optimizer, make: copy.deepcopy(optimizer),
    "pickle": lambda optimizer, make: pickle.loads(pickle.dumps(optimizer)),
}


#: One way is enough for every rule in every dtype.
DUPLICATES = [
    (*run, way)
    for way in WAYS
    for run in RUNS
    if way == "load" or run[2] == FP32 or run[3] != "auto"
]


@pytest.mark.parametrize((*NAMES, "way"), DUPLICATES, ids=str)
@each_backend
def test_another_optimizer_goes_on(cls, variant, dtype, master, states, backend, way):
    """With the same bits, in memory of its own; before the first step too."""

    def new(params):
        first, *others = zip(["a", "b", "c", "d"], params, strict=True)
        settings = {"lr": torch.tensor(0.01), "max_norm": 1.0, "backend": backend, **variant}
        groups = [{"params": [first], "lr": 0.5}, {"params": others, "weight_decay": 0.0}]
        return make(groups, master, states, cls, **settings)

    for steps in (0, 4) if (dtype, master) == (FP32, "auto") else (4,):
        optimizer = new(new_params(SHAPES, dtype))
        optimizer.param_groups[0]["lr"] = 0.25
        take_steps(optimizer, range(steps))
        other = WAYS[way](optimizer, new)
        assert other.backend == backend
        assert_same(*map(settings_of, (other, optimizer)))  # with the names of parameters
        assert [group["param_names"] for group in other.param_groups] == [["a"], ["b", "c", "d"]]
        places = [
            {x.data_ptr() for x in (*states_of(each), *parameters(each)) if x.numel()}
            for each in (optimizer, other)
        ]
        assert not places[0] & places[1]
        assert_go_on_alike(other, optimizer)
        other.param_groups[1]["lr"].fill_(1.0)
        assert optimizer.param_groups[1]["lr"] == torch.tensor(0.01)


def test_deepcopy_with_its_model():
    model = torch.nn.Linear(3, 2)
    optimizer = fastopt.AdamW(model.parameters())
    take_steps(optimizer, range(2))
    other_model, other = copy.deepcopy((model, optimizer))
    assert other.param_groups[0]["params"][0] is other_model.weight
    take_steps(optimizer, range(2, 4))
    take_steps(other, range(2, 4))
    assert_same_bits(other_model.parameters(), model.parameters())


@each_run
def test_state_that_is_not_the_rules(cls, variant, dtype, master, states):
    """A user's own, of a parameter or of none, nested or not, comes back and is trained around."""
    optimizer = trained(dtype, master, states, cls, **variant)
    plain = copy.deepcopy(optimizer)
    mine = {
        "ema": torch.rand(3),
        "exp_avg_bits": torch.ones(2, dtype=torch.uint8),
        "mask": torch.ones(4, dtype=torch.bool),
        "count": torch.tensor(3, dtype=torch.int64),
        "nested": {"tensor": torch.rand(2).to(dtype)},
        "numbers": [1, 2.5, None],
    }
    for param in parameters(optimizer):
        optimizer.state[param].update(mine)
    optimizer.state["global"] = mine
    optimizer.state["average"] = mine["ema"]
    other = make(clones(parameters(optimizer)), master, states, cls, **variant)
    other.load_state_dict(through_file(optimizer.state_dict()))
    for steps in ([4], [5, 6]):
        assert_same_bits(take_steps(other, steps), take_steps(plain, steps))
        for param in parameters(other):
            assert_same({name: other.state[param][name] for name in mine}, mine)
    assert_same(other.state["global"], mine)
    assert_same(other.state["average"], mine["ema"])


@pytest.mark.parametrize("states", [FP32, "8bit"], ids=str)
@pytest.mark.parametrize(("cls", "variant"), STATEFUL, ids=str)
def test_hooks(cls, variant, states):
    """They see tensors, and what they change is what is saved and loaded."""
    if not usable(cls, variant, states):
        pytest.skip("the rule needs more precision")
    optimizer = trained(BF16, "split", states, cls, **variant)
    other = make(clones(parameters(optimizer)), "split", states, cls, **variant)
    called = []

    def double(hooked, state_dict):
        """The rule's states, without a master; of states in 8 bits, their scales."""
        called.append("pre load")
        assert hooked is other
        new = {index: dict(state) for index, state in state_dict["state"].items()}
        for state in new.values():
            assert all(type(value) is torch.Tensor for value in state.values())
            del state["param_remainder"]
            for name in state:
                if state[name].is_floating_point():
                    state[name] = 2 * state[name]
        return {**state_dict, "state": new}

    def look(hooked):
        called.append("post load")
        assert hooked is other
        assert_same_bits(masters(hooked), [param.float() for param in parameters(hooked)])
        assert_same_bits(decoded(hooked), [2 * state for state in decoded(optimizer)])

    optimizer.register_state_dict_post_hook(lambda _, saved: {**saved, "mine": len(saved["state"])})
    other.register_load_state_dict_pre_hook(double)
    other.register_load_state_dict_post_hook(look)
    for _ in range(2):  # nothing of the first load is left behind
        saved = optimizer.state_dict()
        assert saved["mine"] == optimizer.torch_state_dict()["mine"] == len(SHAPES)
        called.clear()
        other.load_state_dict(saved)
        assert called == ["pre load", "post load"]


@each_case
def test_loading_under_a_default_device(cls, variant):
    """States go where the parameters are, and steps are counted on the CPU."""
    optimizer = trained(FP32, cls=cls, **variant)
    with torch.device("meta"):
        other = resumed(lambda p: cls(p, **variant), parameters(optimizer), optimizer.state_dict())
    assert all(state.device.type == "cpu" for state in states_of(other))
    assert_same(entries(other), entries(optimizer))


# --- Older checkpoints ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "convert",
    [int, float, torch.Tensor.double, lambda step: step.view(1)],
    ids=["int", "float", "fp64", "1-dim"],
)
@each_backend
@pytest.mark.parametrize("cls", [cls for cls in fastopt.OPTIMIZERS if cls.rule.counts_steps])
def test_steps_of_older_checkpoints(cls, backend, convert):
    """Numbers, fp64, or of one dimension."""

    def ours(params):
        return cls(params, backend=backend)

    optimizer = ours(new_params(SHAPES))
    params = take_steps(optimizer, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state["step"] = convert(state["step"])
    other = resumed(ours, params, saved)
    # And once more, before a step was made with it.
    theirs = resumed(torch_class(cls), params, through_file(other.state_dict()))
    found = take_steps(other, range(3, 6))
    for param in found:
        step = other.state[param]["step"]
        assert (step.dtype, step.shape, float(step)) == (FP32, (), 6.0)
    assert_near_torch(take_steps(theirs, range(3, 6)), found)
    assert_same_bits(found, take_steps(optimizer, range(3, 6)))


@each_backend
def test_momentum_buffer_none(backend):
    """In older checkpoints of SGD: the first step sets the buffer to the gradient, undampened."""
    settings = {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}
    saved = fastopt.SGD(new_params([(3,)]), **settings).state_dict()
    saved["state"] = {0: {"momentum_buffer": None}}
    ours = resumed(lambda p: fastopt.SGD(p, backend=backend), new_params([(3,)]), saved)
    theirs = resumed(lambda p: torch.optim.SGD(p, foreach=False), new_params([(3,)]), saved)
    assert_near_torch(take_steps(ours, range(1)), take_steps(theirs, range(1)))
    (param,) = parameters(ours)
    assert_same_bits([ours.state[param]["momentum_buffer"]], [param.grad])
    assert_near_torch(take_steps(ours, range(1, 5)), take_steps(theirs, range(1, 5)))


def test_adamw_stays_decoupled():
    """Whatever a state dict of Adam says, as in torch."""
    adam = fastopt.Adam(new_params([(3,)]), weight_decay=0.1)
    params = take_steps(adam, range(2))
    ours = resumed(fastopt.AdamW, params, adam.state_dict())
    theirs = resumed(torch.optim.AdamW, params, adam.state_dict())
    assert_near_torch(take_steps(ours, range(3)), take_steps(theirs, range(3)))
