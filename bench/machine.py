"""What a figure was measured on."""

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

import fastopt

ROOT = Path(__file__).resolve().parent.parent


def describe() -> dict[str, Any]:
    return {
        "cpu": cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "ram_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "last_level_cache": last_level_cache(),
        "transparent_hugepages": transparent_hugepages(),
        "openmp": openmp_runtimes(),
        "backends": {name: found._asdict() for name, found in fastopt.backends().items()},
    }


def versions() -> dict[str, str]:
    return {
        "fastopt": fastopt.__version__,
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "cuda": torch.version.cuda or "",
        "python": platform.python_version(),
        "compiler": first_line("cc", "--version"),
    }


def version_of(package: str) -> str:
    """Empty where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def commit() -> str:
    """The commit measured, marked where the working tree differs from it.

    Where the sources came without their repository, the environment variable COMMIT tells it.
    """
    described = first_line("git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--dirty")
    return described or os.environ.get("COMMIT", "unknown")


def gpu(device: torch.device) -> dict[str, Any]:
    found = torch.cuda.get_device_properties(device)
    return {
        "name": found.name,
        "memory_gib": round(found.total_memory / 2**30, 1),
        "multiprocessors": found.multi_processor_count,
        "capability": f"{found.major}.{found.minor}",
        "driver": first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
    }


def cpu() -> str:
    match = re.search(r"model name\s*:\s*(.+)", read("/proc/cpuinfo"))
    return match[1] if match else platform.processor() or platform.machine()


def slug() -> str:
    """A file name's part for this machine: its CPU and the threads in use."""
    name = re.sub(r"\(\w+\)|CPU|@.*", "", cpu())
    return f"{dashed(name)}-{torch.get_num_threads()}t"


def dashed(name: str) -> str:
    """A name as a part of a file name."""
    return "-".join(re.findall(r"[a-z0-9]+", name.lower()))


def last_level_cache() -> str:
    caches = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((read(path) for path in caches), key=kibibytes, default="")


def kibibytes(size: str) -> int:
    units = {"K": 1, "M": 1024, "G": 1024**2}
    return int(size.rstrip("KMG")) * units.get(size[-1], 1)


def cache_bytes(device: torch.device) -> int:
    """Of the last level; 0 where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    size = last_level_cache()
    return 1024 * kibibytes(size) if size else 0


def free_memory(device: torch.device) -> int:
    """Bytes that a process can still have."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0]) + torch.cuda.memory_reserved(device)
    free = int(re.search(r"MemAvailable:\s*(\d+)", read("/proc/meminfo"))[1]) * 1024
    limit, used = (read(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    return min(free, int(limit) - int(used)) if limit.isdecimal() and used else free


def transparent_hugepages() -> str:
    match = re.search(r"\[(\w+)\]", read("/sys/kernel/mm/transparent_hugepage/enabled"))
    return match[1] if match else ""


def openmp_runtimes() -> list[str]:
    """The OpenMP runtimes that this process has mapped, by file name."""
    paths = set(re.findall(r"/\S*/lib(?:gomp|i?omp5?)[-.]\S*", read("/proc/self/maps")))
    return sorted(Path(path).name for path in paths)


def cpu_seconds() -> tuple[float, float, float]:
    """CPU seconds so far: that passed on all cores, that were used, that this process used."""
    ticks = [int(count) for count in read("/proc/stat").partition("\n")[0].split()[1:9]]
    user, nice, system, idle, waiting, *interrupts_and_steal = ticks or [0] * 8
    used = user + nice + system + sum(interrupts_and_steal)
    frequency = os.sysconf("SC_CLK_TCK")
    own = sum(os.times()[:4])  # with its children that have ended
    return (used + idle + waiting) / frequency, used / frequency, own


def used_by_others(begin: tuple[float, float, float]) -> float:
    """The part of the machine's CPU time since then that went to other processes or machines."""
    passed, used, own = (now - then for now, then in zip(cpu_seconds(), begin, strict=True))
    return max(0.0, used - own) / passed if passed else 0.0


def read(path: str | Path) -> str:
    """The text of a system file, empty on systems without it."""
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def first_line(*command: str) -> str:
    """What a command says first, empty where there is no such command."""
    return next(iter(output(*command).splitlines()), "")


def output(*command: str) -> str:
    """What a command says, empty where there is no such command."""
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout
    except OSError:
        return ""
