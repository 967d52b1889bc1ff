"""Steps over sets of tensors within the cache and beyond it, against the bare loop on fp32."""

from dataclasses import replace

import pytest
import torch

import fastopt
from bench import bound
from bench.contenders import Fastopt, Rule, TorchFused, UnavailableError, rules
from bench.instructions import MODES, OPERATIONS
from bench.workloads import Workload

SETS = {
    "cached": Workload("16 x 16 Ki", "synthetic", ((1 << 14,),) * 16),
    "beyond": Workload("8 x 1 Mi", "synthetic", ((1 << 20,),) * 8),
}
CASES = [
    *((rule, Fastopt) for rule in rules()),
    *((rule, TorchFused) for rule in rules()),
    *((Rule(fastopt.AdamW, {}), mode) for mode in MODES),
]


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("tensors", SETS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0].title}, {case[1].name}")
def test_step(timed, case, tensors, operation):
    rule, kind = case
    workload = SETS[tensors]
    of_bound = Fastopt(rule, workload.parameters())
    of_bound.run()
    limit = bound.Bound(bound.traffic(of_bound.optimizer))
    dtype = getattr(kind, "dtype", torch.float32)
    try:
        contender = kind(rule, replace(workload, dtype=dtype).parameters())
    except UnavailableError as reason:
        pytest.skip(str(reason))
    for each in (contender, limit):
        each.set_clip(OPERATIONS[operation])
    timed(contender.run, "bound, fp32", limit.run)
