"""The first step of a process, which compiles what is not in Triton's cache on the disk.

Each is measured in a process of its own: ``python -m bench.startup RULE DEVICE``. The constructor
is not timed: that of the first optimizer, whosever it is, imports torch's compiler.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from time import perf_counter

import torch

import fastopt

from .contenders import MAX_NORM, Rule
from .machine import ROOT
from .records import FirstStep

EMPTY, WARM = "empty", "warm"
SHAPES = ((1000, 1000), (1000,), (7,))


def first_steps(rule: Rule, device: torch.device) -> Iterator[FirstStep]:
    """How long one takes, clipping included, so that every kernel of the rule is needed: with an
    empty cache, then with what that one has left there."""
    with tempfile.TemporaryDirectory() as directory:
        for cache in (EMPTY, WARM):
            run = subprocess.run(
                [sys.executable, "-m", __name__, rule.title, str(device)],
                cwd=ROOT,
                env={**os.environ, "TRITON_CACHE_DIR": directory},
                capture_output=True,
                text=True,
            )
            if run.returncode:
                raise RuntimeError(run.stderr.strip().rpartition("\n")[-1])
            yield FirstStep(rule.name, cache, round(float(run.stdout), 3))


def main() -> None:
    title, device = sys.argv[1:]
    params = [torch.ones(shape, device=device, requires_grad=True) for shape in SHAPES]
    for param in params:
        param.grad = torch.ones_like(param)
    if params[0].is_cuda:
        torch.cuda.synchronize()  # the driver's own start is over
    optimizer = getattr(fastopt, title)(params, max_norm=MAX_NORM)
    start = perf_counter()
    optimizer.step()
    if params[0].is_cuda:
        torch.cuda.synchronize()
    print(perf_counter() - start)


if __name__ == "__main__":
    main()
