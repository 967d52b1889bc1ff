"""The results of ``bench.gpu`` at a glance."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .clocks import DEVICE, WALL
from .gpu_report import (
    COPY,
    FOREACH,
    FUSED,
    LARGE,
    LOW_STATES,
    MEDIUM,
    OURS,
    SMALL,
    Rows,
    heading,
    rows_of,
)
from .report import Report, digits

OPERATIONS = ("step", "clip + step")
BLUE, PALE_BLUE, ORANGE, PALE_ORANGE = "#1f5fa8", "#85b6e4", "#e8833a", "#f5c79c"
SHADES = (BLUE, PALE_BLUE, ORANGE, PALE_ORANGE)
COLOURS = dict(zip((OURS, LOW_STATES, FUSED, FOREACH), SHADES, strict=True))
MODES = ("#0b3c6f", "#12b5c9", "#177e89", "#8fd3d1", "#3f6fd8")  # more of fastopt's
OTHERS = (*MODES, "#4f9361", "#9ccfa6", "#7d62a8", "#c1b0db", "#8c8c8c", "#b23a48", "#d9a441")
GOAL: dict[str, Any] = {"color": "black", "linestyle": "--", "linewidth": 1}

Series = Mapping[str, Sequence[float | None]]  # by name, a value for each group


def draw(found: Report, path: Path) -> None:
    figure = Figure(figsize=(18, 10), layout="constrained")
    figure.suptitle(heading(found))
    panels = figure.subplot_mosaic(
        [["large"] * 4, ["rules", "small", "overhead", "startup"]], width_ratios=(1.6, 1, 1, 1)
    )
    draw_large(panels["large"], found)
    draw_small(panels["small"], found)
    draw_rules(panels["rules"], found)
    draw_overhead(panels["overhead"], found)
    draw_startup(panels["startup"], found)
    for axes in panels.values():
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small", ncols=4 if axes is panels["large"] else 1)
        else:
            axes.text(0.5, 0.5, "not measured", ha="center", transform=axes.transAxes)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def draw_large(axes: Axes, found: Report) -> None:
    """With a mark on each bar for what a bare copy of as many bytes takes."""
    axes.set(title="AdamW, 1.1 billion parameters: the device's time", ylabel="ms")
    cases = [(dtype, name) for dtype in ("float32", "bfloat16") for name in OPERATIONS]
    rows = [rows_of(found, LARGE, operation, DEVICE, dtype) for dtype, operation in cases]
    groups = [f"{operation}, {dtype}" for dtype, operation in cases]
    label = "a copy of as many bytes"
    for (case, name), ends in bars(axes, groups, milliseconds(found, rows), colours(found)).items():
        row, copy = rows[case][name], rows[case][COPY]
        times = row["bytes_per_element"] / copy["bytes_per_element"]
        axes.hlines(times * copy["median_ns"] / 1e6, *ends, "black", linewidth=2, label=label)
        label = ""
    axes.set_ylim(top=1.25 * axes.get_ylim()[1])  # room for the legend


def draw_small(axes: Axes, found: Report) -> None:
    axes.set(title="AdamW, 1,000 tensors of 1,000: wall time", ylabel="ms")
    rows = [rows_of(found, SMALL, operation, WALL) for operation in OPERATIONS]
    bars(axes, OPERATIONS, milliseconds(found, rows), colours(found))


def draw_rules(axes: Axes, found: Report) -> None:
    """How much faster than torch's fused class, or its foreach one where that is all there is."""
    axes.set(title="GPT-2, 148 tensors: torch's time / fastopt's", ylabel="x")
    series: dict[str, list[float | None]] = defaultdict(list)
    groups = []
    measured = (row["rule"] for row in found["rows"] if row["workload"].endswith(MEDIUM))
    for rule in dict.fromkeys(measured):
        for clock, operation in product((DEVICE, WALL), OPERATIONS):
            rows = rows_of(found, MEDIUM, operation, clock, rule=rule)
            peer = FUSED if FUSED in rows else FOREACH
            ratio = rows[peer]["ratio"] if peer in rows else None
            series[f"{operation}, {clock} time"].append(ratio)
        groups.append(f"{title(rule)}\n{peer}")
    bars(axes, groups, series, dict(zip(series, SHADES, strict=False)))
    axes.axhline(1, color="black", linewidth=1)


def draw_overhead(axes: Axes, found: Report) -> None:
    axes.set(title="AdamW: host time of a step", xlabel="tensors", ylabel="ms")
    slopes = [slope for slope in found["overhead"] if slope["rule"] == "AdamW"]
    for slope in slopes:
        name = slope["contender"]
        counts, us = zip(*((int(n), us) for n, us in slope["medians_us"].items()), strict=True)
        label = f"{name}: {slope['us_per_tensor']:.2f} us a tensor"
        axes.plot(counts, [t / 1e3 for t in us], "o-", color=COLOURS[name], label=label)
        if name == OURS:
            goal = [(50 + 0.3 * count) / 1e3 for count in counts]
            axes.plot(counts, goal, **GOAL, label="goal: 50 us + 0.3 us a tensor")
    axes.set_ylim(bottom=0)


def draw_startup(axes: Axes, found: Report) -> None:
    axes.set(title="First step of a process", ylabel="s")
    seconds: dict[str, list[float | None]] = defaultdict(list)
    for step in found["startup"]:
        seconds[f"{step['cache']} Triton cache"].append(step["seconds"])
    groups = dict.fromkeys(title(step["rule"]) for step in found["startup"])
    bars(axes, list(groups), seconds, dict(zip(seconds, SHADES, strict=False)))
    label = "goals"
    for goal in (3, 0.5) if seconds else ():
        axes.axhline(goal, **GOAL, label=label)
        label = ""


def title(rule: str) -> str:
    """Without its flags."""
    return rule.partition("(")[0]


def milliseconds(found: Report, cases: Sequence[Rows]) -> Series:
    """The times of all contenders but the copy that are in one of the cases."""
    names = [n for n in found["contenders"] if n != COPY and any(n in rows for rows in cases)]
    return {
        name: [rows[name]["median_ns"] / 1e6 if name in rows else None for rows in cases]
        for name in names
    }


def colours(found: Report) -> dict[str, str]:
    others = [name for name in found["contenders"] if name not in (*COLOURS, COPY)]
    return {**COLOURS, **dict(zip(others, OTHERS, strict=False))}


def bars(
    axes: Axes, groups: Sequence[str], series: Series, colour: Mapping[str, str]
) -> dict[tuple[int, str], tuple[float, float]]:
    """Bars side by side in groups, with their values; a few tall ones leave room for the others.

    Returns:
        where the bars begin and end, by the number of the group and the name of the series.
    """
    values = sorted(v for of_group in series.values() for v in of_group if v is not None)
    top = 1.15 * min(values[-1], 3 * values[len(values) // 2]) if values else 1.0
    ends = {}
    for g in range(len(groups)):
        present = {name: of_group[g] for name, of_group in series.items()}
        heights = {name: value for name, value in present.items() if value is not None}
        width = 0.8 / max(len(heights), 1)
        for i, (name, height) in enumerate(heights.items()):
            left = g - 0.4 + i * width
            ends[g, name] = left, left + 0.92 * width
            axes.bar(left, height, 0.92 * width, color=colour[name], align="edge")
            axes.text(
                left + 0.46 * width,
                min(height, top),
                digits(height),
                ha="center",
                va="bottom",
                size=8,
                zorder=3,
                path_effects=[patheffects.withStroke(linewidth=2, foreground="white")],
            )
    for name in series:
        axes.bar(0, 0, color=colour[name], label=name)
    axes.set_xticks(range(len(groups)), groups)
    axes.set_ylim(0, 1.06 * top)
    return ends
