"""One step: what to update, with which backend, and whether that still holds at the next step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import dispatch, reference
from .rules import Group, Rule

if TYPE_CHECKING:
    from ._C import Description
    from .optimizers import Optimizer


def describe(tensor: Tensor) -> Description:
    """What the C++ backend needs to know of a tensor."""
    return (
        tensor.data_ptr(),
        dispatch.DTYPES.index(tensor.dtype),
        tuple(tensor.shape),
        tensor.stride(),
    )


def clip_coef(norm: float, max_norm: float) -> float:
    """The factor that brings a norm down to ``max_norm``, as in torch's ``clip_grad_norm_``."""
    if max_norm == math.inf:
        return 1.0  # whatever the norm
    coef = max_norm / (norm + 1e-6)
    return 1.0 if coef > 1.0 else coef  # NaN stays


@dataclass
class Item:
    """A parameter that can be updated, with what a step reads and writes of it.

    Args:
        grad: None where there is none now, while the states are there from an earlier step.
        state: the optimizer's for this parameter.
        states: those of `state` that the rule updates.
        fresh: the states are made in this step.
    """

    group: int
    param: Tensor
    grad: Tensor | None
    backend: str
    state: dict[str, Any]
    states: dict[str, Tensor]
    fresh: bool = False

    def for_native(self, rule: Rule) -> tuple[Any, ...]:
        """As the constructor of Plan in csrc/plan.h takes it."""
        extension = dispatch.extension()
        assert extension is not None
        grad = self.param if self.grad is None else self.grad
        step = self.state["step"] if rule.counts_steps else None
        return (
            torch.empty(0) if self.grad is None else self.grad,
            self.grad is not None,
            self.state if self.state else None,
            extension.rule_index(rule.name, " ".join(self.states)),
            [describe(tensor) for tensor in (self.param, grad, *self.states.values())],
            list(self.states.values()),
            step,
            None if step is None else describe(step),
            self.fresh,
        )


class Plan:
    """What a step of an optimizer has to do.

    Making one validates every tensor and makes the missing states: slow, and in Python. `holds`
    tells, in C++ and fast, whether it is good for another step, with the gradients there are then.

    Raises:
        RuntimeError, ValueError: something cannot be updated; nothing was changed.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.rule = optimizer.rule
        self.groups = optimizer.param_groups
        self.state = optimizer.state
        self.names = [self.rule.states(group) for group in optimizer.param_groups]
        self.backend = optimizer.backend
        # All that may raise comes before the states are made: they would pass for old ones later.
        rows = _Rows(self.rule, optimizer.param_groups, norm=0.0)
        for g in range(len(optimizer.param_groups)):
            rows.native(g, step=1.0)
        params = [
            (g, param, _item(optimizer, _Place(group, g, i), param, self.names[g]))
            for g, group in enumerate(optimizer.param_groups)
            for i, param in enumerate(group["params"])
        ]
        items = [item for *_, item in params if item is not None]
        self.norm_options = norm_options([param for _, param, _ in params])
        _make_states(optimizer, items, self.names)
        self.others = [
            item for item in items if item.backend == "reference" and item.grad is not None
        ]
        self.native = None
        if extension := dispatch.extension():
            self.native = extension.Plan(
                optimizer.param_groups,
                optimizer.state,
                [
                    (
                        g,
                        param,
                        item.for_native(self.rule) if item and item.backend == "cpp" else None,
                    )
                    for g, param, item in params
                ],
            )

    @property
    def reusable(self) -> bool:
        """Whether `holds` may be asked. If not, the plan keeps gradients alive: drop it."""
        return self.native is not None and not self.others

    def holds(self, optimizer: Optimizer) -> bool:
        """Whether nothing has changed since the plan was made, except where the gradients are and
        which of them are None."""
        return (
            self.native is not None
            and self.backend == optimizer.backend
            and self.groups is optimizer.param_groups
            and self.state is optimizer.state
            and self.names == [self.rule.states(group) for group in optimizer.param_groups]
            and self.native.refresh(torch.get_num_threads())
        )

    def run(self, optimizer: Optimizer) -> None:
        """Makes the step, and sets ``optimizer.grad_norm``."""
        groups = optimizer.param_groups
        threads = torch.get_num_threads()
        norm = None
        if any(group["max_norm"] is not None for group in groups):
            norm = math.sqrt(self._sum_of_squares(threads))
        rows = _Rows(self.rule, groups, norm)
        if self.native is not None:
            cohorts = self.native.cohorts()
            native_rows = [rows.native(group, step) for group, step in cohorts]
        for item in self.others:
            rows.native(item.group, self._next_step(item))  # raises, if at all, before any change
        if self.native is not None:
            self.native.update(native_rows, threads)
            # Autograd does not see writes through an address.
            torch.autograd.graph.increment_version(self.native.active_params())
        for item in self.others:
            self._update_with_reference(item, rows)
        optimizer.grad_norm = None if norm is None else torch.tensor(norm, **self.norm_options)

    def _next_step(self, item: Item) -> float:
        if self.rule.counts_steps:
            return float(item.state["step"]) + 1
        return 1.0 if item.fresh else 2.0

    def _update_with_reference(self, item: Item, rows: _Rows) -> None:
        if item.grad is None:
            return
        reference.update_(
            self.rule.update,
            item.param,
            item.grad,
            item.states,
            rows.rule_scalars(item.group, self._next_step(item)),
            *rows.driver(item.group),
        )
        if self.rule.counts_steps:
            item.state["step"] += 1

    def _sum_of_squares(self, threads: int) -> float:
        total = 0.0
        if self.native is not None:
            total += self.native.sum_of_squares(threads)
        if grads := [item.grad for item in self.others if item.grad is not None]:
            total += float(reference.power_sum(grads, 2))
        return total


class _Rows:
    """The scalars of one step: computed once for all param groups of equal settings."""

    def __init__(self, rule: Rule, groups: list[Group], norm: float | None) -> None:
        self.rule = rule
        self.groups = groups
        self.norm = norm
        self.hyperparameters = [rule.hyperparameters(group) for group in groups]
        self.known: dict[tuple[Any, float], tuple[float, ...]] = {}

    def driver(self, group: int) -> tuple[float, float]:
        """The gradient's factor and the bound of its elements."""
        settings = self.groups[group]
        coef = -1.0 if settings["maximize"] else 1.0
        max_norm, clip_value = settings["max_norm"], settings["clip_value"]
        if max_norm is not None and self.norm is not None:
            if not max_norm >= 0:
                raise ValueError(f"Invalid max_norm in param group {group}: {max_norm}")
            coef *= clip_coef(self.norm, max_norm)
        if clip_value is None:
            return coef, math.inf
        if not clip_value >= 0:
            raise ValueError(f"Invalid clip_value in param group {group}: {clip_value}")
        return coef, clip_value

    def rule_scalars(self, group: int, step: float) -> tuple[float, ...]:
        key = (self.hyperparameters[group], step)
        if key not in self.known:
            self.known[key] = self.rule.scalars_of(*key)
        return self.known[key]

    def native(self, group: int, step: float) -> tuple[float, ...]:
        return self.driver(group) + self.rule_scalars(group, step)


def norm_options(tensors: list[Tensor]) -> dict[str, Any]:
    """Dtype and device of the norm of these tensors: fp32, or fp64 where any of them is."""
    double = any(tensor.dtype == torch.float64 for tensor in tensors)
    return {
        "dtype": torch.float64 if double else torch.float32,
        "device": tensors[0].device if tensors else None,
    }


@dataclass
class _Place:
    """Names a parameter in an error message."""

    group: Group
    group_index: int
    index: int

    def __str__(self) -> str:
        names = self.group.get("param_names")
        name = f" {names[self.index]!r}" if names else ""
        shape = tuple(self.group["params"][self.index].shape)
        return f"parameter {self.index}{name} of group {self.group_index}, of shape {shape},"


def _item(
    optimizer: Optimizer, place: _Place, param: Tensor, names: tuple[str, ...]
) -> Item | None:
    """What can be updated of a parameter; None where nothing is to be done in this step, nor known
    of a later one, because there is neither a gradient nor a state."""
    grad = param.grad
    state = optimizer.state.get(param, {})
    states = {name: state[name] for name in names if state.get(name) is not None}
    if grad is None:
        known = len(states) == len(names) and state and dispatch.fits(param, param)
        if not known or not all(dispatch.fits(param, tensor) for tensor in states.values()):
            return None
        tensors = [param, *states.values()]
        asked = "reference" if optimizer.backend == "reference" else "auto"
        backend = dispatch.backend_for(tensors, asked, place)
    else:
        dispatch.check(param, grad, place)
        dispatch.check_step(state.get("step", 0.0), place)
        for name, tensor in states.items():
            dispatch.check_state(param, name, tensor, place)
        tensors = [param, grad, *states.values()]
        backend = dispatch.backend_for(tensors, optimizer.backend, place)
    return Item(place.group_index, param, grad, backend, state, states)


def _make_states(optimizer: Optimizer, items: list[Item], names: list[tuple[str, ...]]) -> None:
    """Gives every item the states that it lacks."""
    rule, groups = optimizer.rule, optimizer.param_groups
    # All memory first, so that nothing has changed where there is not enough of it.
    made = [
        new_states(rule, groups[item.group], item.param, item.state, names[item.group])
        for item in items
    ]
    for item, new in zip(items, made, strict=True):
        if new:
            item.state = optimizer.state.setdefault(item.param, {})
        for name, tensor in new.items():
            # A parameter that stands twice in its group gets its states once.
            if name == "step" or item.state.get(name) is None:
                item.state[name] = tensor
                item.fresh = True
        item.states = {name: item.state[name] for name in names[item.group]}


def new_states(
    rule: Rule, group: Group, param: Tensor, state: dict[str, Any], names: tuple[str, ...]
) -> dict[str, Tensor]:
    """The states called ``names``, and ``step``, that a parameter's ``state`` lacks."""
    new = {}
    if rule.counts_steps:
        step = state.get("step", 0.0)
        # A number in old checkpoints; on the parameter's device, or fp64, in some of torch's.
        if not isinstance(step, Tensor) or step.dtype != torch.float32 or step.device.type != "cpu":
            new["step"] = torch.tensor(float(step), dtype=torch.float32, device="cpu")
    for name in names:
        if state.get(name) is None:
            new[name] = torch.full_like(
                param,
                rule.initial(group),
                dtype=reference.arithmetic_dtype(param),
                memory_format=torch.preserve_format,
                requires_grad=False,
            )
    return new
