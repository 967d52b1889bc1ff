"""Steps over sets of tensors within the cache and beyond it, against the bare loop of the mode."""

from itertools import product

import pytest
import torch

import fastopt
from bench import bound
from bench.contenders import Rule, UnavailableError, rules
from bench.modes import FP32, MODES, Case, ours
from bench.peers import TorchFused
from bench.turns import CLIP, STEP
from bench.workloads import many_small

SETS = {"cached": many_small(16, (64, 256)), "beyond": many_small(8, (1024, 1024))}
CASES = [
    *product(rules(), (*ours(FP32), Case(TorchFused, torch.float32))),
    *product([Rule(fastopt.AdamW, {})], ours(*(mode for mode in MODES.values() if mode != FP32))),
]


def name(case):
    rule, who = case
    return f"{rule.title}, {who.name}, {who.precision}"


@pytest.mark.parametrize("operation", [STEP, CLIP])
@pytest.mark.parametrize("tensors", SETS)
@pytest.mark.parametrize("case", CASES, ids=name)
def test_step(timed, case, tensors, operation):
    rule, who = case
    try:
        contender = who.make(rule, SETS[tensors].parameters(dtype=who.dtype))
        contender.run()
    except UnavailableError as reason:
        pytest.skip(str(reason))
    contender.set_clip(operation == CLIP)
    loop = bound.BareLoop(bound.traffic(contender))
    timed(contender.run, f"bound, {who.precision}", lambda: loop.run(operation == CLIP))
