"""``python -m bench.gpu``: fastopt on a GPU, against torch.optim, other packages and a bare copy.

Contenders take turns within one run, on the same parameters and gradients, each with its own
states. Timed are the device by itself, which starts when everything has been launched; and where
the host matters, an iteration's step from an idle device until that is idle again, and until the
call returns.

"fastopt" is what it does by default, which for bf16 parameters is the split master; its other
precision modes take turns with it.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from datetime import datetime
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from . import bound, clocks, gpu_picture, gpu_report, machine, modes, report, workloads
from .arguments import existing
from .bound import Copy
from .clocks import Clock
from .contenders import Contender, Fastopt, Rule, UnavailableError, rules, tried
from .jobs import Failure, Job, run
from .measure import OPERATIONS, Row, Skip, compare
from .overhead import OPERATION, Slope, sweep
from .peers import (
    Apex,
    BitsAndBytes,
    BitsAndBytes8Bit,
    FlashOptim,
    MastersByHand,
    Optimi,
    TorchAO,
    TorchForeach,
    TorchFused,
)
from .startup import FirstStep, first_steps
from .workloads import Workload, doubles

RESULTS = Path(__file__).with_name("results")
MAIN = "AdamW"
PARTS = ("large", "medium", "small", "overhead", "startup")
ROUNDS = 20
COPY = 4 << 30  # bytes: far more than any cache holds
QUICK_ROUNDS = 3
QUICK_ELEMENTS = 5_000_000
QUICK_COPY = 64 << 20

PEERS: tuple[type[Contender], ...] = (
    *(TorchFused, TorchForeach),
    *(Optimi, FlashOptim, BitsAndBytes, Apex),
)
# Beside them TorchAO, once only: it compiles a kernel for each shape, which takes long.
IN_FP32 = (modes.FP32_8BIT, *PEERS, BitsAndBytes8Bit)
IN_BF16 = (
    *(modes.FULL, modes.STOCHASTIC, modes.SPLIT_8BIT, modes.STOCHASTIC_8BIT, modes.PLAIN_BF16),
    *(*PEERS, MastersByHand, BitsAndBytes8Bit),
)
KINDS = dict.fromkeys((Fastopt, modes.FP32_8BIT, *IN_BF16, TorchAO))
NAMES = [*(kind.name for kind in KINDS), Copy.name]


def main() -> None:
    console = report.terminal(200)
    options = parse()
    if options.show:
        made, path = report.load(options.show), options.show
    else:
        made = measured(options, console)
        path = options.json or RESULTS / f"{machine.dashed(made['name'])}-{made['date'][:10]}.json"
        report.save(made, path)
    gpu_report.show(made, console)
    gpu_picture.draw(made, path.with_suffix(".png"))
    console.print(f"{path}, {path.with_suffix('.png').name}")
    sys.exit(bool(made["failed"]))


def measured(options: argparse.Namespace, console: Console) -> report.Report:
    device = options.device
    date = datetime.now().astimezone()
    begin = machine.cpu_seconds()
    results = run(list(jobs(options)), console)
    gpu = machine.gpu(device) if device.type == "cuda" else {}

    def part(kind: type[Any]) -> list[dict[str, Any]]:
        return [asdict(result) for result in results if isinstance(result, kind)]

    return {
        "date": date.isoformat(timespec="seconds"),
        "commit": machine.commit(),
        "name": gpu.get("name", machine.cpu()),
        "gpu": gpu,
        "machine": machine.describe(),
        "used_by_others": round(machine.used_by_others(begin), 3),
        "versions": machine.versions(),
        "contenders": NAMES,
        "rows": part(Row),
        "overhead": part(Slope),
        "startup": part(FirstStep),
        "skipped": part(Skip),
        "failed": part(Failure),
    }


def jobs(options: argparse.Namespace) -> Iterator[Job]:
    """What to measure."""
    device_clock, host_clock = clocks.of(options.device)
    rounds = QUICK_ROUNDS if options.quick else ROUNDS
    measured = partial(
        measure, device=options.device, rounds=rounds, copied=QUICK_COPY if options.quick else COPY
    )
    available = workloads.load()
    if options.quick:
        available = {name: found.head(QUICK_ELEMENTS) for name, found in available.items()}
    large, medium = available[gpu_report.LARGE], available[gpu_report.MEDIUM]
    small = workloads.many_small(1000, 1000)
    low = replace(large, dtype=torch.bfloat16)
    # The rule that matters most comes first, in case that time runs out.
    for part, rule in product(options.part, sorted(rules(), key=lambda rule: rule.title != MAIN)):
        if part == "large" and rule.title == MAIN:
            for found, peers in ((large, IN_FP32), (low, IN_BF16)):
                measure_large = partial(measured, rule, found, [device_clock], peers=peers)
                yield f"{found.name}, {found.dtype}", measure_large
        elif part == "medium":
            peers = (*IN_FP32, TorchAO) if rule.title == MAIN else PEERS
            both = [device_clock, host_clock]
            yield f"{medium.name}, {rule.name}", partial(measured, rule, medium, both, peers=peers)
        elif part == "small":
            yield f"{small.name}, {rule.name}", partial(measured, rule, small, [host_clock])
        elif part == "overhead":
            steps = partial(
                measured, rule, time=[host_clock], operations=[OPERATION], peers=[TorchFused]
            )
            yield f"overhead, {rule.name}", partial(sweep, rule, steps, clocks.HOST)
        elif part == "startup":
            yield f"first step, {rule.name}", partial(first_steps, rule, options.device)


def measure(
    rule: Rule,
    workload: Workload,
    time: Sequence[Clock],
    device: torch.device,
    rounds: int,
    copied: int,
    operations: Sequence[str] = tuple(OPERATIONS),
    peers: Sequence[type[Contender]] = PEERS,
) -> Iterator[Row | Skip]:
    """The rows of one rule on one workload.

    Args:
        time: the clocks, each of which has rounds of its own.
        copied: how many bytes the bare copy copies that takes part where memory matters.
    """
    release()
    params = workload.parameters(device)
    has_masters = workload.dtype.itemsize == 2
    ours = Fastopt(rule, doubles(params) if has_masters else params)
    ours.run()
    contenders: list[Contender] = [ours]
    for kind in peers:
        # A parameter that others have written would be a new one to fastopt, without its master.
        apart = has_masters and issubclass(kind, Fastopt)
        try:
            contenders.append(tried(kind, rule, doubles(params) if apart else params))
        except UnavailableError as reason:
            yield Skip(rule.name, kind.name, str(reason))
        release()
    traffic = {contender.name: bound.traffic(contender.optimizer) for contender in contenders}
    copies = [] if workload.small else [Copy(device, copied)]
    prepare = renewal(workload, [contender.params for contender in contenders])
    for operation, clock in product(operations, time):
        passes = {
            contender.name: contender.clip_passes if OPERATIONS[operation] else 0
            for contender in contenders
        }
        yield from compare(
            rule,
            workload,
            operation,
            [*contenders, *copies],
            {name: bound.bytes_moved(traffic[name], passes[name]) for name in traffic}
            | {copy.name: copy.bytes_moved for copy in copies},
            bound.working_set(traffic[ours.name]),
            rounds,
            prepare,
            clock,
        )


def renewal(workload: Workload, lists: Sequence[list[Tensor]]) -> Callable[[], None]:
    """What gives the lists of parameters, some of which may be the same list, gradients that lie
    elsewhere than those of the last step."""
    distinct = list({id(params): params for params in lists}.values())

    def renew() -> None:
        for params in distinct:
            workload.renew_gradients(params)

    grads = [param.grad for param in distinct[0]]
    others: list[Tensor | None] = [torch.clone(param.detach()) for param in distinct[0]]

    def swap() -> None:
        nonlocal grads, others
        grads, others = others, grads
        for params in distinct:
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad

    return renew if workload.small else swap


def release() -> None:
    """Frees the memory of optimizers that are no more: they are cyclic garbage."""
    gc.collect()
    torch.cuda.empty_cache()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument(
        "--part",
        action="append",
        choices=PARTS,
        help="what to measure; may be repeated (default: all)",
    )
    parser.add_argument(
        "--device", type=torch.device, default="cuda", help="cpu: to try this program itself"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"{QUICK_ROUNDS} rounds on parts of the models: for a look",
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="where to save the results")
    parser.add_argument(
        "--show",
        type=existing,
        metavar="PATH",
        help="measure nothing, print and draw saved results",
    )
    options = parser.parse_args()
    options.part = options.part or PARTS
    if not options.show and options.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU here; --device cpu --quick tries the program itself")
    return options


if __name__ == "__main__":
    main()
