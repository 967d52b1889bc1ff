"""Lion: the sign of an interpolated momentum; Chen et al. 2023, "Symbolic Discovery of Optimization
Algorithms"."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..optimizer import Common, Optimizer, Params, documented
from ..rule import Rule, States


class Scalars(NamedTuple):
    lr: float
    decay: float  # a factor on the parameter
    beta1: float
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float


def scalars(step: float, lr: float, betas: tuple[float, float], weight_decay: float) -> Scalars:
    beta1, beta2 = betas
    return Scalars(lr, 1 - lr * weight_decay, beta1, 1 - beta1, beta2, 1 - beta2)


def sign(x: Tensor) -> Tensor:
    """1, -1, or x itself: 0 and NaN. `torch.sign` makes 0 of NaN, and hides a run that diverged."""
    return torch.where(x > 0, 1.0, torch.where(x < 0, -1.0, x))


def update(p: Tensor, g: Tensor, c: Scalars, exp_avg: Tensor) -> tuple[Tensor, States]:
    direction = sign(c.beta1 * exp_avg + c.one_minus_beta1 * g)
    exp_avg = c.beta2 * exp_avg + c.one_minus_beta2 * g
    return p * c.decay - c.lr * direction, {"exp_avg": exp_avg}


@documented
class Lion(Optimizer):
    """Lion (Chen et al. 2023): one state, and steps of the same size for all elements.

    Args:
        lr (default 1e-4): the learning rate, a number or a tensor of one, read at each step; a
            third to a tenth of AdamW's.
        betas (default (0.9, 0.99)): the factors on the old ``exp_avg``, first to find the direction
            of the step, then to keep the average; gradients get the rest. Numbers or tensors of
            one.
        weight_decay (default 0): decoupled, as AdamW's: times ``lr``, the part of the parameter
            that is taken off; three to ten times AdamW's.
    """

    rule = Rule(
        "lion",
        update,
        scalars,
        Scalars,
        hyperparameters=("lr", "betas", "weight_decay"),
        states=("exp_avg",),
        counts_steps=False,
    )

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-4,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.99),
        weight_decay: float | Tensor = 0,
        **common: Unpack[Common],
    ) -> None:
        settings = {"lr": lr, "betas": betas, "weight_decay": weight_decay}
        super().__init__(params, settings, **common)
