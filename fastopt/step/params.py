"""What a step reads and writes of each parameter, validated, and its name in messages."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .. import precision
from ..packing import WHOLE, Piece, Stored, extent, memory_order
from ..precision import Kept
from ..rule import Group, Rule
from . import checks, dispatch, memory, shards
from .devices import capturing

if TYPE_CHECKING:
    from .._C import Description


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


@dataclass
class Target:
    """A tensor that a backend updates in place, of any layout, with all that it reads and writes.

    Args:
        stored: how it is kept, and then how the states that the rule updates are. Codes, and the
            second arrays of packings, have no gaps and lie in the memory order of the tensor.
        grad: of the dtype and strides that its gradients will have.
        names: the states.
        group: the index of its param group.
        number: its place in the optimizer.
        piece: where its elements are in the whole, of which it is a shard.
        norm_class: which of the sums of a norm its gradient is part of.
        step: on the device that counts it; None where the host counts, or nobody.
    """

    stored: list[Stored]
    grad: Tensor
    names: tuple[str, ...] = ()
    group: int = 0
    number: int = 0
    piece: Piece = WHOLE
    norm_class: int = 0
    step: Tensor | None = None

    @property
    def param(self) -> Tensor:
        return self.stored[0].a

    @property
    def arrays(self) -> list[Tensor]:
        """The first arrays."""
        return [stored.a for stored in self.stored]

    @property
    def is_odd(self) -> bool:
        """Whether its tensors have gaps, or lie in different orders."""
        dims = memory_order(self.param)
        return not all(tensor.permute(dims).is_contiguous() for tensor in (*self.arrays, self.grad))

    @property
    def extent(self) -> tuple[int, int]:
        """The addresses from the parameter's first element to the end of its last."""
        begin = self.param.data_ptr()
        return begin, begin + extent(self.param)

    def operands(self) -> list[Description]:
        """Parameter, gradient and states, as C++ takes them."""
        param, *states = self.stored
        return [describe(numbers) for numbers in (param, Stored(self.grad), *states)]


def describe(stored: Stored) -> Description:
    """What C++ needs to know of how some numbers are kept."""
    address, beside, sums = (
        0 if x is None else x.data_ptr() for x in (stored.a, stored.b, stored.sums)
    )
    shape, strides = tuple(stored.a.shape), stored.a.stride()
    return address, stored.storage, shape, strides, beside, sums, stored.block


@dataclass
class Param:
    """A parameter that can be updated.

    Args:
        number: the parameter's place in the optimizer.
        param: what this process has of it, and so are the others.
        grad: None where there is none now, while the states are there from an earlier step.
        entries: the optimizer's state for this parameter, as it stands there.
        state: the same, what this process has of it.
        forms: how the parameter and the rule's states are kept.
        piece, norm_class: see `Target`.
        repeat: how often it stands earlier in the groups.
        fresh: the states are made in this step.
    """

    place: Place
    number: int
    param: Tensor
    grad: Tensor | None
    backend: str
    entries: dict[str, Any]
    state: dict[str, Any]
    forms: list[Kept]
    piece: Piece = WHOLE
    norm_class: int = 0
    repeat: int = 0
    fresh: bool = False

    @property
    def group(self) -> int:
        return self.place.group_index

    @property
    def whole(self) -> Tensor:
        """The parameter as it stands in its group."""
        return self.place.param

    @property
    def next_step(self) -> float:
        """The number of the step that it is about to make."""
        if "step" in self.state:
            return float(self.state["step"]) + 1 + self.repeat
        return 1.0 if self.fresh and not self.repeat else 2.0

    def target(self, counts: bool = False) -> Target:
        """As a backend takes it, which ``counts`` the steps on its device, or not."""
        return Target(
            stored=[form.stored(self.param, self.state) for form in self.forms],
            grad=self.param if self.grad is None else self.grad,
            names=tuple(form.numbers for form in self.forms[1:]),
            group=self.group,
            number=self.number,
            piece=self.piece,
            norm_class=self.norm_class,
            step=self.state.get("step") if counts else None,
        )

    def watched(self, rule: Rule, part: int, scalars_here: bool) -> Watched:
        extension = dispatch.extension()
        assert extension is not None
        target = self.target()
        return Watched(
            local=self.param,
            grad=self.grad,
            state=self.entries or None,
            rule=extension.rule_index(rule.name, " ".join(target.names)),
            operands=target.operands(),
            states=[self.entries[key] for form in self.forms for key in form.keys],
            step=self.state.get("step"),
            number=self.number,
            fresh=self.fresh,
            part=part,
            repeat=self.repeat,
            scalars_here=scalars_here,
            piece=self.piece,
            norm_class=self.norm_class,
        )


class Watched(NamedTuple):
    """What csrc/watch.h has to know of a parameter.

    Args:
        local: what this process has of the parameter.
        grad: likewise; None where there is none now.
        state: the optimizer's for this parameter, None where it is empty.
        rule: index into Rules of csrc/rules.
        operands: descriptions of parameter, gradient and states.
        states: the tensors of the parameter's state that a step writes, except ``step``.
        number, piece, norm_class: see `Target`.
        fresh: there is no step to count, and the states are made in this step.
        part: 0: updated by the C++ kernels; else on this one of the plan's devices, counted from 1.
        repeat: how often it stands earlier in the groups.
        scalars_here: the plan counts the step and computes the scalars, not the device.
    """

    local: Tensor
    grad: Tensor | None
    state: dict[str, Any] | None
    rule: int
    operands: list[Description]
    states: list[Tensor]
    step: Tensor | None
    number: int
    fresh: bool
    part: int
    repeat: int
    scalars_here: bool
    piece: Piece
    norm_class: int


def find(
    rule: Rule,
    place: Place,
    number: int,
    names: tuple[str, ...],
    states: dict[Tensor, Any],
    backend: str,
) -> Param | None:
    """What can be updated of a parameter. None if it has neither a gradient nor state.

    Args:
        names: the states that its group calls for.
        states: the optimizer's.
        backend: the optimizer's.

    Raises:
        RuntimeError, ValueError: it has a gradient and cannot be updated.
    """
    whole = place.param
    entries = states.get(whole, {})
    if not isinstance(entries, dict):
        raise RuntimeError(
            f"{place} has a state that is no dict ({checks.short(entries)}): delete the "
            "parameter's entry in optimizer.state"
        )
    if whole.grad is not None:
        shards.check(whole, whole.grad, place)
    param, grad = shards.local(whole), shards.local(whole.grad)
    state = shards.local_state(whole, entries)
    if grad is not None:
        checks.check(param, grad, place, rule.sparse)
        checks.check_step(state.get("step", 0.0), place)
    try:
        forms = precision.kept(rule, place.group, param, names, place, whole)
        piece = shards.piece(whole, forms, place)
        shards.check_state(whole, entries, precision.keys(rule.states), place)
        if grad is not None:
            precision.check(param, state, rule, forms, place)
        elif not _is_known(param, state, forms):
            return None
        tensors = [state[key] for form in forms for key in form.keys if state.get(key) is not None]
        grads = [] if grad is None else [grad]
        found = dispatch.backend_for([param, *grads, *tensors], backend, place, rule)
    except (RuntimeError, ValueError):
        if grad is None:  # time enough when there is a gradient
            return None
        raise
    return Param(place, number, param, grad, found, entries, state, forms, piece)


def _is_known(param: Tensor, state: dict[str, Any], forms: list[Kept]) -> bool:
    """Whether a parameter without a gradient has all that a later step needs."""
    return (
        bool(state)
        and checks.fits(param, param, tuple(param.shape))
        and checks.is_count(state.get("step", 0.0))
        and precision.are_there(param, state, forms)
    )


#: Calls that take the changes of a step back, last change first, until the step is made.
Undo = list[Callable[[], None]]


def take_back(undo: Undo) -> None:
    while undo:
        undo[-1]()
        undo.pop()


def make_states(
    rule: Rule, states: dict[Tensor, Any], params: list[Param], on_device: bool, undo: Undo
) -> None:
    """Gives every parameter the states that it lacks.

    Args:
        states: the optimizer's.
        on_device: the device counts the steps of what it updates.

    Raises:
        RuntimeError: something cannot be updated; nothing was changed.
    """
    # All memory first, so that nothing has changed if there is not enough of it.
    made: dict[Tensor, precision.Made] = {}  # a parameter that stands twice gets its states once
    uses: list[memory.Use] = []  # of memory that is there already
    counted: set[int] = set()  # the addresses of steps
    for each in params:
        if each.whole in made:
            continue
        step_on = each.param.device if on_device and each.backend == "triton" else None
        with torch.inference_mode(False), torch.no_grad():  # they outlive the mode of this step
            new = new_states(rule, each.place.group, each.param, each.state, each.forms, step_on)
        step = new.new.get("step", each.state.get("step"))
        if step is not None:
            if step.data_ptr() in counted:  # by several parameters, as one number
                new.new["step"] = step = step.clone()
            counted.add(step.data_ptr())
        if new.new and capturing(each.param.device):
            raise RuntimeError(
                "the states of a parameter would be made within a CUDA graph, and made again at "
                "each replay: make one step before the capture"
            )
        uses += _uses(each, new)
        made[each.whole] = new._replace(new=shards.whole_state(each.whole, new.new))
    memory.check(uses)
    changed = [param for param, new in made.items() if new.new or new.obsolete]
    before = {param: dict(states[param]) if param in states else None for param in changed}
    undo.append(functools.partial(_put_back, states, before))
    for each in params:
        if each.whole in made:
            new = made.pop(each.whole)
            if new.new:
                states.setdefault(each.whole, {}).update(new.new)
                each.fresh = new.fresh
            for key in new.obsolete:
                del states[each.whole][key]
        each.entries = states.get(each.whole, each.entries)
        each.state = shards.local_state(each.whole, each.entries)


def _uses(each: Param, new: precision.Made) -> list[memory.Use]:
    """What a parameter has of memory that was there before its new states."""
    arrays = {"": each.param}
    if each.grad is not None:
        arrays["grad"] = each.grad
    for key in (*(key for form in each.forms for key in form.keys), "step"):
        if key in each.state and key not in new.new:
            arrays[key] = each.state[key]
    return [memory.Use(each.param, each.place, *array) for array in arrays.items()]


def _put_back(
    states: dict[Tensor, dict[str, Any]], before: dict[Tensor, dict[str, Any] | None]
) -> None:
    for param, entries in before.items():
        if entries is None:
            states.pop(param, None)
        else:
            states[param].clear()
            states[param].update(entries)


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
