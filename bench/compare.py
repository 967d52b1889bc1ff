"""Whether fastopt became slower from one run to another."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import quantiles

from .arguments import saved
from .records import BOUND, COPY, OURS, Results, Timing, bound_of, ratios
from .tables import Cell, Line, pipes, table, terminal

HELP = "fastopt's times in two saved results, relative to the bound of each run"
THRESHOLD = 1.05
SAME, SLOWER, FASTER, NO_BASE = "same", "SLOWER", "faster", "no base"
COLUMNS = (
    "workload",
    "rule",
    "operation",
    "precision",
    "contender",
    "clock",
    "A",
    "B",
    "B / A",
    "",
)
#: What makes times of two runs differ besides fastopt.
WHERE = (("machine", "cpu"), ("gpu", "name"), ("threads",), ("versions", "torch"))
WHERE += (("versions", "triton"), ("versions", "compiler"), ("versions", "python"))

Key = tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """One measurement in both runs: fastopt's time divided by the base's, in the same round.

    Args:
        a, b: quartiles, with the median between them; None where there is no base.
    """

    key: Key
    a: list[float] | None
    b: list[float] | None

    @property
    def change(self) -> float | None:
        """Above 1, B is slower."""
        return self.b[1] / self.a[1] if self.a and self.b else None

    def verdict(self, threshold: float) -> str:
        """Slower or faster only beyond the threshold, and where the quartiles do not overlap."""
        if not self.a or not self.b or self.change is None:
            return NO_BASE
        if self.change > threshold and self.b[0] > self.a[2]:
            return SLOWER
        if self.change < 1 / threshold and self.b[2] < self.a[0]:
            return FASTER
        return SAME


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", type=saved, metavar="A.json")
    parser.add_argument("b", type=saved, metavar="B.json")
    parser.add_argument(
        "--base",
        metavar="CONTENDER",
        default=BOUND,
        help="relative to whom: another contender of the group, as 'torch fused' (default: the "
        "bound, on a GPU the copy)",
    )
    parser.add_argument(
        "--threshold",
        type=threshold,
        default=THRESHOLD,
        help=f"how many times slower is too slow (default: {THRESHOLD}): exit status 1",
    )
    parser.add_argument("--markdown", action="store_true", help="the table in Markdown")


def threshold(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0
    if not value >= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 up, as 1.05")
    return value


def main(options: argparse.Namespace) -> int:
    (a, path_a), (b, path_b) = options.a, options.b
    console = terminal()
    for note in differences(a, b):
        console.print(note)
    known = {timing.contender for timing in (*a.timings, *b.timings)}
    if options.base not in known and options.base != BOUND:
        console.print(f"Nobody is called {options.base!r} there: {', '.join(sorted(known))}.")
        return 2
    rows = list(compared(a, b, options.base))
    lines = (line(row, options.threshold) for row in rows)
    if options.markdown:
        print(pipes(COLUMNS, lines))
    else:
        console.print(table(COLUMNS, lines))
    for path, others in ((path_a, missing(a, b)), (path_b, missing(b, a))):
        if others:
            console.print(f"Only in {path}: {len(others)} rows, as {', '.join(others[0])}.")
    if not rows:
        console.print("The two have nothing in common.")
        return 2
    slower = [row for row in rows if row.verdict(options.threshold) == SLOWER]
    console.print(f"{len(slower)} of {len(rows)} are slower than {options.threshold:g} times A.")
    return int(bool(slower))


def compared(a: Results, b: Results, base: str = BOUND) -> Iterator[Row]:
    """What both have, in the order of B."""
    before, after = relative(a, base), relative(b, base)
    for key, found in after.items():
        if key in before:
            yield Row(key, before[key], found)


def missing(here: Results, there: Results) -> list[Key]:
    """What only the first has."""
    others = relative(there, BOUND)
    return [key for key in relative(here, BOUND) if key not in others]


def relative(results: Results, base: str) -> dict[Key, list[float] | None]:
    """The quartiles of fastopt's times divided by those of the base; the first of several."""
    found: dict[Key, list[float] | None] = {}
    for group in results.groups():
        for timing in group:
            if timing.contender.startswith(OURS):
                key = key_of(timing)
                other = base_of(timing, group, base)
                if found.get(key) is None:
                    found[key] = other and quantiles(ratios(timing, other), n=4, method="inclusive")
    return found


def key_of(timing: Timing) -> Key:
    names = (timing.workload, timing.rule, timing.operation)
    return (*names, timing.precision, timing.contender, timing.clock)


def base_of(timing: Timing, group: list[Timing], base: str) -> Timing | None:
    if base in (BOUND, COPY):
        return bound_of(timing, group)
    others = [other for other in group if other.contender == base]
    same = [other for other in others if other.precision == timing.precision]
    return next(iter(same + others), None)


def line(row: Row, threshold: float) -> Line:
    verdict = row.verdict(threshold)
    return (
        *map(Cell, row.key),
        *(Cell(f"{found[1]:.3f}" if found else "-") for found in (row.a, row.b)),
        Cell(f"{row.change:.3f}" if row.change else "-"),
        Cell(verdict, loses=verdict == SLOWER),
    )


def differences(a: Results, b: Results) -> Iterator[str]:
    """What else differs between the runs."""
    for keys in WHERE:
        one, other = (look_up(results.run, keys) for results in (a, b))
        if one != other:
            yield f"Note: {' '.join(keys)} is {one or 'none'} in A and {other or 'none'} in B."


def look_up(found: object, keys: tuple[str, ...]) -> object:
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    return found
