"""What an update rule is, and the row of scalars that it gets. The rules are in ``rules/``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

Group = dict[str, Any]
States = dict[str, Tensor]

#: What a row of scalars has ahead of the rule's own, in every backend (compared by name on
#: loading): ``coef`` multiplies the gradient, which is then clamped to ±``clip_value``. Where the
#: norm is known only later, ``coef`` is made of ``unclipped_coef`` (sign of `maximize`, loss scale)
#: and ``max_norm``. Random numbers depend on ``seed`` and ``step``.
HEAD = ("coef", "clip_value", "unclipped_coef", "max_norm", "seed", "step")
COEF, CLIP_VALUE, UNCLIPPED_COEF, MAX_NORM, SEED, STEP = range(len(HEAD))


def head(
    coef: float = 1.0,
    clip_value: float | None = None,
    max_norm: float | None = None,
    seed: float = 0.0,
    step: float = 0.0,
) -> tuple[float, ...]:
    """The first part of a row, before the norm is known."""
    clip_value = math.inf if clip_value is None else clip_value
    max_norm = math.inf if max_norm is None else max_norm
    return coef, clip_value, coef, max_norm, seed, step


@dataclass(frozen=True, eq=False)
class Rule:
    """One update rule: pure arithmetic, and what its drivers have to know of it.

    Args:
        name: that of its files in the three folders. C++ and Triton know a rule by it, its scalars
            and its states: another arithmetic needs another name.
        update: the rule itself, in plain torch operators: from a parameter, a gradient, the scalars
            and the states by name (those that the settings do not call for are left out) to the new
            parameter and states. Parameter and gradient have the type of the arithmetic.
        scalars: what `update` needs of the ``step``-th step, counted from 1, and of the
            `hyperparameters`, in this order: `Scalars`, computed in double.
        Scalars: a NamedTuple, in the order in which kernels take them.
        hyperparameters: keys of a param group.
        states: the names of all states that it can have, in the order in which kernels take them.
        optional: by the name of a state, the key of a param group that is not 0 if there is one.
        counts_steps: whether a parameter's state has a ``step``. If not, ``step`` is 1 in the step
            that makes the states and 2 ever after.
        from_the_start: the states exist before the first step, as in torch.
        initial: what the states are filled with at first.
        non_negative: the names of the states that are never negative.
        unfit: why the states of a param group cannot have a ``state_dtype``; "" if they can.
        sparse: torch's class for sparse gradients, if it has one.
        beyond_torch: settings, other than those of every optimizer, that torch's class of the same
            name lacks.
        checks: of hyperparameters that `settings` does not know.
    """

    name: str
    update: Callable[..., tuple[Tensor, States]]
    scalars: Callable[..., tuple[float, ...]]
    Scalars: type[Any]
    hyperparameters: tuple[str, ...]
    states: tuple[str, ...]
    optional: Mapping[str, str] = field(default_factory=dict)
    counts_steps: bool = True
    from_the_start: bool = False
    initial: Callable[[Group], float] = lambda group: 0.0
    non_negative: tuple[str, ...] = ()
    unfit: Callable[[Group, Any], str] = lambda group, state_dtype: ""
    sparse: str = ""
    beyond_torch: tuple[str, ...] = ()
    checks: Mapping[str, Callable[..., None]] = field(default_factory=dict)

    @property
    def scalar_names(self) -> tuple[str, ...]:
        names: tuple[str, ...] = self.Scalars._fields
        return names

    def gap(self, names: tuple[str, ...]) -> int | None:
        """Index of the optional state that is absent from ``names``; None if there is none."""
        return next((i for i, name in enumerate(names) if name != self.states[i]), None)

    def states_of(self, group: Group) -> tuple[str, ...]:
        """The states that a param group calls for."""
        return tuple(
            name
            for name in self.states
            if name not in self.optional or group[self.optional[name]] != 0
        )


def arithmetic_dtype(param: Tensor) -> torch.dtype:
    """The type in which a parameter's update is computed and its states are kept."""
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def sqrt(x: Tensor) -> Tensor:
    """The correctly rounded square root of a non-negative tensor.

    torch's vectorised CPU ``sqrt`` is an ulp off for some inputs, in fp32 and in fp64. Rounding the
    fp64 root of an fp32 number is exact all the same; fp64 itself goes through the complex root,
    which is computed element by element in libm.
    """
    if x.device.type != "cpu":
        return x.sqrt()
    if x.dtype == torch.float32:
        return x.double().sqrt().float()
    return torch.complex(x, torch.zeros_like(x)).sqrt().real


class _NoScalars(NamedTuple):
    pass


#: Not an optimizer: the parameter becomes the gradient, as the driver has scaled and clamped it.
#: Clipping gradients in place is this rule with each gradient as its own parameter.
ASSIGN = Rule("assign", lambda p, g, c: (g, {}), lambda step: _NoScalars(), _NoScalars, (), ())
