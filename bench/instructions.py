"""``python -m bench.instructions``: instructions of a step, counted by callgrind.

Counts repeat; times do not. So they are committed, in ``instructions.txt``, and a change
that costs something shows in a diff. Compares what it counts with that file, and exits with 1 where
a figure is off by more than its tolerance. ``--write`` writes it, and what changed to
``history.jsonl``. Figures within the tolerance stay as they were, so that small changes cannot add
up unseen. There are two tables:

- ``host``: from ``optimizer.step()`` down, Python and compiled code alike, on tensors of one
  element: instructions and allocations per tensor (the slope between two numbers of tensors) and
  what a step costs once (the rest). Kept gradients are the same objects in every step. Fresh ones
  are at other addresses, and no Python objects exist for them. ``malloc`` counts the calls of
  malloc, calloc, realloc and posix_memalign, whose own instructions are left out; ``objects`` those
  of CPython's allocator, without what its free lists serve; ``python`` the Python functions that
  are called, and ``crossings`` the calls into the extension.
- ``kernels``: instructions per element of the CPU kernels, for every set of states, precision mode,
  operation and instruction set, within the compiled extension (the slope between two sizes of one
  tensor: what a step costs once cancels).

All is counted on one thread, with garbage collection off. The process runs under valgrind from its
start, but instrumented only after its imports: else that of torch would take minutes.
"""

import argparse
import gc
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from statistics import median_low
from types import FrameType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import fastopt
from fastopt.packing import CODE_BLOCK
from fastopt.step import dispatch

from . import history, kernels, machine, native
from .contenders import MAX_NORM, Rule, UnavailableError, rules
from .modes import FP32, MODES, SPLIT, Case, Mode, ours
from .peers import TorchFused
from .turns import CLIP, STEP
from .workloads import many_small, of_ranks

TABLES = Path(__file__).with_suffix(".txt")

FRESH = {"kept gradients": False, "fresh gradients": True}  # whether they are renewed
#: valgrind knows no AVX-512. The host path is counted with the first, which every machine has.
ISAS = ("baseline", "x86-64-v3")
TENSORS = (20, 180)
ELEMENTS = (1 << 13, 1 << 15)  # of the kernels' tensors: whole chunks
#: Steps, until the interpreter has specialised the code; then those of each case, until caches and
#: free lists have settled.
FIRST_WARMUP, WARMUP = 50, 6
STEPS = 3  # that are counted: the median
SHIFT = 50_000  # bytes, of the addresses in the second process

ENVIRONMENT = {"FASTOPT_ISA": ISAS[0], "ATEN_CPU_CAPABILITY": "default", "PYTHONHASHSEED": "0"}

#: What is counted of a step, and how many calls of which functions that is.
CALLS = {
    "malloc": ("malloc", "calloc", "realloc", "posix_memalign"),
    "objects": ("_PyObject_Malloc", "_PyObject_Calloc", "_PyObject_Realloc"),
}
#: glibc's, whose instructions are left out: it tidies up now and then, what others left behind too.
ALLOCATOR = (
    *("malloc", "calloc", "realloc", "free", "cfree", "posix_memalign", "_mid_memalign"),
    *("_int_malloc", "_int_realloc", "_int_free", "_int_memalign", "malloc_consolidate"),
    *("unlink_chunk", "sysmalloc", "systrim", "alloc_perturb", "tcache_init"),
)
INSTRUCTIONS = "instructions"
OURS = "/fastopt/_C."  # the library: the kernels' instructions are counted in it alone
#: What Python's profiler counts, in a step of its own.
PROFILED = ("python", "crossings")
COUNTED = (INSTRUCTIONS, *CALLS, *PROFILED)
HOST, KERNELS = "host", "kernels"
REFERENCE = "reference"  # of the host path
COLUMNS = {
    HOST: tuple(f"{what}/{per}" for what in COUNTED for per in ("tensor", "step")),
    KERNELS: ISAS,
}
FEW, ALL = "few", "all"  # lines


class Tolerance(NamedTuple):
    """A figure may differ by the larger of both."""

    relative: float
    absolute: float

    def allows(self, old: float, new: float) -> bool:
        return abs(new - old) <= max(self.relative * abs(old), self.absolute)


#: The kernels' figures repeat to 0.01, to which they are rounded. Those of the host depend on where
#: things are in memory: they differ by 1% from run to run, and a line or two of some processes by
#: 7%, for which there is a second process.
TOLERANCES = (
    {column: Tolerance(0.005, 0.02) for column in ISAS}
    | {
        # 1,410 and 1,358 for the same code, by what else ran in the process.
        "instructions/tensor": Tolerance(0.04, 0),
        # Where things are in memory moves a step by up to 15,200, however short it is.
        "instructions/step": Tolerance(0.05, 16000),
        "malloc/tensor": Tolerance(0, 0.05),
        "malloc/step": Tolerance(0, 2),
        "objects/tensor": Tolerance(0, 0.05),
        "objects/step": Tolerance(0, 5),
    }
    | {f"{what}/{per}": Tolerance(0, 0) for what in PROFILED for per in ("tensor", "step")}
)


@dataclass(frozen=True)
class Table:
    """Figures, by line and by column, and what they depend on."""

    title: str
    versions: Mapping[str, str]
    lines: dict[str, dict[str, float]] = field(default_factory=dict)

    def __str__(self) -> str:
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        columns = COLUMNS[self.title]
        rows = [(self.title, *columns)]
        for name, line in self.lines.items():
            rows.append((name, *(f"{line[c]:.12g}" if c in line else "-" for c in columns)))
        first, *others = (max(map(len, cells)) for cells in zip(*rows, strict=True))
        lines = (
            name.ljust(first) + "".join(f"   {c:>{w}}" for c, w in zip(cells, others, strict=True))
            for name, *cells in rows
        )
        return "\n".join([f"# {versions}", *lines, ""])


def parse(text: str) -> dict[str, Table]:
    """The tables of a file, by title."""
    found = {}
    for part in filter(None, text.split("\n\n")):
        versions, heading, *lines = part.strip().splitlines()
        title, *columns = re.split(r" {2,}", heading)
        pairs = (pair.partition(" ")[::2] for pair in versions.removeprefix("# ").split(", "))
        figures = {}
        for line in lines:
            name, *cells = re.split(r" {2,}", line)
            figures[name] = {
                c: float(cell) for c, cell in zip(columns, cells, strict=True) if cell != "-"
            }
        found[title] = Table(title, dict(pairs), figures)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.instructions", description=__doc__)
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--check", action="store_true", help="compare only, print no tables")
    chosen.add_argument("--write", action="store_true", help="write what has changed")
    chosen.add_argument("--counted", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.counted:
        count(*options.counted)
        return
    try:
        new = measured(ALL)
    except UnavailableError as reason:
        sys.exit(str(reason))
    old = parse(TABLES.read_text()) if TABLES.exists() else {}
    if options.write:
        write([settled(old.get(table.title), table) for table in new])
        return
    if not options.check:
        print(*new, sep="\n")
    if found := [message for table in new for message in wrong(old.get(table.title), table)]:
        sys.exit("\n".join(found))


def write(tables: list[Table]) -> None:
    TABLES.write_text("\n".join(map(str, tables)))
    in_last_commit = parse(history.committed(TABLES))
    old, new = (
        {f"{table.title}: {name}": line for table in each for name, line in table.lines.items()}
        for each in (in_last_commit.values(), tables)
    )
    versions = {name: version for table in tables for name, version in table.versions.items()}
    history.record(TABLES, old, new, versions)


def settled(old: Table | None, new: Table) -> Table:
    """The new figures, but the old ones where they are within the tolerance."""
    if old is None or old.versions != new.versions:
        return new
    lines = {
        name: {
            column: old.lines[name][column] if is_right(old, name, column, figure) else figure
            for column, figure in line.items()
        }
        for name, line in new.lines.items()
    }
    return replace(new, lines=lines)


def wrong(old: Table | None, new: Table, complete: bool = True) -> list[str]:
    """What of a committed table does not hold.

    Args:
        complete: ``new`` has all lines; where not, the others are not looked at.
    """
    if old is None:
        return [f"{new.title}: there are no figures"]
    if others := other_versions(old, new):
        return [f"{new.title}: {other}" for other in others]
    found = [
        f"{new.title}: {name}, {column}: {old.lines.get(name, {}).get(column)} -> {figure}"
        for name, line in new.lines.items()
        for column, figure in line.items()
        if not is_right(old, name, column, figure)
    ]
    gone = [name for name in old.lines if name not in new.lines] if complete else []
    return found + [f"{new.title}: {name} is no longer there" for name in gone]


def other_versions(old: Table, new: Table) -> list[str]:
    """In what the figures cannot be compared."""
    return [
        f"the figures are of {name} {old.versions.get(name)}, and this is {version}"
        for name, version in new.versions.items()
        if old.versions.get(name) != version
    ]


def is_right(table: Table, name: str, column: str, figure: float) -> bool:
    old = table.lines.get(name, {}).get(column)
    return old is not None and TOLERANCES[column].allows(old, figure)


def versions() -> dict[str, dict[str, str]]:
    """What the figures depend on, by title."""
    extension = dispatch.extension()
    if extension is None:
        raise UnavailableError("there is no compiled extension: see fastopt.backends()")
    # ELF files say in their section .comment who made them.
    made_by = re.findall(
        rb"GCC: \([^)]*\) [\d.]+|clang version [\d.]+", Path(extension.__file__).read_bytes()
    )
    compiled = {
        "compiler": " and ".join(sorted({maker.decode() for maker in made_by})),
        "valgrind": machine.first_line(valgrind(), "--version").removeprefix("valgrind-"),
    }
    built = " ".join(platform.python_build()[1].split())
    python = {
        "python": f"{platform.python_version()} of {built}",
        "torch": torch.__version__,
        "libc": " ".join(platform.libc_ver()),
    }
    return {HOST: python | compiled, KERNELS: compiled}


def valgrind() -> str:
    found = shutil.which("valgrind")
    if found is None:
        raise UnavailableError("valgrind, which counts the instructions, is not installed")
    return found


class Label(NamedTuple):
    """What a part of the run counts."""

    title: str
    line: str
    column: str  # of the kernels; "" for the host path
    size: int  # tensors or elements
    python: int = 0  # calls: see `PROFILED`
    crossings: int = 0


def measured(which: str) -> list[Table]:
    """The tables, with few or all of their lines."""
    of_parts = under_callgrind(which)
    tables = {title: Table(title, depends) for title, depends in versions().items()}
    few, many = (
        {k[:3]: v for k, v in of_parts.items() if k.size in s}
        for s in zip(TENSORS, ELEMENTS, strict=True)
    )
    for (title, name, column), at_many in many.items():
        at_few = few[title, name, column]
        line = tables[title].lines.setdefault(name, {})
        if title == KERNELS:
            line[column] = round(
                (at_many[INSTRUCTIONS] - at_few[INSTRUCTIONS]) / (ELEMENTS[1] - ELEMENTS[0]), 2
            )
            continue
        for what in COUNTED:
            slope = (at_many[what] - at_few[what]) / (TENSORS[1] - TENSORS[0])
            line[f"{what}/tensor"] = round(slope, 0 if what == INSTRUCTIONS else 2)
            line[f"{what}/step"] = round(at_few[what] - TENSORS[0] * slope)
    return list(tables.values())


def under_callgrind(which: str) -> dict[Label, dict[str, int]]:
    """What was counted in each part of the run.

    Of the host path the least of two processes, which have things at other addresses: those decide
    what collides in the interpreter's caches, and in one process of several that shows.
    """
    native.load("callgrind.c")  # here, where an error can be told
    # All that is counted, in about two halves.
    titles = ((HOST, REFERENCE), (HOST, KERNELS))
    with tempfile.TemporaryDirectory() as scratch:
        directories = [Path(scratch, str(number)) for number in range(len(titles))]
        processes = []
        for number, directory in enumerate(directories):
            directory.mkdir()
            command = [
                *(valgrind(), "--tool=callgrind", f"--callgrind-out-file={directory}/out"),
                *("--instr-atstart=no", "--dump-line=no"),
                *("--compress-strings=no", "--compress-pos=no"),
                *(sys.executable, "-m", "bench.instructions", "--counted", which, *titles[number]),
            ]
            environment = os.environ | ENVIRONMENT | {"PADDING": number * SHIFT * "x"}
            with Path(directory, "errors").open("w") as errors:
                processes.append(
                    subprocess.Popen(
                        command, cwd=machine.ROOT, env=environment, stdout=errors, stderr=errors
                    )
                )
        for process, directory in zip(processes, directories, strict=True):
            if process.wait():
                errors_text = Path(directory, "errors").read_text()
                raise RuntimeError(f"the run under valgrind failed:\n{errors_text}")
        first, second = map(parts, directories)
    found = {**first, **second}
    for label in first.keys() & second.keys():
        found[label] = {what: min(first[label][what], second[label][what]) for what in COUNTED}
    return found


def parts(directory: Path) -> dict[Label, dict[str, int]]:
    """What one process counted: the median of what has the same label."""
    paths = sorted(directory.glob("out.*"), key=lambda path: int(path.suffix[1:]))
    found = defaultdict(list)
    for label, counted in filter(None, map(part, paths)):
        found[label].append(counted)
    return {
        label: {what: median_low(counted[what] for counted in steps) for what in steps[0]}
        for label, steps in found.items()
    }


def part(path: Path) -> tuple[Label, dict[str, int]] | None:
    """What one of callgrind's files tells; nothing where it has no label."""
    text = path.read_text()
    found = re.search(r"^desc: Trigger: Client Request: (\[.+)$", text, re.M)
    if not found:
        return None
    label = Label(*json.loads(found[1]))
    calls: Counter[str] = Counter()
    for function, times in re.findall(r"^cfn=(.+)\ncalls=(\d+)", text, re.M):
        calls[function] += int(times)
    instructions = sum(
        own
        for library, function, own in costs(text)
        if function not in ALLOCATOR and (label.title == HOST or OURS in library)
    )
    return label, {
        INSTRUCTIONS: instructions,
        **{what: sum(calls[name] for name in names) for what, names in CALLS.items()},
        **{what: getattr(label, what) for what in PROFILED},
    }


def costs(text: str) -> Iterator[tuple[str, str, int]]:
    """The library, the name and the instructions of functions, without those that they call."""
    library, function, of_callee = "", "", False
    for line in text.splitlines():
        if line.startswith("ob="):
            library = line
        elif line.startswith("fn="):
            function = line[3:].partition(".")[0]
        elif line.startswith("calls="):
            of_callee = True  # the next line
        elif line[:1].isdigit():
            if not of_callee:
                yield library, function, int(line.split()[1])
            of_callee = False


class Counting:
    """In the process that is watched: counts what is run.

    Callgrind can also leave out parts of a run, but then it counts the calls in them all the same.
    """

    def __init__(self) -> None:
        self.callgrind = native.load("callgrind.c")
        self.callgrind.callgrind_start()

    def begin(self) -> None:
        self.callgrind.callgrind_dump(b"what came before")

    def end(self, label: Label) -> None:
        """What was run since `begin`, or since the last `end`, goes to a file."""
        self.callgrind.callgrind_dump(json.dumps(label).encode())


def count(which: str, *titles: str) -> None:
    """The process that is watched."""
    torch.set_num_threads(1)
    first = many_small(2)
    fused = Case(TorchFused, torch.float32)
    for case in (*ours(FP32), fused):  # a process's first optimizer imports torch's compiler
        contender = case.make(rules()[-1], first.parameters())
        for _ in range(FIRST_WARMUP):
            contender.run()
    gc.collect()
    gc.disable()
    counting = Counting()
    chosen = [rule for rule in rules() if which == ALL or rule.optimizer is fastopt.AdamW]
    if HOST in titles:
        count_host(counting, list(product(chosen, ours(FP32))))
        count_host(counting, list(product(chosen[-1:], ours(SPLIT))))
        count_host(counting, list(product(chosen[-1:], ours(FP32))), dtensors=True)
    if REFERENCE in titles:
        count_host(counting, [(rule, fused) for rule in chosen])
    if KERNELS in titles:
        count_kernels(counting, which)


def count_host(counting: Counting, cases: list[tuple[Rule, Case]], dtensors: bool = False) -> None:
    if dtensors and not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    # All parameters are made at first, one beside the other in memory: the hash of a tensor is its
    # address, and between what others have left there would be more collisions in dicts.
    prepared = []
    for (rule, case), tensors in product(cases, TENSORS):
        workload = of_ranks(1, tensors, 1) if dtensors else many_small(tensors, (1,))
        prepared.append((rule, case, workload, workload.parameters(dtype=case.dtype)))
    for rule, case, workload, params in prepared:
        try:
            contender = case.make(rule, params)
        except UnavailableError:
            continue
        for gradients, fresh in FRESH.items():
            what = f"{case.name} {case.precision}{' on DTensors' * dtensors}"
            label = Label(HOST, f"{rule.name}, {what}, {gradients}", "", len(params))
            for number in range(WARMUP + STEPS):
                if fresh:
                    workload.renew_gradients(params)
                if number == 1:  # the first one makes a plan
                    label = label._replace(**profile(contender.run))
                if number >= WARMUP:
                    counting.begin()
                contender.run()
                if number >= WARMUP:
                    counting.end(label)


def profile(step: Callable[[], object]) -> dict[str, int]:
    """How many calls of each kind of `PROFILED` a step makes."""
    counted = dict.fromkeys(PROFILED, 0)
    extension = f"{fastopt.__name__}._C"

    def count(frame: FrameType, event: str, function: Any) -> None:
        counted["python"] += event == "call"
        counted["crossings"] += event == "c_call" and function.__module__ == extension

    sys.setprofile(count)
    try:
        step()
    finally:
        sys.setprofile(None)
    return counted


def kernel_cases(which: str) -> Iterator[tuple[str, Rule, Mode]]:
    """Of the few: every set of states in one mode, and every mode with one set of states."""
    for ((rule, states), variant), mode in product(kernels.variants().items(), MODES.values()):
        if "state_dtype" in mode.settings and not states:
            continue
        default_adam = variant.optimizer is fastopt.Adam and variant in rules()
        if which == ALL or mode is FP32 or default_adam:
            yield f"{rule}({', '.join(states)}) {mode.name}", variant, mode


def count_kernels(counting: Counting, which: str) -> None:
    extension = dispatch.extension()
    assert extension is not None
    isas = [isa for isa in ISAS if isa in extension.supported_isas()]
    for (name, rule, mode), elements in product(kernel_cases(which), ELEMENTS):
        params = one_tensor(elements, mode.dtype)
        (case,) = ours(mode)
        try:
            contender = case.make(rule, params)
            contender.run()
        except UnavailableError:  # the mode is not for this rule
            continue
        counting.begin()
        for operation, isa in product((STEP, CLIP), isas):
            contender.set_clip(operation == CLIP)
            extension.use_isa(isa)
            contender.run()
            counting.end(Label(KERNELS, f"{name}, {operation}", isa, elements))
    for (short, dtype), elements, isa in product(kernels.DTYPES.items(), ELEMENTS, isas):
        params = one_tensor(elements, dtype)  # anew: what is clipped already is not written again
        extension.use_isa(isa)
        counting.begin()
        fastopt.clip_grad_norm_(params, MAX_NORM)
        counting.end(Label(KERNELS, f"clip_grad_norm_ {short}", isa, elements))


def one_tensor(elements: int, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)  # conversions of denormal fp16 numbers take more instructions
    return many_small(1, (elements // CODE_BLOCK, CODE_BLOCK)).parameters(dtype=dtype)


if __name__ == "__main__":
    main()
