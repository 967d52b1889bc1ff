"""Gradient clipping with torch's signatures: `torch.nn.utils.clip_grad_norm_` and its relatives.

An optimizer's ``max_norm`` and ``clip_value`` do the same within the step, without writing the
gradients; these functions are for clipping apart from it. They wait for a GPU only to raise where
the norm is not finite, and where some gradients are on the CPU.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import dispatch, reference
from .devices import moved
from .dynamo import untraced
from .items import describe
from .packing import Stored
from .plan import norm_options
from .scalars import clip_coef

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
        0-dim, fp32 (fp64 where a tensor is), on the first tensor's device. The sum is in fp64, in
        an order that depends on nothing but the tensors' sizes.

    Raises:
        ValueError: ``norm_type`` is not positive.
        TypeError: it is no number, or there is something else than tensors.
        RuntimeError: the norm is not finite, or a tensor is sparse, complex, ...
    """
    tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    norm = _total_norm(_by_backend(tensors, "tensor"), norm_type, error_if_nonfinite)
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
        parameters: those without a gradient are passed over.
        max_norm: the gradients are multiplied by min(1, max_norm / (norm + 1e-6)), and by 1 where
            it is infinite.

    Returns, raises, and the other arguments: see `get_total_norm`.
    """
    bound = _number("max_norm", max_norm)
    grads = _grads(parameters)
    backends = _by_backend(grads, "gradient", in_place=True)
    norm = _total_norm(backends, norm_type, error_if_nonfinite)
    for backend in backends:
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
    for backend in _by_backend(_grads(parameters), "gradient", in_place=True):
        backend.clamp(bound)


class _Reference:
    """What is done to gradients of one device, with torch operators."""

    def __init__(self, grads: list[Tensor]) -> None:
        self.grads = grads

    def power_sum(self, order: float) -> Tensor:
        """As `reference.power_sum`."""
        return reference.power_sum(self.grads, order)

    @torch.no_grad()
    def clip(self, norm: Tensor, max_norm: float) -> None:
        """Brings a norm, in double, down to ``max_norm``."""
        norm = moved(norm, self.grads[0].device)
        coef = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        if max_norm != math.inf:
            for grad in self.grads:
                grad.mul_(coef)

    @torch.no_grad()
    def clamp(self, clip_value: float) -> None:
        for grad in self.grads:
            grad.clamp_(-clip_value, clip_value)


class _Cpp(_Reference):
    """With the compiled extension."""

    def __init__(self, grads: list[Tensor], targets: Any = None) -> None:
        super().__init__(grads)
        extension = dispatch.extension()
        assert extension is not None
        self.targets = targets or extension.Targets([describe(Stored(grad)) for grad in grads])

    def power_sum(self, order: float) -> Tensor:
        total = self.targets.power_sum(order, torch.get_num_threads())
        return torch.tensor(total, dtype=torch.float64, device="cpu")

    def clip(self, norm: Tensor, max_norm: float) -> None:
        coef = clip_coef(float(norm), max_norm)
        if coef != 1.0:
            self._scale_and_clamp(coef, math.inf)

    def clamp(self, clip_value: float) -> None:
        self._scale_and_clamp(1.0, clip_value)

    def _scale_and_clamp(self, coef: float, clip_value: float) -> None:
        self.targets.scale_and_clamp(coef, clip_value, torch.get_num_threads())
        torch.autograd.graph.increment_version(self.grads)


class _Triton(_Reference):
    """With the Triton kernels: a step of the rule that assigns gradients to themselves."""

    def __init__(self, grads: list[Tensor]) -> None:
        super().__init__(grads)
        self.kernels = dispatch.triton_kernels()
        assert self.kernels is not None
        grads = [grad.detach() for grad in grads]
        targets = [self.kernels.Target([Stored(grad)], grad) for grad in grads]
        self.tensors = self.kernels.MultiTensor("assign", 0, targets, _captured)

    def _begin(self, clip_value: float, max_norm: float) -> None:
        self.tensors.begin(
            pattern="all",
            grads=array("q", [grad.data_ptr() for grad in self.grads]).tobytes(),
            odd_grads=[self.grads[i] for i in self.tensors.odd],
            rows=array("d", (1.0, clip_value, 1.0, max_norm, 0.0, 0.0)).tobytes(),
            n_rows=1,
            row_of=array("q", [0] * len(self.grads)).tobytes(),
        )

    def power_sum(self, order: float) -> Tensor:
        if order not in (1, 2, math.inf):
            return super().power_sum(order)
        assert self.kernels is not None
        self._begin(math.inf, math.inf)
        total: Tensor = self.kernels.total(self.tensors.norm_partials(order), order)
        return total

    def clip(self, norm: Tensor, max_norm: float) -> None:
        self._begin(math.inf, max_norm)
        square = moved(norm, self.tensors.device).square()
        self._update(square.view(1))

    def clamp(self, clip_value: float) -> None:
        self._begin(clip_value, math.inf)
        self._update()

    def _update(self, partials: Tensor | None = None) -> None:
        self.tensors.update(partials)
        torch.autograd.graph.increment_version(self.grads)


# What CUDA graphs use, which do not tell when they are no longer replayed: small tables.
_captured: list[Any] = []

_BACKENDS = {"cpp": _Cpp, "triton": _Triton, "reference": _Reference}


def _by_backend(grads: list[Tensor], what: str, in_place: bool = False) -> list[_Reference]:
    """By the backend that takes them, and the device.

    Raises:
        RuntimeError: one cannot be used; ``what`` it is called there.
        TypeError: one is no tensor.
    """
    asked = dispatch.resolve("auto")
    extension = dispatch.extension()
    if extension and asked in ("auto", "cpp"):
        plain = extension.Targets.plain(grads, (Tensor, torch.nn.Parameter))
        if plain is not None:  # the common case: nothing need be looked at in Python
            return [_Cpp(grads, plain)] if grads else []
    groups: dict[tuple[str, torch.device], list[Tensor]] = {}
    for i, grad in enumerate(grads):
        if not isinstance(grad, Tensor):
            raise TypeError(f"{what} {i} is {dispatch.short(grad)}: give tensors")
        where = f"{what} {i}, of shape {tuple(grad.shape)},"
        dispatch.check_dense(grad, where)
        if in_place and dispatch.overlaps_itself(grad):
            raise RuntimeError(
                f"{where} has several elements in one place of memory (an expanded tensor?) and "
                "cannot be clipped in place: clone it"
            )
        backend = dispatch.backend_for([grad], asked, where)
        groups.setdefault((backend, grad.device), []).append(grad)
    return [_BACKENDS[backend](members) for (backend, _), members in groups.items()]


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):  # the last for tensors of several
        raise TypeError(f"{name} must be a number, not {dispatch.short(value)}") from None


def _total_norm(
    backends: Sequence[_Reference], norm_type: float, error_if_nonfinite: bool
) -> Tensor:
    """In double, 0-dim, on the first one's device."""
    order = _number("norm_type", norm_type)
    if not order > 0:
        raise ValueError(f"norm_type must be positive, not {norm_type}")
    sums = [backend.power_sum(order) for backend in backends]
    sums = sums or [torch.zeros((), dtype=torch.float64, device="cpu")]
    total = torch.stack([moved(s, sums[0].device) for s in sums])
    if order == math.inf:
        norm = total.amax()  # NaN wins
    else:
        norm = reference.sqrt(total.sum()) if order == 2 else total.sum() ** (1 / order)
    if error_if_nonfinite and not norm.isfinite():
        raise RuntimeError(
            f"the total norm of order {norm_type} is {norm.item()}, so the gradients cannot be "
            "clipped: pass error_if_nonfinite=False to clip all the same"
        )
    return norm


def _grads(parameters: Tensors) -> list[Tensor]:
    parameters = [parameters] if isinstance(parameters, Tensor) else parameters
    return [grad for param in parameters if (grad := param.grad) is not None]
