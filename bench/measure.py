"""Interleaved timing: all contenders take turns within one run, in a new order each round.

They take turns on the same tensors, too: parameters, gradients and states, as far as their dtypes
allow. Where the system happens to put an array in memory makes a difference of up to a fifth, which
lasts as long as the array does and would be taken for a difference between contenders. Nobody gains
from what another left in the cache: the large workloads do not fit there, and small ones would stay
there anyway. Parameters of 16 bits are fastopt's own in each mode: it would take one that others
have written as a new one, without its master. See METHOD.md.
"""

from __future__ import annotations

import gc
import random
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import torch
from torch import Tensor

from . import clocks, machine
from .contenders import Fastopt, FastoptTorchScaler, Rule, UnavailableError, told
from .isolate import Remote
from .modes import Case
from .ranks import Ranks
from .records import BOUND, COPY, Skip, Timing, case_of
from .turns import OPERATIONS, UNSCALE, Bound, Copy, Local, Turn
from .workloads import Gradients, Workload, doubles

WARMUP = 2  # rounds: plans are built, caches filled, threads awake
SLOW_ROUNDS = 3
SMALL_FACTOR = 4  # rounds of small workloads are cheap, and their times scatter more
#: Seconds: for how long threads that have nothing to do may be waiting in a loop, and keep a core
#: from another process.
SETTLING = 0.02
IN_CACHE, IN_MEMORY = 1 / 2, 4  # of the last level cache: up to the one, and from the other on

Samples = dict[str, list[int]]  # nanoseconds, by what they are


@dataclass(frozen=True)
class Group:
    """Contenders who are to take turns."""

    rule: Rule
    workload: Workload
    cases: Sequence[Case]
    operations: Sequence[str] = OPERATIONS
    rounds: int = 11
    device: torch.device = torch.device("cpu")  # noqa: RUF009
    fresh_gradients: bool = True
    copied: int = 0  # bytes of the bare copy on a GPU
    with_bound: bool = True


#: Groups are numbered as they come.
numbers = count()


def measure(group: Group) -> Iterator[Timing | Skip]:
    """An operation at a time. Those that are slow have rounds of their own, with fastopt."""
    release(group.device)
    rounds = group.rounds * (SMALL_FACTOR if group.workload.small else 1)
    with ExitStack() as stack:
        turns: dict[Turn, Case] = {}
        yield from prepare(group, turns, stack)
        every = [*turns]
        yield from add_bounds(group, turns, every)
        slow = {
            turn
            for turn, case in turns.items()
            if case.kind.slow and group.device.type == "cpu" and not group.workload.small
        }
        ours = [turn for turn, case in turns.items() if issubclass(case.kind, Fastopt)]
        quick = [turn for turn in every if turn not in slow]
        for operation in group.operations:
            yield from compare(group, operation, quick, rounds)
            if slow:
                several = [
                    turn for turn in every if turn in slow or turn in ours or turn.name == BOUND
                ]
                yield from compare(group, operation, several, min(rounds, SLOW_ROUNDS))


def prepare(group: Group, turns: dict[Turn, Case], stack: ExitStack) -> Iterator[Skip]:
    """Puts those that can take turns into ``turns``, and yields the others."""
    workload, device = group.workload, group.device
    common: dict[torch.dtype, tuple[list[Tensor], Gradients | None]] = {}
    pool: dict[Any, Tensor] = {}
    stopwatches = clocks.of(device, workload.elements)
    for case in group.cases:
        try:
            if case.kind.own_process:
                turn: Turn = Remote(case, group.rule, replace(workload, ranks=0), device)
            elif workload.ranks:
                turn = Ranks(case, group.rule, workload, device)
            else:
                if case.dtype not in common:
                    params = workload.parameters(device, case.dtype)
                    gradients = Gradients(workload, params) if group.fresh_gradients else None
                    common[case.dtype] = params, gradients
                params, gradients = common[case.dtype]
                if case.dtype != torch.float32:
                    params = doubles(params)
                turn = Local(case, group.rule, params, gradients, stopwatches)
                turn.share_states(pool)
        except Exception as error:
            yield skip(group, case, error)
        else:
            stack.callback(turn.close)
            turns[turn] = case
        release(device)


def add_bounds(group: Group, turns: dict[Turn, Case], every: list[Turn]) -> Iterator[Skip]:
    """Adds what the memory allows, on a CPU at each precision of fastopt's, and yields what cannot
    be run."""
    if not group.with_bound:
        return
    if group.device.type == "cuda":
        if not group.workload.small:
            stopwatches = clocks.of(group.device, group.workload.elements)
            try:
                every.append(Copy(group.device, group.copied, stopwatches))
            except Exception as error:
                yield skip(group, Copy, error)
        return
    for turn, case in turns.items():
        if case.kind is Fastopt and isinstance(turn, Local):
            try:
                every.append(Bound(turn))
            except Exception as error:
                yield replace(skip(group, turn, error), contender=BOUND)


def compare(
    group: Group, operation: str, turns: Sequence[Turn], rounds: int
) -> Iterator[Timing | Skip]:
    """The timings of one operation; of a turn that raises, the reason."""
    able: list[Turn] = []
    for turn in turns:
        if turn.name == FastoptTorchScaler.name and operation != UNSCALE:
            continue
        try:
            turn.operate(operation)
        except Exception as error:
            yield skip(group, turn, error, operation)
        else:
            able.append(turn)
    number = next(numbers)
    cache = machine.cache_bytes(group.device)
    for clock in range(len(clocks.of(group.device, group.workload.elements))):
        found, failed = interleave(able, rounds, clock)
        for turn, error in failed.items():
            able.remove(turn)
            yield skip(group, turn, error, operation)
        for turn, samples in found.items():
            for what, times in samples.items():
                if turn.name == COPY and what != clocks.DEVICE:
                    continue  # it says something about the device's time alone
                yield Timing(
                    group=number,
                    rule=group.rule.name,
                    workload=group.workload.name,
                    tensors=len(group.workload.shapes),
                    elements=group.workload.elements,
                    operation=operation,
                    clock=what,
                    contender=turn.name,
                    precision=turn.precision,
                    samples_ns=times,
                    needed_bytes=turn.needed(operation),
                    working_set_bytes=turn.working_set,
                    regime=regime(turn.working_set, cache),
                    own_process=turn.own_process,
                )


def interleave(
    turns: Sequence[Turn], rounds: int, clock: int
) -> tuple[dict[Turn, Samples], dict[Turn, Exception]]:
    """The samples of those who took all their turns, and why the others did not.

    Args:
        clock: the number of the one that tells.
    """
    samples: dict[Turn, Samples] = {turn: defaultdict(list) for turn in turns}
    failed: dict[Turn, Exception] = {}
    settling = SETTLING if len({turn.own_process for turn in turns}) > 1 else 0
    order = random.Random(0)
    with no_garbage_collection():
        for number in range(WARMUP + rounds):
            # A new order each time: nobody always follows the same one.
            for turn in order.sample(turns, len(turns)):
                if turn in failed:
                    continue
                time.sleep(settling)
                try:
                    times = turn.take(clock, number)
                except Exception as error:
                    failed[turn] = error
                    del samples[turn]
                    continue
                if number >= WARMUP:
                    for what, elapsed in times.items():
                        samples[turn][what].append(elapsed)
    return samples, failed


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def skip(
    group: Group, who: Case | Turn | type[Copy], error: Exception, operation: str = ""
) -> Skip:
    case = case_of(group.rule.name, group.workload.name, who.precision, operation)
    return Skip(who.name, case, told(error), crashed=not isinstance(error, UnavailableError))


def regime(size: int, cache: int) -> str:
    """Where a working set of so many bytes is."""
    if size <= IN_CACHE * cache:
        return "cache"
    return "memory" if size >= IN_MEMORY * cache else "between"


def release(device: torch.device) -> None:
    """Frees the memory of optimizers that are no more: they are cyclic garbage."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
