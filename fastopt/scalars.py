"""The scalars of one step: what the kernels are told beside the tensors."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import settings
from .devices import is_on_device, moved
from .rules import Group

if TYPE_CHECKING:
    from .optimizers import Optimizer


def clip_coef(norm: float, max_norm: float) -> float:
    """The factor that brings a norm down to ``max_norm``, as in torch's ``clip_grad_norm_``."""
    if max_norm == math.inf:
        return 1.0  # whatever the norm
    coef = max_norm / (norm + 1e-6)
    return 1.0 if coef > 1.0 else coef  # NaN stays


class Scaling(NamedTuple):
    """What a `GradScaler` leaves on an optimizer for the time of a step.

    Args:
        grad_scale: divides the gradients; None: nothing is to be done.
        found_inf: if not 0, a gradient was not finite, and the step must change nothing.
        findings: where the step, which finds that out itself by its norm, puts such a ``found_inf``
            by device; None: it need not.
    """

    grad_scale: Tensor | None
    found_inf: Tensor | float | None
    findings: dict[torch.device, Tensor] | None

    @classmethod
    def of(cls, optimizer: Optimizer) -> Scaling:
        shared = optimizer._shared
        return cls(shared.grad_scale, shared.found_inf, shared.findings)

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

    def to(self, device: torch.device) -> tuple[Tensor | None, Tensor | None, bool]:
        """Both in the memory of a device, and whether ``found_inf`` is for the device to set."""
        scale, found_inf = (moved(x, device) if isinstance(x, Tensor) else None for x in self[:2])
        if self.findings is not None:
            found_inf = torch.empty((), dtype=torch.float32, device=device)
            self.findings[device] = found_inf
        return scale, found_inf, self.findings is not None


class Rows:
    """The scalars of one step: computed once for all param groups of equal settings.

    Attributes:
        on_device: what the step depends on is known only to the device, so that the scalars must be
            computed there, and the steps counted.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.rule = optimizer.rule
        self.groups = optimizer.param_groups
        self.scaling = Scaling.of(optimizer)
        self._names = (*self.rule.keys, *_CLIPPING, "capturable", "seed")
        first: dict[Any, int] = {}
        self.like = [first.setdefault(self._key(group), g) for g, group in enumerate(self.groups)]
        self.distinct = list(first.values())
        if not first.keys() <= optimizer._good_settings:
            self._check_settings(first, optimizer._good_settings)
        self.on_device = self.scaling.on_device or any(
            self.groups[g]["capturable"]
            or any(map(is_on_device, self.rule.settings(self.groups[g])))
            for g in self.distinct
        )
        self.known: dict[tuple[int, float], tuple[float, ...]] = {}
        self.kept: list[Tensor] = []  # until the kernels that read them have been launched

    def _check_settings(self, first: dict[Any, int], good: set[Any]) -> None:
        """Checks settings by key, unless they are ``good``: checked before, and constant."""
        for key, g in first.items():
            if key not in good:
                settings.check(self.groups[g], g, self._names)
        good.clear()
        good.update(filter(_is_constant, first))

    def _key(self, group: Group) -> Any:
        key = tuple(map(group.get, self._names))
        try:
            hash(key)
        except TypeError:  # a list of betas
            return (object(),)
        return key

    @cached_property
    def inv_scale(self) -> float:
        return self.scaling.inv_scale

    def check(self) -> None:
        """Raises what the other methods would, without waiting for a device.

        Raises:
            ValueError: a scalar that settings make is not finite.
        """
        for g in self.distinct:
            if not any(map(is_on_device, self.rule.settings(self.groups[g]))):
                self.scalars(g, 1.0)

    def scalars(self, group: int, step: float) -> tuple[float, ...]:
        """The rule's."""
        key = self.like[group], step
        if key not in self.known:
            hyperparameters = self.rule.hyperparameters(self.groups[group])
            self.known[key] = self.rule.scalars_of(hyperparameters, step)
        return self.known[key]

    def clipping(self, group: int) -> tuple[float, float, float]:
        """A factor for the gradient, the bound of its elements, and that of the norm."""
        maximize, clip_value, max_norm = map(self.groups[group].get, _CLIPPING)
        clip_value = math.inf if clip_value is None else clip_value
        max_norm = math.inf if max_norm is None else max_norm
        return -1.0 if maximize else 1.0, clip_value, max_norm

    def driver(
        self, group: int, norm: float | None, step: float
    ) -> tuple[float, float, float, float]:
        """The gradient's factor, where the norm is known, the bound of its elements, seed and step
        of random numbers."""
        sign, clip_value, max_norm = self.clipping(group)
        coef = sign * self.inv_scale
        if norm is not None:
            coef *= clip_coef(norm, max_norm)
        return coef, clip_value, float(self.groups[group]["seed"]), step

    def table(self, group: int, step: float) -> tuple[float, ...]:
        """A row of the table of scalars in kernels/tables.py."""
        sign, clip_value, max_norm = self.clipping(group)
        coef = sign * self.inv_scale
        seed = float(self.groups[group]["seed"])
        return (coef, clip_value, coef, max_norm, seed, step, *self.scalars(group, step))

    def settings(self, device: torch.device, address_of: Callable[[Tensor], int]) -> bytes:
        """The table of settings there; tensors on a device are not read."""
        rows = {}
        for g in self.distinct:
            sign, clip_value, max_norm = self.clipping(g)
            seed = float(self.groups[g]["seed"])
            values = array("d", (sign, clip_value, sign, max_norm, seed, 0.0))
            addresses = array("q", [0] * len(values))
            for setting in self.rule.settings(self.groups[g]):
                if is_on_device(setting):
                    dtype = torch.float64 if setting.dtype == torch.float64 else torch.float32
                    self.kept.append(moved(setting.to(dtype), device))
                    values.append(0.0)
                    addresses.append(address_of(self.kept[-1]))
                else:
                    values.append(float(setting))
                    addresses.append(0)
            rows[g] = values.tobytes() + addresses.tobytes()
        return b"".join(map(rows.__getitem__, self.like))


def _is_constant(key: tuple[Any, ...]) -> bool:
    """Whether it holds numbers and flags only, not tensors, which change in place."""
    return all(type(x) in _CONSTANTS or (type(x) is tuple and _is_constant(x)) for x in key)


_CONSTANTS = (float, int, bool, type(None))
_CLIPPING = ("maximize", "clip_value", "max_norm")
