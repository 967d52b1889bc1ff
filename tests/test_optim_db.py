"""torch's own table of optimizer cases, `torch.testing._internal.common_optimizers.optim_db`."""

import inspect
import warnings

import pytest
import torch
from helpers import (
    BACKENDS,
    assert_near_torch,
    assert_same_bits,
    new_params,
    set_grads,
    take_steps,
    torch_class,
)
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optim_db

import fastopt

STEPS = range(10)
SHAPES = [(7, 5), (1000,), (), (1,), (0,)]
DTYPES = [torch.float32, torch.float64]
DB = {info.name: info for info in optim_db}
CLASSES = [cls for cls in fastopt.OPTIMIZERS if cls.__name__ in DB]

# What fastopt does otherwise than torch, by the table's description of the case.
#
# Errors of torch that are none here: each setting is read as a number at every step, and `foreach`
# does not choose an implementation.
WORKS_HERE = {
    "lr as Tensor doesn't work with foreach & not capturable",
    "betas must be either both floats or both Tensors",
    r"betas\[0\] as a Tensor is not supported for capturable=False and foreach=True",
}
# Settings that are refused, and why.
REFUSED = {
    "differentiable": "autograd cannot see through a fused step",
}


def all_inputs(cls):
    """The table's cases, with those for GPUs alone: tensor settings, and capturable."""
    func = DB[cls.__name__].optim_inputs_func
    cases = {case.desc: case.kwargs for case in [*func(device="cuda"), *func(device="cpu")]}
    assert all(case.params is None for case in func(device="cpu"))  # or they need a test here
    return cases.items()


INPUTS = [
    pytest.param(cls, kwargs, id=f"{cls.__name__}-{desc}")
    for cls in CLASSES
    for desc, kwargs in all_inputs(cls)
]
ERRORS = [
    pytest.param(cls, index, id=f"{cls.__name__}-{case.optimizer_error_input.desc}")
    for cls in CLASSES
    for index, case in enumerate(
        DB[cls.__name__].optim_error_inputs_func(device="cpu", dtype=torch.float32)
    )
]


def without(kwargs, name):
    return {key: value for key, value in kwargs.items() if key != name}


def in_dtype(value, dtype):
    """torch computes what depends on a tensor setting in that tensor's dtype, fastopt in double."""
    if isinstance(value, tuple):
        return tuple(in_dtype(v, dtype) for v in value)
    return value.to(dtype) if isinstance(value, torch.Tensor) else value


def test_the_table_has_our_classes():
    assert {"SGD", "Adagrad", "RMSprop", "Adam", "AdamW"} <= {cls.__name__ for cls in CLASSES}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("cls", "kwargs"), INPUTS)
def test_inputs(cls, kwargs, backend, dtype):
    kwargs = {key: in_dtype(v, dtype) for key, v in without(kwargs, "capturable").items()}
    ours = cls(new_params(SHAPES, dtype), backend=backend, **kwargs)
    theirs = torch_class(cls)(new_params(SHAPES, dtype), foreach=False, **kwargs)
    assert_near_torch(take_steps(ours, STEPS), take_steps(theirs, STEPS))


@pytest.mark.parametrize(("cls", "kwargs"), INPUTS)
def test_inputs_as_a_param_group(cls, kwargs):
    """Each case beside a group of default settings, and as a group added later."""
    kwargs = without(kwargs, "capturable")
    first, second, third = new_params([(7, 5)] * 3)
    ours = cls([{"params": [first], **kwargs}, {"params": [second]}])
    ours.add_param_group({"params": [third], **kwargs})
    found = take_steps(ours, STEPS)

    # Separate optimizers: torch's Adagrad overlooks a group's own initial_accumulator_value.
    wanted = new_params([(7, 5)] * 3)
    optimizers = [
        torch_class(cls)([param], foreach=False, **settings)
        for param, settings in zip(wanted, (kwargs, {}, kwargs), strict=True)
    ]
    for step in STEPS:
        set_grads(wanted, step)
        for optimizer in optimizers:
            optimizer.step()
    assert_near_torch(found, wanted)


@pytest.mark.parametrize(("cls", "kwargs"), INPUTS)
def test_inputs_with_tensor_lr(cls, kwargs):
    lr = torch.tensor(0.01)
    kwargs = {**without(kwargs, "capturable"), "lr": lr}
    found = take_steps(cls(new_params(SHAPES), **kwargs), STEPS)
    same = take_steps(cls(new_params(SHAPES), **{**kwargs, "lr": lr.item()}), STEPS)
    assert_same_bits(found, same)
    theirs = torch_class(cls)(new_params(SHAPES), foreach=False, **kwargs)
    assert_near_torch(found, take_steps(theirs, STEPS))


@pytest.mark.parametrize(("cls", "kwargs"), INPUTS)
def test_inputs_with_each_implementation_flag(cls, kwargs):
    """foreach and fused are accepted where torch accepts them, and change nothing."""
    kwargs = without(kwargs, "capturable")
    wanted = take_steps(cls(new_params(SHAPES), **kwargs), STEPS)
    for flag in DB[cls.__name__].supported_impls:
        if flag not in REFUSED:
            for value in (True, False):
                optimizer = cls(new_params(SHAPES), **kwargs, **{flag: value})
                assert optimizer.defaults[flag] is value
                assert_same_bits(take_steps(optimizer, STEPS), wanted)


@pytest.mark.parametrize(
    ("cls", "flag"),
    [
        (cls, flag)
        for cls in CLASSES
        for flag in REFUSED
        if flag in inspect.signature(torch_class(cls)).parameters
    ],
)
def test_refused_flags(cls, flag):
    """In the constructor and in a group; False is accepted."""
    expected = pytest.raises(NotImplementedError, match=f"{flag}=True.*{REFUSED[flag]}")
    with expected:
        cls(new_params(SHAPES), **{flag: True})
    with expected:
        cls([{"params": new_params(SHAPES), flag: True}])
    cls(new_params(SHAPES), **{flag: False})


@pytest.mark.parametrize(("cls", "index"), ERRORS)
def test_errors(cls, index):
    func = DB[cls.__name__].optim_error_inputs_func
    for optimizer_class in (torch_class(cls), cls):
        error = func(device="cpu", dtype=torch.float32)[index]  # anew: constructors write to groups
        case = error.optimizer_error_input
        if optimizer_class is cls and case.desc in WORKS_HERE:
            works_like_numbers(cls, case.kwargs)
            continue
        expect = pytest.warns if issubclass(error.error_type, Warning) else pytest.raises
        params = new_params([(1, 1)]) if case.params is None else case.params
        if error.error_on == OptimizerErrorEnum.STEP_ERROR:
            optimizer = optimizer_class(params, **case.kwargs)
            with expect(error.error_type, match=error.error_regex):
                optimizer.step()
        else:
            with expect(error.error_type, match=error.error_regex):
                optimizer_class(params, **case.kwargs)


def works_like_numbers(cls, kwargs):
    numbers = dict(kwargs)
    if isinstance(kwargs["lr"], torch.Tensor):
        numbers["lr"] = kwargs["lr"].item()
    if "betas" in kwargs:
        numbers["betas"] = tuple(float(beta) for beta in kwargs["betas"])
    found = take_steps(cls(new_params(SHAPES), **kwargs), STEPS)
    assert_same_bits(found, take_steps(cls(new_params(SHAPES), **numbers), STEPS))


def test_every_listed_difference_is_in_the_table():
    described = {
        error.optimizer_error_input.desc
        for cls in CLASSES
        for error in DB[cls.__name__].optim_error_inputs_func(device="cpu", dtype=torch.float32)
    }
    assert described >= WORKS_HERE


@pytest.mark.parametrize(
    "cls", [cls for cls in CLASSES if "fused" in DB[cls.__name__].supported_impls]
)
def test_errors_that_the_table_has_for_gpus_alone(cls):
    with pytest.raises(RuntimeError, match="`fused` and `foreach` cannot be `True` together"):
        cls(new_params(SHAPES), foreach=True, fused=True)
    with pytest.raises(NotImplementedError, match="differentiable=True"):
        cls(new_params(SHAPES), fused=True, differentiable=True)


@pytest.mark.parametrize("cls", CLASSES)
def test_sparse_and_complex_are_refused_in_one_sentence(cls):
    """Where torch supports them (`supports_sparse`, `supports_complex`), fastopt does not yet."""
    good, param = new_params([(3,), (3, 2)])
    optimizer = cls([good, param])
    before = good.detach().clone()
    good.grad = torch.ones(3)
    param.grad = torch.ones(3, 2).to_sparse()
    with pytest.raises(RuntimeError, match=r"parameter 1 of group 0, of shape \(3, 2\).*sparse"):
        optimizer.step()
    assert_same_bits([good], [before])

    param = torch.nn.Parameter(torch.ones(3, dtype=torch.complex64))
    optimizer = cls([good, param])
    param.grad = torch.ones_like(param)
    with pytest.raises(RuntimeError, match=r"parameter 1 of group 0, of shape \(3,\).*complex"):
        optimizer.step()
    assert_same_bits([good], [before])


SCHEDULERS = [
    pytest.param(cls, makers, id=f"{cls.__name__}-{i}")
    for cls in CLASSES
    for i, makers in enumerate(DB[cls.__name__].scheduler_inputs)
]


@pytest.mark.parametrize(("cls", "makers"), SCHEDULERS)
def test_schedulers(cls, makers):
    def trajectory(optimizer):
        schedulers = [make(optimizer) for make in makers]
        params = [param for group in optimizer.param_groups for param in group["params"]]
        lrs = []
        for step in STEPS:
            set_grads(params, step)
            optimizer.step()
            for scheduler in schedulers:
                if isinstance(scheduler, ReduceLROnPlateau):
                    scheduler.step(1.0)
                else:
                    scheduler.step()
            lrs.append(optimizer.param_groups[0]["lr"])
        return params, lrs

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # e.g. "lr_scheduler.step() before optimizer.step()"
        found, found_lrs = trajectory(cls(new_params(SHAPES)))
        wanted, wanted_lrs = trajectory(torch_class(cls)(new_params(SHAPES), foreach=False))
    assert found_lrs == wanted_lrs
    assert_near_torch(found, wanted)
