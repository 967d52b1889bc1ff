"""Nothing is read or written beyond an array: each lies directly before or behind memory that must
not be touched."""

import ctypes
import faulthandler
import itertools
import mmap
import os
import sys

import pytest
import torch
from helpers import CASES, ISAS, run_file
from test_lifecycle import PAIRS, suits

import fastopt
from fastopt.step import dispatch

PAGE = mmap.PAGESIZE
# All tails of all vectors and blocks; then buffers (512), lanes (1,024) and chunks (8,192).
LENGTHS = [*range(301), *(m * n + k for n in (512, 1024, 8192) for m in (1, 2) for k in (-1, 0, 1))]
SAMPLE = [0, 1, 7, 8, 9, 15, 17, 31, 33, 64, 65, 255, 257, 300, 511, 513, 1025, 8191, 8193]


def guarded(x, at_end, gaps=False):
    """The numbers of a vector, between pages that must not be touched."""
    if not x.numel():
        return x
    stride = 2 if gaps else 1
    extent = (x.numel() - 1) * stride + 1
    size = -(-extent * x.itemsize // PAGE) * PAGE
    memory = mmap.mmap(-1, PAGE + size + PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (address, address + PAGE + size):
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(page), PAGE, 0) == 0
    offset = PAGE + (size - extent * x.itemsize if at_end else 0)
    array = torch.frombuffer(memory, dtype=x.dtype, count=extent, offset=offset)
    return array[::stride].view(x.shape).copy_(x.detach())


def steps(cls, variant, dtype, mode, at_end, gaps, lengths):
    master, kept = mode
    shapes = [(n,) for n in lengths]
    if kept == "8bit":  # for which these are large enough
        shapes += [(130, 32), (33, 192), (9, 512)]
    params = [torch.nn.Parameter(guarded(numbers(shape, dtype), at_end, gaps)) for shape in shapes]
    optimizer = cls(
        params, max_norm=1.0, master_weights=master, state_dtype=kept, backend="cpp", **variant
    )
    for step in range(3):  # which makes the states, with a new plan, with that one
        for param in params:
            param.grad = guarded(numbers(param.shape, dtype, step), at_end, gaps)
        optimizer.step()
        for state in optimizer.state.values() if step == 0 else ():
            for name, x in state.items():
                if x.ndim:
                    state[name] = guarded(x, at_end)


def norms(dtype, at_end, gaps, lengths):
    """And what clips by them."""
    params = [torch.nn.Parameter(numbers(n, dtype)) for n in lengths]
    for param in params:
        param.grad = guarded(numbers(len(param), dtype), at_end, gaps)
    for order in (1, 2, 3, float("inf")):
        fastopt.get_total_norm([param.grad for param in params], order)
    fastopt.clip_grad_norm_(params, 1e-3)
    fastopt.clip_grad_value_(params, 1e-4)


def numbers(n, dtype, seed=0):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed)).to(dtype)


def cases():
    """Functions of a list of lengths, with their arguments."""
    for isa, at_end, gaps in itertools.product(ISAS, (False, True), (False, True)):
        for dtype, modes in PAIRS.items():
            yield norms, isa, (dtype, at_end, gaps)
            for (cls, variant), mode in itertools.product(CASES, modes):
                if suits(cls.rule.name, variant, mode, [dtype]):
                    yield steps, isa, (cls, variant, dtype, mode, at_end, gaps)


def survives(f, *args):
    """In a process of its own."""
    sys.stdout.flush()
    if child := os.fork():
        return os.waitpid(child, 0)[1] == 0
    faulthandler.disable()
    f(*args)
    os._exit(0)


def main(lengths, every):
    """One of so many cases each."""
    assert not survives(read_beyond, False)
    assert not survives(read_beyond, True)
    crashes = 0
    chosen = list(cases())[::every]
    torch.set_num_threads(1)  # those of torch do not survive a fork
    fastopt.SGD([torch.ones(1)]).step()  # whatever torch imports late
    for f, isa, args in chosen:
        dispatch.extension().use_isa(isa)
        if not survives(f, *args, lengths):
            crashes += 1
            print(isa, *args, "lengths", [n for n in lengths if not survives(f, *args, [n])])
    print(f"{len(chosen):,} cases of {len(lengths)} lengths, {crashes} crashes")
    sys.exit(crashes > 0)


def read_beyond(at_end):
    address = guarded(torch.ones(3), at_end).data_ptr()
    ctypes.string_at(address if at_end else address - 1, 13)


@pytest.mark.parametrize("which", ["sample", pytest.param("all", marks=pytest.mark.full)])
def test_guard_pages(which):
    run_file(__file__, which)


if __name__ == "__main__":
    main(*((LENGTHS, 1) if sys.argv[1] == "all" else (SAMPLE, 61)))
