"""What can be measured here."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch

from . import workloads
from .contenders import rules
from .modes import MODES, SHORT
from .peers import PEERS, availability
from .run import SPECIAL
from .tables import Cell, Line, Section, table, terminal

HELP = "rules, workloads, precision modes, and peers with why they cannot run here"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """It has none."""


def main(options: argparse.Namespace) -> int:
    console = terminal()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for title, columns, lines in sections(device):
        console.print(table(columns, lines, title=title))
    return 0


def sections(device: str) -> Iterator[Section]:
    lines: list[Line] = [(Cell(rule.title), Cell(variants(rule.title))) for rule in rules()]
    yield Section("Rules", ["--rule", "variants"], lines)
    lines = [
        (
            Cell(name),
            Cell(f"{len(found.shapes):,}"),
            Cell(f"{found.elements:,}"),
            Cell(f"{16 * found.elements / 2**30:.2f} GiB"),
            Cell(found.source),
        )
        for name, found in workloads.load().items()
    ]
    lines += [(Cell(name), *[Cell("")] * 3, Cell("of its own kind")) for name in SPECIAL]
    columns = ["--workload", "tensors", "parameters", "AdamW in fp32", "source"]
    yield Section("Workloads", columns, lines)
    lines = [
        (Cell(mode.name), Cell(SHORT[mode.dtype]), Cell(settings(mode.settings)))
        for mode in MODES.values()
    ]
    yield Section("Precision modes", ["--mode", "parameters", "settings"], lines)
    lines = [(Cell(kind.name), Cell(availability(kind, device) or "available")) for kind in PEERS]
    yield Section(f"Peers on {device}", ["--peer", ""], lines)


def variants(title: str) -> str:
    return "; ".join(
        rule.name.removeprefix(title).strip("()") or "defaults"
        for rule in rules(all_variants=True)
        if rule.title == title
    )


def settings(found: object) -> str:
    assert isinstance(found, dict)
    return ", ".join(f"{name}={value!r}" for name, value in found.items()) or "defaults"
