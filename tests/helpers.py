"""What several test files share."""

import sys
from pathlib import Path

import pytest
import torch

import fastopt
from fastopt import dispatch

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
CASES = [(cls, variant) for cls in fastopt.OPTIMIZERS for variant in cls.variants]


def torch_class(cls):
    return getattr(torch.optim, cls.__name__)


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
