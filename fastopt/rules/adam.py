"""Adam, AMSGrad and AdamW; Kingma & Ba 2015, Reddi et al. 2018, Loshchilov & Hutter 2019."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..optimizer import Common, Optimizer, Params, documented
from ..rule import Rule, States, sqrt


class Scalars(NamedTuple):
    step_size: float
    weight_decay: float  # Adam's, added to the gradient
    decay: float  # AdamW's, a factor on the parameter
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float
    eps: float
    inv_bias_correction2_sqrt: float


def scalars(
    step: float,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    decoupled_weight_decay: float,
) -> Scalars:
    beta1, beta2 = betas
    return Scalars(
        step_size=lr / (1 - beta1**step),
        weight_decay=0.0 if decoupled_weight_decay else weight_decay,
        decay=1 - lr * weight_decay if decoupled_weight_decay else 1.0,
        one_minus_beta1=1 - beta1,
        beta2=beta2,
        one_minus_beta2=1 - beta2,
        eps=eps,
        inv_bias_correction2_sqrt=1 / math.sqrt(1 - beta2**step),
    )


def update(
    p: Tensor,
    g: Tensor,
    c: Scalars,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None = None,
) -> tuple[Tensor, States]:
    if c.weight_decay != 0:
        g = g + c.weight_decay * p
    exp_avg = exp_avg + c.one_minus_beta1 * (g - exp_avg)
    exp_avg_sq = c.beta2 * exp_avg_sq + c.one_minus_beta2 * g * g
    second_moment = exp_avg_sq
    states = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    if max_exp_avg_sq is not None:
        max_exp_avg_sq = torch.maximum(max_exp_avg_sq, exp_avg_sq)
        second_moment = states["max_exp_avg_sq"] = max_exp_avg_sq
    denom = sqrt(second_moment) * c.inv_bias_correction2_sqrt + c.eps
    return p * c.decay - c.step_size * exp_avg / denom, states


@documented
class Adam(Optimizer):
    """Adam and AMSGrad, as `torch.optim.Adam`.

    Args:
        lr (default 1e-3): the learning rate, a number or a tensor of one, read at each step.
        betas (default (0.9, 0.999)): the factors on the old ``exp_avg`` and ``exp_avg_sq``, numbers
            or tensors of one; new gradients and their squares get the rest.
        eps (default 1e-8): added to the root of the second moment, by which the first is divided.
        weight_decay (default 0): times the parameter, added to the gradient.
        amsgrad (default False): divide by the largest second moment so far, ``max_exp_avg_sq``.
        decoupled_weight_decay (default False): decay as AdamW does.
    """

    rule = Rule(
        "adam",
        update,
        scalars,
        Scalars,
        hyperparameters=("lr", "betas", "eps", "weight_decay", "decoupled_weight_decay"),
        states=("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
        optional={"max_exp_avg_sq": "amsgrad"},
        non_negative=("exp_avg_sq", "max_exp_avg_sq"),
        sparse="torch.optim.SparseAdam",
    )
    variants = ({}, {"amsgrad": True})

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        decoupled_weight_decay: bool = False,
        **common: Unpack[Common],
    ) -> None:
        settings = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(params, settings, **common)


@documented
class AdamW(Adam):
    """Adam with decoupled weight decay, as `torch.optim.AdamW`.

    Args:
        lr (default 1e-3): the learning rate, a number or a tensor of one, read at each step.
        betas (default (0.9, 0.999)): the factors on the old ``exp_avg`` and ``exp_avg_sq``, numbers
            or tensors of one; new gradients and their squares get the rest.
        eps (default 1e-8): added to the root of the second moment, by which the first is divided.
        weight_decay (default 1e-2): times ``lr``, the part of the parameter that is taken off.
        amsgrad (default False): divide by the largest second moment so far, ``max_exp_avg_sq``.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(
            params, lr, betas, eps, weight_decay, amsgrad, decoupled_weight_decay=True, **common
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # a state dict of Adam may say otherwise
            group["decoupled_weight_decay"] = True
