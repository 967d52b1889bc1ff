"""Loss scaling whose search for overflows is part of the optimizers' steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .dynamo import untraced
from .optimizer import Optimizer
from .step import shards


class GradScaler(torch.amp.GradScaler):
    """`torch.amp.GradScaler`, without its pass over the gradients of fastopt's optimizers.

    torch's reads and writes all of them to find out whether any is infinite or NaN, and unscales
    them, too, where the optimizer has neither ``max_norm`` nor ``fused=True``. This one leaves all
    that to the step, whose norm (taken with or without ``max_norm``) is finite exactly where all
    gradients are, and gradients stay as they are. Scales, skipped steps and state dicts are
    torch's; so is all that happens to optimizers of other makes, after `unscale_`, and to gradients
    in fp64, whose squares may overflow. Nothing waits for a GPU, if the loss is there too.

    Args, methods: as in torch.
    """

    @untraced
    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> float | None:
        """Unscales the gradients and makes a step of the optimizer, unless one is not finite.

        Args:
            args, kwargs: for ``optimizer.step``.

        Returns:
            what ``optimizer.step`` does.

        Raises:
            RuntimeError: ``closure=`` is given, or there was a step since the last `update`.
            AssertionError: no loss has been scaled yet.
        """
        if not self._enabled or not isinstance(optimizer, Optimizer):
            return super().step(optimizer, *args, **kwargs)
        shared = optimizer.shared
        shared.scaled = True
        try:
            return super().step(optimizer, *args, **kwargs)
        finally:
            shared.scaled, shared.findings = False, None
            # torch would not remove its own after an error, and unscale twice in the next step.
            shared.grad_scale = shared.found_inf = None

    def _check_inf_per_device(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        params = [param for group in optimizer.param_groups for param in group["params"]]
        if not isinstance(optimizer, Optimizer) or not all(map(_shows_in_norm, params)):
            return super()._check_inf_per_device(optimizer)
        # Filled by the step; torch reads it now, when it is empty, and in `update`.
        findings: dict[Any, Any] = {}
        if (
            any(param.grad is not None for param in params)
            # A rank without gradients takes part in the norm that others wait for.
            or optimizer.norm_group is not None
            or any(map(shards.is_shard, params))
        ):
            optimizer.shared.findings = findings
        self._per_optimizer_states[id(optimizer)]["found_inf_per_device"] = findings
        return findings


def _shows_in_norm(param: Tensor) -> bool:
    """Whether the sum of squares, in fp64, is finite exactly where the gradient is: on all ranks
    alike, of which some may have none.

    Subclasses other than DTensor may hold only a part of it, and MPS has no fp64.
    """
    if param.dtype == torch.float64 or param.is_mps:
        return False
    grad = param.grad
    return grad is None or (
        grad.dtype != torch.float64 and (type(grad) is Tensor or shards.is_shard(grad))
    )
