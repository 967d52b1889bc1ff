"""``python -m bench.regression compare OLD NEW``: ratios to the references, of two saved runs.

A benchmark is slower where its ratio has grown by more than the tolerance, and the quartiles of the
new ratio lie above those of the old one. Exits with 1 if any is, or is no longer there.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from bench.arguments import existing

TOLERANCE = 0.3  # most benchmarks of two runs differ by less, where others use the machine too


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.regression", description=__doc__)
    parser.add_argument("command", choices=["compare"])
    parser.add_argument("old", type=existing)
    parser.add_argument("new", type=existing)
    parser.add_argument("--tolerance", type=float, default=TOLERANCE)
    options = parser.parse_args()
    old, new = ratios(options.old), ratios(options.new)
    print(f"{'ratio to the reference':84}{'old':>8}{'new':>8}{'change':>9}")
    worse = False
    for name in old:
        if name not in new:
            print(f"{name:84}{old[name]['ratio']:8.2f}{'-':>8}")
            worse = True
            continue
        change = new[name]["ratio"] / old[name]["ratio"] - 1
        is_slower = change > options.tolerance and apart(old[name], new[name])
        worse |= is_slower
        figures = f"{old[name]['ratio']:8.2f}{new[name]['ratio']:8.2f}{change:+9.0%}"
        print(f"{name:84}{figures}{'  slower' if is_slower else ''}")
    sys.exit(worse)


def ratios(path: Path) -> dict[str, dict[str, Any]]:
    """What was saved of each benchmark beside its times, by name."""
    saved = json.loads(path.read_text())["benchmarks"]
    return {each["name"]: each["extra_info"] for each in saved if "ratio" in each["extra_info"]}


def apart(old: dict[str, Any], new: dict[str, Any]) -> bool:
    return bool(new["quartiles"][0] > old["quartiles"][1])


if __name__ == "__main__":
    main()
