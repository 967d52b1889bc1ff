"""How the results of ``bench.gpu`` are told: tables, and the figures that were set as goals."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import product
from typing import Any

from rich.console import Console

from . import report
from .bound import Copy
from .clocks import DEVICE, HOST, WALL
from .contenders import Fastopt
from .modes import PLAIN_BF16, SPLIT_8BIT
from .peers import FlashOptim, TorchForeach, TorchFused
from .report import Cell, Goal, Line, Report, digits, table, written
from .startup import EMPTY, WARM

Rows = dict[str, dict[str, Any]]  # of one workload, rule, operation and clock, by contender

OURS, LOW_STATES, COPY = Fastopt.name, PLAIN_BF16.name, Copy.name
FUSED, FOREACH = TorchFused.name, TorchForeach.name
EIGHT, FLASH = SPLIT_8BIT.name, FlashOptim.name
LARGE, MEDIUM, SMALL = "tinyllama-1.1b", "gpt2", "1000 x 1000"
TITLES = {
    DEVICE: "The device by itself: milliseconds, x fastopt's, bytes an element that it needs",
    WALL: "From an idle device until it is idle again: milliseconds, x fastopt's",
    HOST: "Until the call returns: milliseconds, x fastopt's",
}
OVERHEAD = "Host time: microseconds per tensor, with fresh gradients"
STARTUP = "First step of a process, by what is in Triton's cache: seconds"


def show(found: Report, console: Console) -> None:
    console.print(heading(found))
    dtypes = dict.fromkeys(row["dtype"] for row in found["rows"])
    for (clock, title), dtype in product(TITLES.items(), dtypes):
        part = of_clock(found, clock, dtype)
        if part["rows"]:
            console.print(table(headings(part, clock), lines(part, clock), title=title))
    if found["overhead"]:
        names = report.overhead_headings(found)
        console.print(table(names, report.overhead_lines(found), title=OVERHEAD))
    if found["startup"]:
        console.print(table(["rule", EMPTY, WARM], startup_lines(found), title=STARTUP))
    console.print(report.goal_table(goals(found)))
    for note in report.notes(found):
        console.print(note)


def heading(found: Report) -> str:
    """What was measured on what, in a line."""
    versions = found["versions"]
    commit, _, dirty = found["commit"].partition("-")
    return (
        f"{found['name']}, driver {found['gpu'].get('driver') or '-'}, torch {versions['torch']}, "
        f"triton {versions['triton'] or '-'}, {found['date'][:10]}, fastopt "
        f"{commit[:10]}{' with changes' if dirty else ''}"
    )


def of_clock(found: Report, clock: str, dtype: str) -> Report:
    """The rows of one clock and dtype; the bare copy has a meaning for the device's time alone."""
    return found | {
        "rows": [
            row
            for row in found["rows"]
            if (row["clock"], row["dtype"]) == (clock, dtype)
            and (clock == DEVICE or row["contender"] != COPY)
        ]
    }


def headings(part: Report, clock: str) -> list[str]:
    names = ["workload", "rule", "operation", *report.contenders(part, "rows")]
    return [*names, "of the copy"] if clock == DEVICE else names


def lines(part: Report, clock: str) -> Iterator[Line]:
    """A line per workload, rule and operation."""
    groups: dict[tuple[str, ...], Rows] = defaultdict(dict)
    for row in part["rows"]:
        line = f"{row['workload']} {row['dtype']}", row["rule"], row["operation"]
        groups[line][row["contender"]] = row
    for names, rows in groups.items():
        cells = [timing(rows.get(name), clock) for name in report.contenders(part, "rows")]
        if clock == DEVICE:
            cells.append(Cell(written(of_copy(rows))))
        yield (*map(Cell, names), *cells)


def timing(row: dict[str, Any] | None, clock: str) -> Cell:
    if row is None:
        return Cell("-")
    parts = [digits(row["median_ns"] / 1e6)]
    if row["contender"] != OURS:
        parts.append(f"{row['ratio']:.2f}x")
    if clock == DEVICE and row["contender"] != COPY:
        parts.append(f"{row['bytes_per_element']:.3g}B")
    peer = row["contender"] != COPY and not row["contender"].startswith(OURS)
    return Cell(" ".join(parts), row["ratio"] < 1 and peer)


def startup_lines(found: Report) -> Iterator[Line]:
    seconds: dict[str, dict[str, float]] = defaultdict(dict)
    for step in found["startup"]:
        seconds[step["rule"]][step["cache"]] = step["seconds"]
    for rule, by_cache in seconds.items():
        yield (Cell(rule), *(Cell(written(by_cache.get(cache))) for cache in (EMPTY, WARM)))


def goals(found: Report) -> Iterator[Goal]:
    """The figures that an H200 is to reach."""

    def least(case: str, what: str, bound: float, value: float | None) -> Goal:
        return Goal(case, what, bound, at_least=True, found=value)

    def most(case: str, what: str, bound: float, values: Iterable[float]) -> Goal:
        return Goal(case, what, bound, at_least=False, found=max(values, default=None))

    in_fp32, in_bf16 = (
        rows_of(found, LARGE, "step", DEVICE, dtype) for dtype in ("float32", "bfloat16")
    )
    case = "AdamW, 1.1B bf16 + split"
    yield least(case, "step: of the copy's bandwidth", 0.92, of_copy(in_bf16))
    # torch's bf16 states leave it half the bytes of a split master with fp32 states.
    for case, dtype, ours in (
        ("AdamW, 1.1B fp32", "float32", OURS),
        ("AdamW, 1.1B bf16, no master, bf16 states", "bfloat16", LOW_STATES),
    ):
        step = rows_of(found, LARGE, "step", DEVICE, dtype)
        clip = rows_of(found, LARGE, "clip + step", DEVICE, dtype)
        yield least(case, "step: of the copy's bandwidth", 0.92, of_copy(step, ours))
        yield least(case, "step: torch fused x", 1.1, against(FUSED, step, ours))
        yield least(case, "clip + step: torch fused x", 1.4, against(FUSED, clip, ours))
    case = "AdamW, 1.1B bf16 + split + 8-bit states"
    torch_fp32 = quotient(in_fp32.get(FUSED), in_bf16.get(EIGHT))
    yield least(case, "step: torch fused fp32 x", 1.8, torch_fp32)
    yield least(case, "step: flashoptim x", 1.5, against(FLASH, in_bf16, EIGHT))
    for clock in (DEVICE, WALL):
        ratio = against(FUSED, rows_of(found, MEDIUM, "clip + step", clock))
        yield least("AdamW, GPT-2", f"clip + step, {clock} time: torch fused x", 2, ratio)
    for operation in ("step", "clip + step"):
        ratio = against(FUSED, rows_of(found, SMALL, operation, WALL))
        yield least("AdamW, 1000 x 1000", f"{operation}, wall time: torch fused x", 5, ratio)
    slopes = [slope for slope in found["overhead"] if slope["contender"] == OURS]
    per_tensor, fixed = ([slope[key] for slope in slopes] for key in ("us_per_tensor", "fixed_us"))
    yield most("Host time, slowest rule", "us a tensor", 0.3, per_tensor)
    yield most("Host time, slowest rule", "us besides", 50, fixed)
    for cache, bound in ((EMPTY, 3.0), (WARM, 0.5)):
        seconds = [step["seconds"] for step in found["startup"] if step["cache"] == cache]
        yield most("First step, slowest rule", f"{cache} cache: seconds", bound, seconds)


def rows_of(
    found: Report,
    workload: str,
    operation: str,
    clock: str,
    dtype: str = "float32",
    rule: str = "AdamW",
) -> Rows:
    """A workload of which only a part was run counts as the workload."""
    wanted = {"rule": rule, "operation": operation, "clock": clock, "dtype": dtype}
    return {
        row["contender"]: row
        for row in found["rows"]
        if row["workload"].endswith(workload) and wanted.items() <= row.items()
    }


def of_copy(rows: Rows, name: str = OURS) -> float | None:
    """A contender's bytes per second, of those that it needs, divided by the bare copy's.

    Both took turns, and their ratios to fastopt's time are medians over the rounds.
    """
    if name not in rows or COPY not in rows:
        return None
    row, copy = rows[name], rows[COPY]
    needed: float = row["bytes_per_element"] / copy["bytes_per_element"]
    faster: float = copy["ratio"] / row["ratio"]
    return needed * faster


def against(peer: str, rows: Rows, name: str = OURS) -> float | None:
    """The time of one contender divided by another's, which took turns."""
    if name not in rows or peer not in rows:
        return None
    ratio: float = rows[peer]["ratio"] / rows[name]["ratio"]
    return ratio


def quotient(peer: dict[str, Any] | None, ours: dict[str, Any] | None) -> float | None:
    """The same for two that did not."""
    if peer is None or ours is None:
        return None
    ratio: float = peer["median_ns"] / ours["median_ns"]
    return ratio
