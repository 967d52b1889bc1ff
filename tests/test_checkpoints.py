"""State dicts, both ways with torch.optim; deepcopy and pickle; resuming gives the same bits."""

import copy
import io
import pickle

import pytest
import torch
from helpers import (
    BACKENDS,
    CASES,
    assert_near_torch,
    assert_same_bits,
    new_params,
    take_steps,
    torch_class,
)
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import fastopt

SHAPES = [(7, 5), (300,), (), (0,)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
HALVES = [torch.bfloat16, torch.float16]
SETTINGS = {"weight_decay": 0.1}

each_case = pytest.mark.parametrize(("cls", "variant"), CASES, ids=str)
each_class = pytest.mark.parametrize("cls", fastopt.OPTIMIZERS)
each_backend = pytest.mark.parametrize("backend", BACKENDS)
#: Where the states hold enough to tell right from wrong.
STATEFUL = [
    (cls, variant)
    for cls, variant in CASES
    if cls.rule.states_of({**cls([torch.ones(1)]).defaults, **variant})
]
each_stateful_case = pytest.mark.parametrize(("cls", "variant"), STATEFUL, ids=str)


def clones(params):
    return [torch.nn.Parameter(param.detach().clone()) for param in params]


def through_file(obj):
    file = io.BytesIO()
    torch.save(obj, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def states(optimizer):
    """All states, in order."""
    return [
        optimizer.state[param][name]
        for group in optimizer.param_groups
        for param in group["params"]
        for name in sorted(optimizer.state.get(param, {}))
    ]


def resumed(make, params, state_dict):
    """A new optimizer of copies of the parameters, with the state dict loaded."""
    optimizer = make(clones(params))
    optimizer.load_state_dict(state_dict)
    return optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@each_backend
@each_case
def test_from_torch_and_to_torch(cls, variant, backend, dtype):
    def ours(params):
        return cls(params, **SETTINGS, **variant, backend=backend)

    def theirs(params):
        return torch_class(cls)(params, foreach=False, **SETTINGS, **variant)

    for source, target in [(theirs, ours), (ours, theirs)]:
        optimizer = source(new_params(SHAPES, dtype))
        params = take_steps(optimizer, range(5))
        other = resumed(target, params, through_file(optimizer.state_dict()))
        found = take_steps(other, range(5, 10))
        assert_near_torch(found, take_steps(optimizer, range(5, 10)))
        for a, b in zip(states(other), states(optimizer), strict=True):
            # A momentum buffer sums terms of 10 that cancel: rounding is relative to the largest.
            scale = max([1.0, *b.abs().view(-1).tolist()])
            assert_near_torch([a / scale], [b / scale])


@each_case
def test_states_are_named_and_shaped_as_torchs(cls, variant):
    ours = cls(new_params(SHAPES), **variant)
    theirs = torch_class(cls)(new_params(SHAPES), **variant)
    take_steps(ours, range(3))
    take_steps(theirs, range(3))
    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert ours["state"].keys() == theirs["state"].keys()
    for index, state in theirs["state"].items():
        found = {name: (t.dtype, t.shape) for name, t in ours["state"][index].items()}
        assert found == {name: (t.dtype, t.shape) for name, t in state.items()}
        if "step" in state:
            assert ours["state"][index]["step"] == 3
    assert theirs["param_groups"][0].keys() <= ours["param_groups"][0].keys()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_backend
@each_case
def test_resuming_gives_the_same_bits(cls, variant, backend, dtype):
    def make(params):
        return cls(params, **SETTINGS, **variant, max_norm=2.0, backend=backend)

    optimizer = make(new_params(SHAPES, dtype))
    params = take_steps(optimizer, range(5))
    checkpoint = through_file({"params": params, "optimizer": optimizer.state_dict()})
    other = resumed(make, checkpoint["params"], checkpoint["optimizer"])
    assert_same_bits(take_steps(other, range(5, 10)), take_steps(optimizer, range(5, 10)))
    assert_same_bits(states(other), states(optimizer))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@each_stateful_case
def test_fp32_states_of_16_bit_parameters_load_exactly(cls, variant, dtype):
    """torch casts them to the parameter's dtype."""
    optimizer = cls(new_params([(300,)], dtype), master_weights=None, **variant)
    params = take_steps(optimizer, range(3))
    saved = states(optimizer)
    assert any(not torch.equal(state, state.to(dtype).float()) for state in saved)  # would show

    def resumed_by_us(state_dict):
        return resumed(lambda p: cls(p, master_weights=None, **variant), params, state_dict)

    other = resumed_by_us(optimizer.state_dict())
    assert all(state.dtype == torch.float32 for state in states(other))
    assert_same_bits(states(other), saved)

    # Into torch, rounded, and back, no better than torch left them, but in fp32 again.
    theirs = resumed(lambda p: torch_class(cls)(p, **variant), params, optimizer.state_dict())
    back = resumed_by_us(theirs.state_dict())
    assert_same_bits(states(back), [state.float() for state in states(theirs)])
    for optimizer in (theirs, back):
        assert all(param.isfinite().all() for param in take_steps(optimizer, range(2)))


@each_stateful_case
def test_hooks_see_tensors(cls, variant):
    """The user's hooks around load_state_dict, which may change what is loaded."""
    optimizer = cls(new_params(SHAPES, torch.bfloat16), **variant)
    params = take_steps(optimizer, range(3))
    other = cls(clones(params), **variant)
    called = []

    def double(hooked, state_dict):
        assert hooked is other
        for state in state_dict["state"].values():
            assert all(type(value) is torch.Tensor for value in state.values())
        called.append("pre")
        new = {
            index: {name: 2 * value for name, value in state.items()}
            for index, state in state_dict["state"].items()
        }
        return {**state_dict, "state": new}

    def look(hooked):
        called.append("post")
        assert hooked is other
        assert_same_bits(states(other), [2 * state for state in states(optimizer)])

    other.register_load_state_dict_pre_hook(double)
    other.register_load_state_dict_post_hook(look)
    other.load_state_dict(optimizer.state_dict())
    assert called == ["pre", "post"]
    other.load_state_dict(optimizer.state_dict())  # nothing of the first load is left behind
    assert called == ["pre", "post"] * 2


def test_state_dict_hooks():
    optimizer = fastopt.AdamW(new_params([(3,)]))
    take_steps(optimizer, range(1))
    optimizer.register_state_dict_post_hook(lambda _, state_dict: {**state_dict, "mine": 1})
    assert optimizer.state_dict()["mine"] == 1


@each_case
def test_shares_no_memory_with_the_state_dict(cls, variant):
    optimizer = cls(new_params(SHAPES), lr=torch.tensor(0.01), **variant)
    params = take_steps(optimizer, range(3))
    state_dict = optimizer.state_dict()
    before = copy.deepcopy(state_dict)
    others = [resumed(lambda p: cls(p, **variant), params, state_dict) for _ in range(2)]
    take_steps(others[0], range(2))
    others[0].param_groups[0]["lr"].fill_(1.0)

    for left, right in [(state_dict, before), (others[1].state_dict(), before)]:
        assert left["param_groups"] == right["param_groups"]
        assert left["state"].keys() == right["state"].keys()
        for index, state in right["state"].items():
            assert_same_bits(left["state"][index].values(), state.values())


@pytest.mark.parametrize(
    "convert",
    [int, float, torch.Tensor.double, lambda step: step.view(1)],
    ids=["int", "float", "fp64", "1-dim"],
)
@each_backend
@pytest.mark.parametrize("cls", [cls for cls in fastopt.OPTIMIZERS if cls.rule.counts_steps])
def test_steps_of_older_checkpoints(cls, backend, convert):
    """Numbers, fp64, or of one dimension."""

    def make(params):
        return cls(params, backend=backend)

    optimizer = make(new_params(SHAPES))
    params = take_steps(optimizer, range(3))
    state_dict = copy.deepcopy(optimizer.state_dict())
    for state in state_dict["state"].values():
        state["step"] = convert(state["step"])
    other = resumed(make, params, state_dict)
    # And once more, before a step was made with it.
    theirs = resumed(lambda p: torch_class(cls)(p), params, through_file(other.state_dict()))
    found = take_steps(other, range(3, 6))
    for param in found:
        step = other.state[param]["step"]
        assert (step.dtype, step.shape, float(step)) == (torch.float32, (), 6.0)
    assert_near_torch(take_steps(theirs, range(3, 6)), found)
    assert_same_bits(found, take_steps(optimizer, range(3, 6)))


@each_class
def test_groups_without_our_settings(cls):
    """torch's groups have no max_norm and no clip_value: those of the constructor stay."""
    theirs = torch_class(cls)(new_params(SHAPES), lr=0.5)
    params = take_steps(theirs, range(3))
    state_dict = theirs.state_dict()
    assert "max_norm" not in state_dict["param_groups"][0]

    plain = resumed(cls, params, state_dict)
    assert plain.param_groups[0]["max_norm"] is None
    assert plain.param_groups[0]["clip_value"] is None
    assert_near_torch(take_steps(plain, range(2)), take_steps(theirs, range(2)))

    clipping = resumed(lambda p: cls(p, max_norm=0.5, clip_value=0.1), params, state_dict)
    assert clipping.param_groups[0]["lr"] == 0.5
    assert clipping.param_groups[0]["max_norm"] == 0.5
    assert clipping.param_groups[0]["clip_value"] == 0.1
    take_steps(clipping, range(1))
    assert clipping.grad_norm > 0.5


@each_backend
def test_momentum_buffer_none(backend):
    """In older checkpoints of SGD: the first step sets the buffer to the gradient, undampened."""
    settings = {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}
    state_dict = fastopt.SGD(new_params([(3,)]), **settings).state_dict()
    state_dict["state"] = {0: {"momentum_buffer": None}}
    ours = resumed(lambda p: fastopt.SGD(p, backend=backend), new_params([(3,)]), state_dict)
    theirs = resumed(lambda p: torch.optim.SGD(p, foreach=False), new_params([(3,)]), state_dict)
    assert_near_torch(take_steps(ours, range(1)), take_steps(theirs, range(1)))
    (param,) = ours.param_groups[0]["params"]
    assert_same_bits([ours.state[param]["momentum_buffer"]], [param.grad])
    assert_near_torch(take_steps(ours, range(1, 5)), take_steps(theirs, range(1, 5)))


@each_backend
@each_case
def test_before_the_first_step(cls, variant, backend):
    """Adagrad has its states by then, the others have none; both ways with torch."""

    def ours(params):
        return cls(params, backend=backend, **variant)

    def theirs(params):
        return torch_class(cls)(params, foreach=False, **variant)

    for source, target in [(theirs, ours), (ours, theirs)]:
        optimizer = source(new_params(SHAPES))
        other = resumed(target, new_params(SHAPES), through_file(optimizer.state_dict()))
        saved = optimizer.state_dict()["state"]
        assert bool(saved) == (cls is fastopt.Adagrad)
        assert_same_bits(states(other), states(optimizer))
        assert_near_torch(take_steps(other, range(5)), take_steps(optimizer, range(5)))


def deepcopied(optimizer):
    return copy.deepcopy(optimizer)


def pickled(optimizer):
    return pickle.loads(pickle.dumps(optimizer))


@pytest.mark.parametrize("duplicate", [deepcopied, pickled])
@each_backend
@each_case
def test_copies_continue_with_the_same_bits(cls, variant, backend, duplicate):
    for steps_before in (0, 5):
        optimizer = cls(new_params(SHAPES), **SETTINGS, **variant, max_norm=2.0, backend=backend)
        params = take_steps(optimizer, range(steps_before))
        other = duplicate(optimizer)
        assert other.backend == backend
        found = take_steps(other, range(5, 10))
        assert all(a is not b for a, b in zip(found, params, strict=True))
        assert_same_bits(found, take_steps(optimizer, range(5, 10)))
        assert_same_bits(states(other), states(optimizer))


def test_deepcopy_with_its_model():
    model = torch.nn.Linear(3, 2)
    optimizer = fastopt.AdamW(model.parameters())
    take_steps(optimizer, range(2))
    other_model, other = copy.deepcopy((model, optimizer))
    assert other.param_groups[0]["params"][0] is other_model.weight
    take_steps(optimizer, range(2, 4))
    take_steps(other, range(2, 4))
    assert_same_bits(other_model.parameters(), model.parameters())


@each_class
@pytest.mark.parametrize("shapes", [[[(3,)], [(4,)]], [[(3,), (4,)]]], ids=["groups", "parameters"])
def test_state_dict_of_another_model(cls, shapes):
    """Raises what torch raises, and changes nothing."""
    saved = cls([{"params": new_params(group)} for group in shapes]).state_dict()
    params = new_params([(3,)])
    optimizer = cls(params, lr=0.5)
    take_steps(optimizer, range(2))
    before = copy.deepcopy(states(optimizer))
    with pytest.raises(ValueError) as wanted:  # noqa: PT011  the message is compared below
        torch_class(cls)(new_params([(3,)])).load_state_dict(saved)
    with pytest.raises(ValueError, match=str(wanted.value)):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert_same_bits(states(optimizer), before)
    optimizer.load_state_dict(optimizer.state_dict())  # the failure left nothing behind
    take_steps(optimizer, range(1))


@each_class
def test_state_that_is_not_the_rules(cls):
    """A user's own state, of a parameter or of none, nested or not, comes back as it was."""
    optimizer = cls(new_params([(3,)]))
    (param,) = take_steps(optimizer, range(1))
    mine = {"tensor": torch.rand(2), "nested": {"tensor": torch.rand(2)}, "number": 3}
    optimizer.state[param]["mine"] = mine["nested"]
    optimizer.state[param]["masked"] = torch.ones(3, dtype=torch.bool)
    optimizer.state["global"] = mine
    optimizer.state["average"] = mine["tensor"]
    other = resumed(cls, [param], optimizer.state_dict())
    (other_param,) = other.param_groups[0]["params"]
    assert torch.equal(other.state[other_param]["mine"]["tensor"], mine["nested"]["tensor"])
    assert other.state[other_param]["masked"].dtype == torch.bool
    assert torch.equal(other.state["average"], mine["tensor"])
    assert torch.equal(other.state["global"]["nested"]["tensor"], mine["nested"]["tensor"])
    assert other.state["global"]["number"] == 3
    assert_same_bits(take_steps(other, range(1, 3)), take_steps(optimizer, range(1, 3)))


@each_case
def test_param_groups_and_names(cls, variant):
    """Settings of groups, their parameters' names included, come back from a checkpoint."""
    names = ["a", "b"]

    def make(params):
        named = list(zip(names, params, strict=True))
        return cls(
            [{"params": named[:1], "lr": 0.5}, {"params": named[1:], "max_norm": 1.0}], **variant
        )

    optimizer = make(new_params([(3,), (4,)]))
    optimizer.param_groups[0]["lr"] = 0.25
    params = take_steps(optimizer, range(2))
    other = resumed(make, params, through_file(optimizer.state_dict()))
    assert [group["param_names"] for group in other.param_groups] == [["a"], ["b"]]
    assert other.param_groups[0]["lr"] == 0.25
    assert other.param_groups[1]["max_norm"] == 1.0
    assert_same_bits(take_steps(other, range(2, 5)), take_steps(optimizer, range(2, 5)))


def test_adamw_stays_decoupled():
    """Whatever a state dict of Adam says, as in torch."""
    adam = fastopt.Adam(new_params([(3,)]), weight_decay=0.1)
    params = take_steps(adam, range(2))
    ours = resumed(fastopt.AdamW, params, adam.state_dict())
    theirs = resumed(torch.optim.AdamW, params, adam.state_dict())
    assert_near_torch(take_steps(ours, range(3)), take_steps(theirs, range(3)))


@each_case
def test_loading_under_a_default_device(cls, variant):
    """States go where the parameters are, and steps are counted on the CPU."""
    optimizer = cls(new_params(SHAPES), **variant)
    params = take_steps(optimizer, range(3))
    other = cls(clones(params), **variant)
    with torch.device("meta"):
        other.load_state_dict(optimizer.state_dict())
    assert all(state.device.type == "cpu" for state in states(other))
    assert_same_bits(states(other), states(optimizer))


@each_case
def test_distributed_checkpoint_state_dict(cls, variant):
    """torch.distributed.checkpoint's state dicts, by parameter name; they need no process group."""

    def make():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
        return model, cls(model.parameters(), **SETTINGS, **variant, max_norm=1.0)

    model, optimizer = make()
    take_steps(optimizer, range(3))
    optimizer.zero_grad()
    state_dict = through_file(get_optimizer_state_dict(model, optimizer))
    other_model, other = make()
    other_model.load_state_dict(model.state_dict())
    set_optimizer_state_dict(other_model, other, state_dict)
    assert_same_bits(other_model.parameters(), model.parameters())
    assert_same_bits(states(other), states(optimizer))
    assert_same_bits(take_steps(other, range(3, 6)), take_steps(optimizer, range(3, 6)))
