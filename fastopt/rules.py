"""The table of update rules, shared by optimizers, backends, tests and benchmarks.

A row says which states a parameter group's flags call for and computes the scalars of one step, in
double; every backend gets the same numbers. The arithmetic is in ``reference.py``.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference

Group = dict[str, Any]


class SGDScalars(NamedTuple):
    lr: float
    weight_decay: float
    momentum: float
    one_minus_dampening: float
    nesterov: float
    first: float  # 1 in a parameter's first step: its momentum_buffer becomes the gradient


def sgd(
    step: float,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: float,
) -> SGDScalars:
    return SGDScalars(lr, weight_decay, momentum, 1 - dampening, nesterov, float(step == 1))


class AdagradScalars(NamedTuple):
    step_size: float
    weight_decay: float
    eps: float


def adagrad(
    step: float, lr: float, lr_decay: float, weight_decay: float, eps: float
) -> AdagradScalars:
    return AdagradScalars(lr / (1 + (step - 1) * lr_decay), weight_decay, eps)


class RMSpropScalars(NamedTuple):
    lr: float
    weight_decay: float
    alpha: float
    one_minus_alpha: float
    eps: float
    momentum: float


def rmsprop(
    step: float, lr: float, alpha: float, eps: float, weight_decay: float, momentum: float
) -> RMSpropScalars:
    return RMSpropScalars(lr, weight_decay, alpha, 1 - alpha, eps, momentum)


class AdamScalars(NamedTuple):
    step_size: float
    weight_decay: float  # Adam's, added to the gradient
    decay: float  # AdamW's, a factor on the parameter
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float
    eps: float
    inv_bias_correction2_sqrt: float


def adam(
    step: float,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    decoupled_weight_decay: float,
) -> AdamScalars:
    beta1, beta2 = betas
    return AdamScalars(
        step_size=lr / (1 - beta1**step),
        weight_decay=0.0 if decoupled_weight_decay else weight_decay,
        decay=1 - lr * weight_decay if decoupled_weight_decay else 1.0,
        one_minus_beta1=1 - beta1,
        beta2=beta2,
        one_minus_beta2=1 - beta2,
        eps=eps,
        inv_bias_correction2_sqrt=1 / math.sqrt(1 - beta2**step),
    )


@dataclass(frozen=True)
class Rule:
    """One update rule.

    Args:
        update: the rule itself, from ``reference.py``; its name is the rule's.
        scalars: the scalars of the ``step``-th step, counted from 1; the other arguments are the
            keys of a param group on which they depend.
        scalar_names: their names, in order.
        states: the names of the states, in the order in which kernels take them, that a param group
            calls for.
        counts_steps: whether a parameter's state has a ``step``. Where not, ``step`` is 1 in the
            step that creates the states and 2 ever after.
        initial: what the states are filled with at first.
        non_negative: the names of the states that are never negative.
        unfit: why the states of a param group cannot have a ``state_dtype``; "" where they can.
        sparse: torch's class for sparse gradients, if it has one.
    """

    update: reference.Rule
    scalars: Callable[..., tuple[float, ...]]
    scalar_names: tuple[str, ...]
    states: Callable[[Group], tuple[str, ...]]
    counts_steps: bool = True
    initial: Callable[[Group], float] = lambda group: 0.0
    non_negative: tuple[str, ...] = ()
    unfit: Callable[[Group, Any], str] = lambda group, state_dtype: ""
    sparse: str = ""

    @property
    def name(self) -> str:
        return self.update.__name__

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """The keys of a param group on which the scalars depend."""
        return tuple(inspect.signature(self.scalars).parameters)[1:]

    def hyperparameters(self, group: Group) -> tuple[Any, ...]:
        """A param group's values for `keys`, as numbers; a tensor is read (a GPU waited for)."""
        return tuple(_number(group[key]) for key in self.keys)

    def settings(self, group: Group) -> list[float | Tensor]:
        """The same in one flat list, tensors as they are."""
        return list(_flat(group[key] for key in self.keys))

    @cached_property
    def possible(self) -> tuple[str, ...]:
        """The states that param groups can call for, in the order in which kernels take them."""
        return tuple(inspect.signature(self.update).parameters)[3:]

    def gap(self, names: tuple[str, ...]) -> int | None:
        """Before which of the states called ``names`` one is missing that the rule can have."""
        return next((i for i, name in enumerate(names) if name != self.possible[i]), None)

    def scalars_of(self, hyperparameters: tuple[Any, ...], step: float) -> tuple[float, ...]:
        """`scalars` of one step.

        Raises:
            ValueError: a hyperparameter is infinite or NaN.
        """
        row = self.scalars(step, *hyperparameters)
        if not all(map(math.isfinite, row)):
            settings = dict(zip(self.keys, hyperparameters, strict=True))
            raise ValueError(f"a hyperparameter is not finite, nothing was changed: {settings}")
        return row


def _is_sequence(value: Any) -> bool:
    # Each step asks: what is common first, because abstract classes answer in Python.
    if isinstance(value, (float, int, Tensor)):
        return False
    return isinstance(value, (tuple, list, Sequence))


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if _is_sequence(value):
            yield from value
        else:
            yield value


def _number(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.item()
    if _is_sequence(value):
        return tuple(map(_number, value))
    return value


def _with_momentum(names: tuple[str, ...], group: Group) -> tuple[str, ...]:
    return (*names, "momentum_buffer") if group["momentum"] != 0 else names


RULES: dict[str, Rule] = {
    rule.name: rule
    for rule in (
        Rule(
            reference.sgd,
            sgd,
            SGDScalars._fields,
            lambda group: _with_momentum((), group),
            counts_steps=False,
            sparse="torch.optim.SGD",
        ),
        Rule(
            reference.adagrad,
            adagrad,
            AdagradScalars._fields,
            lambda group: ("sum",),
            initial=lambda group: float(group["initial_accumulator_value"]),
            non_negative=("sum",),
            unfit=lambda group, state_dtype: (
                "its sum only grows, by less and less" if state_dtype == "8bit" else ""
            ),
            sparse="torch.optim.Adagrad",
        ),
        Rule(
            reference.rmsprop,
            rmsprop,
            RMSpropScalars._fields,
            lambda group: _with_momentum(
                ("square_avg", "grad_avg") if group["centered"] else ("square_avg",), group
            ),
            non_negative=("square_avg",),
            unfit=lambda group, state_dtype: (
                "centered, it takes the difference of two states"
                if group["centered"] and state_dtype != torch.float32
                else ""
            ),
        ),
        Rule(
            reference.adam,
            adam,
            AdamScalars._fields,
            lambda group: (
                ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
                if group["amsgrad"]
                else ("exp_avg", "exp_avg_sq")
            ),
            non_negative=("exp_avg_sq", "max_exp_avg_sq"),
            sparse="torch.optim.SparseAdam",
        ),
    )
}
