"""Reads what a GPU's compiler has made of a kernel: PTX and a cubin for NVIDIA, AMDGCN for AMD."""

import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from .offline import Kernel

WIDE = 128  # bits; what a thread can load or store at a time


class Figures(NamedTuple):
    """What a kernel costs. Instructions are counted where they stand, not as often as they run."""

    ld128: int  # loads from global memory, of 128 bits
    st128: int
    ld: int  # narrower ones: elements of tails, and tables
    st: int
    div: int  # of floating-point numbers
    sqrt: int
    bar: int  # barriers
    regs: int  # of a thread; on AMD the vector registers
    sregs: int  # AMD's scalar registers
    stack: int  # bytes of a thread
    spill: int  # NVIDIA: bytes of a thread, AMD: registers
    smem: int  # bytes of shared memory of a program


class Access(NamedTuple):
    """An instruction that loads from global memory or stores to it, of a number of bits."""

    kind: str  # "load" or "store"
    bits: int


#: In PTX and in AMDGCN. There an exact division ends in a fixup, and an exact root starts from an
#: approximate one.
DIVISION = r"\bdiv\.[.\w]*\bf\d+|\bv_div_fixup_f\d+"
SQUARE_ROOT = r"\bsqrt\.[.\w]*\bf\d+|\bv_(?:sqrt|rsq)_f\d+"
BARRIER = r"\bbar\.sync\b|\bs_barrier\b"


def figures(kernel: Kernel) -> Figures:
    text = assembly(kernel)
    counts = Counter((access.kind, access.bits == WIDE) for access in accesses(text))
    usage = _cubin_usage(kernel.files[".cubin"]) if is_nvidia(kernel) else _metadata_usage(text)
    return Figures(
        ld128=counts["load", True],
        st128=counts["store", True],
        ld=counts["load", False],
        st=counts["store", False],
        div=count(DIVISION, text),
        sqrt=count(SQUARE_ROOT, text),
        bar=count(BARRIER, text),
        smem=kernel.metadata["shared"],
        **usage,
    )


def count(pattern: str, text: str) -> int:
    return len(re.findall(pattern, text))


def is_nvidia(kernel: Kernel) -> bool:
    return ".ptx" in kernel.files


def assembly(kernel: Kernel) -> str:
    """PTX or AMDGCN."""
    return kernel.text(".ptx" if is_nvidia(kernel) else ".amdgcn")


def machine_code(kernel: Kernel) -> str:
    """SASS or AMDGCN: the instructions that the GPU executes."""
    if is_nvidia(kernel):
        return _run("nvdisasm", "-c", kernel.files[".cubin"])
    return assembly(kernel)


def blocks(text: str) -> list[str]:
    """The stretches of an assembly that nothing jumps into or out of."""
    return re.split(r"^(?:\$L__BB|\.LBB)\w+:|\bs_c?branch|\bbra\b", text, flags=re.M)


def accesses(text: str) -> Iterator[Access]:
    """The accesses to global memory in an assembly of either kind."""
    for kind, modifiers in re.findall(r"\b(ld|st)\.global([.:\w]*)", text):
        vector, bits = re.search(r"\.v(\d)", modifiers), re.search(r"\d+$", modifiers)
        assert bits, modifiers
        yield Access(_NVIDIA_KINDS[kind], int(bits[0]) * (int(vector[1]) if vector else 1))
    pattern = r"\b(?:global|buffer|flat)_(load|store)_[us]?(byte|short|dword(?:x\d)?)"
    for kind, unit in re.findall(pattern, text):
        yield Access(kind, _AMD_BITS[unit])


_NVIDIA_KINDS = {"ld": "load", "st": "store"}
_AMD_BITS = {"byte": 8, "short": 16, "dword": 32, "dwordx2": 64, "dwordx3": 96, "dwordx4": 128}


def _cubin_usage(cubin: Path) -> dict[str, int]:
    found = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", _run("cuobjdump", "-res-usage", cubin)))
    return {
        "regs": int(found["REG"]),
        "sregs": 0,
        "stack": int(found["STACK"]),
        "spill": int(found["LOCAL"]),
    }


def _metadata_usage(text: str) -> dict[str, int]:
    found = dict(re.findall(r"^ +\.(\w+): +(\d+)$", text, re.M))
    return {
        "regs": int(found["vgpr_count"]),
        "sregs": int(found["sgpr_count"]),
        "stack": int(found["private_segment_fixed_size"]),
        "spill": int(found["vgpr_spill_count"]) + int(found["sgpr_spill_count"]),
    }


def _run(tool: str, *arguments: str | Path) -> str:
    """What one of the tools says that Triton brings along."""
    import triton

    path = Path(triton.__file__).parent / "backends/nvidia/bin" / tool
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout
