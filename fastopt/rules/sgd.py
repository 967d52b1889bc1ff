"""SGD with momentum; Sutskever et al. 2013."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from typing_extensions import Unpack

from ..optimizer import Common, Optimizer, Params, documented
from ..rule import Rule, States


class Scalars(NamedTuple):
    lr: float
    weight_decay: float
    momentum: float
    one_minus_dampening: float
    nesterov: float
    first: float  # 1 in a parameter's first step: its momentum_buffer becomes the gradient


def scalars(
    step: float,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: float,
) -> Scalars:
    return Scalars(lr, weight_decay, momentum, 1 - dampening, nesterov, float(step == 1))


def update(
    p: Tensor, g: Tensor, c: Scalars, momentum_buffer: Tensor | None = None
) -> tuple[Tensor, States]:
    states = {}
    if c.weight_decay != 0:
        g = g + c.weight_decay * p
    if momentum_buffer is not None:
        momentum_buffer = (
            g.clone() if c.first else c.momentum * momentum_buffer + c.one_minus_dampening * g
        )
        g = g + c.momentum * momentum_buffer if c.nesterov else momentum_buffer
        states["momentum_buffer"] = momentum_buffer
    return p - c.lr * g, states


@documented
class SGD(Optimizer):
    """SGD with momentum, as `torch.optim.SGD`.

    Args:
        lr (default 1e-3): the learning rate, a number or a tensor of one, read at each step.
        momentum (default 0): the factor on the old ``momentum_buffer``; 0: there is none.
        dampening (default 0): 1 minus the factor on the gradient that is added to it, except for
            the first one.
        weight_decay (default 0): times the parameter, added to the gradient.
        nesterov (default False): step by the gradient plus ``momentum`` times the new buffer,
            instead of by the buffer; wants a ``momentum``, and no ``dampening``.
    """

    rule = Rule(
        "sgd",
        update,
        scalars,
        Scalars,
        hyperparameters=("lr", "momentum", "dampening", "weight_decay", "nesterov"),
        states=("momentum_buffer",),
        beyond_torch=("capturable",),
        optional={"momentum_buffer": "momentum"},
        counts_steps=False,
        sparse="torch.optim.SGD",
    )
    variants = (
        {"momentum": 0.9},
        {},
        {"momentum": 0.9, "nesterov": True},
        {"momentum": 0.9, "dampening": 0.1},
    )

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        **common: Unpack[Common],
    ) -> None:
        settings = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
        }
        super().__init__(params, settings, **common)
