"""``python -m bench``: fastopt against torch.optim and against what the memory allows."""

import argparse
import difflib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from datetime import datetime
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from . import machine, report, workloads
from .contenders import rules
from .measure import NAMES, Row, Skip, measure
from .overhead import Slope, sweep

SWEEP = "overhead"  # a workload of its own kind
RESULTS = Path(__file__).with_name("results")
ROUNDS = 11
QUICK_ROUNDS = 5
FILE_WIDTH = 120  # where the output is no terminal
SMALL_FACTOR = 4  # rounds of small workloads are cheap, and their times scatter more

Job = tuple[str, Callable[[], Iterable[Row | Slope | Skip]]]


def main() -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = FILE_WIDTH
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
    }
    path = options.json or RESULTS / f"{machine.slug()}-{date:%Y-%m-%d}.json"
    report.save(made, path)
    report.show(made, console)
    console.print(f"Saved as {path}")


def jobs(options: argparse.Namespace) -> Iterator[Job]:
    """What to measure: every chosen rule on every chosen workload."""
    available = workloads.load()
    chosen = [rule for rule in rules(options.all_variants) if rule.title in options.rule]
    small_rounds = SMALL_FACTOR * options.rounds
    for name in options.workload:
        for rule in chosen:
            title = f"{name}, {rule.name}"
            if name == SWEEP:
                yield title, partial(sweep, rule, small_rounds)
            else:
                rounds = small_rounds if available[name].small else options.rounds
                yield title, partial(measure, rule, available[name], rounds)


def run(work: Sequence[Job], console: Console) -> list[Row | Slope | Skip]:
    """All results, or with Ctrl-C those that are finished."""
    results: list[Row | Slope | Skip] = []
    columns = (TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
        task = progress.add_task("", total=len(work))
        try:
            for title, job in work:
                progress.update(task, description=title)
                results += job()
                progress.advance(task)
        except KeyboardInterrupt:
            console.print("Interrupted: what follows is what was finished.")
    return results


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    titles = list({rule.title: None for rule in rules()})
    names = [SWEEP, *workloads.load()]
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
        help=f"{', '.join(names)}; may be repeated (default: all)",
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
    options.workload = options.workload or names
    options.rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    return options


def one_of(names: Sequence[str]) -> Callable[[str], str]:
    """An argument type: one of the names, in whatever case."""

    def choose(text: str) -> str:
        by_case = {name.lower(): name for name in names}
        if text.lower() in by_case:
            return by_case[text.lower()]
        nearest = difflib.get_close_matches(text.lower(), by_case, n=1, cutoff=0)
        raise argparse.ArgumentTypeError(
            f"{text!r} is not known; did you mean {by_case[nearest[0]]}?"
        )

    return choose


def at_least(least: int) -> Callable[[str], int]:
    """An argument type: a whole number with a lower bound."""

    def whole(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} up")
        return int(text)

    return whole


def existing(text: str) -> Path:
    """An argument type: a file that is there."""
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"there is no file {text}")
    return Path(text)


if __name__ == "__main__":
    main()
