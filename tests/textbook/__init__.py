"""The rules as their papers have them, one file each, and how far less precision may be off.

A file has the names of the states that settings ``c`` call for, and ``update``: the new parameter
and states of the ``t``-th step, in fp64. A rule that torch lacks has its torch class there too,
under the name of ours.
"""

from __future__ import annotations

import importlib
import math

import torch

FP16, BF16, FP32, FP64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


def textbook(name, c, t, p, g, s):
    """The new parameter and states of the ``t``-th step of a rule, with settings ``c``."""
    return importlib.import_module(f"textbook.{name}").update(c, t, p, g, s)


def states_of(name, c):
    """The names of the states that a step uses."""
    return importlib.import_module(f"textbook.{name}").states(c)


def textbook_step(name, c, t, p, g, s, eps, slack):
    """What a step should make, and how far one in arithmetic of precision ``eps`` may be off.

    Every input is moved a little, in turn, to see what that does to the results: the rounding
    errors of some ten operations do no more than a change of each input, and of the results, by 16
    half ulps. ``slack``: how far ``p`` may be from what is given.

    Returns:
        for the parameter ("") and each state: the number and the bound of its error.
    """

    def results(p, g, s):
        new_p, new_s = textbook(name, c, t, p, g, s)
        return {"": new_p, **new_s}

    base = results(p, g, s)
    error = {key: 8 * eps * x.abs() for key, x in base.items()}
    error[""] += 8 * eps * p.abs()

    def add(moved, factor):
        for key, x in moved.items():
            error[key] += factor * (x - base[key]).abs()

    h = 2.0**-20
    add(results(p * (1 + h), g, s), 8 * eps / h)
    add(results(p, g * (1 + h), s), 8 * eps / h)
    for key, x in s.items():
        add(results(p, g, {**s, key: x * (1 + h)}), 8 * eps / h)
    for sign in (1, -1) if torch.as_tensor(slack).any() else ():
        add(results(p + sign * slack, g, s), 1)
    return {key: (x, error[key]) for key, x in base.items()}


def is_square(state):
    return state in ("sum", "square_avg", "exp_avg_sq", "max_exp_avg_sq")


def state_error(name, x, kept):
    """How far rounding to a `state_dtype` moves a state.

    bf16 goes to one of the two neighbours. A code stands for (z - 1) * scale, where z >= 1 has 5
    bits of mantissa (4 for squares): it is at most (|x| + scale) / 32 away. The largest code, 14.75
    (63,487) times the scale, stands for the largest of the elements that share a scale.
    """
    if kept == BF16:
        return x.abs() / 128
    if kept != "8bit" or not x.numel():
        return torch.zeros_like(x)
    bits, top = (4, 63487) if is_square(name) else (5, 14.75)
    scale = (x.abs().max() / top).clamp(min=2.0**-120)  # a scale is never less
    return (x.abs() + scale) / 2**bits * 1.001


def param_error(x, dtype):
    """How far rounding moves a parameter that has no master: to one of its two neighbours."""
    if dtype not in (FP16, BF16):
        return torch.zeros_like(x)
    info = torch.finfo(dtype)
    return x.abs() * info.eps + info.smallest_normal * info.eps


def half_ulp(param):
    """Of 16-bit numbers."""
    info = torch.finfo(param.dtype)
    exponent = torch.frexp(param.detach().double().abs().clamp(min=info.smallest_normal))[1]
    return info.eps / 4 * torch.exp2(exponent.double())  # exact


def clip_coefs(groups, norm):
    """The factor of each group's gradients."""
    return [
        1.0 if c["max_norm"] in (None, math.inf) else min(1.0, c["max_norm"] / (norm + 1e-6))
        for c in groups
    ]
