"""RMSprop, centered and with momentum; Tieleman & Hinton 2012, Graves 2013."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..optimizer import Extra, Optimizer, Params, documented
from ..rule import Group, Rule, States, sqrt


class Scalars(NamedTuple):
    lr: float
    weight_decay: float
    alpha: float
    one_minus_alpha: float
    eps: float
    momentum: float


def scalars(
    step: float, lr: float, alpha: float, eps: float, weight_decay: float, momentum: float
) -> Scalars:
    return Scalars(lr, weight_decay, alpha, 1 - alpha, eps, momentum)


def update(
    p: Tensor,
    g: Tensor,
    c: Scalars,
    square_avg: Tensor,
    grad_avg: Tensor | None = None,
    momentum_buffer: Tensor | None = None,
) -> tuple[Tensor, States]:
    """The centered variance is a difference that rounding can make negative.

    torch takes its square root all the same, and the parameter becomes NaN; here it is clamped.
    """
    if c.weight_decay != 0:
        g = g + c.weight_decay * p
    square_avg = c.alpha * square_avg + c.one_minus_alpha * g * g
    variance = square_avg
    states = {"square_avg": square_avg}
    if grad_avg is not None:
        grad_avg = grad_avg + c.one_minus_alpha * (g - grad_avg)
        variance = (square_avg - grad_avg * grad_avg).clamp(min=0)
        states["grad_avg"] = grad_avg
    denom = sqrt(variance) + c.eps
    if momentum_buffer is None:
        return p - c.lr * g / denom, states
    momentum_buffer = c.momentum * momentum_buffer + g / denom
    states["momentum_buffer"] = momentum_buffer
    return p - c.lr * momentum_buffer, states


def unfit(group: Group, state_dtype: Any) -> str:
    if group["centered"] and state_dtype != torch.float32:
        return "centered, it takes the difference of two states"
    return ""


@documented
class RMSprop(Optimizer):
    """RMSprop, as `torch.optim.RMSprop`, but never NaN where ``centered`` meets rounding.

    Args:
        lr (default 1e-2): the learning rate, a number or a tensor of one, read at each step.
        alpha (default 0.99): the factor on the old averages, of which a new gradient gets the rest.
        eps (default 1e-8): added to the root of ``square_avg``, by which the gradient is divided.
        weight_decay (default 0): times the parameter, added to the gradient.
        momentum (default 0): the factor on the old ``momentum_buffer``; 0: there is none.
        centered (default False): divide by the root of the variance: of ``square_avg`` minus the
            square of ``grad_avg``.
    """

    rule = Rule(
        "rmsprop",
        update,
        scalars,
        Scalars,
        hyperparameters=("lr", "alpha", "eps", "weight_decay", "momentum"),
        states=("square_avg", "grad_avg", "momentum_buffer"),
        optional={"grad_avg": "centered", "momentum_buffer": "momentum"},
        non_negative=("square_avg",),
        unfit=unfit,
        beyond_torch=("fused",),
    )
    variants = (
        {},
        {"momentum": 0.9},
        {"centered": True},
        {"centered": True, "momentum": 0.9},
    )

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        **common: Unpack[Extra],
    ) -> None:
        settings = {
            "lr": lr,
            "alpha": alpha,
            "eps": eps,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "centered": centered,
        }
        super().__init__(
            params,
            settings,
            capturable=capturable,
            foreach=foreach,
            maximize=maximize,
            differentiable=differentiable,
            **common,
        )
