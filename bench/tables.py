"""How results are told: tables for the terminal, where a loss is red, and in Markdown."""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from math import floor, log10
from operator import itemgetter
from statistics import quantiles
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from . import goals
from .arguments import saved
from .modes import FP32
from .records import BOUND, COPY, OURS, Results, Skip, Timing, case_of, counterpart, part_of_bound
from .records import ratio as ratio_of

HELP = "print the tables of saved results"
QUIET = 0.03  # the part of the CPU time that other processes may take
FEW = 5  # contenders, up to which a group is a line and not a table
LEGEND = (
    "Median milliseconds; x: a contender's time divided by fastopt's at the same precision; bound: "
    "a bare loop with the same reads and writes (copy: within the GPU's memory); of the bound: "
    "fastopt's speed, in bytes that are needed, as a part of the bound's; in: where the data is."
)
OVERHEAD = "Microseconds per tensor per step; gradients kept from step to step, or fresh"
FOOTPRINTS = "Bytes of memory per parameter, of AdamW"
STARTUP = "First step of a process, by what is in Triton's cache: seconds"


@dataclass(frozen=True)
class Cell:
    text: str
    loses: bool = False  # a peer is faster than fastopt


Line = tuple[Cell, ...]


class Section(NamedTuple):
    title: str
    columns: Sequence[str]
    lines: list[Line]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", type=saved, metavar="RESULTS.json")
    parser.add_argument("--markdown", action="store_true", help="in Markdown, as in the README")


def main(options: argparse.Namespace) -> int:
    results, _ = options.results
    if options.markdown:
        print(markdown(results))
    else:
        show(results, terminal())
    return 0


def terminal(width: int = 160) -> Console:
    """Where the tables go; a file gets lines of a fixed width."""
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = width
    return console


def show(results: Results, console: Console) -> None:
    console.print(heading(results), LEGEND)
    for title, columns, lines in sections(results):
        console.print(table(columns, lines, title=title))
    for note in notes(results):
        console.print(note)


def markdown(results: Results) -> str:
    """The README's tables."""
    paragraphs = [f"{heading(results)} {LEGEND}"]
    for title, columns, lines in sections(results):
        paragraphs += [f"{title}:", pipes(columns, lines)]
    return "\n\n".join([*paragraphs, *notes(results)])


def table(columns: Sequence[str], lines: Iterable[Line], title: str | None = None) -> Table:
    """A rich table, with space between groups where some lines begin alike."""
    made = Table(title=title, box=box.SIMPLE_HEAD)
    for column in columns:
        made.add_column(column)
    groups = [list(group) for _, group in groupby(lines, key=itemgetter(0))]
    alone = all(len(group) == 1 for group in groups)
    for group in groups:
        for line in group:
            made.add_row(*(Text(cell.text, style="red" if cell.loses else "") for cell in line))
        if not alone:
            made.add_section()
    return made


def pipes(columns: Sequence[str], lines: Iterable[Line]) -> str:
    texts = [columns, ["---"] * len(columns), *([cell.text for cell in line] for line in lines)]
    return "\n".join(f"| {' | '.join(line)} |" for line in texts)


def heading(results: Results) -> str:
    """What was measured on what, in a line."""
    run = results.run
    gpu = run["gpu"]
    where = [f"{gpu['name']}, driver {gpu['driver']}"] if gpu else []
    where += [
        f"{run['machine']['cpu']}, {run['threads']} threads",
        f"torch {run['versions']['torch']}",
    ]
    commit, _, dirty = run["commit"].partition("-")
    where.append(f"fastopt {commit[:10]}{' with changes' if dirty else ''}")
    return f"{', '.join(where)}, {run['date'][:10]}: `{run['command']}`."


def sections(results: Results) -> Iterator[Section]:
    """The tables: lines of few contenders together, then a table for each group of many."""
    groups = list(results.groups())
    failed = {(skip.contender, skip.case): skip for skip in results.skipped}
    few = [group for group in groups if is_short(group)]
    for clock in dict.fromkeys(group[0].clock for group in few):
        chosen = [group for group in few if group[0].clock == clock]
        names = list(dict.fromkeys(t.contender for group in chosen for t in group))
        names.sort(key=lambda name: (name != OURS, name in (BOUND, COPY)))
        columns = ["workload", "in", "rule", "operation", *names, "B/element", "of the bound"]
        make = partial(wide_line, names=names, failed=failed)
        yield Section(f"Steps, {clock} time", columns, list(map(make, chosen)))
    for group in groups:
        if not is_short(group):
            first = group[0]
            title = f"{first.rule}, {first.workload}, {first.operation}, {first.clock} time"
            columns = ["", "precision", "ms", "+-", "x", "B/element", "GB/s", "of the bound", "in"]
            yield Section(title, columns, list(long_lines(group, results.skipped)))
    if results.overhead:
        yield overhead(results)
    if results.footprints:
        columns = ["", "precision", "parameter", "master", "states", "sum", "gradient apart"]
        yield Section(FOOTPRINTS, columns, list(footprint_lines(results)))
    if results.startup:
        seconds: dict[str, dict[str, float]] = defaultdict(dict)
        for step in results.startup:
            seconds[step.rule][step.cache] = step.seconds
        caches = list(dict.fromkeys(step.cache for step in results.startup))
        lines = [
            (Cell(rule), *(Cell(written(by.get(cache))) for cache in caches))
            for rule, by in seconds.items()
        ]
        yield Section(STARTUP, ["rule", *caches], lines)
    if reached := [line for line in goal_lines(goals.of(results)) if line]:
        yield Section("Goals", ["case", "goal", "bound", "measured", ""], reached)


def is_short(group: list[Timing]) -> bool:
    """Whether a line tells all of it."""
    return len(group) <= FEW and {timing.precision for timing in group} <= {FP32.name, ""}


def wide_line(
    group: list[Timing], names: Sequence[str], failed: dict[tuple[str, str], Skip]
) -> Line:
    """A line of a workload, rule and operation."""
    by_name = {timing.contender: timing for timing in group}
    ours = by_name.get(OURS, group[0])
    case = case_of(ours.rule, ours.workload, ours.precision)
    cells = []
    for name in names:
        if name in by_name:
            cells.append(timing_cell(by_name[name], group))
        else:
            skip = failed.get((name, case)) or failed.get((name, f"{case}, {ours.operation}"))
            cells.append(Cell("raised" if skip and skip.crashed else "-"))
    return (
        *(Cell(ours.workload), Cell(ours.regime), Cell(ours.rule), Cell(ours.operation)),
        *cells,
        Cell(digits(ours.bytes_per_element)),
        Cell(written(part_of_bound(ours, group), 2)),
    )


def timing_cell(timing: Timing, group: list[Timing]) -> Cell:
    time = digits(timing.median_ns / 1e6)
    times, loses = versus(timing, group)
    return Cell(f"{time} {times}".strip(), loses)


def versus(timing: Timing, group: list[Timing]) -> tuple[str, bool]:
    """How many times fastopt's time it took, and whether fastopt loses by that."""
    base = counterpart(timing, group)
    if timing.contender.startswith(OURS) or timing.contender == COPY or base is None:
        return "", False
    if timing.contender == BOUND:
        same = [t for t in group if (t.contender, t.precision) == (OURS, timing.precision)]
        return (f"{ratio_of(timing, same[0]):.2f}x" if same else ""), False
    value = ratio_of(timing, base)
    return f"{value:.2f}x", value < 1


def long_lines(group: list[Timing], skipped: Iterable[Skip]) -> Iterator[Line]:
    """A line of a contender, also where it has none but a reason."""
    for timing in sorted(group, key=lambda t: (not t.contender.startswith(OURS), t.contender)):
        low, _, high = quantiles(timing.samples_ns, n=4, method="inclusive")
        times, loses = versus(timing, group)
        base = counterpart(timing, group)
        if base and times and timing.contender != BOUND and base.precision != "fp32":
            times += f" {base.precision}"
        yield (
            Cell(timing.contender + (" (own process)" if timing.own_process else "")),
            Cell(timing.precision),
            Cell(digits(timing.median_ns / 1e6)),
            Cell(f"{(high - low) / 2 / timing.median_ns:.0%}"),
            Cell(times, loses),
            Cell(digits(timing.bytes_per_element)),
            Cell(digits(timing.gb_per_s)),
            Cell(written(part_of_bound(timing, group), 2)),
            Cell(timing.regime),
        )
    first = group[0]
    begin = f"{case_of(first.rule, first.workload, '')}, "
    for skip in skipped:
        precision, _, operation = skip.case.removeprefix(begin).partition(", ")
        if skip.case.startswith(begin) and operation in ("", first.operation):
            reason = skip.reason if skip.crashed else f"not run: {skip.reason}"
            yield Cell(skip.contender), Cell(precision), *[Cell("")] * 6, Cell(reason, skip.crashed)


def overhead(results: Results) -> Section:
    """A line per rule and kind of gradients."""
    names = list(dict.fromkeys(slope.contender for slope in results.overhead))
    groups: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    for slope in results.overhead:
        groups[slope.rule, slope.gradients][slope.contender] = slope.us_per_tensor
    lines = [
        (Cell(rule), Cell(gradients), *(Cell(written(slopes.get(name), 2)) for name in names))
        for (rule, gradients), slopes in groups.items()
    ]
    return Section(OVERHEAD, ["rule", "gradients", *names], lines)


def footprint_lines(results: Results) -> Iterator[Line]:
    for found in results.footprints:
        numbers = (found.parameter, found.master, found.states, found.total, found.gradient)
        cells = (Cell(f"{number:.2f}") for number in numbers)
        yield Cell(found.contender), Cell(found.precision), *cells


def goal_lines(found: Iterable[goals.Goal]) -> Iterator[Line]:
    for goal in found:
        if goal.found is None:
            continue
        bound = f"{'>=' if goal.at_least else '<='} {goal.bound:g}"
        verdict = Cell("reached") if goal.reached else Cell("not reached", loses=True)
        yield Cell(goal.case), Cell(goal.what), Cell(bound), Cell(written(goal.found)), verdict


def notes(results: Results) -> Iterator[str]:
    """What the reader of the tables has to know besides: a busy machine, and who did not run."""
    used = results.run["used_by_others"]
    if used is None:
        yield "The run did not come to its end."
    elif used > QUIET:
        yield (
            f"Other work took {used:.0%} of the machine's CPU time meanwhile: measure again when "
            "it is quiet."
        )
    reasons: dict[tuple[str, str], list[Skip]] = defaultdict(list)
    for skip in results.skipped:
        reasons[skip.contender, skip.reason].append(skip)
    for (contender, reason), skips in reasons.items():
        where = skips[0].case if len(skips) == 1 else f"{skips[0].case} and {len(skips) - 1} more"
        yield f"{contender} {'failed' if skips[0].crashed else 'was not run'} ({where}): {reason}."
    for failure in results.failed:
        yield f"{failure.job} failed: {failure.error}"


def digits(value: float, count: int = 3) -> str:
    """The number with so many significant digits, and never in scientific notation."""
    magnitude = floor(log10(abs(value))) if value else 0
    return f"{value:.{max(0, count - 1 - magnitude)}f}"


def written(value: float | None, count: int = 3) -> str:
    return "-" if value is None else digits(value, count)
