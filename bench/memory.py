"""``python -m bench.memory``: the memory that a parameter costs, by optimizer and precision mode.

Nothing is computed from formulas: after one step of AdamW on a model's tensors, this counts the
bytes of the storages under the parameters, their masters (a full copy, or what completes the
parameter to one), the optimizer's states and the gradients, each storage once.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, astuple, dataclass, replace
from itertools import chain

import torch
from rich.console import Console
from torch import Tensor
from torch.optim import Optimizer

import fastopt

from . import modes, report, workloads
from .arguments import one_of
from .bound import tensors_of
from .contenders import Rule, UnavailableError, tried
from .jobs import Failure, Job, run
from .measure import Skip
from .modes import Case
from .peers import BitsAndBytes8Bit, FlashOptim, MastersByHand, TorchAO, TorchFused
from .report import Cell, Line
from .workloads import Workload

RULE = Rule(fastopt.AdamW, {})
CASES = [
    *modes.cases(modes.FP32, modes.FP32_8BIT, modes.FULL, modes.SPLIT, modes.SPLIT_BF16),
    *modes.cases(modes.SPLIT_8BIT, modes.STOCHASTIC_8BIT),
    *(Case(TorchFused, torch.float32), Case(TorchFused, torch.bfloat16)),
    *(Case(MastersByHand, torch.bfloat16), Case(FlashOptim, torch.bfloat16)),
    *(Case(BitsAndBytes8Bit, torch.float32), Case(BitsAndBytes8Bit, torch.bfloat16)),
    *(Case(TorchAO, torch.float32), Case(TorchAO, torch.bfloat16)),
]
MASTERS = {"master_param", "param_remainder", "error_bits"}  # fastopt's, and flashoptim's
COLUMNS = ("optimizer", "precision", "parameter", "master", "states", "sum", "gradient apart")


@dataclass(frozen=True)
class Footprint:
    """Bytes per parameter."""

    optimizer: str
    precision: str
    parameter: float
    master: float
    states: float
    total: float
    gradient: float


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


def footprint(case: Case, workload: Workload, device: torch.device) -> Iterator[Footprint | Skip]:
    """What one case costs after a step."""
    gc.collect()  # optimizers are cyclic garbage, and the last one's memory may be needed
    params = replace(workload, dtype=case.dtype).parameters(device)
    try:
        optimizer = tried(case.kind, RULE, params).optimizer
    except UnavailableError as reason:
        yield Skip(RULE.name, case.name, str(reason))
        return
    state = state_tensors(optimizer)
    # An optimizer of masters that somebody keeps by hand has other parameters than the model.
    optimized = [param for group in optimizer.param_groups for param in group["params"]]
    model = set(params)
    masters = [param for param in optimized if param not in model]
    masters += chain.from_iterable(state.pop(name, []) for name in MASTERS)
    states = list(chain.from_iterable(state.values()))
    parts = (params, masters, states, [*params, *masters, *states])
    grads = [param.grad for param in {*params, *optimized} if param.grad is not None]
    yield Footprint(
        *case.names, *(stored_bytes(part) / workload.elements for part in (*parts, grads))
    )


def jobs(workload: Workload, device: torch.device) -> Iterator[Job]:
    for case in CASES:
        yield case.name, lambda case=case: footprint(case, workload, device)


def lines(results: Iterable[Footprint]) -> Iterator[Line]:
    for result in results:
        optimizer, precision, *numbers = astuple(result)
        yield Cell(optimizer), Cell(precision), *(Cell(f"{number:.2f}") for number in numbers)


def main() -> None:
    options = parse()
    console = report.terminal()
    workload = workloads.load()[options.workload]
    # Tables in Markdown may go to a file, the progress bar shall not.
    results = run(list(jobs(workload, options.device)), Console(stderr=True))
    found = [result for result in results if isinstance(result, Footprint)]
    title = f"Bytes per parameter: AdamW on {workload.source}, {workload.elements:,} parameters"
    if options.markdown:
        print(title, report.pipes(COLUMNS, lines(found)), sep="\n\n", end="\n\n")
    else:
        console.print(report.table(COLUMNS, lines(found), title=title))
    skipped, failed = ([asdict(r) for r in results if isinstance(r, t)] for t in (Skip, Failure))
    for note in report.not_run(skipped, failed):
        print(note)
    sys.exit(bool(failed))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description=__doc__)
    parser.add_argument("--workload", type=one_of(list(workloads.load())), default="gpt2")
    parser.add_argument("--markdown", action="store_true", help="print Markdown")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=torch.device, default=device)
    return parser.parse_args()


if __name__ == "__main__":
    main()
