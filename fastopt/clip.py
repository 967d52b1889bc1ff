"""Gradient clipping with torch's signatures: `torch.nn.utils.clip_grad_norm_` and its relatives.

An optimizer's ``max_norm`` and ``clip_value`` do the same within the step, without writing the
gradients; these functions are for clipping apart from it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from . import dispatch, reference
from .plan import clip_coef, describe, norm_options

Tensors = Tensor | Iterable[Tensor]


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
        0-dim, fp32 (fp64 where a tensor is), on the first tensor's device. The sum is in fp64, in
        an order that does not depend on the number of threads.

    Raises:
        ValueError: ``norm_type`` is not positive.
        RuntimeError: the norm is not finite, or a tensor is sparse, complex, ...
    """
    tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    order = float(norm_type)
    if not order > 0:
        raise ValueError(f"norm_type must be positive, not {norm_type}")
    for i, tensor in enumerate(tensors):
        dispatch.check_dense(tensor, f"tensor {i}, of shape {tuple(tensor.shape)},")
    native, others = _by_backend(tensors)
    totals = []
    if others:
        totals.append(float(reference.power_sum(others, order)))
    if extension := dispatch.extension():
        descriptions = [describe(tensor) for tensor in native]
        totals.append(extension.power_sum(descriptions, order, torch.get_num_threads()))
    if order == math.inf:
        norm = max(totals, key=lambda total: (math.isnan(total), total), default=0.0)
    else:
        norm = sum(totals) ** (1 / order)
    if error_if_nonfinite and not math.isfinite(norm):
        raise RuntimeError(
            f"the total norm of order {norm_type} is {norm}, so the gradients cannot be clipped: "
            "pass error_if_nonfinite=False to clip all the same"
        )
    return torch.tensor(norm, **norm_options(tensors))


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
        parameters: those without a gradient are passed over.
        max_norm: the gradients are multiplied by min(1, max_norm / (norm + 1e-6)), and by 1 where
            it is infinite.

    Returns, raises, and the other arguments: see `get_total_norm`.
    """
    grads = _grads(parameters)
    norm = get_total_norm(grads, norm_type, error_if_nonfinite)
    coef = clip_coef(float(norm), float(max_norm))
    if coef != 1.0:
        _scale_and_clamp(grads, coef, math.inf)
    return norm


def clip_grad_value_(parameters: Tensors, clip_value: float, foreach: bool | None = None) -> None:
    """Clamps every element of the gradients to ±``clip_value`` in place.

    As `torch.nn.utils.clip_grad_value_`; NaN stays.

    Raises:
        RuntimeError: a gradient is sparse, complex, ...
    """
    _scale_and_clamp(_grads(parameters), 1.0, float(clip_value))


def _grads(parameters: Tensors) -> list[Tensor]:
    parameters = [parameters] if isinstance(parameters, Tensor) else parameters
    grads = [param.grad for param in parameters if param.grad is not None]
    for i, grad in enumerate(grads):
        dispatch.check_dense(grad, f"gradient {i}, of shape {tuple(grad.shape)},")
    return grads


def _by_backend(tensors: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors that the C++ kernels take, and the others."""
    native: list[Tensor] = []
    others: list[Tensor] = []
    for tensor in tensors:
        backend = dispatch.backend_for([tensor], dispatch.resolve("auto"), "a gradient")
        (native if backend == "cpp" else others).append(tensor)
    return native, others


@torch.no_grad()
def _scale_and_clamp(grads: list[Tensor], coef: float, clip_value: float) -> None:
    for i, grad in enumerate(grads):
        if dispatch.overlaps_itself(grad):
            raise RuntimeError(
                f"gradient {i}, of shape {tuple(grad.shape)}, has several elements in one place of "
                "memory (an expanded tensor?) and cannot be clipped in place: clone it"
            )
    native, others = _by_backend(grads)
    if extension := dispatch.extension():
        descriptions = [describe(grad) for grad in native]
        extension.scale_and_clamp(descriptions, coef, clip_value, torch.get_num_threads())
        torch.autograd.graph.increment_version(native)
    for grad in others:
        grad.mul_(coef).clamp_(-clip_value, clip_value)
