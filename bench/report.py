"""How results are told: a JSON file, from which the terminal's tables and the README's are made."""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import floor, log10
from operator import itemgetter
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

Report = dict[str, Any]

OURS, BOUND = "fastopt", "bound"
LEGEND = (
    "Median milliseconds; x: a contender's time divided by fastopt's; bound: a bare loop with the "
    "same reads and writes; GB/s: fastopt's, of the bytes that the operation needs."
)
QUIET = 0.03  # the part of the CPU time that other processes may take
GOAL_COLUMNS = ("case", "goal", "bound", "measured", "")
OVERHEAD = "Microseconds per tensor per step, with fresh gradients"


@dataclass(frozen=True)
class Cell:
    text: str
    loses: bool = False  # a peer is faster than fastopt


Line = tuple[Cell, ...]


def terminal(width: int = 120) -> Console:
    """Where the tables go; a file gets lines of a fixed width."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = width
    return console


def save(report: Report, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")


def load(path: Path) -> Report:
    report: Report = json.loads(path.read_text())
    return report


def select(report: Report, rules: Sequence[str], workloads: Sequence[str]) -> Report:
    """The part of a report that is on some rules, by class name, and workloads."""

    def chosen(entry: dict[str, Any]) -> bool:
        return entry["rule"].partition("(")[0] in rules

    return report | {
        "rows": [row for row in report["rows"] if chosen(row) and row["workload"] in workloads],
        "overhead": list(filter(chosen, report["overhead"])) if "overhead" in workloads else [],
        "skipped": list(filter(chosen, report["skipped"])),
    }


def show(report: Report, console: Console) -> None:
    """Print the tables; where fastopt loses is red."""
    if report["rows"]:
        console.print(table(headings(report), lines(report)), LEGEND)
    if report["overhead"]:
        console.print(table(overhead_headings(report), overhead_lines(report), title=OVERHEAD))
    for note in notes(report):
        console.print(note)


def table(columns: Sequence[str], rows: Iterator[Line], title: str | None = None) -> Table:
    """A rich table, with space between groups where some lines begin alike."""
    made = Table(title=title, box=box.SIMPLE_HEAD)
    for column in columns:
        made.add_column(column)
    groups = [list(group) for _, group in groupby(rows, key=itemgetter(0))]
    alone = all(len(group) == 1 for group in groups)
    for group in groups:
        for line in group:
            made.add_row(*(Text(cell.text, style="red" if cell.loses else "") for cell in line))
        if not alone:
            made.add_section()
    return made


def markdown(report: Report) -> str:
    """The README's tables."""
    machine, versions = report["machine"], report["versions"]
    where = f"{machine['cpu']}, {machine['threads']} threads, torch {versions['torch']}"
    paragraphs = [f"{where}, {report['date'][:10]}: `python -m bench`. {LEGEND}"]
    if report["rows"]:
        paragraphs.append(pipes(headings(report), lines(report)))
    if report["overhead"]:
        paragraphs += [f"{OVERHEAD}:", pipes(overhead_headings(report), overhead_lines(report))]
    return "\n\n".join(paragraphs + list(notes(report)))


def pipes(columns: Sequence[str], rows: Iterator[Line]) -> str:
    texts = [columns, ["---"] * len(columns), *([cell.text for cell in line] for line in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in texts)


def headings(report: Report) -> list[str]:
    return ["workload", "rule", "operation", *contenders(report, "rows"), "GB/s"]


def lines(report: Report) -> Iterator[Line]:
    """A line per workload, rule and operation."""
    groups: dict[tuple[str, str, str], dict[str, Any]] = defaultdict(dict)
    for row in report["rows"]:
        groups[row["workload"], row["rule"], row["operation"]][row["contender"]] = row
    for names, rows in groups.items():
        cells = (timing(rows.get(contender)) for contender in contenders(report, "rows"))
        yield (*map(Cell, names), *cells, Cell(f"{rows[OURS]['gb_per_s']:.1f}"))


def timing(row: dict[str, Any] | None) -> Cell:
    if row is None:
        return Cell("-")
    time = digits(row["median_ns"] / 1e6)
    if row["contender"] == OURS:
        return Cell(time)
    return Cell(f"{time} {row['ratio']:.2f}x", row["ratio"] < 1 and row["contender"] != BOUND)


def overhead_headings(report: Report) -> list[str]:
    return ["rule", *contenders(report, "overhead")]


def overhead_lines(report: Report) -> Iterator[Line]:
    """A line per rule."""
    groups: dict[str, dict[str, float]] = defaultdict(dict)
    for slope in report["overhead"]:
        groups[slope["rule"]][slope["contender"]] = slope["us_per_tensor"]
    for rule, slopes in groups.items():
        cells = (
            Cell(digits(slopes[contender]) if contender in slopes else "-")
            for contender in contenders(report, "overhead")
        )
        yield (Cell(rule), *cells)


def notes(report: Report) -> Iterator[str]:
    """What the reader of the tables has to know besides: a busy machine, and who did not run."""
    if report["used_by_others"] > QUIET:
        yield (
            f"Other work took {report['used_by_others']:.0%} of the machine's CPU time meanwhile: "
            "measure again when it is quiet."
        )
    yield from not_run(report["skipped"], report.get("failed", []))  # older ones have no such part


def not_run(skipped: Sequence[dict[str, Any]], failed: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Who did not run, and why."""
    for skip in {(skip["contender"], skip["reason"]): None for skip in skipped}:
        yield "{} was not run: {}.".format(*skip)
    for failure in failed:
        yield f"{failure['job']} failed: {failure['error']}"


def contenders(report: Report, part: str) -> list[str]:
    """Those that have results in a part of the report, in the order of the columns."""
    present = {entry["contender"] for entry in report[part]}
    return [name for name in report["contenders"] if name in present]


def digits(value: float, count: int = 3) -> str:
    """The number with so many significant digits, and never in scientific notation."""
    magnitude = floor(log10(abs(value))) if value else 0
    return f"{value:.{max(0, count - 1 - magnitude)}f}"


def written(value: float | None) -> str:
    return "-" if value is None else digits(value)


@dataclass(frozen=True)
class Goal:
    """A figure to reach; ``found`` is None where it was not measured."""

    case: str
    what: str
    bound: float
    at_least: bool
    found: float | None

    @property
    def reached(self) -> bool:
        if self.found is None:
            return False
        return self.found >= self.bound if self.at_least else self.found <= self.bound


def goal_table(goals: Iterable[Goal]) -> Table:
    return table(GOAL_COLUMNS, goal_lines(goals), title="Goals")


def goal_lines(goals: Iterable[Goal]) -> Iterator[Line]:
    for goal in goals:
        bound = f"{'>=' if goal.at_least else '<='} {goal.bound:g}"
        verdict = Cell("reached") if goal.reached else Cell("not reached", loses=True)
        if goal.found is None:
            verdict = Cell("not measured")
        yield Cell(goal.case), Cell(goal.what), Cell(bound), Cell(written(goal.found)), verdict
