"""Every precision mode's checkpoints into every other, into torch and out of it, and into models of
another dtype or layout."""

import copy
import functools
import itertools

import pytest
import torch
import torch.distributed.checkpoint.state_dict as dcp
from helpers import (
    BACKENDS,
    BF16,
    CASES,
    FP16,
    FP32,
    FP64,
    HALVES,
    MASTERS,
    STATE_DTYPES,
    assert_near_torch,
    assert_same_bits,
    clones,
    each_backend,
    each_case,
    each_mode,
    entries,
    new_params,
    parameters,
    take_steps,
    through_file,
    torch_class,
    unchanged,
)
from saved_runs import (
    SHAPES,
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

#: Of a dtype, (master_weights, state_dtype).
MODES_OF = {dtype: list(itertools.product(MASTERS[dtype], STATE_DTYPES)) for dtype in MASTERS}
#: One rule in all modes, and of the others all that differs from rule to rule.
PAIRS = [
    (fastopt.AdamW, {}, dtype, source, target)
    for dtype, modes in MODES_OF.items()
    for source, target in itertools.product(modes, modes)
] + [
    (*case, BF16, *modes)
    for case in CASES
    for narrow in (("split", BF16), (None, "8bit"))
    for modes in itertools.permutations((narrow, ("fp32", FP32)))
    if usable(*case, narrow[1])
]


def master_of(tensor):
    return tensor.detach().to(FP64 if tensor.dtype == FP64 else FP32)


def names_of(optimizer):
    """But for steps, which a rule may count though it does not have to."""
    found = entries(optimizer)
    return [(index, name, value.dtype) for index, name, value in found if name != "step"]


def lost_in(source, target, states):
    """What cannot be converted exactly."""
    keeps = {"split", "fp32"}
    lost = ["master weights"] if source[0] in keeps and target[0] not in keeps else []
    if (source[1], target[1]) == ("8bit", BF16):
        lost += states
    return " and ".join(lost)


def assert_converted(found, wanted, lost=""):
    """Exactly, but for what is lost: masters become the parameters, states are rounded."""
    old = parameters(wanted) if "master" in lost else masters(wanted)
    assert_same_bits(masters(found), [number.float() for number in old])
    states, old_states = (each.param_groups[0]["state_dtype"] for each in (found, wanted))
    for a, b in zip(decoded(found), decoded(wanted), strict=True):
        error = (a - b).abs()
        if states in (FP32, old_states) and lost in ("", "master weights"):
            assert_same_bits([a], [b])
        elif states == BF16:
            assert (error <= b.abs() * 2**-8).all()  # 8 bits of precision
        elif states == "8bit" and b.numel():
            # The number plus the scale, at most a 15th of the largest of a block, is rounded to 6
            # bits where it has a sign, to 5 where it has none; 0 may become the first code.
            scale = b.abs().max() / 14
            assert (error <= (b.abs() + scale) * 2**-5).all()
        else:
            assert_same_bits([a], [b])


def stand_still(optimizer):
    """A step with a learning rate of 0."""
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    take_steps(optimizer, [4])


# --- From mode to mode ---------------------------------------------------------------------------


@pytest.mark.parametrize(("cls", "variant", "dtype", "source", "target"), PAIRS, ids=str)
def test_from_mode_to_mode(cls, variant, dtype, source, target):
    """By a load, before the model's or after it, in place of all that was learnt; or by the next
    step, with new settings."""
    backend = BACKENDS[PAIRS.index((cls, variant, dtype, source, target)) % 2]
    new = functools.partial(make, cls=cls, backend=backend, **variant)
    optimizer = new(new_params(SHAPES, dtype), *source)
    take_steps(optimizer, range(4))
    saved = through_file(optimizer.state_dict())
    lost = lost_in(source, target, cls.rule.states_of(optimizer.param_groups[0]))
    for model_first in (True, False):
        params = [torch.nn.Parameter(-2 * param.detach()) for param in parameters(optimizer)]
        other = new(params, *target)
        take_steps(other, range(9))
        if model_first:
            copy_model(optimizer, other)
        if lost:
            with unchanged(other), pytest.raises(ValueError) as error:  # noqa: PT011  see below
                other.load_state_dict(saved)
            message = str(error.value)
            place = "parameter 0 of group 0, of shape (9, 512)"
            assert message.startswith(f"{place}, would lose precision of its {lost}: use ")
            assert "lossy=True" in message
            assert "\n" not in message
            assert ". " not in message
        other.load_state_dict(saved, lossy=bool(lost))
        if not model_first:
            copy_model(optimizer, other)
        assert_converted(other, optimizer, lost)

    if not lost and source[1] != "8bit" and target[1] in (FP32, source[1]):
        back = new(clones(parameters(optimizer)), *source)
        back.load_state_dict(other.state_dict())
        assert_same(entries(back), entries(optimizer))

    # Saved again, before there was a step to convert its master.
    again = new(clones(parameters(other)), *target)
    again.load_state_dict(through_file(other.state_dict()), lossy=bool(lost))
    optimizer.param_groups[0].update(master_weights=target[0], state_dtype=target[1])
    assert_same_bits(masters(optimizer), masters(other))
    before = clones(parameters(other))
    for steps in ([4], [5, 6]):
        found = take_steps(other, steps)
        for each in (optimizer, again):
            assert_same_bits(take_steps(each, steps), found)
            assert_same(entries(each), entries(other))
    wanted = trained(dtype, *target, cls, **variant)
    assert names_of(other) == names_of(wanted)  # nothing is left of the other form
    for param, value in zip(found, before, strict=True):
        assert param.isfinite().all()
        assert param.numel() < 2 or not torch.equal(param, value)
        assert not cls.rule.counts_steps or other.state[param]["step"] == 7


DCP_OPTIONS = {
    "plain": None,
    "full": dcp.StateDictOptions(full_state_dict=True),
    "on the CPU": dcp.StateDictOptions(full_state_dict=True, cpu_offload=True),
    "flat": dcp.StateDictOptions(flatten_optimizer_state_dict=True),
}
DCP_RUNS = [(*case, FP32, ("auto", FP32), ("auto", FP32), "plain") for case in CASES] + [
    (fastopt.AdamW, {}, BF16, source, target, options)
    for source in [("split", FP32), ("fp32", "8bit"), (None, BF16)]
    for target in MODES_OF[BF16]
    for options in DCP_OPTIONS
    if options != "flat" or source == target  # torch leaves out what the new optimizer has not
]


@pytest.mark.parametrize(
    ("cls", "variant", "dtype", "source", "target", "options"), DCP_RUNS, ids=str
)
def test_distributed_checkpoints(cls, variant, dtype, source, target, options):
    """torch.distributed.checkpoint adds what it loads to states that a first step has made, in the
    form of the new optimizer: they are not taken for what was loaded."""
    shapes = [(9, 512), (7, 5)]  # torch has no place for what it adds to a 0-dim parameter
    models, optimizers = [], []
    for mode in (source, target):
        params = {str(i): param for i, param in enumerate(new_params(shapes, dtype))}
        models.append(torch.nn.ParameterDict(params))
        optimizers.append(make(list(params.values()), *mode, cls, max_norm=1.0, **variant))
    optimizer, other = optimizers
    take_steps(optimizer, range(4))
    optimizer.zero_grad()
    options = DCP_OPTIONS[options]
    saved = through_file(dcp.get_optimizer_state_dict(models[0], optimizer, options=options))
    models[1].load_state_dict(models[0].state_dict())
    lost = lost_in(source, target, ["exp_avg", "exp_avg_sq"])
    if lost:
        with pytest.raises(ValueError, match=f"would lose precision of its {lost}: use"):
            dcp.set_optimizer_state_dict(models[1], other, saved, options=options)
        return
    dcp.set_optimizer_state_dict(models[1], other, saved, options=options)
    assert_converted(other, optimizer)
    assert all(value == 4 for _, name, value in entries(other) if name == "step")
    if source == target:
        assert_go_on_alike(other, optimizer)
    assert all(param.isfinite().all() for param in take_steps(other, [4, 5]))
    assert names_of(other) == names_of(trained(dtype, *target, cls, shapes=shapes, **variant))


# --- From torch and to torch ---------------------------------------------------------------------


def go_on_like_torch(ours, theirs, steps):
    """Where torch computes as precisely, with states of the same names, dtypes and shapes."""
    before = clones(parameters(ours))
    found, wanted = take_steps(ours, steps), take_steps(theirs, steps)
    assert all(param.isfinite().all() for param in (*found, *wanted))
    for param, value in zip(found, before, strict=True):
        assert param.numel() < 2 or not torch.equal(param, value)
    if found[0].dtype in (FP32, FP64) and ours.param_groups[0]["state_dtype"] == FP32:
        assert_near_torch(found, wanted)
        for (*name, a), (*theirs_name, b) in zip(entries(ours), entries(theirs), strict=True):
            assert (name, a.shape) == (theirs_name, b.shape)
            # A momentum buffer sums terms of 10 that cancel: rounding is relative to the largest.
            scale = max([1.0, *b.abs().view(-1).tolist()])
            assert_near_torch([a / scale], [b / scale])


FROM_TORCH = [*itertools.product((FP32, FP64), BACKENDS, (0, 3))]
FROM_TORCH += [(dtype, "auto", 3) for dtype in HALVES]


@pytest.mark.parametrize(("dtype", "backend", "steps"), FROM_TORCH, ids=str)
@each_case
def test_from_torch_and_back(cls, variant, backend, dtype, steps):
    """By every mode: what can be exact is, and torch gets states in the parameter's dtype."""
    settings = {**variant, "weight_decay": 0.1}
    if dtype == FP16 and "eps" in cls([torch.ones(1)]).defaults:
        settings["eps"] = 1e-4  # torch computes in fp16, where the default is 0
    theirs = functools.partial(torch_class(cls), lr=0.01, foreach=False, **settings)
    source = theirs(new_params(SHAPES, dtype))
    params = clones(take_steps(source, range(steps)))
    saved = through_file(source.state_dict())
    for mode in MODES_OF.get(dtype, [(None, FP32)]):
        states = mode[1]
        if not usable(cls, variant, states):
            continue

        def new(params, mode=mode):
            return make(params, *mode, cls, backend=backend, **{**settings, "lr": 0.5})

        ours = resumed(new, params, saved)
        (group,) = ours.param_groups
        assert (group["lr"], group["master_weights"], group["state_dtype"]) == (0.01, *mode)
        assert source.param_groups[0].keys() <= group.keys()
        names = cls.rule.states_of(group)
        assert_same_bits(masters(ours), [master_of(param) for param in params])
        found = ours.torch_state_dict()["state"]
        for index, state in saved["state"].items():
            for name in names:
                a, b = found[index][name], master_of(state[name])
                if states == FP32 or (states == BF16 == dtype):
                    assert_same_bits([a], [b])
                elif b.numel():
                    # Of the largest, however they are kept: see assert_converted.
                    assert (a - b).abs().max() <= b.abs().max() * 2**-5
            assert not cls.rule.counts_steps or found[index]["step"] == steps
        if not steps:  # only Adagrad has states by then
            assert_same(decoded(ours), decoded(new(clones(params))))
        trained = ours if steps else copy.deepcopy(ours)
        go_on_like_torch(trained, copy.deepcopy(source), [3, 4])

        plain = ours.torch_state_dict()
        assert all(state.keys() <= {*names, "step"} for state in plain["state"].values())
        results = []
        # torch's load casts what it does not know, too.
        for state_dict in [plain] if states == "8bit" else [plain, ours.state_dict()]:
            target = resumed(theirs, parameters(ours), through_file(state_dict))
            for index, state in target.state_dict()["state"].items():
                for name in names:
                    wanted = plain["state"][index][name].to(dtype)
                    assert_same_bits([state[name]], [wanted])
            go_on_like_torch(copy.deepcopy(ours), target, [5, 6])
            results.append(parameters(target))
            back = resumed(new, results[-1], target.state_dict(), lossy=True)
            assert_same_bits(masters(back), [master_of(param) for param in results[-1]])
            assert all(param.isfinite().all() for param in take_steps(back, [7, 8]))
        assert_same_bits(results[-1], results[0])


# --- Models that are not what they were ----------------------------------------------------------


def cast(optimizer, dtype):
    """As ``model.to(dtype)`` does."""
    for param in parameters(optimizer):
        param.grad = None
        param.data = param.data.to(dtype)


@pytest.mark.parametrize("states", STATE_DTYPES, ids=str)
@pytest.mark.parametrize("way", ["cast", "load"])
@pytest.mark.parametrize(
    ("old", "new"), [(BF16, FP16), (FP16, BF16), (BF16, FP32), (FP16, FP32), (FP32, BF16)], ids=str
)
@pytest.mark.parametrize("master", ["auto", "fp32", None])
def test_another_dtype(old, new, master, states, way):
    """In the middle of training, or from a checkpoint: nothing is left of the old master, but for
    an fp32 master as far as the parameter is rounded from it."""
    optimizer = trained(old, master, states)
    old_masters = masters(optimizer)
    if way == "cast":
        cast(optimizer, new)
    else:
        saved = optimizer.state_dict()
        params = [param.detach().to(new).requires_grad_() for param in parameters(optimizer)]
        optimizer = make(params, master, states)
        drops = (
            master is not None and old != FP32 and (new == FP32 or (old, master) == (BF16, "auto"))
        )
        if drops:
            with unchanged(optimizer), pytest.raises(ValueError, match="of its master weights"):
                optimizer.load_state_dict(saved)
        optimizer.load_state_dict(saved, lossy=drops)
    found = masters(optimizer)
    for number, old_master, param in zip(found, old_masters, parameters(optimizer), strict=True):
        assert ((number == param.float()) | (number == old_master)).all()
    stand_still(optimizer)
    assert_same_bits(masters(optimizer), found)
    assert names_of(optimizer) == names_of(trained(new, master, states))
    optimizer.param_groups[0]["lr"] = 0.01
    for param in take_steps(optimizer, range(5, 8)):
        assert param.dtype == new
        assert param.isfinite().all()


@pytest.mark.parametrize(("dtype", "master"), [(BF16, "split"), (BF16, "fp32"), (FP16, "fp32")])
@pytest.mark.parametrize("lossy", [False, True])
def test_masters_in_an_fp32_model(dtype, master, lossy):
    """Exporting the masters into an fp32 model loses nothing, so it is no error."""
    optimizer = trained(dtype, master)
    other = resumed(make, masters(optimizer), optimizer.state_dict(), lossy=lossy)
    assert_same_bits(parameters(other), masters(optimizer))
    assert_same_bits(decoded(other), decoded(optimizer))
    take_steps(other, [4])
    assert names_of(other) == names_of(trained(FP32, None))


@pytest.mark.parametrize("master", [None, "stochastic"])
def test_a_master_that_was_about_to_go(master):
    """An optimizer takes its own state dict back, whatever was set since its last step."""
    optimizer = trained(BF16, "split")
    optimizer.param_groups[0]["master_weights"] = master
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    assert "param_remainder" not in [name for _, name, _ in entries(optimizer)]


def test_split_is_not_for_fp16():
    """Neither in a step nor in a load, after which all is as before."""
    optimizer = trained(BF16, "split")
    saved = optimizer.state_dict()
    cast(optimizer, FP16)
    message = "parameter 0 of group 0, of shape .9, 512., is torch.float16, which master_weights="
    with unchanged(optimizer), pytest.raises(ValueError, match=message):
        take_steps(optimizer, [4])
    with unchanged(optimizer), pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)


FORMATS = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "contiguous": torch.Tensor.contiguous,
    "transposed": lambda x: x.transpose(0, 2).contiguous().transpose(0, 2),
    "strided": lambda x: torch.stack([x, x], -1)[..., 0],
}


def formatted(params, name):
    return [torch.nn.Parameter(FORMATS[name](param.detach())) for param in params]


@each_backend
@pytest.mark.parametrize("states", STATE_DTYPES, ids=str)
@pytest.mark.parametrize("master", ["split", "fp32"])
@pytest.mark.parametrize(("old", "new"), [*itertools.permutations(FORMATS, 2)])
def test_another_layout(old, new, master, states, backend):
    """Blocks of codes go by the memory order of a row: where that changes, only rows of one block
    are exact; and where rows are no runs of memory, there are no codes."""
    same_order = {old, new} == {"contiguous", "strided"}
    for shape, one_block in (((8, 32, 5, 4), False), ((16, 32, 4, 2), True)):
        optimizer = make(formatted(new_params([shape], BF16), old), master, states, backend=backend)
        take_steps(optimizer, range(4))
        exact = states != "8bit" or same_order or new == "transposed"
        exact |= one_block and old != "transposed"
        lost = "" if exact else "exp_avg and exp_avg_sq"
        for saved in (optimizer.state_dict(), through_file(optimizer.state_dict())):
            other = make(formatted(parameters(optimizer), new), master, states, backend=backend)
            if raises := bool(lost) and old != "transposed":  # codes, which are not fp32
                with unchanged(other), pytest.raises(ValueError, match=lost):
                    other.load_state_dict(saved)
            other.load_state_dict(saved, lossy=raises)
            assert_converted(other, optimizer, lost)
            if states == FP32:
                # The arithmetic is the same; of the others, random numbers go by memory order.
                wanted = copy.deepcopy(optimizer)
                assert_same_bits(take_steps(other, [4, 5]), take_steps(wanted, [4, 5]))
                assert_same_bits(masters(other), masters(wanted))
            else:
                assert all(param.isfinite().all() for param in take_steps(other, [4, 5]))
            (wanted,) = formatted(parameters(optimizer), new)
            assert parameters(other)[0].stride() == wanted.stride()


# --- State dicts that are not what they were -----------------------------------------------------


@pytest.mark.parametrize("change", [None, torch.Tensor.bfloat16, torch.Tensor.double])
@each_mode
def test_a_missing_master_is_rebuilt(dtype, master, states, change):
    """As if it had been trained without one; so is one that something has cast."""
    optimizer = trained(dtype, master, states)
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        for name in {"param_remainder", "master_param"} & state.keys():
            value = state.pop(name)
            if change:
                state[name] = change(value)
    other = make(clones(parameters(optimizer)), master, states)
    other.load_state_dict(saved)
    assert_converted(other, optimizer, "master weights")
    stand_still(other)
    assert_same_bits(masters(other), [param.float() for param in parameters(optimizer)])
    assert names_of(other) == names_of(optimizer)


@each_backend
@each_mode
def test_a_parameter_that_stands_twice(dtype, master, states, backend):
    """Two steps in one, and a resumed run goes on with the same bits."""

    def doubled(params):
        with pytest.warns(UserWarning, match="duplicate"):
            return make([params[0], params[1], params[0]], master, states, backend=backend)

    optimizer = doubled(new_params([(300,), (5,)], dtype))
    take_steps(optimizer, range(3))
    assert optimizer.state[parameters(optimizer)[0]]["step"] == 6
    other = doubled(clones(parameters(optimizer)))
    other.load_state_dict(through_file(optimizer.state_dict()))
    assert_go_on_alike(other, optimizer)
    assert all(param.isfinite().all() for param in parameters(other))
