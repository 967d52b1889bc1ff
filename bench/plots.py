"""``python -m bench plot``: the pictures of a run, each for one question.

They read without colour, too: bars carry their names and values, and lines their own markers. A
part that was not measured has no picture.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import floor, log10
from pathlib import Path
from statistics import quantiles
from typing import Any

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from matplotlib.transforms import blended_transform_factory

from .arguments import saved
from .clocks import DEVICE, HOST, WALL
from .records import (
    BOUND,
    COPY,
    OURS,
    Results,
    Slope,
    Timing,
    bound_of,
    counterpart,
    ratio,
    ratios,
)
from .tables import digits
from .turns import STEP

HELP = "draw the pictures of a run as PNGs"

CHIEF = "AdamW"  # the rule of the pictures that have room for one
FP32 = "fp32"
DPI = 110
WIDTH = 11.0  # inches; heights follow from the number of bars
ROOM = 1.35  # of the longest bar, for a text beside it
MARGIN = 1.5  # inches for title, axis label and footer
BAR = 0.21  # inches
BEYOND = 1.5  # what takes longer than so many times fastopt's slowest mode leaves the picture
CLOCKS = {DEVICE: "device time", WALL: "wall time", HOST: "host time"}
SAID = {WALL: "", DEVICE: " (device time)", HOST: " (host time)"}  # beside what is usual

#: Okabe and Ito's, then Tol's, which the colour-blind tell apart; the same in every picture.
COLOURS = {
    OURS: "#0072b2",
    "fastopt, torch's GradScaler": "#5aa9d6",
    "torch fused": "#e69f00",
    "torch foreach": "#009e73",
    "torch for-loop": "#999999",
    "torch.compile": "#cc79a7",
    "torch fused, masters by hand": "#f0e442",
    "DeepSpeed CPUAdam": "#56b4e9",
    "bitsandbytes": "#882255",
    "bitsandbytes 8-bit": "#cc6677",
    "torchao 8-bit": "#44aa99",
    "optimi": "#ddcc77",
    "flashoptim": "#332288",
    "apex": "#d55e00",
    "heavyball": "#aa4499",
    BOUND: "#000000",
    COPY: "#000000",
}
OTHER = "#bbbbbb"
LOSS = "#b00020"
#: First digits of the numbers on a logarithmic axis, from the coarsest on.
TICKS = ((1,), (1, 3), (1, 2, 5), (1, 1.1, 1.2, 1.35, 1.5, 1.75, *range(2, 10)))
MARKERS = "osDv^<>pPX*"
LIMITS = {BOUND: "a bare loop with the same reads and writes", COPY: "a copy of as many bytes"}
PARTS = {"parameter": "#444444", "master": "#888888", "states": "#cccccc"}  # nobody's colours
HATCHES = {"parameter": "", "master": "//", "states": ".."}


@dataclass(frozen=True)
class Picture:
    """A figure and what to see on it.

    Args:
        name: of the file, without its ending.
        sentence: one or two, in words: what it shows, and which way is better.
    """

    name: str
    title: str
    sentence: str
    figure: Figure

    def save(self, folder: Path) -> Path:
        path = folder / f"{self.name}.png"
        self.figure.savefig(path, dpi=DPI)
        return path


@dataclass(frozen=True, eq=False)
class Versus:
    """A peer against what fastopt stands against it with: above 1, fastopt is faster."""

    peer: Timing
    ours: Timing

    @property
    def ratio(self) -> float:
        return ratio(self.peer, self.ours)

    @property
    def loses(self) -> bool:
        """Whether fastopt does."""
        return self.ratio < 1

    @property
    def quartiles(self) -> tuple[float, float]:
        return quartiles(ratios(self.peer, self.ours))

    @property
    def label(self) -> str:
        """The peer, and which modes are compared where that is not plainly fp32."""
        modes = self.peer.precision, self.ours.precision
        if modes == (FP32, FP32):
            return self.peer.contender
        return f"{self.peer.contender} {modes[0]} | {modes[1]}"


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """The lower and the upper one."""
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = quantiles(values, n=4, method="inclusive")
    return low, high


def comparisons(results: Results) -> Iterator[Versus]:
    """Every peer's timing against fastopt's, where both took turns."""
    for group in results.groups():
        for timing in group:
            ours = counterpart(timing, group)
            if ours and not is_ours(timing) and timing.contender not in (BOUND, COPY):
                yield Versus(timing, ours)


def is_ours(timing: Timing) -> bool:
    """Whether it is fastopt, be it in a variant, which is named after it."""
    return timing.contender.startswith(OURS)


def of_limit(timing: Timing, limit: Timing) -> float:
    """How many times as long it took as the limit takes for as many bytes."""
    return ratio(timing, limit) * limit.needed_bytes / timing.needed_bytes


def main_clock(results: Results) -> str:
    """What a GPU takes by itself where that was measured, and else what the user waits for."""
    return DEVICE if any(timing.clock == DEVICE for timing in results.timings) else WALL


def clocks_of(results: Results) -> list[str]:
    """Those of whole steps; on a GPU the user waits for the launches, too."""
    present = {timing.clock for timing in results.timings}
    return [clock for clock in (DEVICE, WALL) if clock in present]


def main_groups(results: Results, operation: str = STEP) -> Iterator[list[Timing]]:
    """The groups of one operation by the main clock."""
    clock = main_clock(results)
    for group in results.groups():
        if group[0].clock == clock and group[0].operation == operation:
            yield group


def pictures(results: Results) -> Iterator[Picture]:
    """All that the results have something for."""
    for draw in DRAWN.values():
        yield from draw(results)


def draw_times(results: Results) -> Iterator[Picture]:
    """Time against parameters, with the bound as a line, and below it the time in bounds."""
    points: dict[str, dict[int, tuple[float, float | None]]] = {}
    limits: dict[int, float] = {}
    names: dict[int, list[str]] = {}
    kinds = set()
    for group in main_groups(results):
        if group[0].rule != CHIEF:
            continue
        for timing in group:
            if timing.precision != FP32 or timing.contender in (BOUND, COPY):
                continue
            n, limit = timing.elements, bound_of(timing, group)
            times = of_limit(timing, limit) if limit else None
            # Who takes turns again, with slow ones, has fewer rounds there.
            points.setdefault(timing.contender, {}).setdefault(n, (timing.median_ns / 1e6, times))
            if timing.workload not in names.setdefault(n, []):
                names[n].append(timing.workload)
            if limit and timing.contender == OURS:
                limits.setdefault(n, timing.median_ns / of_limit(timing, limit) / 1e6)
                kinds.add(LIMITS[limit.contender])
    if len(names) < 2:
        return
    chosen = [name for name in COLOURS if name in points]
    chosen += [name for name in points if name not in COLOURS]
    rows, height = (2, 8.4) if limits else (1, 5.6)
    heights = (1.5, 1) if limits else None
    figure, panels = new_figure(results, height, rows=rows, heights=heights, sharex=True)
    above = panels[0]
    if limits:
        label = f"the limit: {' or '.join(sorted(kinds))}"
        above.plot(*in_order(limits), color="black", linestyle="--", label=label, zorder=1)
    for name in chosen:
        times = {n: ms for n, (ms, _) in points[name].items()}
        above.plot(*in_order(times), label=name, **line_style(name))
    above.set(xscale="log", yscale="log", ylabel="milliseconds a step")
    if limits:
        draw_bounds(panels[1], {name: points[name] for name in chosen})
    panels[-1].set_xlabel("parameters")
    for axes in panels:
        axes.grid(alpha=0.3, which="major")
    log_axis(above.yaxis, above.get_ylim())
    above.xaxis.set_major_formatter(FuncFormatter(lambda n, _: short(n)))
    above.legend(loc="upper left", fontsize=9)
    name_points(above, {n: ", ".join(found) for n, found in names.items()})
    title = f"{CHIEF}, fp32: time of a step{SAID[main_clock(results)]} | lower is better"
    entitle(figure, title)
    sentence = (
        "Time of a step against the number of parameters, one point for each workload; lower is "
        "better, and the dashed line is as fast as the memory is. Below: the same, divided by that."
    )
    yield Picture("time", "Time against parameters", sentence, figure)


def draw_bounds(axes: Axes, points: dict[str, dict[int, tuple[float, float | None]]]) -> None:
    """The times in limits, which many powers of ten would hide."""
    axes.axhline(1, color="black", linestyle="--", zorder=1)
    for name, of_name in points.items():
        bounds = {n: bounds for n, (_, bounds) in of_name.items() if bounds is not None}
        axes.plot(*in_order(bounds), **line_style(name))
    axes.set(yscale="log", ylabel="times the limit")
    log_axis(axes.yaxis, axes.get_ylim())


def draw_ratios(results: Results) -> Iterator[Picture]:
    """A picture for each rule and clock: what peers take, divided by what fastopt takes."""
    found = list(comparisons(results))
    rules = dict.fromkeys(versus.peer.rule for versus in found)
    for rule in sorted(rules, key=lambda rule: rule != CHIEF):
        for clock in clocks_of(results):
            chosen = [v for v in found if (v.peer.rule, v.peer.clock) == (rule, clock)]
            if chosen:
                yield draw_ratio(results, rule, clock, chosen)


def draw_ratio(results: Results, rule: str, clock: str, found: Sequence[Versus]) -> Picture:
    operations = list(dict.fromkeys(v.peer.operation for v in found))
    labels = dict(zip(found, labelled(found), strict=True))
    rows: list[tuple[str, str]] = []  # workload and label; a heading has no label
    for workload in dict.fromkeys(v.peer.workload for v in found):
        own = dict.fromkeys(labels[v] for v in found if v.peer.workload == workload)
        rows += [(workload, ""), *((workload, label) for label in own)]
    figure, panels = new_figure(
        results, MARGIN + BAR * len(rows), columns=len(operations), sharey=True, sharex=True
    )
    place = {row: number for number, row in enumerate(rows)}
    ends = [end for v in found for end in (*v.quartiles, v.ratio)]
    span = log_span(ends)
    for axes, operation in zip(panels, operations, strict=True):
        for v in found:
            if v.peer.operation == operation:
                draw_versus(axes, place[v.peer.workload, labels[v]], v)
        axes.axvline(1, color="black", linewidth=1.2, zorder=3)
        axes.set(xscale="log", xlim=span)
        log_axis(axes.xaxis, span, "x")
        axes.set_xlabel("its time / fastopt's")
        axes.set_title(operation, fontsize=10)
        axes.grid(axis="x", alpha=0.3)
        axes.tick_params(axis="y", length=0)
    name_rows(panels[0], rows)
    title = f"{rule}: times of the others divided by fastopt's{SAID[clock]} | right of 1: faster"
    entitle(figure, title.replace("faster", "fastopt is faster"))
    losses = sum(v.loses for v in found)
    sentence = (
        f"{rule}, {CLOCKS[clock]}: bars to the right of 1 are peers that take longer than fastopt; "
        f"hatched ones to the left, {losses or 'none'} of {len(found)}, are faster. Whiskers are "
        "quartiles of the rounds; where it is not plainly fp32, the peer's precision and fastopt's "
        "are named."
    )
    name = f"ratio-{slug(rule)}" + (f"-{clock}" if clock != WALL else "")
    return Picture(name, f"{rule} against each peer{SAID[clock]}", sentence, figure)


def labelled(found: Sequence[Versus]) -> list[str]:
    """Their labels, numbered where somebody did the same in several groups."""
    seen: Counter[tuple[str, ...]] = Counter()
    labels = []
    for v in found:
        key = v.peer.workload, v.peer.operation, v.label
        seen[key] += 1
        labels.append(v.label + (f" ({seen[key]})" if seen[key] > 1 else ""))
    return labels


def draw_versus(axes: Axes, row: int, versus: Versus) -> None:
    """A bar from 1 to the ratio, with quartiles, and its value beside the longer of them."""
    value, (low, high) = versus.ratio, versus.quartiles
    colour = COLOURS.get(versus.peer.contender, OTHER)
    style: dict[str, Any] = {"color": colour}
    if versus.loses:
        style = {"facecolor": "white", "edgecolor": LOSS, "hatch": "////", "linewidth": 1}
    axes.barh(row, value - 1, 0.72, left=1, **style)
    axes.hlines(row, low, high, color="#333333", linewidth=1.1, zorder=4)
    text = f"{digits(value, 2 if value >= 10 else 3)}x"
    if versus.loses:
        text += " loses"
    axes.annotate(
        text,
        (max(value, high, 1), row),
        xytext=(4, 0),
        textcoords="offset points",
        va="center",
        fontsize=8,
        color=LOSS if versus.loses else "black",
        fontweight="bold" if versus.loses else "normal",
    )


def draw_modes(results: Results) -> Iterator[Picture]:
    """fastopt's precision modes, and the peers that took turns with them, on each workload."""
    found: dict[str, list[tuple[Timing, Timing | None]]] = {}
    for group in main_groups(results):
        if group[0].rule == CHIEF and len({t.precision for t in group if t.contender == OURS}) > 1:
            for timing in group:
                rows = found.setdefault(timing.workload, [])
                who = timing.contender, timing.precision
                is_new = who not in {(t.contender, t.precision) for t, _ in rows}
                if timing.contender not in (BOUND, COPY) and is_new:
                    rows.append((timing, bound_of(timing, group)))
    if not found:
        return
    counts = [len(rows) for rows in found.values()]
    height = MARGIN + 0.7 * len(found) + 1.3 * BAR * sum(counts)
    figure, panels = new_figure(results, height, rows=len(found), heights=counts)
    for axes, (workload, rows) in zip(panels, found.items(), strict=True):
        ours = max(timing.median_ns for timing, _ in rows if timing.contender == OURS) / 1e6
        top = min(max(timing.median_ns for timing, _ in rows) / 1e6, BEYOND * ours)
        for row, (timing, limit) in enumerate(rows):
            ms = timing.median_ns / 1e6
            text = f"{digits(ms)} ms"
            if limit:
                # By the ratio of the rounds, so that a swing of the machine does not show.
                times = of_limit(timing, limit)
                bound = ms / times
                axes.vlines(bound, row - 0.45, row + 0.45, color="black", linewidth=2.2, zorder=4)
                text += f", {digits(times)} times the limit"
            axes.barh(row, ms, 0.72, color=COLOURS.get(timing.contender, OTHER))
            end = max(ms, bound) if limit else ms
            if ms > ROOM * top:
                text += ", beyond the scale"
            if ms > top:
                end = min(ms, ROOM * top)
            axes.annotate(
                text,
                (end, row),
                xytext=(-5 if ms > top else 5, 0),
                textcoords="offset points",
                ha="right" if ms > top else "left",
                va="center",
                fontsize=8,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5} if ms > top else None,
            )
        names = [f"{timing.contender}, {timing.precision}" for timing, _ in rows]
        axes.set_yticks(range(len(rows)), names, fontsize=9)
        axes.invert_yaxis()
        axes.set_xlim(0, ROOM * top)
        axes.set_title(workload, fontsize=10)
        axes.grid(axis="x", alpha=0.3)
    panels[-1].set_xlabel("milliseconds a step")
    title = f"{CHIEF}: time of a step by precision{SAID[main_clock(results)]} | shorter is better"
    entitle(figure, title)
    sentence = (
        "Time of a step in each precision mode; shorter is better. The black mark is the limit: "
        "what the memory takes for the bytes that this mode needs."
    )
    yield Picture("modes", "Precision modes against their limits", sentence, figure)


def draw_overhead(results: Results) -> Iterator[Picture]:
    """Time of a step against the number of small tensors."""
    chief = [slope for slope in results.overhead if slope.rule == CHIEF] or results.overhead
    chief = [slope for slope in chief if slope.rule == chief[0].rule]
    if not chief:
        return
    found: dict[tuple[str, str], list[Slope]] = {}
    for slope in chief:
        found.setdefault((slope.clock, slope.gradients), []).append(slope)
    columns = min(2, len(found))
    rows = -(-len(found) // columns)
    figure, panels = new_figure(results, 0.6 + 4.6 * rows, rows=rows, columns=columns)
    for axes in panels[len(found) :]:
        axes.set_visible(False)
    for axes, ((clock, gradients), slopes) in zip(panels, found.items(), strict=False):
        for slope in slopes:
            points = {int(count): us for count, us in slope.medians_us.items()}
            ends = [min(points), max(points)]
            fitted = [slope.fixed_us + slope.us_per_tensor * n for n in ends]
            name = slope.contender
            if slope.precision != FP32:
                name += f", {slope.precision}"
            style = line_style(slope.contender)
            axes.plot(ends, fitted, color=style["color"], linewidth=1.2, zorder=2)
            label = f"{name}: {digits(slope.us_per_tensor)} us a tensor"
            axes.plot(*in_order(points), label=label, **{**style, "linestyle": "none"})
        axes.set_title(f"{gradients} gradients, {CLOCKS[clock]}", fontsize=10)
        axes.set(xlabel="tensors of 64 elements", ylabel="microseconds a step")
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0, top=1.3 * axes.get_ylim()[1])  # room for the legend
        axes.grid(alpha=0.3)
        axes.legend(loc="upper left", fontsize=9)
    entitle(figure, f"{chief[0].rule}: overhead of a step by its tensors | lower is better")
    sentence = (
        "Time of a step over many small tensors, which is all overhead: medians, and the lines "
        "fitted to them; flat and low is good. Kept gradients are the same tensors "
        "in every step, fresh ones are new after each backward pass."
    )
    yield Picture("overhead", "Python overhead against tensors", sentence, figure)


def draw_footprints(results: Results) -> Iterator[Picture]:
    """Bytes per parameter, stacked."""
    if not results.footprints:
        return
    workloads = dict.fromkeys(footprint.workload for footprint in results.footprints)
    found = {w: [f for f in results.footprints if f.workload == w] for w in workloads}
    counts = [len(rows) for rows in found.values()]
    height = MARGIN + 0.7 * len(found) + 1.3 * BAR * sum(counts)
    figure, panels = new_figure(results, height, rows=len(found), heights=counts)
    for axes, (workload, rows) in zip(panels, found.items(), strict=True):
        left = [0.0] * len(rows)
        for part, colour in PARTS.items():
            widths = [getattr(footprint, part) for footprint in rows]
            style = {"color": colour, "hatch": HATCHES[part], "edgecolor": "white"}
            axes.barh(range(len(rows)), widths, 0.72, left=left, label=part, **style)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        for row, footprint in enumerate(rows):
            ours = footprint.contender == OURS
            axes.annotate(
                f"{footprint.total:.2f}",
                (left[row], row),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
                fontsize=9,
                fontweight="bold" if ours else "normal",
            )
        names = [f"{footprint.contender}, {footprint.precision}" for footprint in rows]
        axes.set_yticks(range(len(rows)), names, fontsize=9)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.12 * max(left))
        axes.set_title(workload, fontsize=10)
        axes.grid(axis="x", alpha=0.3)
    panels[-1].set_xlabel("bytes per parameter, gradients apart")
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=3, fontsize=9
    )
    entitle(figure, "Memory per parameter | shorter is better", left=True)
    sentence = (
        "Bytes of memory for each parameter after a step: the parameter itself, its master copy or "
        "what completes it to one, and the optimizer's states; shorter is better."
    )
    yield Picture("memory", "Bytes per parameter", sentence, figure)


def draw_bandwidth(results: Results) -> Iterator[Picture]:
    """What fastopt moves per second, of what the memory allows, on the largest workload of each."""
    largest: dict[tuple[str, str], tuple[Timing, Timing | None]] = {}
    for group in main_groups(results):
        for timing in group:
            known = largest.get((timing.rule, timing.precision))
            if timing.contender != OURS or timing.regime != "memory":
                continue
            if known is None or known[0].elements < timing.elements:
                largest[timing.rule, timing.precision] = timing, bound_of(timing, group)
    rows = sorted(largest.values(), key=lambda row: row[0].rule != CHIEF)
    if not rows:
        return
    figure, (axes,) = new_figure(results, MARGIN + 0.3 + 1.3 * BAR * len(rows))
    top = 0.0
    edges: list[tuple[float, float]] = []  # of the limit, which is drawn as one line in steps
    for row, (timing, limit) in enumerate(rows):
        text = f"{timing.gb_per_s:.1f} GB/s"
        end = timing.gb_per_s
        if limit:
            peak = timing.gb_per_s * of_limit(timing, limit)
            text += f", {timing.gb_per_s / peak:.0%}"
            edges += [(peak, row - 0.5), (peak, row + 0.5)]
            end = max(end, peak)
        else:
            edges += [(float("nan"), row)]
        axes.barh(row, timing.gb_per_s, 0.72, color=COLOURS[OURS])
        axes.annotate(text, (end, row), (6, 0), textcoords="offset points", va="center", fontsize=9)
        top = max(top, end)
    label = " or ".join(dict.fromkeys(LIMITS[limit.contender] for _, limit in rows if limit))
    if label:
        axes.plot(*zip(*edges, strict=True), color="black", linewidth=2, label=f"peak: {label}")
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), fontsize=9, borderaxespad=0.2)
    names = [f"{timing.rule}, {timing.precision}: {timing.workload}" for timing, _ in rows]
    axes.set_yticks(range(len(rows)), names, fontsize=9)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set(xlim=(0, 1.25 * top), xlabel="GB/s of the bytes that the step needs")
    axes.grid(axis="x", alpha=0.3)
    entitle(
        figure, f"fastopt against the memory{SAID[main_clock(results)]} | longer is better", True
    )
    sentence = (
        "What fastopt's step moves per second on the largest workload that is not in a cache, and "
        "the peak that was measured beside it; the nearer to the line, the better."
    )
    yield Picture("bandwidth", "GB/s against the peak", sentence, figure)


#: By what it shows.
DRAWN: dict[str, Callable[[Results], Iterator[Picture]]] = {
    "time against parameters, of two sizes or more": draw_times,
    "times of the peers": draw_ratios,
    "precision modes": draw_modes,
    "GB/s against the peak": draw_bandwidth,
    "overhead of many tensors": draw_overhead,
    "bytes per parameter": draw_footprints,
}


def new_figure(
    results: Results,
    height: float,
    rows: int = 1,
    columns: int = 1,
    heights: Sequence[float] | None = None,
    sharex: bool = False,
    sharey: bool = False,
) -> tuple[Figure, list[Axes]]:
    """A figure with its footer, and its panels row by row."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    footer = 0.32 / height
    figure.get_layout_engine().set(rect=(0.005, footer, 0.99, 1 - footer))  # type: ignore[union-attr]
    figure.text(0.01, 0.1 / height, described(results), fontsize=7.5, color="#555555")
    panels = figure.subplots(
        rows, columns, squeeze=False, height_ratios=heights, sharex=sharex, sharey=sharey
    )
    for axes in panels.flat:
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
    return figure, list(panels.flat)


def entitle(figure: Figure, title: str, left: bool = False) -> None:
    """Its title; at the left where something else is at the right."""
    where = {"x": 0.01, "ha": "left"} if left else {}
    figure.suptitle(title, fontsize=12, fontweight="bold", **where)


def described(results: Results) -> str:
    """One line: the machine, the versions and the date."""
    run = results.run
    machine, versions, gpu = (run.get(key) or {} for key in ("machine", "versions", "gpu"))
    threads = run.get("threads") or machine.get("threads")
    parts = [
        gpu.get("name", ""),
        machine.get("cpu", ""),
        f"{threads} threads" if threads else "",
        *(f"{name} {versions[name]}" for name in ("fastopt", "torch") if versions.get(name)),
        f"triton {versions['triton']}" if gpu and versions.get("triton") else "",
        str(run.get("date", ""))[:10],
        f"commit {run['commit'][:9]}" if run.get("commit") else "",
    ]
    return ", ".join(part for part in parts if part)


def line_style(name: str) -> dict[str, Any]:
    """A contender's colour and marker."""
    names = list(COLOURS)
    marker = MARKERS[names.index(name) % len(MARKERS)] if name in names else "."
    width = 2.4 if name == OURS else 1.5
    order = 3 if name == OURS else 2
    colour = COLOURS.get(name, OTHER)
    return {"color": colour, "marker": marker, "markersize": 6, "linewidth": width, "zorder": order}


def in_order(points: dict[int, float]) -> tuple[list[int], list[float]]:
    """The coordinates, from left to right."""
    return sorted(points), [points[n] for n in sorted(points)]


def name_rows(axes: Axes, rows: Sequence[tuple[str, str]]) -> None:
    """Labels the rows of groups; a group's heading is bold."""
    axes.set_ylim(len(rows) - 0.4, -0.7)
    axes.set_yticks(range(len(rows)), [label or group for group, label in rows], fontsize=9)
    for tick, (_, label) in zip(axes.get_yticklabels(), rows, strict=True):
        if not label:
            tick.set_fontweight("bold")


def name_points(axes: Axes, names: dict[int, str]) -> None:
    """Labels above the axes, moved apart where they would touch, with a line to each point."""
    low, high = (log10(end) for end in axes.get_xlim())
    across = blended_transform_factory(axes.transData, axes.transAxes)
    least = 0.021  # of the width: a line of text
    spots = spread([(log10(n) - low) / (high - low) for n in sorted(names)], least)
    for n, spot in zip(sorted(names), spots, strict=True):
        style = {"arrowstyle": "-", "color": "#999999", "linewidth": 0.7}
        axes.annotate(
            names[n],
            (n, 1.0),
            xycoords=across,
            xytext=(spot, 1.06),
            textcoords="axes fraction",
            rotation=90,
            ha="center",
            va="bottom",
            fontsize=8.5,
            arrowprops={**style, "shrinkA": 0, "shrinkB": 0},
        )


def spread(spots: Sequence[float], least: float) -> list[float]:
    """The spots, which are in order, at least so far apart: to the right, then back from 1."""
    moved: list[float] = []
    for spot in spots:
        moved.append(max(spot, moved[-1] + least) if moved else spot)
    end = 1.0
    for i in range(len(moved) - 1, -1, -1):
        moved[i] = min(moved[i], end)
        end = moved[i] - least
    return moved


def log_span(values: Sequence[float]) -> tuple[float, float]:
    """Limits of a logarithmic axis around 1, with room for a text at the right."""
    low, high = min(*values, 1 / 1.15), max(*values, 1.15)
    return low / 1.1, high * (high / low) ** 0.3 * 1.1


def log_axis(axis: Axis, values: Sequence[float], unit: str = "") -> None:
    """Plain numbers on a logarithmic axis, at least four of them where there is room to choose."""
    low, high = min(values), max(values)
    decades = range(floor(log10(low)), floor(log10(high)) + 1)
    for digits_of_tick in TICKS:
        ticks = [d * 10.0**decade for decade in decades for d in digits_of_tick]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= 4:
            break
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}{unit}"))


def short(count: float) -> str:
    """A number of parameters, as 1.1B."""
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:g}{letter}"
    return f"{count:g}"


def slug(name: str) -> str:
    """A rule as a part of a file name."""
    return "".join(c if c.isalnum() else "-" for c in name.lower()).strip("-")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", type=saved, metavar="RESULTS.json", help="of `bench run`")
    parser.add_argument(
        "--folder", type=Path, help="where the PNGs go (default: beside the results, by its name)"
    )


def main(options: argparse.Namespace) -> int:
    results, path = options.results
    folder = options.folder or path.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    for what, draw in DRAWN.items():
        made = [picture.save(folder) for picture in draw(results)]
        print(*made or [f"No picture of {what}: it was not measured."], sep="\n")
    return 0
