"""One step: what to update, with which backend, and whether that still holds at the next step."""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import dispatch, reference
from .devices import capturing, moved
from .rules import Group, Rule
from .scalars import Rows

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


class Watched(NamedTuple):
    """What csrc/plan.cpp has to know of a parameter.

    Args:
        grad: None where there is none now.
        grad_type: the gradient's Python type.
        state: the optimizer's for this parameter, None where it is empty.
        rule: index into Rules of csrc/rules.h.
        operands: descriptions of parameter, gradient and states.
        states: those that the rule updates.
        fresh: there is no step to count, and the states are made in this step.
        part: 0: updated by the C++ kernels; else by this one of `Plan.parts`, counted from 1.
        scalars_here: the plan counts the step and computes the scalars, not the device.
    """

    grad: Tensor | None
    grad_type: type
    state: dict[str, Any] | None
    rule: int
    operands: list[Description]
    states: list[Tensor]
    step: Tensor | None
    fresh: bool
    part: int
    scalars_here: bool


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

    def watched(self, rule: Rule, part: int, scalars_here: bool) -> Watched:
        extension = dispatch.extension()
        assert extension is not None
        grad = self.param if self.grad is None else self.grad
        return Watched(
            grad=self.grad,
            grad_type=Tensor if self.grad is None else type(self.grad),
            state=self.state or None,
            rule=extension.rule_index(rule.name, " ".join(self.states)),
            operands=[describe(tensor) for tensor in (self.param, grad, *self.states.values())],
            states=list(self.states.values()),
            step=self.state.get("step"),
            fresh=self.fresh,
            part=part,
            scalars_here=scalars_here,
        )

    def target(self, rule: Rule, scalars_here: bool) -> Any:
        """As the Triton kernels take it."""
        kernels = dispatch.triton_kernels()
        assert kernels is not None
        return kernels.Target(
            param=self.param,
            grad=self.param if self.grad is None else self.grad,
            states=list(self.states.values()),
            gap=rule.gap(tuple(self.states)),
            group=self.group,
            step=None if scalars_here else self.state.get("step"),
        )


class Part:
    """The parameters on one device that the Triton backend updates."""

    def __init__(
        self, number: int, optimizer: Optimizer, items: list[Item], on_device: bool
    ) -> None:
        kernels = dispatch.triton_kernels()
        assert kernels is not None
        rule = optimizer.rule
        self.number = number
        self.params = [item.param for item in items]
        self.device = self.params[0].device
        self.kernels = kernels
        self.tensors = kernels.MultiTensor(
            rule.name,
            len(rule.scalar_names),
            [item.target(rule, not on_device) for item in items],
            optimizer._captured,
            on_device,
        )

    def begin(self, native: Any, rows: Rows, scalars: bytes, n_rows: int) -> None:
        """Tells the device of a step: of its gradients, and of ``scalars`` or the settings."""
        row_of = None
        if self.tensors.on_device:
            scalars = rows.settings(self.device, self.kernels.address_of)
            n_rows = len(rows.groups)
        else:
            row_of = native.scalars_of(self.number)
        if not self.tensors.on_device and self.is_captured:
            raise RuntimeError(
                "a step that becomes part of a CUDA graph needs capturable=True, so that the GPU "
                "computes its scalars at each replay"
            )
        odd_grads = [self.params[i].grad for i in self.tensors.odd]
        grads = native.grads(self.number)
        self.tensors.begin(native.pattern(), grads, odd_grads, scalars, n_rows, row_of)

    @property
    def is_captured(self) -> bool:
        """Whether what is launched now becomes part of a CUDA graph."""
        return capturing(self.device)


class Plan:
    """What a step of an optimizer has to do.

    Making one validates every tensor and makes the missing states: slow, and in Python. `holds`
    tells, in C++ and fast, whether it is good for another step, with the gradients there are then.

    Raises:
        RuntimeError, ValueError: something cannot be updated; nothing was changed.
    """

    def __init__(self, optimizer: Optimizer, rows: Rows) -> None:
        self.rule = optimizer.rule
        self.groups = optimizer.param_groups
        self.state = optimizer.state
        self.names = [self.rule.states(group) for group in optimizer.param_groups]
        self.backend = optimizer.backend
        self.on_device = rows.on_device
        # All that may raise comes before the states are made: they would pass for old ones later.
        rows.check()
        params = [
            (g, param, _item(optimizer, _Place(group, g, i), param, self.names[g]))
            for g, group in enumerate(optimizer.param_groups)
            for i, param in enumerate(group["params"])
        ]
        items = [item for *_, item in params if item is not None]
        self.norm_options = norm_options([param for _, param, _ in params])
        #: Until the first step is made: what the state had for the parameters that lacked some.
        self.before = _make_states(optimizer, items, self.names, self.on_device)
        self.others = [
            item for item in items if item.backend == "reference" and item.grad is not None
        ]
        by_device: dict[torch.device, list[Item]] = {}
        for item in items:
            if item.backend == "triton":
                by_device.setdefault(item.param.device, []).append(item)
        self.parts = [
            Part(number, optimizer, members, self.on_device)
            for number, members in enumerate(by_device.values(), start=1)
        ]
        part_of = {
            id(item): number
            for number, members in enumerate(by_device.values(), start=1)
            for item in members
        }
        # A graph copies the parts' tables at its replays: until then they are not there.
        self.is_captured = any(part.is_captured for part in self.parts)
        #: Whether anything is updated outside of `parts`.
        self.on_host = any(id(item) not in part_of for item in items) or not self.parts
        self.native: Any = None  # there if `parts` are
        if extension := dispatch.extension():
            self.native = extension.Plan(
                optimizer.param_groups,
                optimizer.state,
                [
                    (
                        g,
                        param,
                        item.watched(
                            self.rule,
                            part_of.get(id(item), 0),
                            scalars_here=not (self.on_device and id(item) in part_of),
                        )
                        if item and item.backend != "reference"
                        else None,
                    )
                    for g, param, item in params
                ],
            )

    @property
    def reusable(self) -> bool:
        """Whether `holds` may be asked. If not, the plan keeps gradients alive: drop it."""
        return self.native is not None and not self.others and not self.is_captured

    def holds(self, optimizer: Optimizer, rows: Rows) -> bool:
        """Whether nothing has changed since the plan was made, except where the gradients are and
        which of them are None."""
        return (
            self.native is not None
            and self.backend == optimizer.backend
            and self.groups is optimizer.param_groups
            and self.state is optimizer.state
            and self.on_device == rows.on_device
            and self.names == [self.rule.states(group) for group in optimizer.param_groups]
            # Threads pay where they are awake for the update that follows.
            and self.native.refresh(torch.get_num_threads() if self.on_host else 1)
        )

    def run(self, optimizer: Optimizer, rows: Rows) -> None:
        """Makes the step, and sets ``optimizer.grad_norm``."""
        # All that may raise comes before any change.
        cohorts = [] if self.native is None else self.native.cohorts()
        scalars = array("d", chain.from_iterable(rows.table(*cohort) for cohort in cohorts))
        for item in self.others:
            if capturing(item.param.device):
                raise RuntimeError(
                    "a step of the reference backend cannot become part of a CUDA graph: see "
                    "fastopt.backends() for why parameters on a GPU are not updated by triton"
                )
            rows.table(item.group, self._next_step(item))
        for part in self.parts:
            part.begin(self.native, rows, scalars.tobytes(), len(cohorts))
            if part.is_captured:
                optimizer._captured.append((self, rows))

        clips = any(group["max_norm"] is not None for group in optimizer.param_groups)
        findings = rows.scaling.findings
        measures = clips or findings is not None
        partials: list[Any] = self._partials() if measures else [None] * len(self.parts)
        total = None  # the norm before it is unscaled, where the host has to know it
        if measures and (self.on_host or (findings is not None and not self.on_device)):
            total = self._norm(partials)
        skips = self.on_host and rows.scaling.skips
        if findings is not None and total is not None:
            skips = not math.isfinite(total)
            findings[torch.device("cpu")] = torch.full((), float(skips), device="cpu")
        norm = total * rows.inv_scale if clips and total is not None else None
        optimizer.grad_norm = None
        if skips:
            if norm is not None:
                optimizer.grad_norm = torch.full((), norm, **self.norm_options)
            self._skip(optimizer)
            return
        self.before = []
        if not clips and not self.on_device:
            partials = [None] * len(self.parts)
        for part, of_norm in zip(self.parts, partials, strict=True):
            scaling = rows.scaling.to(part.device) if self.on_device else ()
            if not self.on_device and of_norm is not None and rows.inv_scale != 1:
                of_norm = of_norm * rows.inv_scale**2
            of_part = part.tensors.update(of_norm, self.norm_options["dtype"], *scaling)
            if clips and (
                optimizer.grad_norm is None or part.device == self.norm_options["device"]
            ):
                optimizer.grad_norm = of_part
        if self.native is not None:
            # Autograd does not see writes through an address.
            torch.autograd.graph.increment_version(self.native.active_params())
        if self.on_host:
            self._run_on_host(optimizer, rows, cohorts, norm)
        else:
            self.native.update([], 1)  # only counts

    def _skip(self, optimizer: Optimizer) -> None:
        """Leaves all as it was before this step."""
        if self.native is not None:
            self.native.release()
        for param, state in self.before:
            if state is None:
                optimizer.state.pop(param, None)  # it may stand twice in its group
            else:
                optimizer.state[param].clear()
                optimizer.state[param].update(state)
        self.before = []

    def _run_on_host(
        self,
        optimizer: Optimizer,
        rows: Rows,
        cohorts: list[tuple[int, float]],
        norm: float | None,
    ) -> None:
        if norm is not None and optimizer.grad_norm is None:
            optimizer.grad_norm = torch.full((), norm, **self.norm_options)
        if self.native is not None:
            native_rows = [
                (*rows.driver(group, norm), *rows.scalars(group, step)) for group, step in cohorts
            ]
            self.native.update(native_rows, torch.get_num_threads())
        for item in self.others:
            step = self._next_step(item)
            assert item.grad is not None
            reference.update_(
                self.rule.update,
                item.param,
                item.grad,
                item.states,
                rows.scalars(item.group, step),
                *rows.driver(item.group, norm),
            )
            if "step" in item.state:
                item.state["step"] += 1

    def _next_step(self, item: Item) -> float:
        if "step" in item.state:
            return float(item.state["step"]) + 1
        return 1.0 if item.fresh else 2.0

    def _partials(self) -> list[Any]:
        """For each part, on its device: numbers that add up to the sum of all squares."""
        partials = [part.tensors.norm_partials() for part in self.parts]
        if not partials or (len(partials) == 1 and not self.on_host):
            return partials
        totals = [part.kernels.total(p) for part, p in zip(self.parts, partials, strict=True)]
        if self.on_host:
            on_host = self._sum_of_squares_on_host()
            totals.append(torch.full((), on_host, dtype=torch.float64, device="cpu"))
        return [torch.stack([moved(total, part.device) for total in totals]) for part in self.parts]

    def _norm(self, partials: list[Any]) -> float:
        """The norm for the host, which has to wait for all parts."""
        if not self.parts:
            return math.sqrt(self._sum_of_squares_on_host())
        return math.sqrt(float(self.parts[0].kernels.total(partials[0])))

    def _sum_of_squares_on_host(self) -> float:
        total = 0.0
        if self.native is not None:
            total += self.native.sum_of_squares(torch.get_num_threads())
        if grads := [item.grad for item in self.others if item.grad is not None]:
            total += float(reference.power_sum(grads, 2))
        return total


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
        try:
            backend = dispatch.backend_for([param, *states.values()], optimizer.backend, place)
        except RuntimeError:  # time enough when there is a gradient
            return None
    else:
        dispatch.check(param, grad, place)
        dispatch.check_step(state.get("step", 0.0), place)
        for name, tensor in states.items():
            dispatch.check_state(param, name, tensor, place)
        tensors = [param, grad, *states.values()]
        backend = dispatch.backend_for(tensors, optimizer.backend, place)
    return Item(place.group_index, param, grad, backend, state, states)


def _make_states(
    optimizer: Optimizer, items: list[Item], names: list[tuple[str, ...]], on_device: bool
) -> list[tuple[Tensor, dict[str, Any] | None]]:
    """Gives every item the states that it lacks, and returns what there was before: for each of
    these parameters a copy of its entry in the optimizer's state, None where it had none."""
    rule, groups = optimizer.rule, optimizer.param_groups
    # All memory first, so that nothing has changed where there is not enough of it.
    made = []
    for item in items:
        step_on = item.param.device if on_device and item.backend == "triton" else None
        new = new_states(
            rule, groups[item.group], item.param, item.state, names[item.group], step_on
        )
        if new and capturing(item.param.device):
            raise RuntimeError(
                "the states of a parameter would be made within a CUDA graph, and made again at "
                "each replay: make one step before the capture"
            )
        made.append(new)
    state = optimizer.state
    before = [
        (item.param, dict(state[item.param]) if item.param in state else None)
        for item, new in zip(items, made, strict=True)
        if new
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
    return before


def new_states(
    rule: Rule,
    group: Group,
    param: Tensor,
    state: dict[str, Any],
    names: tuple[str, ...],
    step_on: torch.device | None = None,
) -> dict[str, Tensor]:
    """The states called ``names``, and ``step``, that a parameter's ``state`` lacks.

    Args:
        step_on: where the step must be, for a rule that has no use for it on the host too.
    """
    missing = [name for name in names if state.get(name) is None]
    new = {}
    if rule.counts_steps or (names and (step_on is not None or "step" in state)):
        # A rule that does not count makes its first step with the states.
        step = state.get("step", 0.0 if rule.counts_steps else 1.0)
        if missing and not rule.counts_steps:
            step = 0.0
        device = step_on or torch.device("cpu")
        # A number in old checkpoints; elsewhere, or fp64, in some of torch's.
        if not isinstance(step, Tensor) or step.dtype != torch.float32 or step.device != device:
            new["step"] = torch.full((), float(step), dtype=torch.float32, device=device)
    for name in missing:
        new[name] = torch.full_like(
            param,
            rule.initial(group),
            dtype=reference.arithmetic_dtype(param),
            memory_format=torch.preserve_format,
            requires_grad=False,
        )
    return new
