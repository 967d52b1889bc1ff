"""``python -m bench.precision``: the speed of the precision modes, and of steps under a GradScaler.

Contenders take turns within one run, as in `measure`: on the same gradients, and on the same states
where these are of one kind. Parameters of 16 bits are everyone's own: fastopt would take one that
others have written as a new one, without its master. The baselines are torch's fused AdamW on fp32
parameters, and what users write around it for bf16 ones: fp32 masters, gradients cast up, the step,
masters cast down.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from functools import partial
from statistics import median
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

import fastopt

from . import bound, clocks, machine, modes, report, workloads
from .arguments import at_least, one_of
from .contenders import MAX_NORM, Contender, Fastopt, Rule, UnavailableError, tried
from .jobs import Failure, Job, run
from .measure import Skip, interleave
from .modes import Case
from .peers import BitsAndBytes8Bit, MastersByHand, TorchAO, TorchFused
from .report import Cell, Goal, Line, digits
from .workloads import Workload, doubles

RULE = Rule(fastopt.AdamW, {})
ROUNDS, SLOW_ROUNDS = 11, 3
FUSED, BY_HAND = Case(TorchFused, torch.float32), Case(MastersByHand, torch.bfloat16)
CASES = [
    *(FUSED, BY_HAND),
    *modes.cases(modes.FP32, modes.SPLIT, modes.FULL, modes.STOCHASTIC),
    *modes.cases(modes.SPLIT_8BIT, modes.STOCHASTIC_8BIT, modes.FP32_8BIT),
]
SLOW = [
    Case(kind, dtype)
    for kind in (BitsAndBytes8Bit, TorchAO)
    for dtype in (torch.float32, torch.bfloat16)
]
MODES, SCALERS, PEERS = "Precision modes", "Steps under a GradScaler", "8-bit states of others"
THREE_CALLS = "torch: unscale_, clip_grad_norm_, fused step"
TORCH_SCALER, OUR_SCALER = "fastopt, torch's GradScaler", "fastopt, fastopt.GradScaler"
LEGEND = (
    "Median milliseconds; x: the other's time divided by this one's; GB/s: of the bytes that the "
    "precision needs; of the bound: of the GB/s of a bare loop with the reads and writes of fp32."
)


@dataclass(frozen=True)
class Turn:
    """What is timed, under the name that it has in the tables."""

    name: str
    run: Callable[[], None]
    moved: bound.Traffic
    clip_passes: int = 0

    @property
    def needed(self) -> int:
        return bound.bytes_moved(self.moved, self.clip_passes)


@dataclass(frozen=True)
class Result:
    """The ratios are medians over the rounds, in each of which both times were taken."""

    part: str
    name: str
    milliseconds: float
    ratios: dict[str, float]  # by baseline: its time divided by this one's
    gb_per_s: float
    of_bound: float | None


def measure(
    part: str,
    turns: Sequence[Turn],
    baselines: Sequence[str],
    rounds: int,
    prepare: Callable[[], None],
) -> Iterator[Result]:
    """The results of those who take turns."""
    samples = interleave(turns, rounds, prepare, clocks.wall)[clocks.WALL]
    by_name = {turn.name: turn for turn in turns}

    def ratio(base: str, name: str) -> float:
        return median(b / t for b, t in zip(samples[base], samples[name], strict=True))

    for turn in turns:
        time = median(samples[turn.name])
        of_bound = None
        if limit := by_name.get(bound.Bound.name):
            of_bound = ratio(limit.name, turn.name) * turn.needed / limit.needed
        ratios = {base: ratio(base, turn.name) for base in baselines if base in by_name}
        yield Result(part, turn.name, time / 1e6, ratios, turn.needed / time, of_bound)


def compare_cases(
    part: str, cases: Sequence[Case], baselines: Sequence[Case], workload: Workload, rounds: int
) -> Iterator[Result | Skip]:
    """The steps of some cases; where torch's fused fp32 is one, with the bare loop."""
    gc.collect()  # optimizers are cyclic garbage, and the last ones' memory may be needed
    turns = []
    for made in turns_of(cases, workload):
        if isinstance(made, Skip):
            yield made
            continue
        turns.append(made)
        if made.name == FUSED.name:
            try:
                turns.append(Turn(bound.Bound.name, bound.Bound(made.moved).run, made.moved))
            except UnavailableError as reason:
                yield Skip(RULE.name, bound.Bound.name, str(reason))
    yield from measure(part, turns, [case.name for case in baselines], rounds, lambda: None)


def turns_of(cases: Sequence[Case], workload: Workload) -> Iterator[Turn | Skip]:
    dtypes = dict.fromkeys(case.dtype for case in cases)
    common = {dtype: replace(workload, dtype=dtype).parameters() for dtype in dtypes}
    pool: dict[Any, Tensor] = {}
    for case in cases:
        params = common[case.dtype]
        if case.dtype != torch.float32:
            params = doubles(params)
        try:
            contender = tried(case.kind, RULE, params)
        except UnavailableError as reason:
            yield Skip(RULE.name, case.name, str(reason))
        else:
            share_states(contender.optimizer, pool)
            yield Turn(case.name, contender.run, bound.traffic(contender.optimizer))


def share_states(optimizer: Optimizer, pool: dict[Any, Tensor]) -> None:
    """Replaces moments by those in the pool, and adds what is new there.

    Where an array lies in memory makes a difference, see `measure`.
    """
    for number, state in enumerate(optimizer.state.values()):
        for name, value in state.items():
            if type(value) is Tensor and name.startswith("exp_avg"):
                state[name] = pool.setdefault((number, name, value.dtype), value)


def compare_scalers(part: str, workload: Workload, rounds: int) -> Iterator[Result]:
    """Unscale, clip and step on fp32 parameters, with scaled gradients that are new each time."""
    gc.collect()
    params = workload.parameters()
    grads = [param.grad for param in params]
    kinds = {
        THREE_CALLS: (TorchFused, torch.amp.GradScaler),
        TORCH_SCALER: (Fastopt, torch.amp.GradScaler),
        OUR_SCALER: (Fastopt, fastopt.GradScaler),
    }
    states = tried(TorchFused, RULE, params).optimizer.state
    turns = []
    for name, (kind, make_scaler) in kinds.items():
        contender = kind(RULE, params)
        contender.set_clip(True)
        contender.optimizer.state = states
        scaler = make_scaler("cpu")
        scale = float(scaler.scale(torch.ones(())))  # which also makes the scale
        moved = bound.traffic(contender.optimizer)
        turns.append(Turn(name, partial(scaled_step, contender, scaler), moved, clip_passes=1))
    scaled = [grad * scale for grad in grads]
    renew = partial(torch._foreach_copy_, grads, scaled)
    yield from measure(part, turns, [THREE_CALLS], rounds, renew)


def scaled_step(contender: Contender, scaler: torch.amp.GradScaler) -> None:
    """What follows the backward pass; fastopt unscales and clips within its step."""
    if not isinstance(contender, Fastopt):
        scaler.unscale_(contender.optimizer)
        clip_grad_norm_(contender.params, MAX_NORM)
    scaler.step(contender.optimizer)
    scaler.update()


def jobs(workload: Workload, rounds: int) -> Iterator[Job]:
    yield MODES, partial(compare_cases, MODES, CASES, [FUSED, BY_HAND], workload, rounds)
    yield SCALERS, partial(compare_scalers, SCALERS, workload, rounds)
    slow = modes.cases(modes.SPLIT_8BIT) + SLOW
    yield PEERS, partial(compare_cases, PEERS, slow, SLOW, workload, min(rounds, SLOW_ROUNDS))


def goals(results: Iterable[Result]) -> Iterator[Goal]:
    ratios = {(result.part, result.name): result.ratios for result in results}

    def faster(part: str, name: str, base: str) -> float | None:
        return ratios.get((part, name), {}).get(base)

    split, eight = modes.SPLIT.name, modes.SPLIT_8BIT.name
    for base, least in ((BY_HAND.name, 1.5), (FUSED.name, 1.0)):
        yield Goal(split, f"x {base}", least, True, faster(MODES, split, base))
    ratio = faster(MODES, eight, FUSED.name)
    yield Goal(eight, f"time, of {FUSED.name}", 0.75, False, ratio and 1 / ratio)
    for case in SLOW:
        yield Goal(eight, f"x {case.name}", 40, True, faster(PEERS, eight, case.name))
    for name, least in ((OUR_SCALER, 1.45), (TORCH_SCALER, 1.2)):
        yield Goal(name, "x torch's three calls", least, True, faster(SCALERS, name, THREE_CALLS))


def columns(results: Sequence[Result]) -> list[str]:
    return [
        results[0].part,
        "ms",
        *(f"x {base}" for base in results[0].ratios),
        "GB/s",
        "of the bound",
    ]


def lines(results: Iterable[Result]) -> Iterator[Line]:
    for result in results:
        ours = result.name.startswith(Fastopt.name)
        yield (
            Cell(result.name),
            Cell(digits(result.milliseconds)),
            *(Cell(f"{ratio:.2f}x", ours and ratio < 1) for ratio in result.ratios.values()),
            Cell(f"{result.gb_per_s:.1f}"),
            Cell("-" if result.of_bound is None else f"{result.of_bound:.2f}"),
        )


def main() -> None:
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    workload = workloads.load()[options.workload]
    begin = machine.cpu_seconds()
    # Tables in Markdown may go to a file, the progress bar shall not.
    results = run(list(jobs(workload, options.rounds)), Console(stderr=True))
    found = [result for result in results if isinstance(result, Result)]
    parts = [
        [result for result in found if result.part == part] for part in (MODES, SCALERS, PEERS)
    ]
    heading = (
        f"AdamW on {workload.source}; {machine.cpu()}, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}, {date.today()}: `python -m bench.precision`. {LEGEND}"
    )
    made = {
        "used_by_others": machine.used_by_others(begin),
        "skipped": [asdict(result) for result in results if isinstance(result, Skip)],
        "failed": [asdict(result) for result in results if isinstance(result, Failure)],
    }
    if options.markdown:
        tables = [report.pipes(columns(part), lines(part)) for part in parts if part]
        tables.append(report.pipes(report.GOAL_COLUMNS, report.goal_lines(goals(found))))
        print("\n\n".join([heading, *tables, *report.notes(made)]))
    else:
        console = report.terminal()
        console.print(heading)
        for part in filter(None, parts):
            console.print(report.table(columns(part), lines(part)))
        console.print(report.goal_table(goals(found)), *report.notes(made), sep="\n")
    sys.exit(bool(made["failed"]))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.precision", description=__doc__)
    # Steps over small tensors wait for fresh gradients, which all cases share here.
    names = [name for name, found in workloads.load().items() if not found.small]
    parser.add_argument("--workload", type=one_of(names), default="gpt2", help=", ".join(names))
    parser.add_argument("--rounds", type=at_least(2), default=ROUNDS, help="timed rounds")
    parser.add_argument("--threads", type=at_least(1), help="default: torch's choice")
    parser.add_argument("--markdown", action="store_true", help="print Markdown")
    return parser.parse_args()


if __name__ == "__main__":
    main()
