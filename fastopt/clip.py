"""Gradient clipping with torch's signatures: `torch.nn.utils.clip_grad_norm_` and its relatives.

An optimizer's ``max_norm`` and ``clip_value`` do the same within the step, without writing the
gradients; these functions are for clipping apart from it. They wait for a GPU only to raise where
the norm is not finite, and where some gradients are on the CPU. Of DTensors the norm is that of the
whole gradients: every rank must call the function, with gradients of the same parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .dynamo import untraced
from .rule import sqrt
from .step import checks, dispatch, shards
from .step.backends import Cpp, Reference, Triton
from .step.devices import moved
from .step.plan import norm_options

Tensors = Tensor | Iterable[Tensor]


@untraced
def get_total_norm(
    tensors: Tensors,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """The norm of all tensors, taken as one vector, as `torch.nn.utils.get_total_norm`.

    Args:
        tensors: dense real tensors of any shapes, dtypes and devices.
        norm_type: 1, 2, inf or any other positive order, as a number or ``"inf"``.
        error_if_nonfinite: raise where the norm is infinite or NaN.
        foreach: accepted for torch's sake.

    Returns:
        0-dim, fp32 (fp64 where a tensor is), on the first tensor's device; no DTensor. The sum is
        in fp64, in an order that depends on nothing but the tensors' sizes and their shards.

    Raises:
        ValueError: ``norm_type`` is not positive.
        TypeError: it is no number, or there is something else than tensors.
        RuntimeError: the norm is not finite, or a tensor is sparse, complex, ...
    """
    tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    norm = _total_norm(_divide(tensors, "tensor"), norm_type, error_if_nonfinite)
    return norm.to(**norm_options(tensors))


@untraced
def clip_grad_norm_(
    parameters: Tensors,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """Scales gradients in place so that their norm is at most ``max_norm``.

    As `torch.nn.utils.clip_grad_norm_`. Gradients that are within it already are not written.

    Args:
        parameters: those without a gradient are passed over. Of DTensors, all ranks give the same.
        max_norm: the gradients are multiplied by min(1, max_norm / (norm + 1e-6)), and by 1 where
            it is infinite.

    Returns, raises, and the other arguments: see `get_total_norm`. ValueError also for parameters
    of `FullyShardedDataParallel`, which has a method of this name.
    """
    bound = _number("max_norm", max_norm)
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    if any(map(shards.is_flat, parameters)):
        raise ValueError(
            "of the gradients of FullyShardedDataParallel each rank has only a part: use its "
            "method clip_grad_norm_"
        )
    grads = _grads(parameters)
    every = [param if param.grad is None else param.grad for param in parameters]
    work = _divide(grads, "gradient", in_place=True, every=every)
    norm = _total_norm(work, norm_type, error_if_nonfinite)
    for backend in work.backends:
        backend.clip(norm, bound)
    return norm.to(**norm_options(grads))


@untraced
def clip_grad_value_(parameters: Tensors, clip_value: float, foreach: bool | None = None) -> None:
    """Clamps every element of the gradients to ±``clip_value`` in place.

    As `torch.nn.utils.clip_grad_value_`; NaN stays.

    Raises:
        RuntimeError: a gradient is sparse, complex, ...
        TypeError: ``clip_value`` is no number.
    """
    bound = _number("clip_value", clip_value)
    for backend in _divide(_grads(parameters), "gradient", in_place=True).backends:
        backend.clamp(bound)


_BACKENDS: dict[str, type[Reference]] = {"cpp": Cpp, "triton": Triton, "reference": Reference}


class _Work(NamedTuple):
    """Gradients by the backend that takes them, the device, and the sum of the norm they belong to.

    Args:
        classes: for each backend the index of that sum.
        exchange: of these sums; None where there is one, of this process alone.
    """

    backends: list[Reference]
    classes: list[int]
    exchange: shards.Exchange | None


def _divide(
    grads: list[Tensor], what: str, in_place: bool = False, every: list[Tensor] | None = None
) -> _Work:
    """
    Args:
        every: those, and what stands for gradients that other ranks may have.

    Raises:
        RuntimeError: one cannot be used; ``what`` it is called there.
        TypeError: one is no tensor.
    """
    asked = dispatch.resolve("auto")
    every = grads if every is None else every
    elsewhere = len(every) > len(grads) and any(map(shards.is_shard, every))
    if dispatch.extension() and asked in ("auto", "cpp") and not elsewhere:
        plain = Cpp.of_plain(grads)
        if plain is not None:  # the common case: nothing need be looked at in Python
            return _Work([plain], [0], None) if grads else _Work([], [], None)
    exchange = shards.Exchange(every)
    here = set(map(id, grads))
    classes = [k for x, k in zip(every, exchange.classes, strict=True) if id(x) in here]
    groups: dict[tuple[str, torch.device, int], list[Tensor]] = {}
    for i, grad in enumerate(map(shards.local, grads)):
        if not isinstance(grad, Tensor):
            raise TypeError(f"{what} {i} is {checks.short(grad)}: give tensors")
        where = f"{what} {i}, of shape {tuple(grad.shape)},"
        checks.check_dense(grad, where)
        if in_place and checks.overlaps_itself(grad):
            raise RuntimeError(
                f"{where} has several elements in one place of memory (an expanded tensor?) and "
                "cannot be clipped in place: clone it"
            )
        backend = dispatch.backend_for([grad], asked, where)
        groups.setdefault((backend, grad.device, classes[i]), []).append(grad)
    return _Work(
        [_BACKENDS[backend].of_grads(members) for (backend, *_), members in groups.items()],
        [norm_class for *_, norm_class in groups],
        exchange if exchange else None,
    )


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):  # the last for tensors of several
        raise TypeError(f"{name} must be a number, not {checks.short(value)}") from None


def _total_norm(work: _Work, norm_type: float, error_if_nonfinite: bool) -> Tensor:
    """In double, 0-dim, on the first one's device."""
    order = _number("norm_type", norm_type)
    if not order > 0:
        raise ValueError(f"norm_type must be positive, not {norm_type}")
    sums = [backend.power_sum(order) for backend in work.backends]
    add = torch.Tensor.amax if order == math.inf else torch.Tensor.sum  # NaN wins
    if work.exchange is None:
        sums = sums or [torch.zeros((), dtype=torch.float64, device="cpu")]
        total = add(torch.stack([moved(s, sums[0].device) for s in sums]))
    else:
        there = work.exchange.device
        by_class = [torch.zeros(1, dtype=torch.float64, device=there)] * work.exchange.n
        for norm_class, s in zip(work.classes, sums, strict=True):
            by_class[norm_class] = torch.cat([by_class[norm_class], moved(s, there).view(1)])
        total = add(work.exchange(torch.stack([*map(add, by_class)])))
    if order != math.inf:
        total = sqrt(total) if order == 2 else total ** (1 / order)
    if error_if_nonfinite and not total.isfinite():
        raise RuntimeError(
            f"the total norm of order {norm_type} is {total.item()}, so the gradients cannot be "
            "clipped: pass error_if_nonfinite=False to clip all the same"
        )
    return total


def _grads(parameters: Tensors) -> list[Tensor]:
    parameters = [parameters] if isinstance(parameters, Tensor) else parameters
    return [grad for param in parameters if (grad := param.grad) is not None]
