"""What the Triton kernels compile to: read from PTX, SASS and AMDGCN, so that no GPU is needed.

``bench/kernels.py`` has the cases, and compiles them in processes of their own: in this one Triton
may interpret them.
"""

import importlib.util
import re
from collections import Counter
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from bench import assembly, kernels, offline
from bench.assembly import DIVISION, SQUARE_ROOT, WIDE, Access, accesses
from bench.kernels import Clip, ComputeScalars, ReduceChunks, Update
from fastopt.rules import RULES

ADAM = ("adam", ("exp_avg", "exp_avg_sq"))
ELEMENTS = 8  # of each operand that a thread has at a time: update.BLOCK / tables.THREADS
CHUNK = 64  # of each operand that a thread has in all: tables.CHUNK / tables.THREADS
#: Of the precision modes, those with most to do.
PACKED = [
    ("bf16+16", "bf16", "fp32"),
    ("bf16+16", "bf16", "8bit"),
    ("bf16+32", "bf16", "fp32"),
    ("bf16~", "bf16", "8bit"),
    ("fp32", "fp32", "8bit"),
]


def few():
    """Every rule on one target, one that has every operation on the others."""
    for target in offline.TARGETS:
        rules = kernels.variants() if target == "sm_90" else [ADAM]
        for (rule, states), kind in product(rules, ("fp32", "bf16")):
            yield Update(rule, states, (kind, kind, "fp32") if states else (kind, kind)), target
        for storage in PACKED if target in ("sm_90", "gfx942") else PACKED[:2]:
            yield Update(*ADAM, storage), target
    for target in ("sm_100", "gfx942"):
        yield Update("sgd", ("momentum_buffer",), ("fp32",) * 3), target  # nothing but + - *
    yield ReduceChunks("fp32", 2), "sm_90"
    yield ReduceChunks("bf16", 2), "gfx942"
    yield Clip("sgd", "fp32"), "sm_90"
    yield ComputeScalars("adam", ("norm", "grad_scale", "found_inf")), "sm_90"


def everything():
    return product(kernels.cases(), offline.TARGETS)


@pytest.fixture(scope="module", params=[few, pytest.param(everything, marks=pytest.mark.full)])
def results(request):
    return list(kernels.compile_all(request.param()))


@pytest.fixture
def updates(results):
    return [result for result in results if isinstance(result.case, Update)]


def of_triton_3_6(result):
    """Its ptxas for sm_100 fuses packed operations that are each to be rounded; its fp32 roots on
    AMD flush denormal numbers."""
    return result.kernel.metadata["triton_version"].startswith("3.6.")


def branches(result):
    """Of an update: the loop over the blocks of a full chunk, and the rest of the code."""
    text = assembly.assembly(result.kernel)
    loops = [
        block for block in assembly.blocks(text) if any(a.bits == WIDE for a in accesses(block))
    ]
    assert len(loops) == 1, result.line()
    return loops[0], text.replace(loops[0], "")


def accesses_of_a_block(kind, dtypes, bits=None):
    """What a thread needs to access its elements, by `bits` or all at once where that is less, or
    one by one."""
    found = Counter()
    for size in (8 * dtype.itemsize for dtype in dtypes):
        width = min(bits, ELEMENTS * size) if bits else size
        found[Access(kind, width)] += ELEMENTS * size // width
    return found


def without_scales(counts, case, in_tail):
    """Scales of 8-bit states and checksums of remainders are of 32 bits. In a tail other things are
    too, so that only the codes, or parameter and remainder, are left there."""
    if "8bit" not in case.storage and "bf16+16" not in case.storage:
        return counts
    bits = 8 if "8bit" in case.storage else 16
    return Counter(
        {a: n for a, n in counts.items() if (a.bits == bits if in_tail else a.bits != 32)}
    )


def blocks_in_a_turn(result):
    """How many blocks the loops over a full chunk and over a tail take at a time: LLVM may unroll
    them.

    The accesses must be those of that many blocks: of 128 bits in a full chunk, single elements in
    a tail. The loads there are not looked at: the tables' are among them.
    """
    case = result.case
    full, tail = (Counter(accesses(branch)) for branch in branches(result))
    param, grad, *states = case.dtypes
    read = [grad, *states] if case.rule == "assign" else [param, grad, *states]
    written = [param, *states]
    in_full = accesses_of_a_block("load", read, WIDE) + accesses_of_a_block("store", written, WIDE)
    stores = Counter({a: n for a, n in tail.items() if a.kind == "store"})
    in_tail = without_scales(accesses_of_a_block("store", written), case, True)
    return (
        quotient(without_scales(full, case, False), in_full, result),
        quotient(without_scales(stores, case, True), in_tail, result),
    )


def quotient(found, unit, result):
    times = max(1, found.total() // unit.total())
    assert found == Counter({key: times * n for key, n in unit.items()}), result.line()
    return times


def test_accesses_of_the_norm(results):
    """A thread's part of a full chunk is read 128 bits at a time, the loop being unrolled."""
    for result in results:
        if isinstance(result.case, ReduceChunks):
            bits = 8 * kernels.DTYPES[result.case.dtype].itemsize * CHUNK
            assert result.figures.ld128 == bits // WIDE, result.line()


class Operations(TorchDispatchMode):
    """Counts the operations that are called in it."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.counts[operation.overloadpacket] += 1
        return operation(*args, **(kwargs or {}))


def divisions_and_roots(rule, states):
    """How many the specification takes, of an element."""
    if rule not in RULES:
        return 0, 0
    one = torch.ones(1)
    scalars = SimpleNamespace(**dict.fromkeys(RULES[rule].scalar_names, 0.5))
    with Operations() as operations:
        RULES[rule].update(one, one, scalars, **dict.fromkeys(states, one))
    return operations.counts[torch.ops.aten.div], operations.counts[torch.ops.aten.sqrt]


def test_accesses_divisions_and_square_roots(updates):
    assert divisions_and_roots(*ADAM) == (1, 1)
    for result in updates:
        in_a_turn = blocks_in_a_turn(result)
        if "8bit" in result.case.storage:
            continue  # there are those of the scales, as many as a thread has of them
        wanted = divisions_and_roots(result.case.rule, result.case.states)
        for branch, blocks in zip(branches(result), in_a_turn, strict=True):
            found = tuple(assembly.count(p, branch) for p in (DIVISION, SQUARE_ROOT))
            assert found == tuple(blocks * ELEMENTS * n for n in wanted), result.line()


def test_arithmetic_is_exact(results):
    """No approximate division or root, and denormal numbers are not flushed to zero."""
    for result in results:
        if isinstance(result.case, ComputeScalars):
            continue  # exp and log
        text = assembly.assembly(result.kernel)
        if assembly.is_nvidia(result.kernel):
            inexact = re.findall(r"\b(?:div|sqrt)\.(?!rn\.f)[.\w]*f\d+|\brcp\S+|\S+\.ftz\b", text)
            assert not inexact, result.line()
        else:
            # What refines an approximation: a fixup after each reciprocal, and after each root a
            # look for those that need none.
            found = Counter(re.findall(r"\bv_(rcp|sqrt|rsq|div_fixup|cmp_class)_(f\d+)", text))
            for kind in ("f32", "f64"):
                roots = found["sqrt", kind] + found["rsq", kind]
                assert found["rcp", kind] == found["div_fixup", kind], result.line()
                assert roots <= found["cmp_class", kind], result.line()
            assert of_triton_3_6(result) or not found["rsq", "f32"], result.line()
            assert re.search(r"\.amdhsa_float_denorm_mode_32 3\b", text), result.line()
            assert re.search(r"\.amdhsa_float_denorm_mode_16_64 3\b", text), result.line()


def test_nothing_is_fused(results):
    """No multiplication and addition in one: the reference rounds in between.

    PTX shows that for every kernel. What the GPU executes has fused operations inside its divisions
    and roots, so it is looked at where there are none; AMD converts from fp16 by one with a factor
    of 1 or a summand of -0.
    """
    for result in results:
        if isinstance(result.case, ComputeScalars):
            continue  # exp and log
        if assembly.is_nvidia(result.kernel):
            assert not re.search(r"\bfma\.", assembly.assembly(result.kernel)), result.line()
        if of_triton_3_6(result) and result.target == "sm_100":
            continue
        if result.figures.div == result.figures.sqrt == 0:
            amd = r"v_(?:pk_)?(?:fma|mad)\w*_f\w*\b(?! .*(?:neg\(0\)| 1\.0,))"
            code = assembly.machine_code(result.kernel)
            assert not re.search(rf"\b[FD]FMA2?\b|\b{amd}", code), result.line()


def test_spills_and_shared_memory(results):
    """Spilled is a number here and there: NVIDIA's compiler keeps one of 8 bytes on the stack,
    AMD's some scalars, of which there are 106, in lanes of a vector register.

    Shared is a block of doubles at most, which goes from one layout to another: 8 KiB. NVIDIA's
    multiprocessors have that for as many programs as they have threads for.
    """
    for result in results:
        figures = result.figures
        in_lanes = 0 if assembly.is_nvidia(result.kernel) else 8
        assert figures.stack <= 8, result.line()
        assert figures.spill <= (in_lanes if figures.stack == 0 else 0), result.line()
        assert figures.smem <= 8 * 1024, result.line()


def test_registers(updates):
    """They leave room for enough threads to keep the memory busy.

    In flight must be what the memory delivers during the latency of an access (Little's law): an
    H200's 4.8 TB/s for 0.6 us are 22 KB on each of 132 multiprocessors. Every thread loads its part
    of a block of each operand at once.
    """
    for result in updates:
        registers = result.figures.regs
        if assembly.is_nvidia(result.kernel):
            # 64 Ki of them, given to warps by 8 a thread, and 2048 threads at most.
            programs = min(2048, 65536 // (-(-registers // 8) * 8)) // 128
        else:
            # 512 for each thread of a wave, given by 8, in 4 SIMDs of 8 waves at most; 2 a program.
            programs = min(8, 512 // (-(-registers // 8) * 8)) * 4 // 2
        of_a_thread = sum(ELEMENTS * dtype.itemsize for dtype in result.case.dtypes)
        # An element of these has 6 bytes to read, and the scales of its block take registers: three
        # programs a multiprocessor. With fewer registers they would spill.
        few_bytes = result.case.storage == ("bf16~", "bf16", "8bit")
        assert programs * 128 * of_a_thread >= (18 if few_bytes else 24) * 1024, result.line()


def test_figures_are_those_of_the_table(results, request):
    committed, lines = kernels.TABLE.read_text().splitlines(), kernels.table(results)
    if committed[0] != lines[0]:
        pytest.skip(f"the figures are of {' '.join(committed[0].split()[:2])}")
    complete = request.node.callspec.params["results"] is everything
    differences = kernels.differences(committed, lines, complete)
    assert not differences, "\n".join(["", *differences])
