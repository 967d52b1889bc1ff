"""torch's own table of optimizer cases, `torch.testing._internal.common_optimizers.optim_db`."""

import warnings

import pytest
import torch
from helpers import (
    FP32,
    FP64,
    assert_near_torch,
    assert_same_bits,
    new_params,
    set_grads,
    take_steps,
    torch_class,
)
from rules.runs import of_torch
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optim_db

import fastopt

STEPS = range(10)
SHAPES = [(7, 5), (1000,), (), (1,), (0,)]
DB = {info.name: info for info in optim_db}
CLASSES = [cls for cls in fastopt.OPTIMIZERS if cls.__name__ in DB]
#: Errors of torch that are none here, by the table's description: each setting is read as a number
#: at every step, and `foreach` chooses no implementation.
WORKS_HERE = {
    "lr as Tensor doesn't work with foreach & not capturable",
    "betas must be either both floats or both Tensors",
    r"betas\[0\] as a Tensor is not supported for capturable=False and foreach=True",
}


def all_inputs(cls):
    """The table's cases, with those for GPUs alone; each also with a tensor lr."""
    func = DB[cls.__name__].optim_inputs_func
    cases = {case.desc: case.kwargs for case in [*func(device="cuda"), *func(device="cpu")]}
    assert all(case.params is None for case in func(device="cpu"))  # or they need a test here
    for desc, kwargs in cases.items():
        kwargs = {key: value for key, value in kwargs.items() if key != "capturable"}
        yield cls, desc, kwargs
        yield cls, f"{desc}, tensor lr", {**kwargs, "lr": torch.tensor(0.01)}


def all_errors(cls):
    """Anew each time: constructors write to the groups in them."""
    return DB[cls.__name__].optim_error_inputs_func(device="cpu", dtype=FP32)


def each(names, rows):
    """Of a class, a description, and what else there is in a row."""
    rows = [row for cls in CLASSES for row in rows(cls)]
    params = [pytest.param(cls, *rest, id=f"{cls.__name__}-{desc}") for cls, desc, *rest in rows]
    return pytest.mark.parametrize(names, params)


each_input = each(("cls", "kwargs"), all_inputs)


def numbers(setting, convert=float):
    """A setting with its tensors converted."""
    if isinstance(setting, tuple):
        return tuple(numbers(x, convert) for x in setting)
    return convert(setting) if isinstance(setting, torch.Tensor) else setting


def flags_of(cls):
    """foreach and fused, where torch accepts them."""
    flags = {*DB[cls.__name__].supported_impls} - {"differentiable"}
    return [{flag: value} for flag in sorted(flags) for value in (True, False)]


def after_steps(cls, dtype=FP32, backend="cpp", **kwargs):
    optimizer = cls(new_params(SHAPES, dtype), backend=backend, **kwargs)
    assert all(optimizer.defaults[key] is value for key, value in kwargs.items())
    return take_steps(optimizer, STEPS)


@pytest.mark.parametrize("dtype", [FP32, FP64], ids=str)
@each_input
def test_inputs(cls, kwargs, dtype):
    """Near torch's; the same bits with numbers in place of tensors, and whatever the flags are."""
    # torch computes what depends on a tensor setting in that tensor's dtype, fastopt in double.
    kwargs = {key: numbers(value, lambda x: x.to(dtype)) for key, value in kwargs.items()}
    theirs = of_torch(cls, new_params(SHAPES, dtype), **kwargs)
    found = after_steps(cls, dtype, **kwargs)
    assert_near_torch(found, take_steps(theirs, STEPS))
    assert_same_bits(after_steps(cls, dtype, "reference", **kwargs), found)
    plain = {key: numbers(value) for key, value in kwargs.items()}
    for flags in [{}, *flags_of(cls)]:
        assert_same_bits(after_steps(cls, dtype, **plain, **flags), found)


@each_input
def test_inputs_as_a_param_group(cls, kwargs):
    """Each case beside a group of default settings, and as a group added later."""
    first, second, third = new_params([(7, 5)] * 3)
    ours = cls([{"params": [first], **kwargs}, {"params": [second]}])
    ours.add_param_group({"params": [third], **kwargs})
    found = take_steps(ours, STEPS)
    # Separate optimizers: torch's Adagrad overlooks a group's own initial_accumulator_value.
    wanted = new_params([(7, 5)] * 3)
    optimizers = [
        of_torch(cls, [param], **settings)
        for param, settings in zip(wanted, (kwargs, {}, kwargs), strict=True)
    ]
    for step in STEPS:
        set_grads(wanted, step)
        for optimizer in optimizers:
            optimizer.step()
    assert_near_torch(found, wanted)


@pytest.mark.parametrize("cls", CLASSES)
def test_refused_flags(cls):
    """In the constructor and in a group; False is accepted."""
    message = "differentiable=True.*autograd cannot see through a fused step"
    for flags in ({}, {"fused": True} if "fused" in DB[cls.__name__].supported_impls else {}):
        with pytest.raises(NotImplementedError, match=message):
            cls(new_params(SHAPES), differentiable=True, **flags)
    with pytest.raises(NotImplementedError, match=message):
        cls([{"params": new_params(SHAPES), "differentiable": True}])
    cls(new_params(SHAPES), differentiable=False)
    if "fused" in DB[cls.__name__].supported_impls:  # the table has this error for GPUs alone
        with pytest.raises(RuntimeError, match="`fused` and `foreach` cannot be `True` together"):
            cls(new_params(SHAPES), foreach=True, fused=True)


@each(
    ("cls", "index"),
    lambda cls: [(cls, e.optimizer_error_input.desc, i) for i, e in enumerate(all_errors(cls))],
)
def test_errors(cls, index):
    for optimizer_class in (torch_class(cls), cls):
        error = all_errors(cls)[index]
        case = error.optimizer_error_input
        if optimizer_class is cls and case.desc in WORKS_HERE:
            plain = {key: numbers(value) for key, value in case.kwargs.items()}
            assert_same_bits(after_steps(cls, **case.kwargs), after_steps(cls, **plain))
            continue
        expected = pytest.warns if issubclass(error.error_type, Warning) else pytest.raises
        params = new_params([(1, 1)]) if case.params is None else case.params
        in_step = error.error_on == OptimizerErrorEnum.STEP_ERROR
        optimizer = optimizer_class(params, **case.kwargs) if in_step else None
        with expected(error.error_type, match=error.error_regex):
            optimizer.step() if in_step else optimizer_class(params, **case.kwargs)


def test_the_table_has_our_classes_and_every_listed_difference():
    assert {"SGD", "Adagrad", "RMSprop", "Adam", "AdamW"} <= {cls.__name__ for cls in CLASSES}
    described = {error.optimizer_error_input.desc for cls in CLASSES for error in all_errors(cls)}
    assert described >= WORKS_HERE


@each(
    ("cls", "makers"),
    lambda cls: [(cls, *makers) for makers in enumerate(DB[cls.__name__].scheduler_inputs)],
)
def test_schedulers(cls, makers):
    def trajectory(optimizer):
        schedulers = [make(optimizer) for make in makers]
        lrs = []
        for step in STEPS:
            params = take_steps(optimizer, [step])
            for scheduler in schedulers:
                scheduler.step(*[1.0] * isinstance(scheduler, ReduceLROnPlateau))
            lrs.append(optimizer.param_groups[0]["lr"])
        return params, lrs

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # e.g. "lr_scheduler.step() before optimizer.step()"
        found, found_lrs = trajectory(cls(new_params(SHAPES)))
        wanted, wanted_lrs = trajectory(of_torch(cls, new_params(SHAPES)))
    assert found_lrs == wanted_lrs
    assert_near_torch(found, wanted)
