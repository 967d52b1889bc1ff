"""The memory that a parameter costs, by optimizer and precision mode.

Nothing is computed from formulas: after a step on a model's tensors, this counts the bytes of the
storages under the parameters, their masters (a full copy, or what completes the parameter to one),
the optimizer's states and the gradients, each storage once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from .bound import tensors_of
from .contenders import Contender, Rule, UnavailableError, told
from .isolate import Child
from .measure import Group, prepare, release
from .modes import Case
from .records import Footprint, Skip, case_of
from .turns import MASTERS, UNSCALE, Local, Turn
from .workloads import Workload

PROBE = Workload("probe", "one tensor", ((1, ((2**16,),)),))
#: Bytes per parameter that come and go: what a step allocates, states before they are shared.
PASSING = 8
#: Bytes per parameter of one that cannot be tried first, because it compiles: its states.
STATES = 8


class Held(NamedTuple):
    """The tensors of a contender."""

    params: list[Tensor]
    masters: list[Tensor]
    states: list[Tensor]
    grads: list[Tensor]


def held(contender: Contender) -> Held:
    state = state_tensors(contender.optimizer)
    # An optimizer of masters that somebody keeps by hand has other parameters than the model.
    optimized = [param for group in contender.optimizer.param_groups for param in group["params"]]
    model = set(contender.params)
    masters = [param for param in optimized if param not in model]
    masters += chain.from_iterable(state.pop(name, []) for name in MASTERS)
    grads = [param.grad for param in {*model, *optimized} if param.grad is not None]
    return Held(contender.params, masters, list(chain.from_iterable(state.values())), grads)


def stored_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of memory under the tensors, each storage counted once."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def state_tensors(optimizer: Optimizer) -> dict[str, list[Tensor]]:
    """The tensors of the optimizer's state, over all parameters, by the state's name."""
    found = defaultdict(list)
    for state in optimizer.state.values():
        for name, value in state.items():
            found[name].extend(tensors_of(value))
    return found


def footprint(
    case: Case, rule: Rule, workload: Workload, device: torch.device
) -> Iterator[Footprint | Skip]:
    """What one case costs after a step."""
    release(device)
    arguments = (case, rule, workload, device)
    try:
        if case.kind.own_process:
            with closing(Child(Weighing, *arguments)) as child:
                yield child.call("result")
        else:
            yield Weighing(*arguments).result()
    except Exception as error:
        where = case_of(rule.name, workload.name, case.precision, "memory")
        crashed = not isinstance(error, UnavailableError)
        yield Skip(case.name, where, told(error), crashed)


class Weighing:
    """A contender that has made a step, and what it weighs."""

    def __init__(self, case: Case, rule: Rule, workload: Workload, device: torch.device) -> None:
        contender = case.make(rule, workload.parameters(device, case.dtype))
        contender.run()
        params, masters, states, grads = held(contender)
        parts = (params, masters, states, [*params, *masters, *states], grads)
        sizes = [stored_bytes(part) / workload.elements for part in parts]
        self.found = Footprint(workload.name, case.name, case.precision, *sizes)

    def result(self) -> Footprint:
        return self.found


def required(group: Group) -> int:
    """Bytes of memory that a group needs, by what it takes on a small tensor."""
    compiling = [case for case in group.cases if case.kind.own_process or compiles(case)]
    tried = [case for case in group.cases if case not in compiling]
    turns: dict[Turn, Case] = {}
    with ExitStack() as stack:
        for _ in prepare(replace(group, workload=PROBE, cases=tried), turns, stack):
            pass
        tensors = [
            tensor
            for turn in turns
            if isinstance(turn, Local)
            for part in held(turn.contender)
            for tensor in part
        ]
    each = stored_bytes(tensors) / PROBE.elements + PASSING
    each += sum(2 * case.dtype.itemsize + STATES for case in compiling)
    if UNSCALE in group.operations:
        each += sum(dtype.itemsize for dtype in {case.dtype for case in group.cases})
    copied = 2 * group.copied if group.device.type == "cuda" else 0
    return round(each * group.workload.elements) + copied


def compiles(case: Case) -> bool:
    return getattr(case.kind, "compiles", False)
