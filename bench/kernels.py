"""``python -m bench.kernels``: what the Triton kernels compile to, which needs no GPU.

Compares the figures of every kernel, for every target, with those that are committed in
``kernels.txt``: whoever changes a kernel sees in a diff what it costs. Exits with 1 where any
differ, and writes them with ``--write``. The figures belong to one version of Triton.
"""

import argparse
import functools
import sys
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastopt import packing
from fastopt.packing import CODE_BLOCK, Stored
from fastopt.rule import ASSIGN, HEAD
from fastopt.rules import RULES
from fastopt.step.params import Target

from . import assembly, contenders, history, offline

TABLE = Path(__file__).with_suffix(".txt")

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}
#: Of parameter, gradient and states: the common ones, and a few that mix. A + is followed by what
#: is kept beside a parameter, or by ~ where it is rounded stochastically.
STORAGE = (
    ("fp32", "fp32", "fp32"),
    ("bf16", "bf16", "fp32"),
    ("fp16", "fp16", "fp32"),
    ("fp64", "fp64", "fp64"),
    ("fp32", "bf16", "fp32"),
    ("bf16", "bf16", "bf16"),
    ("fp32", "fp32", "8bit"),
    ("bf16+16", "bf16", "fp32"),
    ("bf16+16", "bf16", "bf16~"),
    ("bf16+16", "bf16", "8bit"),
    ("bf16+32", "bf16", "fp32"),
    ("fp16+32", "fp16", "fp32"),
    ("bf16~", "bf16", "fp32"),
    ("bf16~", "bf16", "8bit"),
)

PACKINGS = {
    "bf16+16": "remainder",
    "bf16+32": "master_of_bfloat16",
    "fp16+32": "master_of_float16",
    "bf16~": "stochastic",
    "8bit": "codes",
    "8bit+": "unsigned_codes",
}


RULES_AND_CLIPPING = RULES | {ASSIGN.name: ASSIGN}
PARTIALS = torch.zeros(1, dtype=torch.float64)
NOTHING = torch.zeros(0)  # needs no update


class Case:
    """A kernel with one set of types and constants; as a string, its name in the table."""

    def launch(self) -> None:
        """Launches this kernel, and no other, as a step does."""
        raise NotImplementedError


@dataclass(frozen=True)
class Update(Case):
    rule: str
    states: tuple[str, ...]
    storage: tuple[str, ...]  # of parameter, gradient and states

    def __str__(self) -> str:
        return f"update {self.rule}({', '.join(self.states)}) {' '.join(self.storage)}"

    @property
    def written(self) -> list[str]:
        """The storage of the parameter and of each state."""
        param, _, *state = self.storage
        non_negative = RULES_AND_CLIPPING[self.rule].non_negative
        return [
            param,
            *(
                f"{kind}+" if kind == "8bit" and name in non_negative else kind
                for name, kind in product(self.states, state)
            ),
        ]

    @property
    def dtypes(self) -> list[torch.dtype]:
        """Of all that is read; all but the second is written."""
        param, *states = map(stored, self.written)
        first = [param.a.dtype, DTYPES[self.storage[1]], *(state.a.dtype for state in states)]
        return first + [each.b.dtype for each in (param, *states) if has_second(each)]

    def launch(self) -> None:
        grad = torch.zeros(1, CODE_BLOCK, dtype=DTYPES[self.storage[1]])
        one_tensor(self.rule, list(map(stored, self.written)), grad, self.states).update()


def stored(kind: str) -> Stored:
    """Some elements, kept in some way."""
    if kind not in PACKINGS:
        return Stored(torch.zeros(1, CODE_BLOCK, dtype=DTYPES[kind]))
    name = PACKINGS[kind]
    a = torch.zeros(1, CODE_BLOCK, dtype=packing.PACKINGS[name].a)
    return Stored(a, name, packing.PACKINGS[name].new_b(a, CODE_BLOCK))


def has_second(each: Stored) -> bool:
    """Whether it is kept in a second array of an element for each of the first."""
    return each.b is not None and each.a.dtype != torch.uint8


@dataclass(frozen=True)
class ReduceChunks(Case):
    dtype: str
    order: float

    def __str__(self) -> str:
        return f"reduce_chunks {self.dtype} order {self.order:g}"

    def launch(self) -> None:
        grad = torch.zeros(1, dtype=DTYPES[self.dtype])
        one_tensor("assign", [Stored(grad)], grad).norm_partials(self.order)


@dataclass(frozen=True)
class ReducePartials(Case):
    order: float

    def __str__(self) -> str:
        return f"reduce_partials order {self.order:g}"

    def launch(self) -> None:
        from fastopt.kernels.launches import total

        total(PARTIALS, self.order)


@dataclass(frozen=True)
class Clip(Case):
    rule: str
    norm: str

    def __str__(self) -> str:
        return f"clip {self.rule}, norm {self.norm}"

    def launch(self) -> None:
        one_tensor(self.rule, [Stored(NOTHING)], NOTHING).update(PARTIALS, DTYPES[self.norm])


@dataclass(frozen=True)
class ComputeScalars(Case):
    rule: str
    options: tuple[str, ...]

    def __str__(self) -> str:
        return f"compute_scalars {self.rule}({', '.join(self.options)})"

    def launch(self) -> None:
        tensors = one_tensor(self.rule, [Stored(NOTHING)], NOTHING, on_device=True)
        tensors.update(
            partials=PARTIALS if "norm" in self.options else None,
            **{name: torch.ones(1) for name in ("grad_scale", "found_inf") if name in self.options},
            finds_inf="finds_inf" in self.options,
        )


def one_tensor(
    rule: str,
    stored: list[Stored],
    grad: torch.Tensor,
    states: tuple[str, ...] = (),
    on_device: bool = False,
) -> Any:
    """A `MultiTensor` of one tensor, ready for the launches of a step."""
    from fastopt.kernels.launches import MultiTensor
    from fastopt.kernels.rules import RULES as KERNELS

    step = torch.zeros(()) if on_device else None
    target = Target(stored, grad, states, step=step)
    of_rule = RULES_AND_CLIPPING[rule]
    tensors = MultiTensor(of_rule, [target], captured=[], on_device=on_device)
    words = len(HEAD) + len(of_rule.scalar_names)
    if on_device:
        words = 2 * (len(HEAD) + len(KERNELS[rule].scalars.arg_names[1:]))
    row = bytes(8 * words)
    tensors.begin("all", array("q", [grad.data_ptr()]).tobytes(), [], row, n_rows=1)
    return tensors


def variants() -> dict[tuple[str, tuple[str, ...]], contenders.Rule]:
    """Every rule of the optimizers with every set of states that it can have, and the first
    optimizer that does."""
    found: dict[tuple[str, tuple[str, ...]], contenders.Rule] = {}
    for variant in contenders.rules(all_variants=True):
        optimizer = variant.optimizer([torch.zeros(1)], **variant.flags)
        found.setdefault(
            (optimizer.rule.name, optimizer.rule.states_of(optimizer.defaults)), variant
        )
    return found


def is_fit(rule: str, states: tuple[str, ...]) -> bool:
    """For states of 8 bits."""
    return not RULES[rule].unfit({"centered": "grad_avg" in states}, "8bit")


def cases() -> list[Case]:
    orders = (1, 2, float("inf"))
    found: list[Case] = [
        *(
            Update(rule, states, storage if states else storage[:2])
            for (rule, states), storage in product(variants(), STORAGE)
            if storage[2] not in ("8bit", "bf16~") or (states and is_fit(rule, states))
        ),
        *(Update("assign", (), (dtype, dtype)) for dtype in DTYPES),
        *(ReduceChunks(dtype, order) for dtype, order in product(DTYPES, orders)),
        *(ReducePartials(order) for order in orders),
        *(Clip(rule, norm) for rule, norm in product(("sgd", "assign"), ("fp32", "fp64"))),
        *(
            ComputeScalars(rule, (*norm, *scaler))
            for rule, norm, scaler in product(
                RULES, ((), ("norm",)), ((), ("grad_scale", "found_inf"))
            )
        ),
        *(ComputeScalars(rule, ("norm", "grad_scale", "found_inf", "finds_inf")) for rule in RULES),
    ]
    return list(dict.fromkeys(found))


class Result(NamedTuple):
    case: Case
    target: str
    kernel: offline.Kernel
    figures: assembly.Figures

    def line(self) -> str:
        """That of the table."""
        return _line(f"{self.case!s:70}{self.target}", self.figures)


def _line(name: str, cells: Iterable[object]) -> str:
    return f"{name:76}{''.join(f'{cell:>6}' for cell in cells)}"


def compile_all(jobs: Iterable[tuple[Case, str]]) -> Iterator[Result]:
    """Compiles cases for targets, on all cores."""
    with offline.workers() as workers:
        yield from workers.map(_compile, *zip(*jobs, strict=True))


def _compile(case: Case, target: str) -> Result:
    driver = _driver(target)
    driver.activate()
    driver.launched.clear()
    case.launch()
    (kernel,) = driver.launched
    return Result(case, target, kernel, assembly.figures(kernel))


_driver = functools.cache(offline.Driver)


def table(results: Iterable[Result]) -> list[str]:
    """Its lines. The first says what the figures depend on."""
    results = list(results)
    header = _line(
        f"triton {results[0].kernel.metadata['triton_version']}", assembly.Figures._fields
    )
    return [header, *(result.line() for result in results)]


def differences(committed: list[str], lines: list[str], complete: bool = True) -> list[str]:
    """Lines of the committed table that do not hold, after a -, and those that do, after a +.

    Args:
        complete: `lines` are a whole table; where not, the others are not looked at.
    """
    old, new = (
        {line.rsplit(maxsplit=len(assembly.Figures._fields))[0]: line for line in lines}
        for lines in (committed, lines)
    )
    return [
        sign + lines[name]
        for name in ({**old, **new} if complete else new)
        if old.get(name) != new.get(name)
        for sign, lines in (("-", old), ("+", new))
        if name in lines
    ]


def figures(lines: list[str]) -> history.Figures:
    """Those of a table, by name and by column."""
    columns = assembly.Figures._fields
    cells = (line.rsplit(maxsplit=len(columns)) for line in lines[1:])
    return {
        " ".join(name.split()): dict(zip(columns, map(int, of_name), strict=True))
        for name, *of_name in cells
    }


def versions(lines: list[str]) -> dict[str, str]:
    """What the first line of a table says."""
    name, version, *_ = lines[0].split()
    return {name: version}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the table")
    write = parser.parse_args().write
    from rich.progress import track

    jobs = list(product(cases(), offline.TARGETS))
    lines = table(track(compile_all(jobs), f"Compiling {len(jobs)} kernels", len(jobs)))
    if write:
        TABLE.write_text("".join(f"{line}\n" for line in lines))
        old = history.committed(TABLE).splitlines()
        history.record(TABLE, figures(old), figures(lines), versions(lines))
    elif found := differences(TABLE.read_text().splitlines(), lines):
        print(*found, sep="\n")
        sys.exit(1)


if __name__ == "__main__":
    main()
