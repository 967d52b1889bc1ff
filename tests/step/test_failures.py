"""A step that is interrupted, wherever that is: it was made or nothing has changed, and the next
one is right."""

import contextlib
import ctypes
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
from helpers import Interruption, new_params, set_grads
from torch.testing._internal.two_tensor import TwoTensor

import fastopt

BF16 = torch.bfloat16
SHAPES = [(5, 3), (), (300,), (0,)]


def negated(params):
    """One gradient that only the reference takes."""
    params[0].grad = torch._neg_view(-params[0].grad)


def wrapped(shapes):
    """Of which the first is a wrapper, for the reference."""
    first, *others = new_params(shapes)
    return [torch.nn.Parameter(TwoTensor(first.detach(), first.detach().clone())), *others]


def adamw(backend, dtype=torch.float32, **settings):
    return lambda: fastopt.AdamW(new_params(SHAPES, dtype), lr=0.1, backend=backend, **settings)


def sgd(backend, new_params=new_params, **settings):
    return lambda: fastopt.SGD(
        new_params(SHAPES), lr=0.1, momentum=0.9, dampening=0.5, backend=backend, **settings
    )


def two_groups():
    params = new_params(SHAPES, BF16)
    return fastopt.RMSprop(
        [{"params": params[:2]}, {"params": params[2:], "lr": 0.5, "state_dtype": BF16}],
        momentum=0.9,
        max_norm=1.0,
        backend="cpp",
    )


#: Optimizers, and what is done to their gradients before each step.
CASES = {
    **{
        f"AdamW, {backend}": (adamw(backend, max_norm=0.1), None)
        for backend in ("cpp", "reference")
    },
    **{f"SGD, {backend}": (sgd(backend), None) for backend in ("cpp", "reference")},
    **{
        f"AdamW split 8 bits, {backend}": (adamw(backend, BF16, state_dtype="8bit"), None)
        for backend in ("cpp", "reference")
    },
    "RMSprop in two groups": (two_groups, None),
    "SGD, one parameter on the reference": (sgd("auto", max_norm=1.0), negated),
    "AdamW split 8 bits, one on the reference": (adamw("auto", BF16, state_dtype="8bit"), negated),
    "SGD, a wrapper": (sgd("auto", wrapped), None),
    "Adagrad, stochastic": (
        lambda: fastopt.Adagrad(new_params(SHAPES, BF16), lr=0.1, master_weights="stochastic"),
        None,
    ),
}


def bits(optimizer):
    """Of all that a step changes."""

    def of(x):
        x = getattr(x, "a", x)  # of a wrapper
        x = torch.as_tensor(x).detach().contiguous()
        return x.dtype, x.reshape(-1).view(torch.uint8).numpy().tobytes()

    params = [param for group in optimizer.param_groups for param in group["params"]]
    states = [optimizer.state.get(param, {}) for param in params]
    return [
        (of(param), {key: of(value) for key, value in state.items()})
        for param, state in zip(params, states, strict=True)
    ]


class Runs:
    """An optimizer that makes ``before`` steps, and then one that may be interrupted."""

    def __init__(self, case, before):
        self.make, self.spoil = CASES[case]
        self.before = before
        whole = self.at_the_step()
        self.bits = [bits(whole)]
        for step in range(before, before + 2):
            self.give_gradients(whole, step)
            whole.step()
            self.bits.append(bits(whole))

    def give_gradients(self, optimizer, step):
        params = [param for group in optimizer.param_groups for param in group["params"]]
        set_grads(params, step)
        if self.spoil:
            self.spoil(params)

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


def interrupt(case, before, sample, opcodes=False):
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


each_case = pytest.mark.parametrize("case", CASES)
ignored = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@each_case
@ignored
@pytest.mark.parametrize("before", [0, 2])
def test_interrupted_somewhere_in_python(case, before):
    interrupt(case, before, 40)


@each_case
@ignored
@pytest.mark.full
@pytest.mark.parametrize("before", [0, 1, 3])
def test_interrupted_at_instructions_of_python(case, before):
    interrupt(case, before, 500, opcodes=True)


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


def run_this_file(*args, **environment):
    """In a process of its own, which may crash."""
    command = [sys.executable, __file__, *args]
    run = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **environment},
        capture_output=True,
    )
    output = (run.stdout + run.stderr).decode()
    assert run.returncode == 0, f"exit status {run.returncode}: {output}"
    print(output)


def test_out_of_memory_in_the_extension(failing_new):
    run_this_file("allocations", LD_PRELOAD=str(failing_new))


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


@pytest.mark.parametrize(("backend", "times"), [("cpp", "60"), ("reference", "15")])
def test_signals(backend, times):
    run_this_file("signals", backend, times)


@pytest.mark.full
@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_hundreds_of_signals(backend):
    run_this_file("signals", backend, "1000")


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
    for dtype in (torch.float32, BF16):
        disturbed, model = new(dtype), new(dtype)
        for step in range(times):
            if step % 20 == 0:  # first steps, too
                disturbed, model = new(dtype), new(dtype)
            for optimizer in (disturbed, model):
                set_grads(optimizer.param_groups[0]["params"], step)
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
