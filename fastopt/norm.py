"""The specification of the norm: a fixed partition and a fixed order, in double.

``csrc/norm.h`` and ``kernels/norm.py`` have the same functions, with the same bits.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .packing import CHUNK, in_memory_order

LANES = CHUNK // 8


def power_sum(tensors: Sequence[Tensor], order: float) -> Tensor:
    """The sum of ``abs(x)**order`` over all elements, in a fixed order; for inf their maximum.

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


def clip_coef(norm: float, max_norm: float) -> float:
    """The factor that brings a norm down to ``max_norm``, as in torch's ``clip_grad_norm_``."""
    if max_norm == math.inf:
        return 1.0  # whatever the norm
    coef = max_norm / (norm + 1e-6)
    return 1.0 if coef > 1.0 else coef  # NaN stays
