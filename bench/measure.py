"""Interleaved timing: all contenders take turns within one run.

They take turns on the same tensors, too: parameters, gradients and states. Where the system happens
to put an array in memory makes a difference of up to a fifth, which lasts as long as the array does
and would be taken for a difference between contenders. Nobody gains from what another left in the
cache: the large workloads do not fit there, and small ones would stay there anyway.

The time of a contender is its median over the rounds. A ratio is the median over the rounds of the
ratio within one round, whose two times were taken a moment apart: where another process slows the
machine for a while, it slows both. Quartiles are given beside each.
"""

import gc
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import quantiles
from typing import Protocol

from . import bound
from .clocks import Clock, wall
from .contenders import Contender, Fastopt, Rule, UnavailableError
from .peers import TorchForeach, TorchFused
from .workloads import Workload

WARMUP = 2  # rounds: plans are built, caches filled, threads awake
PEERS: tuple[type[Contender], ...] = (TorchFused, TorchForeach)
NAMES = [Fastopt.name, *(peer.name for peer in PEERS), bound.Bound.name]
OPERATIONS = {"step": False, "clip + step": True}  # whether it clips


class Turn(Protocol):
    """What the stopwatch sees of a contender."""

    @property
    def name(self) -> str: ...
    def run(self) -> None: ...


class Timed(Turn, Protocol):
    """One that steps with and without clipping."""

    def set_clip(self, clip: bool) -> None: ...


@dataclass(frozen=True)
class Row:
    """One contender's result; ratios are to fastopt's time: above 1, fastopt is faster."""

    rule: str
    workload: str
    dtype: str
    operation: str
    clock: str
    contender: str
    rounds: int
    median_ns: float
    quartiles_ns: tuple[float, float]
    ratio: float
    ratio_quartiles: tuple[float, float]
    bytes_per_element: float  # that the operation needs, whatever else the contender moves
    gb_per_s: float
    working_set_mb: float


@dataclass(frozen=True)
class Skip:
    """A contender that could not run, and why."""

    rule: str
    contender: str
    reason: str


def measure(
    rule: Rule,
    workload: Workload,
    rounds: int,
    operations: Sequence[str] = tuple(OPERATIONS),
    peers: Sequence[type[Contender]] = PEERS,
    with_bound: bool = True,
) -> Iterator[Row | Skip]:
    """The rows of one rule on one workload, an operation at a time."""
    gc.collect()  # optimizers are cyclic garbage, and the last ones' memory may be needed
    params = workload.parameters()
    ours = Fastopt(rule, params)
    ours.run()
    contenders: list[Timed] = [ours]
    for kind in peers:
        try:
            peer = kind(rule, params)
        except UnavailableError as reason:
            yield Skip(rule.name, kind.name, str(reason))
        else:
            peer.optimizer.state = ours.optimizer.state
            contenders.append(peer)
    moved = bound.traffic(ours.optimizer)
    if with_bound:
        try:
            contenders.append(bound.Bound(moved))
        except UnavailableError as reason:
            yield Skip(rule.name, bound.Bound.name, str(reason))
    prepare = partial(workload.renew_gradients, params)
    for operation in operations:
        clip = OPERATIONS[operation]
        needed = bound.bytes_moved(moved, Fastopt.clip_passes if clip else 0)
        yield from compare(
            rule,
            workload,
            operation,
            contenders,
            dict.fromkeys((contender.name for contender in contenders), needed),
            bound.working_set(moved),
            rounds,
            prepare,
        )


def compare(
    rule: Rule,
    workload: Workload,
    operation: str,
    contenders: Sequence[Timed],
    needed: Mapping[str, int],
    working_set: int,
    rounds: int,
    prepare: Callable[[], None],
    clock: Clock = wall,
) -> Iterator[Row]:
    """The rows of one operation.

    Args:
        contenders: fastopt first.
        needed: the bytes that each of them has to move.
        working_set: the bytes that they touch.
        prepare, clock: see `interleave`.
    """
    for contender in contenders:
        contender.set_clip(OPERATIONS[operation])
    for what, samples in interleave(contenders, rounds, prepare, clock).items():
        for name, times in samples.items():
            low, median, high = quantiles(times, n=4, method="inclusive")
            ratios = [a / b for a, b in zip(times, samples[contenders[0].name], strict=True)]
            ratio_low, ratio, ratio_high = quantiles(ratios, n=4, method="inclusive")
            yield Row(
                rule=rule.name,
                workload=workload.name,
                dtype=str(workload.dtype).removeprefix("torch."),
                operation=operation,
                clock=what,
                contender=name,
                rounds=rounds,
                median_ns=median,
                quartiles_ns=(low, high),
                ratio=round(ratio, 4),
                ratio_quartiles=(round(ratio_low, 4), round(ratio_high, 4)),
                bytes_per_element=round(needed[name] / workload.elements, 2),
                gb_per_s=round(needed[name] / median, 2),
                working_set_mb=round(working_set / 1e6, 1),
            )


def interleave(
    contenders: Sequence[Turn], rounds: int, prepare: Callable[[], None], clock: Clock
) -> dict[str, dict[str, list[int]]]:
    """Nanoseconds of every round, by what they are and by contender.

    Args:
        prepare: what an iteration does before the optimizer's turn; not timed.
        clock: times one turn.
    """
    samples: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    order = random.Random(0)
    gc.collect()
    gc.disable()
    try:
        for number in range(WARMUP + rounds):
            # A new order each time: nobody always follows the same one.
            for contender in order.sample(contenders, len(contenders)):
                prepare()
                times = clock(contender.run)
                if number >= WARMUP:
                    for what, elapsed in times.items():
                        samples[what][contender.name].append(elapsed)
    finally:
        gc.enable()
    return samples
