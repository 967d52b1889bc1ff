"""What several test files share."""

import contextlib
import copy
import importlib
import io
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastopt
from fastopt.step import dispatch

FP64, FP32, BF16, FP16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
DTYPES = [FP32, FP64, BF16, FP16]
HALVES = [BF16, FP16]

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(fastopt.__file__).parent  # of another build, where that is tested
BACKENDS = ["cpp", "reference"]
#: For tests that need Triton's interpreter.
interpreted = pytest.mark.skipif(
    not dispatch.backends()["triton"].available or not dispatch.triton_kernels().INTERPRETED,
    reason="the kernels are not interpreted",
)
#: It computes lanes that are masked out, on zeros.
masked_out = [
    pytest.mark.filterwarnings(f"ignore:{what} encountered:RuntimeWarning")
    for what in ("divide by zero", "invalid value", "overflow")
]

# The table of cases. Every optimizer, with settings that between them reach every kernel:
CASES = [(cls, variant) for cls in fastopt.OPTIMIZERS for variant in cls.variants]
# every precision mode, as (dtype, master_weights, state_dtype):
MASTERS = {BF16: ("split", "fp32", "stochastic", None), FP16: ("fp32", None), FP32: (None,)}
STATE_DTYPES = (FP32, BF16, "8bit")
MODES = [
    (dtype, *mode) for dtype in MASTERS for mode in itertools.product(MASTERS[dtype], STATE_DTYPES)
]
# and every instruction set of this machine.
ISAS = dispatch.extension().supported_isas() if dispatch.extension() else []

each_case = pytest.mark.parametrize(("cls", "variant"), CASES, ids=str)
each_optimizer = pytest.mark.parametrize("cls", fastopt.OPTIMIZERS)
each_mode = pytest.mark.parametrize(("dtype", "master", "states"), MODES, ids=str)
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def torch_class(cls):
    """torch's optimizer of the same name, or the textbook's."""
    name = cls.__name__
    if found := getattr(torch.optim, name, None):
        return found
    return getattr(importlib.import_module(f"textbook.{cls.rule.name}"), name)


def new_params(shapes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
        for shape in shapes
    ]


def set_grads(params, step):
    """Random gradients, the same for the same step."""
    generator = torch.Generator().manual_seed(step)
    for param in params:
        grad = torch.randn(param.shape, generator=generator, dtype=torch.float64)
        param.grad = grad.to(param.dtype)


def take_steps(optimizer, steps):
    """One step for each number in ``steps``, with the gradients of that number."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for step in steps:
        set_grads(params, step)
        optimizer.step()
    return params


def clones(params):
    return [torch.nn.Parameter(param.detach().clone()) for param in params]


def parameters(optimizer):
    return [param for group in optimizer.param_groups for param in group["params"]]


def entries(optimizer):
    """All that the state holds, in order: parameter's index, name, value."""
    return [
        (index, name, value)
        for index, param in enumerate(parameters(optimizer))
        for name, value in sorted(optimizer.state.get(param, {}).items())
    ]


def through_file(obj, weights_only=True):
    file = io.BytesIO()
    torch.save(obj, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


def run_file(file, *args, **environment):
    """Runs a test file as a script, in a process of its own because it may crash."""
    path = os.pathsep.join(filter(None, sys.path))
    found = subprocess.run(
        [sys.executable, "-W", "ignore", file, *args],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
    )
    output = (found.stdout + found.stderr).decode()
    assert found.returncode == 0, f"exit status {found.returncode}: {output}"
    print(output)


@contextlib.contextmanager
def unchanged(optimizer):
    """Asserts that nothing of an optimizer changes: groups, states, parameters, their versions."""

    def things():
        groups = [
            (group, {k: v for k, v in group.items() if k != "params"}, group["params"])
            for group in optimizer.param_groups
        ]
        params = [(param, param.detach(), param._version) for param in parameters(optimizer)]
        return optimizer.state, groups, entries(optimizer), params

    state, groups, tensors, params = things()
    identities = [id(group) for group, *_ in groups]
    groups = copy.deepcopy([settings for _, settings, _ in groups])
    values = [(*entry, entry[2].clone()) for entry in tensors]
    numbers = [param.clone() for _, param, _ in params]
    yield
    new_state, new_groups, new_tensors, new_params = things()
    assert new_state is state
    assert [id(group) for group, *_ in new_groups] == identities
    assert [settings for _, settings, _ in new_groups] == groups
    for (*name, tensor, value), (*new_name, new) in zip(values, new_tensors, strict=True):
        assert new_name == name
        assert new is tensor
        assert_same_bits([new], [value])
    for (param, _, version), number, (new, _, new_version) in zip(
        params, numbers, new_params, strict=True
    ):
        assert new is param
        assert new_version == version
        assert_same_bits([new], [number])


def assert_near_torch(found, wanted):
    """Equal but for rounding, after at most 10 steps.

    Each side rounds the parameter by up to half an eps a step, relative to values of order 1: after
    10 steps the two are within 10 eps. Measured at most 6 (RMSprop with momentum).
    """
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype
        error = (a - b).abs() / (torch.finfo(b.dtype).eps * b.abs().clamp(min=1))
        assert error.numel() == 0 or error.max() <= 10


def assert_same_bits(found, wanted):
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


class NoReads(TorchDispatchMode):
    """Raises where the host asks for a tensor's value, for which it would wait for a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "is_nonzero", "equal", "nonzero"), name
        return func(*args, **(kwargs or {}))


class Interruption:
    """Raises an error at the ``at``-th place in fastopt's Python code, once.

    Places are function calls and lines, or with ``opcodes`` every instruction: a signal may arrive
    between a call and the use of its result.
    """

    FILES = str(PACKAGE)

    def __init__(self, at=None, error=KeyboardInterrupt, opcodes=False):
        self.left = at
        self.error = error
        self.opcodes = opcodes
        self.places = 0
        self.where = ""

    def __enter__(self):
        sys.settrace(self.trace)
        return self

    def __exit__(self, *args):
        sys.settrace(None)

    def trace(self, frame, event, arg):
        if not frame.f_code.co_filename.startswith(self.FILES):
            return None
        frame.f_trace_opcodes = self.opcodes
        if event in ("call", "opcode" if self.opcodes else "line"):
            if self.places == self.left:
                self.left = None
                self.where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
                sys.settrace(None)
                raise self.error
            self.places += 1
        return self.trace
