"""``python -m bench``: fastopt against torch.optim and against what the memory allows."""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import asdict
from datetime import datetime
from functools import partial
from pathlib import Path

import torch

from . import clocks, machine, report, workloads
from .arguments import at_least, existing, one_of
from .contenders import rules
from .jobs import Failure, Job, run
from .measure import NAMES, Row, Skip, measure
from .overhead import OPERATION, Slope, sweep
from .peers import TorchFused

SWEEP = "overhead"  # a workload of its own kind
RESULTS = Path(__file__).with_name("results")
ROUNDS = 11
QUICK_ROUNDS = 5
SMALL_FACTOR = 4  # rounds of small workloads are cheap, and their times scatter more


def main() -> None:
    console = report.terminal()
    options = parse()
    if options.markdown:
        chosen = report.select(report.load(options.markdown), options.rule, options.workload)
        print(report.markdown(chosen))
        return
    if options.threads:
        torch.set_num_threads(options.threads)
    date = datetime.now().astimezone()
    begin = machine.cpu_seconds()
    results = run(list(jobs(options)), console)
    made = {
        "date": date.isoformat(timespec="seconds"),
        "commit": machine.commit(),
        "machine": machine.describe(),
        "used_by_others": round(machine.used_by_others(begin), 3),
        "versions": machine.versions(),
        "rounds": options.rounds,
        "contenders": NAMES,
        "rows": [asdict(row) for row in results if isinstance(row, Row)],
        "overhead": [asdict(slope) for slope in results if isinstance(slope, Slope)],
        "skipped": [asdict(skip) for skip in results if isinstance(skip, Skip)],
        "failed": [asdict(failure) for failure in results if isinstance(failure, Failure)],
    }
    path = options.json or RESULTS / f"{machine.slug()}-{date:%Y-%m-%d}.json"
    report.save(made, path)
    report.show(made, console)
    console.print(f"Saved as {path}")
    sys.exit(bool(made["failed"]))


def jobs(options: argparse.Namespace) -> Iterator[Job]:
    """What to measure: every chosen rule on every chosen workload."""
    available = workloads.load()
    chosen = [rule for rule in rules(options.all_variants) if rule.title in options.rule]
    small_rounds = SMALL_FACTOR * options.rounds
    for name in options.workload:
        for rule in chosen:
            title = f"{name}, {rule.name}"
            if name == SWEEP:
                measured = partial(
                    measure,
                    rule,
                    rounds=small_rounds,
                    operations=[OPERATION],
                    peers=[TorchFused],
                    with_bound=False,
                )
                yield title, partial(sweep, rule, measured, clocks.WALL)
            else:
                rounds = small_rounds if available[name].small else options.rounds
                yield title, partial(measure, rule, available[name], rounds)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    titles = list({rule.title: None for rule in rules()})
    available = workloads.load()
    names = [SWEEP, *available]
    usual = [name for name in names if name == SWEEP or not available[name].large]
    parser.add_argument(
        "--rule",
        action="append",
        type=one_of(titles),
        metavar="RULE",
        help=f"{', '.join(titles)}; may be repeated (default: all)",
    )
    parser.add_argument(
        "--workload",
        action="append",
        type=one_of(names),
        metavar="WORKLOAD",
        help=f"{', '.join(names)}; may be repeated (default: all but the largest)",
    )
    parser.add_argument(
        "--all-variants", action="store_true", help="every kernel of a rule, not only the default"
    )
    parser.add_argument(
        "--rounds", type=at_least(2), help=f"timed rounds (default: {ROUNDS}; small tensors: more)"
    )
    parser.add_argument("--threads", type=at_least(1), help="default: torch's choice")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_ROUNDS} rounds: for a look")
    parser.add_argument("--json", type=Path, metavar="PATH", help="where to save the results")
    parser.add_argument(
        "--markdown",
        type=existing,
        metavar="PATH",
        help="measure nothing, print saved results as Markdown",
    )
    options = parser.parse_args()
    options.rule = options.rule or titles
    options.workload = options.workload or usual
    options.rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    return options


if __name__ == "__main__":
    main()
