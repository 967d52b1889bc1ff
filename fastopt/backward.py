"""Steps within backward: each gradient is applied and freed as soon as it is there."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from .dynamo import untraced
from .optimizer import Optimizer
from .step import checks, shards
from .step.params import Place
from .step.plan import Plan


class StepInBackward:
    """What `step_in_backward` returns.

    Attributes:
        accumulates: while True, gradients add up and no step is made. False at first.
        plans: for each parameter that of its last step, if it is good for another one.
    """

    __slots__ = (
        *("__weakref__", "_clip_each", "_handles", "_looked_for_ddp", "_optimizer", "_places"),
        *("accumulates", "plans"),
    )

    def __init__(self, optimizer: Optimizer, clip_each: bool) -> None:
        self.accumulates = False
        self._optimizer = optimizer
        self._clip_each = clip_each
        self._places = _places_of(optimizer)
        self.plans: dict[Tensor, Plan | None] = {}
        self._looked_for_ddp = False
        self._check()
        hook = _Hook(self)
        self._handles = [
            param.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
            for param in self._places
            if param.requires_grad
        ]
        optimizer.shared.in_backward = self

    def remove(self) -> None:
        """Leaves all gradients to the optimizer's ``step`` again."""
        for handle in self._handles:
            handle.remove()
        self.plans.clear()
        if self._optimizer.shared.in_backward is self:
            self._optimizer.shared.in_backward = None

    def _check(self) -> None:
        for param, places in self._places.items():
            for place in places.values():
                self._check_max_norm(place)
            hooks = (param._post_accumulate_grad_hooks or {}).values()
            if any(isinstance(hook, _Hook) and hook.handle() is not None for hook in hooks):
                raise RuntimeError(
                    f"{place} makes its steps in backward already: remove() the handle that "
                    "step_in_backward returned first"
                )
            if shards.is_flat(param):
                raise RuntimeError(
                    f"{place} belongs to FullyShardedDataParallel, which reduces gradients after "
                    "they have been accumulated: use fully_shard (FSDP2)"
                )

    def _check_max_norm(self, place: Place) -> None:
        max_norm = place.group["max_norm"]
        if max_norm is not None and not self._clip_each:
            raise ValueError(
                f"max_norm={max_norm} of group {place.group_index} bounds the norm of all "
                "gradients, which is not known while they are applied one by one in backward: use "
                "clip_each=True, which bounds each gradient's own norm, or max_norm=None, with "
                "clip_value"
            )

    def accumulated(self, param: Tensor) -> None:
        """Its gradient is there."""
        if self.accumulates:
            return
        if not self._looked_for_ddp:
            self._looked_for_ddp = _refuse_ddp(self._places)
        self._apply(param)

    def apply_rest(self) -> None:
        """What was only accumulated is clipped one by one, too."""
        if self._clip_each:
            for param in [*self._places]:
                if param.grad is not None:
                    self._apply(param)

    def _apply(self, param: Tensor) -> None:
        optimizer = self._optimizer
        plan = self.plans.pop(param, None)
        groups = optimizer.param_groups
        places = self._places.get(param)
        if places is None or not all(_stands(param, place, groups) for place in places.values()):
            self._places, plan = _places_of(optimizer), None
            places = self._places.get(param)
            if places is None:  # it has been taken out of the optimizer
                return
        for place in places.values():
            self._check_max_norm(place)
        self.plans[param] = optimizer.step_alone(places, plan)


class _Hook:
    """Keeps neither the optimizer alive nor, through its plans, the parameter that has it."""

    def __init__(self, handle: StepInBackward) -> None:
        self.handle = weakref.ref(handle)

    @untraced
    def __call__(self, param: Tensor) -> None:
        if handle := self.handle():
            handle.accumulated(param)
        else:
            checks.warn_once(
                "the optimizer of step_in_backward is no more, so gradients add up and no step is "
                "made in backward: keep the optimizer, or the handle"
            )


def _places_of(optimizer: Optimizer) -> dict[Tensor, dict[int, Place]]:
    """For each parameter where it stands in the groups, by its numbers."""
    places: dict[Tensor, dict[int, Place]] = {}
    for number, place in optimizer.places().items():
        places.setdefault(place.param, {})[number] = place
    return places


def _stands(param: Tensor, place: Place, groups: list[dict[str, Any]]) -> bool:
    g, i = place.group_index, place.index
    return (
        g < len(groups)
        and groups[g] is place.group
        and i < len(place.group["params"])
        and place.group["params"][i] is param
    )


def _refuse_ddp(params: dict[Tensor, Any]) -> bool:
    """DDP leaves no mark on its parameters: all objects alive are looked through, once.

    Returns:
        whether there can be DDP at all.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    if frozen := gc.get_freeze_count():  # else they are not listed
        gc.unfreeze()
    found = any(
        issubclass(type(each), DistributedDataParallel)
        and any(param in params for param in each.parameters())
        for each in gc.get_objects()
    )
    if frozen:
        gc.freeze()
    if found:
        raise RuntimeError(
            "step_in_backward would apply gradients before DistributedDataParallel has averaged "
            "them, and would free no memory, because DDP keeps them in its buckets: use "
            "fully_shard (FSDP2), or the optimizer's own step"
        )
    return True


@untraced
def step_in_backward(optimizer: Optimizer, clip_each: bool = False) -> StepInBackward:
    """Applies each gradient as soon as backward has accumulated it, and frees it.

    Call it once, after the model has its final parameters (``fully_shard``, ``to``), and leave the
    training loop as it is: ``loss.backward(); optimizer.step(); scheduler.step()``. Only some of
    the gradients are in memory at one time. Param groups, schedulers and state dicts are the
    optimizer's, as without this, and the bits are those of an ordinary step. Its ``step`` finds
    only the gradients of parameters that were frozen or not yet there when this was called, or that
    were only accumulated, and updates these; step hooks run there. This ends with the life of both
    the optimizer and the handle.

    - Gradients are accumulated over several backward passes by ``handle.accumulates = True`` before
      all but the last one (which costs their memory), or, with FSDP2, by
      ``set_requires_gradient_sync``.
    - A step that raises does so out of ``backward()``: parameters before it have been updated, this
      one and those after it have not. Call ``zero_grad()`` before you go on; FSDP2 cannot go on
      after any error in backward.
    - A `torch.amp.GradScaler` cannot be used: a later gradient may overflow when the first ones
      have been applied. ``scaler.step(optimizer)`` raises, but only after a backward pass that has
      applied scaled gradients.
    - A parameter that is part of several reentrant checkpoints is accumulated, and so updated, once
      for each: use ``use_reentrant=False``.

    Args:
        optimizer: any of fastopt's. Copies of it make ordinary steps.
        clip_each: clip each parameter's gradient by its own norm, to the ``max_norm`` of its group.
            ``grad_norm`` is 0, as where there is no gradient. For DTensors that is one collective a
            parameter.

    Returns:
        a handle with ``remove()`` and ``accumulates``.

    Raises:
        TypeError: this is no optimizer of fastopt's.
        ValueError: a group has a ``max_norm``, without ``clip_each``: the norm of all gradients is
            known only after the last one. Raised in backward if it is set later. Or the other way
            round: ``clip_each`` without any ``max_norm``.
        RuntimeError: a parameter makes its steps in backward already, or belongs to FSDP1; or, in
            the first backward, to `DistributedDataParallel`. A model that is wrapped later is not
            noticed.

    Source: Lv et al. 2023, "Full Parameter Fine-tuning for Large Language Models with Limited
    Resources" (LOMO); torch's tutorial "How to save memory by fusing the optimizer step into the
    backward pass".
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"step_in_backward takes an optimizer of fastopt, not {type(optimizer)}")
    if clip_each and all(group["max_norm"] is None for group in optimizer.param_groups):
        raise ValueError("clip_each=True clips to a group's max_norm, and no group has one: set it")
    return StepInBackward(optimizer.shared.optimizer() or optimizer, clip_each)
