"""A step that is interrupted, wherever that is: it was made or nothing has changed, and the next
one is right."""

import contextlib
import ctypes
import functools
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import (
    BACKENDS,
    BF16,
    FP32,
    Interruption,
    new_params,
    parameters,
    run_file,
    set_grads,
)
from torch.testing._internal.two_tensor import TwoTensor

import fastopt

SHAPES = [(5, 3), (), (130, 32), (0,)]


def new(cls, dtype=FP32, **settings):
    return cls(new_params(SHAPES, dtype), lr=0.1, **settings)


def negated(params):
    """One gradient that only the reference takes."""
    params[0].grad = torch._neg_view(-params[0].grad)


def with_a_wrapper(**settings):
    """For the reference alone."""
    first, *others = new_params(SHAPES)
    wrapper = torch.nn.Parameter(TwoTensor(first.detach(), first.detach().clone()))
    return fastopt.SGD([wrapper, *others], lr=0.1, **settings)


def two_groups():
    params = new_params(SHAPES, BF16)
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.5, "state_dtype": BF16}]
    return fastopt.RMSprop(groups, momentum=0.9, max_norm=1.0, backend="cpp")


adamw, sgd = functools.partial(new, fastopt.AdamW), functools.partial(new, fastopt.SGD)
MOMENTUM = {"momentum": 0.9, "dampening": 0.5}
SPLIT = {"dtype": BF16, "state_dtype": "8bit"}
#: Functions that make an optimizer, and their settings.
CASES = {
    **{f"AdamW, {name}": (adamw, {"max_norm": 0.1, "backend": name}) for name in BACKENDS},
    **{f"SGD, {name}": (sgd, {**MOMENTUM, "backend": name}) for name in BACKENDS},
    **{f"AdamW split 8 bits, {name}": (adamw, {**SPLIT, "backend": name}) for name in BACKENDS},
    "RMSprop in two groups": (two_groups, {}),
    "SGD, one parameter on the reference": (sgd, {**MOMENTUM, "max_norm": 1.0}),
    "AdamW split 8 bits, one on the reference": (adamw, SPLIT),
    "SGD, a wrapper": (with_a_wrapper, MOMENTUM),
    "Adagrad, stochastic": (
        new,
        {"cls": fastopt.Adagrad, "dtype": BF16, "master_weights": "stochastic"},
    ),
}


def bits(optimizer):
    """Of all that a step changes."""

    def of(x):
        x = getattr(x, "a", x)  # of a wrapper
        x = torch.as_tensor(x).detach().contiguous()
        return x.dtype, x.reshape(-1).view(torch.uint8).numpy().tobytes()

    states = optimizer.state
    return [
        (of(param), {key: of(value) for key, value in states.get(param, {}).items()})
        for param in parameters(optimizer)
    ]


class Runs:
    """An optimizer that makes ``before`` steps, and then one that may be interrupted."""

    def __init__(self, case, before):
        make, settings = CASES[case]
        self.make = functools.partial(make, **settings)
        self.spoils = "on the reference" in case
        self.before = before
        whole = self.at_the_step()
        self.bits = [bits(whole)]
        for step in range(before, before + 2):
            self.give_gradients(whole, step)
            whole.step()
            self.bits.append(bits(whole))

    def give_gradients(self, optimizer, step):
        set_grads(parameters(optimizer), step)
        if self.spoils:
            negated(parameters(optimizer))

    def at_the_step(self):
        optimizer = self.make()
        for step in range(self.before):
            self.give_gradients(optimizer, step)
            optimizer.step()
        self.give_gradients(optimizer, self.before)
        return optimizer

    def check(self, optimizer, place):
        """Whether an interrupted step was made; it must not have been made in part."""
        now = bits(optimizer)
        made = self.bits.index(now) if now in self.bits else -1
        assert made in (0, 1), f"interrupted at {place}, a step was made in part"
        for k in range(made, 2):
            self.give_gradients(optimizer, self.before + k)
            optimizer.step()
            right = bits(optimizer) == self.bits[k + 1]
            assert right, f"a good step after one that was interrupted at {place} is wrong"
        return made


FULL = [pytest.param(before, 500, True, marks=pytest.mark.full) for before in (0, 1, 3)]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(("before", "sample", "opcodes"), [(0, 40, False), (2, 40, False), *FULL])
def test_interrupted_in_python(case, before, sample, opcodes):
    """At a sample of the places in a step, and at each of the last ones, where it is made."""
    runs = Runs(case, before)
    optimizer = runs.at_the_step()
    with Interruption(opcodes=opcodes) as counted:
        optimizer.step()
    n = counted.places
    places = sorted({*range(0, n, max(1, n // sample)), *range(max(0, n - sample), n)})
    made = 0
    for place in places:
        optimizer = runs.at_the_step()
        error = (KeyboardInterrupt, MemoryError)[place % 2]
        # Python ignores what is raised while it closes a generator.
        with contextlib.suppress(error), Interruption(place, error, opcodes) as interruption:
            optimizer.step()
        made += runs.check(optimizer, interruption.where)
    print(f"\n{case}, after {before} steps: {len(places)} places, at {made} the step was made")


@pytest.fixture(scope="session")
def failing_new(tmp_path_factory):
    compiler = shutil.which("c++")
    if not compiler or sys.platform != "linux":
        pytest.skip("there is no C++ compiler, or no LD_PRELOAD")
    library = tmp_path_factory.mktemp("preload") / "failing_new.so"
    source = Path(__file__).with_name("failing_new.cpp")
    command = [compiler, "-O1", "-shared", "-fPIC", "-std=c++17", source, "-o", library]
    subprocess.run(command, check=True)
    return library


def test_out_of_memory_in_the_extension(failing_new):
    run_file(__file__, "allocations", LD_PRELOAD=str(failing_new))


def out_of_memory():
    """Each allocation of the extension fails in turn, in a step of each kind."""
    library = ctypes.CDLL(os.environ["LD_PRELOAD"])
    for case in CASES:
        for before in (0, 2):
            runs = Runs(case, before)
            optimizer = runs.at_the_step()
            library.fail_at(10**9)
            optimizer.step()
            allocations = library.allocations()
            made = 0
            for n in range(allocations):
                optimizer = runs.at_the_step()
                library.fail_at(n)
                with contextlib.suppress(MemoryError):
                    optimizer.step()
                library.fail_at(-1)
                made += runs.check(optimizer, f"allocation {n}")
            print(f"{case}, after {before} steps: {allocations} allocations, {made} made")


HUNDREDS = [pytest.param(backend, 1000, marks=pytest.mark.full) for backend in BACKENDS]


@pytest.mark.parametrize(("backend", "times"), [("cpp", 60), ("reference", 15), *HUNDREDS])
def test_signals(backend, times):
    run_file(__file__, "signals", backend, str(times))


def signals(backend, times):
    """Ctrl-C at random moments of steps; an optimizer without them is the model."""

    def interrupt(*args):
        raise KeyboardInterrupt

    signal.signal(signal.SIGALRM, interrupt)
    generator = random.Random(0)
    shapes = [(20_000,)] * 4 + [(7,)] * 40

    def new(dtype):
        return fastopt.AdamW(new_params(shapes, dtype), lr=0.1, max_norm=1.0, backend=backend)

    made = 0
    for dtype in (FP32, BF16):
        disturbed, model = new(dtype), new(dtype)
        for step in range(times):
            if step % 20 == 0:  # first steps, too
                disturbed, model = new(dtype), new(dtype)
            for optimizer in (disturbed, model):
                set_grads(parameters(optimizer), step)
            before = bits(model)
            start = time.perf_counter()
            model.step()
            took = time.perf_counter() - start
            with contextlib.suppress(KeyboardInterrupt):
                signal.setitimer(signal.ITIMER_REAL, max(1e-6, generator.uniform(0, 1.2 * took)))
                disturbed.step()
                signal.setitimer(signal.ITIMER_REAL, 0)
            now, after = bits(disturbed), bits(model)
            assert now in (before, after), f"a signal left half of step {step}"
            if now == before:
                disturbed.step()
                assert bits(disturbed) == after, f"the step after a signal in {step} is wrong"
            else:
                made += 1
    print(f"{backend}: {2 * times} signals, {made} after which the step was made")


if __name__ == "__main__":
    if sys.argv[1] == "signals":
        signals(sys.argv[2], int(sys.argv[3]))
    else:
        out_of_memory()
