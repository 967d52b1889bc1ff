"""``history.jsonl``: a line for each commit that changed a table of figures, oldest first.

``python -m bench.instructions --write`` and ``python -m bench.kernels --write`` add to it. A line
has the day, the commit that the change was made upon, the table, what its figures depend on, the
sum of each column, and the lines of the table that changed: all, or the worst where they are many.
"""

import json
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

from . import machine

PATH = Path(__file__).with_suffix(".jsonl")
MANY = 20  # lines of a table: where more have changed, the worst of them are told

#: By line of a table and by column.
Figures = Mapping[str, Mapping[str, float]]


def committed(table: Path) -> str:
    """A table's text in the last commit, empty where it has none."""
    return machine.output("git", "-C", str(machine.ROOT), "show", f"HEAD:./{relative(table)}")


def relative(table: Path) -> str:
    return table.relative_to(machine.ROOT).as_posix()


def record(
    table: Path,
    old: Figures,
    new: Figures,
    versions: Mapping[str, str],
    path: Path = PATH,
) -> None:
    """Adds a line, if any figure has changed since the last commit.

    What was recorded for this table since that commit gives way: figures may be written several
    times before they are committed.
    """
    parent = machine.first_line("git", "-C", str(machine.ROOT), "rev-parse", "--short", "HEAD")
    name = relative(table)
    lines = path.read_text().splitlines() if path.exists() else []
    kept = [line for line in lines if told(line) != (parent, name)]
    if found := changes(old, new):
        heading = {"date": date.today().isoformat(), "parent": parent, "table": name}
        kept.append(json.dumps({**heading, "versions": versions, **found}))
    path.write_text("".join(f"{line}\n" for line in kept))


def told(line: str) -> tuple[str, str]:
    """The parent commit and the table of a line."""
    entry = json.loads(line)
    return entry["parent"], entry["table"]


def changes(old: Figures, new: Figures) -> dict[str, Any]:
    """What a line tells of two states of a table; empty where they are the same."""
    both = {name: differences(old[name], new[name]) for name in old if name in new}
    changed = {name: columns for name, columns in both.items() if columns}
    added = {name: columns for name, columns in new.items() if name not in old}
    removed = [name for name in old if name not in new]
    if not (changed or added or removed):
        return {}
    before, after = sums(old), sums(new)
    by_growth = sorted(changed, key=lambda name: growth(changed[name]), reverse=True)
    return {
        "lines": {"changed": len(changed), "added": len(added), "removed": len(removed)},
        "sums": {column: [before.get(column), after.get(column)] for column in before | after},
        "changed": {name: changed[name] for name in by_growth[:MANY]},
        "added": dict(list(added.items())[:MANY]),
        "removed": removed[:MANY],
    }


def differences(
    old: Mapping[str, float], new: Mapping[str, float]
) -> dict[str, list[float | None]]:
    """Old and new figure of each column that has changed; None: there is none."""
    return {
        column: [old.get(column), new.get(column)]
        for column in {**old, **new}
        if old.get(column) != new.get(column)
    }


def growth(columns: Mapping[str, list[float | None]]) -> float:
    """The most that a figure grew, relative to what it was."""
    pairs = (pair for pair in columns.values() if None not in pair)
    return max(((new - old) / max(abs(old), 1) for old, new in pairs), default=0)  # type: ignore[operator, arg-type]


def sums(figures: Figures) -> dict[str, float]:
    """Of each column, over all lines."""
    found: dict[str, float] = {}
    for columns in figures.values():
        for column, figure in columns.items():
            found[column] = round(found.get(column, 0) + figure, 2)
    return found
