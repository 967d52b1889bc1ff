"""What is done around the arithmetic, on many small tensors, against torch."""

import copy
from collections import defaultdict
from functools import partial

import pytest
import torch

import fastopt
from bench.contenders import MAX_NORM, Fastopt, Rule, rules
from bench.peers import TorchFused
from bench.workloads import many_small

SMALL = many_small(500)
ADAMW = Rule(fastopt.AdamW, {})


def pair(rule=ADAMW, workload=SMALL):
    """fastopt and torch, each with parameters of its own, after a step."""
    pair = [kind(rule, workload.parameters()) for kind in (Fastopt, TorchFused)]
    for contender in pair:
        contender.run()
    return pair


@pytest.mark.parametrize("gradients", ["kept", "fresh"])
@pytest.mark.parametrize("rule", [r for r in rules() if r.title != "RMSprop"], ids=lambda r: r.name)
def test_step_over_small_tensors(timed, rule, gradients):
    ours, torchs = pair(rule)

    def renew():
        for contender in (ours, torchs):
            SMALL.renew_gradients(contender.params)

    timed(ours.run, TorchFused.name, torchs.run, *([renew] if gradients == "fresh" else []))


@pytest.mark.parametrize("elements", [64, 1 << 15])
def test_clip_grad_norm(timed, elements):
    params = many_small(100, (elements,)).parameters()
    grads = [param.grad for param in params]
    saved = [grad.clone() for grad in grads]
    timed(
        partial(fastopt.clip_grad_norm_, params, MAX_NORM),
        "torch.nn.utils.clip_grad_norm_",
        partial(torch.nn.utils.clip_grad_norm_, params, MAX_NORM),
        # What is clipped already is not written again.
        partial(torch._foreach_copy_, grads, saved),
    )


def test_first_step(timed):
    """Makes the states and the plan."""
    ours, torchs = pair()

    def forget():
        for contender in (ours, torchs):
            contender.optimizer.state = defaultdict(dict)

    timed(ours.run, TorchFused.name, torchs.run, forget)


def test_step_after_a_changed_group(timed):
    """Makes the plan anew, not the states."""
    ours, torchs = pair()

    def change():
        for contender in (ours, torchs):
            contender.optimizer.param_groups = list(contender.optimizer.param_groups)

    timed(ours.run, TorchFused.name, torchs.run, change)


def test_state_dict(timed):
    ours, torchs = pair()
    timed(ours.optimizer.state_dict, TorchFused.name, torchs.optimizer.state_dict)


def test_load_state_dict(timed):
    ours, torchs = pair()
    saved = [copy.deepcopy(contender.optimizer.state_dict()) for contender in (ours, torchs)]
    timed(
        partial(ours.optimizer.load_state_dict, saved[0]),
        TorchFused.name,
        partial(torchs.optimizer.load_state_dict, saved[1]),
    )
