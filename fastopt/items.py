"""What a step reads and writes of each parameter, validated."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import dispatch, memory, precision
from .devices import capturing
from .packing import PACKINGS, Stored
from .precision import Kept
from .rules import Group, Rule

if TYPE_CHECKING:
    from ._C import Description
    from .optimizers import Optimizer


def describe(stored: Stored) -> Description:
    """What the C++ backend needs to know of how some numbers are kept."""
    if stored.packing is None:
        storage = dispatch.DTYPES.index(stored.a.dtype)
    else:
        storage = len(dispatch.DTYPES) + list(PACKINGS).index(stored.packing)
    address, beside, sums = (
        0 if x is None else x.data_ptr() for x in (stored.a, stored.b, stored.sums)
    )
    return address, storage, tuple(stored.a.shape), stored.a.stride(), beside, sums


class Watched(NamedTuple):
    """What csrc/plan.cpp has to know of a parameter.

    Args:
        grad: None where there is none now.
        state: the optimizer's for this parameter, None where it is empty.
        rule: index into Rules of csrc/rules.h.
        operands: descriptions of parameter, gradient and states.
        states: the tensors of the parameter's state that a step writes, but for ``step``.
        fresh: there is no step to count, and the states are made in this step.
        part: 0: updated by the C++ kernels; else by this one of `Plan.parts`, counted from 1.
        scalars_here: the plan counts the step and computes the scalars, not the device.
    """

    grad: Tensor | None
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
        number: the parameter's place in the optimizer.
        grad: None where there is none now, while the states are there from an earlier step.
        state: the optimizer's for this parameter.
        forms: how the parameter and the rule's states are kept.
        place: names the parameter.
        fresh: the states are made in this step.
    """

    group: int
    number: int
    param: Tensor
    grad: Tensor | None
    backend: str
    state: dict[str, Any]
    forms: list[Kept]
    place: Place
    fresh: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """The rule's states."""
        return tuple(form.numbers for form in self.forms[1:])

    @property
    def stored(self) -> list[Stored]:
        """The parameter and the rule's states."""
        return [form.stored(self.param, self.state) for form in self.forms]

    def watched(self, rule: Rule, part: int, scalars_here: bool) -> Watched:
        extension = dispatch.extension()
        assert extension is not None
        grad = self.param if self.grad is None else self.grad
        param, *states = self.stored
        return Watched(
            grad=self.grad,
            state=self.state or None,
            rule=extension.rule_index(rule.name, " ".join(self.names)),
            operands=[describe(numbers) for numbers in (param, Stored(grad), *states)],
            states=[self.state[key] for form in self.forms for key in form.keys],
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
            grad=self.param if self.grad is None else self.grad,
            stored=self.stored,
            gap=rule.gap(self.names),
            number=self.number,
            group=self.group,
            step=None if scalars_here else self.state.get("step"),
        )


@dataclass
class Place:
    """Names a parameter in an error message."""

    group: Group
    group_index: int
    index: int

    @property
    def param(self) -> Tensor:
        param: Tensor = self.group["params"][self.index]
        return param

    def __str__(self) -> str:
        names = self.group.get("param_names")
        name = f" {names[self.index]!r}" if names else ""
        shape = tuple(self.param.shape)
        return f"parameter {self.index}{name} of group {self.group_index}, of shape {shape},"


def find(optimizer: Optimizer, place: Place, number: int, settings: list[Any]) -> Item | None:
    """What can be updated of a parameter; None where nothing is to be done in this step, nor known
    of a later one, because there is neither a gradient nor a state."""
    rule, param, grad = optimizer.rule, place.param, place.param.grad
    names = settings[place.group_index][0]
    state = optimizer.state.get(param, {})
    if not isinstance(state, dict):
        raise RuntimeError(
            f"{place} has a state that is no dict ({dispatch.short(state)}): delete the "
            "parameter's entry in optimizer.state"
        )
    if grad is not None:
        dispatch.check(param, grad, place, rule.sparse)
        dispatch.check_step(state.get("step", 0.0), place)
    try:
        forms = precision.kept(rule, place.group, param, names, place)
    except ValueError:
        if grad is None:  # time enough when there is a gradient
            return None
        raise
    if grad is None:
        known = (
            state
            and dispatch.fits(param, param, tuple(param.shape))
            and dispatch.is_count(state.get("step", 0.0))
        )
        if not known or not precision.are_there(param, state, forms):
            return None
    else:
        precision.check(param, state, rule, forms, place)
    tensors = [state[key] for form in forms for key in form.keys if state.get(key) is not None]
    try:
        grads = [] if grad is None else [grad]
        backend = dispatch.backend_for([param, *grads, *tensors], optimizer.backend, place)
    except RuntimeError:
        if grad is None:
            return None
        raise
    return Item(place.group_index, number, param, grad, backend, state, forms, place)


#: Calls that take the changes of a step back, last change first, until the step is made.
Undo = list[Callable[[], None]]


def take_back(undo: Undo) -> None:
    while undo:
        undo[-1]()
        undo.pop()


def make_states(optimizer: Optimizer, items: list[Item], on_device: bool, undo: Undo) -> None:
    """Gives every item the states that it lacks.

    Raises:
        RuntimeError: something cannot be updated; nothing was changed.
    """
    rule, groups, state = optimizer.rule, optimizer.param_groups, optimizer.state
    # All memory first, so that nothing has changed where there is not enough of it.
    made = {}
    uses: list[memory.Use] = []  # of memory that is there already
    counted: set[int] = set()  # the addresses of steps
    for item in items:
        if item.param in made:
            continue  # a parameter that stands twice gets its states once
        step_on = item.param.device if on_device and item.backend == "triton" else None
        new = new_states(rule, groups[item.group], item.param, item.state, item.forms, step_on)
        step = new.new.get("step", item.state.get("step"))
        if step is not None:
            if step.data_ptr() in counted:  # by several parameters, as one number
                new.new["step"] = step = step.clone()
            counted.add(step.data_ptr())
        arrays = {"": item.param} if item.grad is None else {"": item.param, "grad": item.grad}
        for key in (*(key for form in item.forms for key in form.keys), "step"):
            if key in item.state and key not in new.new:
                arrays[key] = item.state[key]
        uses += [memory.Use(item.param, item.place, *array) for array in arrays.items()]
        if new.new and capturing(item.param.device):
            raise RuntimeError(
                "the states of a parameter would be made within a CUDA graph, and made again at "
                "each replay: make one step before the capture"
            )
        made[item.param] = new
    memory.check(uses)
    changed = [param for param, new in made.items() if new.new or new.obsolete]
    before = {param: dict(state[param]) if param in state else None for param in changed}
    undo.append(functools.partial(_put_back, state, before))
    for item in items:
        if item.param in made:
            new = made.pop(item.param)
            if new.new:
                state.setdefault(item.param, {}).update(new.new)
                item.fresh = new.fresh
            for key in new.obsolete:
                del state[item.param][key]
        item.state = state.get(item.param, item.state)


def _put_back(
    state: dict[Tensor, dict[str, Any]], before: dict[Tensor, dict[str, Any] | None]
) -> None:
    for param, entries in before.items():
        if entries is None:
            state.pop(param, None)
        else:
            state[param].clear()
            state[param].update(entries)


def new_states(
    rule: Rule,
    group: Group,
    param: Tensor,
    state: dict[str, Any],
    forms: list[Kept],
    step_on: torch.device | None = None,
) -> precision.Made:
    """The states in ``forms``, and ``step``, that a parameter's ``state`` lacks.

    Args:
        step_on: where the step must be, for a rule that has no use for it on the host too.
    """
    made = precision.make(rule, group, param, state, forms)
    if (
        rule.counts_steps
        or precision.is_random(forms)
        or "step" in state
        or (len(forms) > 1 and step_on is not None)
    ):
        # A rule that does not count makes its first step with the states.
        first = rule.counts_steps or made.fresh or len(forms) == 1
        step = state.get("step", 0.0 if first else 1.0)
        if made.fresh and not rule.counts_steps:
            step = 0.0
        device = step_on or torch.device("cpu")
        if not _is_plain(step, device):
            number = float(step.detach() if isinstance(step, Tensor) else step)
            made.new["step"] = torch.full((), number, dtype=torch.float32, device=device)
    return made


def _is_plain(step: object, device: torch.device) -> bool:
    """Whether a step is as new ones are. In old checkpoints it is a number, in some of torch's on
    another device, of fp64 or of shape (1,); and a lazily negated one is not what its memory is."""
    return (
        type(step) is Tensor
        and (step.dtype, step.shape, step.device) == (torch.float32, (), device)
        and not (step.is_neg() or step.requires_grad or step.is_inference())
    )
