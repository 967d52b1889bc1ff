"""The launches of a step on a GPU that is not there: how many there are, and what they compile."""

import importlib.util

import pytest
import torch

import fastopt
from fastopt.step import dispatch

if importlib.util.find_spec("triton") is None or dispatch.extension() is None:
    pytest.skip("the Triton backend cannot work here", allow_module_level=True)

from bench import offline


def start():
    """A driver that records; from now on optimizers take the CPU's memory for its own."""
    from fastopt.kernels import launches

    driver = offline.Driver("sm_90")
    launches.INTERPRETED = False
    driver.activate()
    launches._options()  # cached
    launches.INTERPRETED = True
    return driver


def adam(params, **settings):
    """Each parameter in a group of its own, with 28 different learning rates."""
    groups = [{"params": [param], "lr": 1 / (1 + i % 28)} for i, param in enumerate(params)]
    return fastopt.Adam(groups, backend="triton", **settings)


def take_step(optimizer, scaled):
    if not scaled:
        return optimizer.step()
    scaler = fastopt.GradScaler("cpu")
    scaler.scale(torch.zeros(()))
    return scaler.step(optimizer)


def one_step(tensors, settings, scaled):
    """The names of the kernels that it launches."""
    driver = start()
    params = [torch.zeros(5) for _ in range(tensors)]
    for param in params:
        param.grad = torch.ones(5)
    take_step(adam(params, **settings), scaled)
    return [kernel.name for kernel in driver.launched]


def forty_steps(settings, scaled):
    """The names of the kernels that each of them compiles.

    Numbers of tensors, groups, chunks and launches are 1, 2, multiples of 16, and others.
    """
    driver = start()
    compiled = []
    everything = []
    for n in (1, 2, 16, 17, 48):
        params = [torch.zeros(5) for _ in range(n)]
        if n == 2:
            params[1] = torch.zeros(20_000)  # 3 chunks
        if n == 17:
            params[16] = params[0].detach()  # the same memory: updated in a launch after the other
        everything.append((params, adam(params, **settings)))
    for step in range(40):
        for params, optimizer in everything:
            for param in params:
                # At an address that is a multiple of 16, or not.
                param.grad = torch.ones(param.numel() + 1)[step % 2 :][: param.numel()]
            if step % 3 == 2 and len(params) > 1:
                params[step % len(params)].grad = None
            take_step(optimizer, scaled)
        compiled.append([kernel.name for kernel in driver.compiled])
        driver.compiled.clear()
    return compiled


@pytest.fixture(scope="module")
def worker():
    with offline.workers(1) as workers:
        yield workers


CLIP = {"max_norm": 1.0}
CAPTURABLE = {"capturable": True}
WITH_NORM = ["reduce_chunks", "compute_scalars", "update"]
each_kind = pytest.mark.parametrize(
    ("settings", "scaled", "kernels"),
    [
        ({}, False, ["update"]),
        (CLIP, False, ["reduce_chunks", "clip", "update"]),
        (CAPTURABLE, False, ["compute_scalars", "update"]),
        ({**CLIP, **CAPTURABLE}, False, WITH_NORM),
        (CAPTURABLE, True, WITH_NORM),
        ({**CLIP, **CAPTURABLE}, True, WITH_NORM),
    ],
)


@each_kind
@pytest.mark.parametrize("tensors", [1, 1000])
def test_number_of_launches(worker, tensors, settings, scaled, kernels):
    assert worker.submit(one_step, tensors, settings, scaled).result() == kernels


@each_kind
def test_nothing_is_compiled_after_the_first_step(worker, settings, scaled, kernels):
    """Triton would compile anew for numbers that are 1 or multiples of 16, and for addresses that
    are, unless told not to."""
    compiled = worker.submit(forty_steps, settings, scaled).result()
    assert sorted(compiled[0]) == sorted(kernels)
    assert compiled[1:] == [[]] * 39
