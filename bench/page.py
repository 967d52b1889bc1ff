"""``python -m bench report``: runs as one self-contained HTML page, pictures included."""

from __future__ import annotations

import argparse
import os
from base64 import b64encode
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import BytesIO
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from . import goals
from .arguments import saved
from .plots import (
    CHIEF,
    DPI,
    DRAWN,
    FP32,
    Picture,
    Versus,
    comparisons,
    described,
    main_clock,
    main_groups,
    of_limit,
    quartiles,
)
from .records import BOUND, COPY, OURS, Results, Skip, Timing, bound_of
from .tables import QUIET, digits, goal_lines
from .turns import STEP

HELP = "write a run's tables and pictures as one HTML page"

FUSED = "torch fused"
METHOD = Path(__file__).resolve().with_name("METHOD.md")
Columns = tuple[str, ...]


@dataclass(frozen=True)
class Cell:
    text: str
    loses: bool = False  # a peer is faster than fastopt
    number: bool = True


@dataclass(frozen=True)
class Table:
    """Lines of cells under some headings, in parts with titles of their own."""

    title: str
    columns: Columns
    parts: list[tuple[str, list[list[Cell]]]]


@dataclass(frozen=True)
class Section:
    """What the page says of one run."""

    anchor: str
    title: str
    source: str  # the file's name
    summary: list[str]
    facts: list[tuple[str, str]]
    busy: str
    pictures: list[Picture]
    missing: list[str]  # what was not measured
    tables: list[Table]
    goals: Table | None


def section(number: int, results: Results, path: Path) -> Section:
    drawn = {what: list(draw(results)) for what, draw in DRAWN.items()}
    return Section(
        anchor=f"run-{number}",
        title=described(results) or path.stem,
        source=path.name,
        summary=list(summary(results)),
        facts=list(facts(results)),
        busy=busy(results),
        pictures=[picture for made in drawn.values() for picture in made],
        missing=[what for what, made in drawn.items() if not made],
        tables=list(tables(results)),
        goals=goal_table(results),
    )


def summary(results: Results) -> Iterator[str]:
    """The run in some sentences, wins and losses alike, of what was measured."""
    clock = main_clock(results)
    found = [versus for versus in comparisons(results) if versus.peer.clock == clock]
    if found:
        yield overall(found, clock)
        yield extremes(found)
    chief = [v for v in found if is_chief(v)]
    if chief:
        ratios = [v.ratio for v in chief]
        among = f" ({digits(median(ratios))} in the median of {len(ratios)})"
        yield (
            f"For a step of {CHIEF} in fp32, {FUSED} takes {spanned(ratios)} times as long as "
            f"fastopt{among if len(ratios) > 1 else ''}."
        )
    yield from against_memory(results)
    yield from footprints(results)
    yield from overheads(results)


def is_chief(versus: Versus) -> bool:
    """Whether it is what most users would compare."""
    peer = versus.peer
    return (peer.rule, peer.operation, peer.contender, peer.precision) == (CHIEF, STEP, FUSED, FP32)


def overall(found: list[Versus], clock: str) -> str:
    lost = sum(versus.loses for versus in found)
    ratios = [versus.ratio for versus in found]
    return (
        f"fastopt was faster in {len(found) - lost} of {plural(len(found), 'comparison')} of "
        f"{clock} time and slower in {lost}; in the median, the peer took "
        f"{digits(median(ratios))} times as long."
    )


def extremes(found: list[Versus]) -> str:
    best, worst = (choose(found, key=lambda versus: versus.ratio) for choose in (max, min))
    verdict = "The worst loss" if worst.loses else "The narrowest lead"
    return (
        f"The largest lead: {digits(best.ratio)} times the speed of {named(best)}. {verdict}: "
        f"{digits(worst.ratio)} times the speed of {named(worst)}."
    )


def named(versus: Versus) -> str:
    peer, ours = versus.peer, versus.ours
    precision = f"{peer.precision} against {ours.precision}"
    if peer.precision == ours.precision:
        precision = peer.precision
    return f"{peer.contender} ({peer.rule}, {peer.operation}, {peer.workload}, {precision})"


def against_memory(results: Results) -> Iterator[str]:
    """How near to the limit, on workloads that no cache holds."""
    times: dict[str, list[float]] = {}
    for group in main_groups(results):
        for timing in group:
            limit = bound_of(timing, group)
            if timing.contender == OURS and timing.regime == "memory" and limit:
                times.setdefault(timing.precision, []).append(of_limit(timing, limit))
    if times:
        medians = {mode: median(found) for mode, found in times.items()}
        worst = max(medians, key=medians.__getitem__)
        first = FP32 if FP32 in medians else next(iter(medians))
        sentence = (
            f"Where the data is in memory, a step in {first} takes {digits(medians[first])} times "
            "as long as the memory needs for the same bytes"
        )
        if worst != first:
            sentence += f"; the farthest mode is {worst}, with {digits(medians[worst])} times"
        yield f"{sentence} (medians over rules and workloads)."


def footprints(results: Results) -> Iterator[str]:
    ours = [f for f in results.footprints if f.contender == OURS]
    if ours:
        least = min(ours, key=lambda footprint: footprint.total)
        sentence = (
            f"Memory per parameter, gradients apart: {least.total:.2f} bytes in mode "
            f"{least.precision}, the smallest of {plural(len(ours), 'mode')}"
        )
        fused = [f for f in results.footprints if (f.contender, f.precision) == (FUSED, FP32)]
        yield sentence + (f"; {FUSED} in fp32 takes {fused[0].total:.2f}." if fused else ".")


def overheads(results: Results) -> Iterator[str]:
    for slope in results.overhead:
        if (slope.rule, slope.contender, slope.precision) == (CHIEF, OURS, FP32):
            others = [
                other
                for other in results.overhead
                if (other.rule, other.contender) == (CHIEF, FUSED)
                and (other.gradients, other.clock) == (slope.gradients, slope.clock)
            ]
            versus = f" ({FUSED}: {digits(others[0].us_per_tensor)})" if others else ""
            yield (
                f"Every tensor costs {digits(slope.us_per_tensor)} us of {slope.clock} time with "
                f"{slope.gradients} gradients{versus}."
            )


def facts(results: Results) -> Iterator[tuple[str, str]]:
    """What was run on what."""
    run = results.run
    machine, versions, gpu = (run.get(key) or {} for key in ("machine", "versions", "gpu"))
    yield "Date", str(run.get("date", ""))
    yield "Command", str(run.get("command", ""))
    yield "Commit", str(run.get("commit", ""))
    yield "GPU", listed(gpu)
    yield "CPU", listed({k: v for k, v in machine.items() if k != "backends"})
    backends = {
        name: found.get("detail", "") for name, found in machine.get("backends", {}).items()
    }
    yield "Backends", listed(backends)
    yield "Versions", listed(versions)
    yield "Timed rounds", str(run.get("rounds", ""))
    yield "Threads", str(run.get("threads", ""))
    for name, workload in run.get("workloads", {}).items():
        count = f"{workload['parameters']:,} parameters in {workload['tensors']:,} tensors"
        yield f"Workload {name}", f"{workload['source']}: {count}"


def listed(found: dict[str, Any]) -> str:
    written = {
        name: ", ".join(map(str, value)) if isinstance(value, list) else value
        for name, value in found.items()
    }
    return "; ".join(
        f"{name}: {value}" for name, value in written.items() if value not in ("", None)
    )


def busy(results: Results) -> str:
    used = results.run.get("used_by_others")
    if used is None:
        return "How busy the machine was is not known."
    if used > QUIET:
        return (
            f"The machine was busy: other work took {used:.0%} of its CPU time meanwhile. Ratios "
            "bear that, since both times of a round are taken a moment apart; times do not."
        )
    return f"The machine was quiet: other work took {used:.1%} of its CPU time."


def tables(results: Results) -> Iterator[Table]:
    """All that have lines."""
    made = (
        timing_table(results),
        Table(
            "Overhead of tensors",
            (
                "rule",
                "contender",
                "precision",
                "gradients",
                "clock",
                "us a tensor",
                "fixed us a step",
            ),
            [
                (
                    "",
                    [
                        words(s.rule, s.contender, s.precision, s.gradients, s.clock)
                        + numbers(digits(s.us_per_tensor), digits(s.fixed_us))
                        for s in results.overhead
                    ],
                )
            ],
        ),
        Table(
            "Bytes per parameter",
            ("contender", "precision", "parameter", "master", "states", "sum", "gradient apart"),
            [
                (
                    workload,
                    [
                        words(f.contender, f.precision)
                        + numbers(
                            *(
                                f"{size:.2f}"
                                for size in (f.parameter, f.master, f.states, f.total, f.gradient)
                            )
                        )
                        for f in found
                    ],
                )
                for workload, found in grouped(results.footprints, "workload")
            ],
        ),
        Table(
            "First step of a process",
            ("rule", "Triton's cache", "seconds"),
            [("", [words(s.rule, s.cache) + numbers(digits(s.seconds)) for s in results.startup])],
        ),
        Table(
            "Not run",
            ("contender", "what", "reason"),
            [("", unique(words(s.contender, s.case, why(s)) for s in results.skipped))],
        ),
        Table(
            "Failed",
            ("measurement", "error"),
            [("", [words(f.job, f.error) for f in results.failed])],
        ),
    )
    return (table for table in made if any(lines for _, lines in table.parts))


def timing_table(results: Results) -> Table:
    """Every timing, in a part for each workload, rule, operation and clock."""
    versus = {id(v.peer): v for v in comparisons(results)}
    parts = []
    for group in results.groups():
        first = group[0]
        title = (
            f"{first.workload}, {first.rule}, {first.operation}, {first.clock} time "
            f"({first.elements:,} parameters in {first.tensors:,} tensors)"
        )
        lines = [timing_line(timing, group, versus.get(id(timing))) for timing in group]
        parts.append((title, lines))
    columns = (
        *("contender", "precision", "ms", "quartiles", "time / fastopt's", "quartiles", "against"),
        *("times the limit", "GB/s", "bytes a parameter", "working set, MB", "it is in"),
    )
    return Table("Times", columns, parts)


def timing_line(timing: Timing, group: list[Timing], versus: Versus | None) -> list[Cell]:
    compared = [Cell(""), Cell(""), Cell("", number=False)]
    if versus:
        text = f"{digits(versus.ratio)}x" + (" loses" if versus.loses else "")
        compared = [
            Cell(text, versus.loses),
            Cell(between(versus.quartiles)),
            Cell(versus.ours.precision, number=False),
        ]
    limit = bound_of(timing, group)
    own_limit = timing.contender in (BOUND, COPY) or limit is None
    name = timing.contender + (", in its own process" if timing.own_process else "")
    return [
        *words(name, timing.precision),
        Cell(digits(timing.median_ns / 1e6)),
        Cell(between([ns / 1e6 for ns in quartiles(timing.samples_ns)])),
        *compared,
        Cell("" if own_limit else digits(of_limit(timing, limit))),
        *numbers(
            f"{timing.gb_per_s:.1f}",
            f"{timing.bytes_per_element:.2f}",
            f"{timing.working_set_bytes / 1e6:,.1f}",
        ),
        *words(timing.regime),
    ]


def goal_table(results: Results) -> Table | None:
    """The goals for which something was measured."""
    lines = [
        [Cell(cell.text, cell.loses, number=False) for cell in line]
        for line in goal_lines(goals.of(results))
    ]
    if not lines:
        return None
    return Table("Goals", ("case", "goal", "bound", "measured", ""), [("", lines)])


def words(*texts: str) -> list[Cell]:
    return [Cell(text, number=False) for text in texts]


def numbers(*texts: str) -> list[Cell]:
    return [Cell(text) for text in texts]


def between(ends: Iterable[float]) -> str:
    return " .. ".join(map(digits, ends))


def spanned(values: list[float]) -> str:
    low, high = digits(min(values)), digits(max(values))
    return low if low == high else f"{low} to {high}"


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def why(skip: Skip) -> str:
    return f"raised {skip.reason}" if skip.crashed else skip.reason


def unique(lines: Iterable[list[Cell]]) -> list[list[Cell]]:
    return [list(line) for line in dict.fromkeys(map(tuple, lines))]


def grouped(records: list[Any], name: str) -> Iterator[tuple[str, Iterator[Any]]]:
    """By an attribute that is the same in neighbours."""
    return groupby(records, key=lambda record: getattr(record, name))


def data_uri(picture: Picture) -> str:
    buffer = BytesIO()
    picture.figure.savefig(buffer, format="png", dpi=DPI)
    return f"data:image/png;base64,{b64encode(buffer.getvalue()).decode()}"


def render(sections: list[Section], method: str = "") -> str:
    """The page.

    Args:
        method: the address of the method's description, from the page's place; empty without.
    """
    environment = Environment(
        loader=PackageLoader("bench", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["data_uri"] = data_uri
    return environment.get_template("page.html").render(sections=sections, method=method)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "results", type=saved, nargs="+", metavar="RESULTS.json", help="of `bench run`"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="PAGE.html",
        help="where the page goes (default: beside the first results)",
    )


def main(options: argparse.Namespace) -> int:
    sections = [section(number, *found) for number, found in enumerate(options.results, start=1)]
    output = options.output or options.results[0][1].with_suffix(".html")
    output.parent.mkdir(parents=True, exist_ok=True)
    inside = output.resolve().is_relative_to(METHOD.parents[1])  # another place's path is its own
    method = os.path.relpath(METHOD, output.resolve().parent) if inside else ""
    output.write_text(render(sections, method))
    print(output)
    return 0
