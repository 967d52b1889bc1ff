"""``python -m bench.instructions``: instructions per tensor per step, counted by callgrind.

Counts repeat where times do not. The path from ``optimizer.step()`` down is counted, Python and
compiled code alike, on one thread, with fresh gradients of one element. Two numbers of tensors are
counted and their difference is divided, so that what a step costs once cancels.

The process runs under valgrind from its start, but instrumented only after its imports: else that
of torch would take minutes.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

import torch

from . import machine, native
from .contenders import Contender, Fastopt, UnavailableError, rules
from .peers import TorchFused
from .workloads import many_small

COUNTS = (100, 300)  # tensors
WARMUP = 5  # steps: until caches, free lists and the interpreter's specialisations have settled
STEPS = 3
CONTENDERS: tuple[type[Contender], ...] = (Fastopt, TorchFused)

# valgrind knows no AVX-512, and the counts of the baseline hold for every machine.
ENVIRONMENT = {"FASTOPT_ISA": "baseline", "ATEN_CPU_CAPABILITY": "default", "PYTHONHASHSEED": "0"}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.instructions", description=__doc__)
    parser.add_argument("--counted", action="store_true", help=argparse.SUPPRESS)
    if parser.parse_args().counted:
        count()
        return
    try:
        totals = under_callgrind()
    except UnavailableError as reason:
        sys.exit(str(reason))
    print("Instructions per tensor per step")
    for rule in rules():
        slopes = (slope(totals, rule.name, contender.name) for contender in CONTENDERS)
        print(f"{rule.name:20}", *slopes)


def slope(totals: dict[str, int], rule: str, contender: str) -> str:
    """One contender's figure, or that it was not run."""
    few, many = (totals.get(label(rule, contender, tensors)) for tensors in COUNTS)
    if few is None or many is None:
        return f"{contender}: -"
    return f"{contender}: {(many - few) / (COUNTS[1] - COUNTS[0]) / STEPS:7.0f}"


def label(rule: str, contender: str, tensors: int) -> str:
    return f"{rule}, {contender}, {tensors}"


def under_callgrind() -> dict[str, int]:
    """The instructions of each part of the run, by label."""
    valgrind = shutil.which("valgrind")
    if valgrind is None:
        raise UnavailableError("valgrind, which counts the instructions, is not installed")
    native.load("callgrind.c")  # here, where an error can be told
    with tempfile.TemporaryDirectory() as scratch:
        command = [valgrind, "--tool=callgrind", "--instr-atstart=no", "--collect-atstart=no"]
        command += [f"--callgrind-out-file={scratch}/out", sys.executable, "-m", __spec__.name]
        result = subprocess.run(
            [*command, "--counted"],
            cwd=machine.ROOT,
            env=os.environ | ENVIRONMENT,
            capture_output=True,
            text=True,
        )
        if result.returncode:
            raise UnavailableError(f"the run under valgrind failed:\n{result.stderr}")
        parts = [path.read_text() for path in Path(scratch).iterdir()]
    totals = {}
    for part in parts:
        name = re.search(r"^desc: Trigger: Client Request: (.+)$", part, re.M)
        number = re.search(r"^totals: (\d+)", part, re.M)
        if name and number:
            totals[name[1]] = int(number[1])
    return totals


def count() -> None:
    """The process that is watched."""
    torch.set_num_threads(1)
    callgrind = native.load("callgrind.c")
    callgrind.callgrind_start()
    for rule, kind, tensors in product(rules(), CONTENDERS, COUNTS):
        workload = many_small(tensors, elements=1)
        params = workload.parameters()
        try:
            contender = kind(rule, params)
        except UnavailableError:
            continue
        for _ in range(WARMUP):
            workload.renew_gradients(params)
            contender.run()
        for _ in range(STEPS):
            workload.renew_gradients(params)
            callgrind.callgrind_toggle()
            contender.run()
            callgrind.callgrind_toggle()
        callgrind.callgrind_dump(label(rule.name, kind.name, tensors).encode())


if __name__ == "__main__":
    main()
