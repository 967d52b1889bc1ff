"""The scalars of one step: what the kernels are told beside the tensors."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import torch
from torch import Tensor

from .rules import Group, Rule

if TYPE_CHECKING:
    from .optimizers import Optimizer


def clip_coef(norm: float, max_norm: float) -> float:
    """The factor that brings a norm down to ``max_norm``, as in torch's ``clip_grad_norm_``."""
    if max_norm == math.inf:
        return 1.0  # whatever the norm
    coef = max_norm / (norm + 1e-6)
    return 1.0 if coef > 1.0 else coef  # NaN stays


def is_on_device(value: Any) -> TypeGuard[Tensor]:
    """Whether the host would have to wait for a value."""
    return isinstance(value, Tensor) and value.device.type != "cpu"


class Scaling(NamedTuple):
    """What `torch.amp.GradScaler` leaves on an optimizer for the time of a step.

    Args:
        grad_scale: divides the gradients; None: nothing is to be done.
        found_inf: if not 0, a gradient was not finite, and the step must change nothing.
    """

    grad_scale: Tensor | None
    found_inf: Tensor | float | None

    @classmethod
    def of(cls, optimizer: Optimizer) -> Scaling:
        return cls(getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None))

    @property
    def on_device(self) -> bool:
        """Whether the host would have to wait for them."""
        return any(map(is_on_device, self))

    @property
    def inv_scale(self) -> float:
        return 1.0 if self.grad_scale is None else 1.0 / float(self.grad_scale)

    @property
    def skips(self) -> bool:
        return self.found_inf is not None and float(self.found_inf) != 0

    def to(self, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """Both in the memory of a device."""
        scale, found_inf = (
            x.to(device, non_blocking=True) if isinstance(x, Tensor) else None for x in self
        )
        return scale, found_inf


def scalars_on_device(optimizer: Optimizer) -> bool:
    """Whether what a step depends on is known only to the device, so that the scalars must be
    computed there, and the steps counted."""
    return Scaling.of(optimizer).on_device or any(
        group["capturable"] or any(map(is_on_device, optimizer.rule.settings(group)))
        for group in optimizer.param_groups
    )


class Rows:
    """The scalars of one step: computed once for all param groups of equal settings."""

    def __init__(self, rule: Rule, groups: list[Group], inv_scale: float = 1.0) -> None:
        self.rule = rule
        self.groups = groups
        self.inv_scale = inv_scale
        self.hyperparameters: dict[int, tuple[Any, ...]] = {}  # of a group
        self.known: dict[tuple[Any, float], tuple[float, ...]] = {}
        self.kept: list[Tensor] = []  # until the kernels that read them have been launched

    def scalars(self, group: int, step: float) -> tuple[float, ...]:
        """The rule's."""
        if group not in self.hyperparameters:
            self.hyperparameters[group] = self.rule.hyperparameters(self.groups[group])
        key = (self.hyperparameters[group], step)
        if key not in self.known:
            self.known[key] = self.rule.scalars_of(*key)
        return self.known[key]

    def clipping(self, group: int) -> tuple[float, float, float]:
        """A factor for the gradient, the bound of its elements, and that of the norm."""
        settings = self.groups[group]
        bounds = {"clip_value": math.inf, "max_norm": math.inf}
        for name in bounds:
            if settings[name] is not None:
                bounds[name] = settings[name]
                if not bounds[name] >= 0:
                    raise ValueError(f"Invalid {name} in param group {group}: {bounds[name]}")
        return -1.0 if settings["maximize"] else 1.0, bounds["clip_value"], bounds["max_norm"]

    def driver(self, group: int, norm: float | None) -> tuple[float, float]:
        """The gradient's factor and the bound of its elements, where the norm is known."""
        sign, clip_value, max_norm = self.clipping(group)
        coef = sign * self.inv_scale
        return coef if norm is None else coef * clip_coef(norm, max_norm), clip_value

    def table(self, group: int, step: float) -> tuple[float, ...]:
        """A row of the table of scalars in kernels/tables.py."""
        sign, clip_value, max_norm = self.clipping(group)
        coef = sign * self.inv_scale
        return (coef, clip_value, coef, max_norm, *self.scalars(group, step))

    def settings(self, device: torch.device, address_of: Callable[[Tensor], int]) -> bytes:
        """The table of settings there; tensors on the device are not read."""
        words = b""
        for g, group in enumerate(self.groups):
            sign, clip_value, max_norm = self.clipping(g)
            values, addresses = array("d", (sign, clip_value, sign, max_norm)), array("q", [0] * 4)
            for setting in self.rule.settings(group):
                if is_on_device(setting):
                    dtype = torch.float64 if setting.dtype == torch.float64 else torch.float32
                    self.kept.append(setting.to(device, dtype, non_blocking=True))
                    values.append(0.0)
                    addresses.append(address_of(self.kept[-1]))
                else:
                    values.append(float(setting))
                    addresses.append(0)
            if not all(map(math.isfinite, values[4:])):
                raise ValueError(
                    "a hyperparameter is not finite, nothing was changed: "
                    f"{dict(zip(self.rule.keys, map(group.get, self.rule.keys), strict=True))}"
                )
            words += values.tobytes() + addresses.tobytes()
        return words
