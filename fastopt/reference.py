"""The specification: every update rule, and the norm, in a few plain torch lines.

Each rule below is spelled again in ``csrc/rules.h``, line by line, and the compiled code gives the
same bits on fp32 and fp64. The rules are pure: they take a parameter ``p`` and a gradient ``g`` in
the type of the arithmetic (fp64 for fp64 parameters, else fp32), the scalars ``c`` that
``rules.py`` computes in double, and the states by their torch names; they return the new parameter
and the new states.
Only ``+ - * /``, comparisons and :func:`sqrt` appear, all of them correctly rounded: torch's fused
spellings (``add(alpha=)``, ``addcmul``, ``addcdiv``, ``lerp``) may contract to FMA.

The functions below the rules do what surrounds a rule, for the tensors that no faster backend
takes: conversion from and to 16-bit types, clipping, ``maximize``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .packing import Stored, in_memory_order, random_bits

States = dict[str, Tensor]

LANES = 1024  # the norm's fixed partition, as in csrc/norm.h
CHUNK = 8 * LANES


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


def sgd(
    p: Tensor, g: Tensor, c: Any, momentum_buffer: Tensor | None = None
) -> tuple[Tensor, States]:
    """SGD with momentum, as `torch.optim.SGD`; Sutskever et al. 2013."""
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


def adagrad(p: Tensor, g: Tensor, c: Any, sum: Tensor) -> tuple[Tensor, States]:
    """Adagrad, as `torch.optim.Adagrad`; Duchi et al. 2011."""
    if c.weight_decay != 0:
        g = g + c.weight_decay * p
    sum = sum + g * g
    return p - c.step_size * g / (sqrt(sum) + c.eps), {"sum": sum}


def rmsprop(
    p: Tensor,
    g: Tensor,
    c: Any,
    square_avg: Tensor,
    grad_avg: Tensor | None = None,
    momentum_buffer: Tensor | None = None,
) -> tuple[Tensor, States]:
    """RMSprop, centered and with momentum, as `torch.optim.RMSprop`; Graves 2013.

    The centered variance is a difference that rounding can make negative. torch then takes the
    square root all the same, and the parameter becomes NaN; here it is clamped at 0.
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


def adam(
    p: Tensor,
    g: Tensor,
    c: Any,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None = None,
) -> tuple[Tensor, States]:
    """Adam, AdamW and AMSGrad, as `torch.optim.Adam` and `AdamW`.

    Kingma & Ba 2015, Loshchilov & Hutter 2019, Reddi et al. 2018. Adam's weight decay is
    ``c.weight_decay``, AdamW's is ``c.decay``; the other one is 0 or 1.
    """
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


Rule = Callable[..., tuple[Tensor, States]]


def arithmetic_dtype(param: Tensor) -> torch.dtype:
    """The type in which a parameter's update is computed and its states are kept."""
    return torch.float64 if param.dtype == torch.float64 else torch.float32


@torch.no_grad()
def update_(
    rule: Rule,
    param: Stored,
    grad: Tensor,
    states: dict[str, Stored],
    c: Any,
    grad_coef: float = 1.0,
    clip_value: float = math.inf,
    seed: float = 0,
    step: float = 0,
    number: int = 0,
) -> None:
    """Makes one step of ``rule`` in place.

    The gradient is multiplied by ``grad_coef`` and clamped to ±``clip_value`` first. Random numbers
    depend on ``seed``, ``step`` and the parameter's ``number`` in the optimizer.
    """
    dtype = arithmetic_dtype(param.a)
    random = functools.partial(random_bits, int(seed), int(step), number)
    g = (grad.to(dtype) * grad_coef).clamp(-clip_value, clip_value)
    new_param, new_states = rule(
        param.unpack(dtype), g, c, **{name: s.unpack(dtype) for name, s in states.items()}
    )
    param.pack_(new_param, random)
    for name, new in new_states.items():
        states[name].pack_(new, random)


def power_sum(tensors: Sequence[Tensor], order: float) -> Tensor:
    """The sum of ``abs(x)**order`` over all elements, in a fixed order; their maximum for inf.

    Each tensor, in its own memory order, is cut into chunks of 8192 elements. :func:`_reduce` makes
    one number of each chunk, and then one of the numbers of all tensors' chunks.

    Returns:
        0-dim, fp64, on the first tensor's device.
    """
    device = tensors[0].device
    chunks = [
        _reduce(_pad(_terms(t.detach(), order), CHUNK), order).to(device)
        for t in tensors
        if t.numel() > 0
    ] or [torch.zeros(1, dtype=torch.float64, device=device)]
    return _reduce(torch.cat(chunks), order)


def _terms(tensor: Tensor, order: float) -> Tensor:
    """The terms of the sum, in memory order."""
    x = in_memory_order(tensor).double().abs()
    return x if order in (1, math.inf) else x * x if order == 2 else x**order


def _pad(x: Tensor, multiple: int) -> Tensor:
    """``x`` in rows of ``multiple``, the last one padded with zeros."""
    padded = torch.nn.functional.pad(x, (0, -x.shape[-1] % multiple))
    return padded.view(*x.shape[:-1], -1, multiple)


def _reduce(x: Tensor, order: float) -> Tensor:
    """Reduces the last dimension: rows of LANES one after the other, then the lanes by halving.

    Lane i takes in lane i + half, for half = 512, 256, ..., 1.
    """
    combine = torch.maximum if order == math.inf else torch.add
    lanes = functools.reduce(combine, _pad(x, LANES).unbind(-2))
    while lanes.shape[-1] > 1:
        lanes = combine(*lanes.chunk(2, dim=-1))
    return lanes[..., 0]
