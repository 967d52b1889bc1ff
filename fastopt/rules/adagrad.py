"""Adagrad; Duchi et al. 2011."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor
from typing_extensions import Unpack

from .. import precision
from ..optimizer import CommonButForeach, Optimizer, Params, documented, on_real
from ..rule import Group, Rule, States, sqrt


class Scalars(NamedTuple):
    step_size: float
    weight_decay: float
    eps: float


def scalars(step: float, lr: float, lr_decay: float, weight_decay: float, eps: float) -> Scalars:
    return Scalars(lr / (1 + (step - 1) * lr_decay), weight_decay, eps)


def update(p: Tensor, g: Tensor, c: Scalars, sum: Tensor) -> tuple[Tensor, States]:
    if c.weight_decay != 0:
        g = g + c.weight_decay * p
    sum = sum + g * g
    return p - c.step_size * g / (sqrt(sum) + c.eps), {"sum": sum}


def unfit(group: Group, state_dtype: Any) -> str:
    return "its sum only grows, by less and less" if state_dtype == "8bit" else ""


@documented
class Adagrad(Optimizer):
    """Adagrad, as `torch.optim.Adagrad`. The states exist from the start, as in torch.

    Args:
        lr (default 1e-2): the learning rate, a number or a tensor of one, read at each step.
        lr_decay (default 0): in step t, ``lr`` is divided by 1 + (t - 1) * lr_decay.
        weight_decay (default 0): times the parameter, added to the gradient.
        initial_accumulator_value (default 0): what ``sum``, of the squared gradients, starts from.
        eps (default 1e-10): added to the root of ``sum``, by which the gradient is divided.
    """

    rule = Rule(
        "adagrad",
        update,
        scalars,
        Scalars,
        hyperparameters=("lr", "lr_decay", "weight_decay", "eps"),
        states=("sum",),
        from_the_start=True,
        initial=lambda group: float(group["initial_accumulator_value"]),
        non_negative=("sum",),
        unfit=unfit,
        sparse="torch.optim.Adagrad",
        beyond_torch=("capturable",),
    )
    variants = ({}, {"lr_decay": 0.01, "initial_accumulator_value": 0.1})

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        **common: Unpack[CommonButForeach],
    ) -> None:
        settings = {
            "lr": lr,
            "lr_decay": lr_decay,
            "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value,
            "eps": eps,
        }
        super().__init__(params, settings, foreach=foreach, **common)

    @on_real
    def share_memory(self) -> None:
        """Moves the states to shared memory, for training by several processes."""
        for state in self.state.values():
            precision.share_memory(state)
