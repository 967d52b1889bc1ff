"""Compiles the benchmarks' own C files with the system's compiler, once per machine."""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from . import machine
from .contenders import UnavailableError

FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")


@cache
def load(filename: str) -> ctypes.CDLL:
    """The library made of ``bench/<filename>``.

    Raises:
        UnavailableError: there is no compiler, it failed, or the library needs another OpenMP
            runtime than torch's: two pools of threads in one process get in each other's way.
    """
    library = ctypes.CDLL(str(compiled(Path(__file__).with_name(filename))))
    runtimes = machine.openmp_runtimes()
    if len(runtimes) > 1:
        raise UnavailableError(f"two OpenMP runtimes in one process: {', '.join(runtimes)}")
    return library


def compiled(source: Path) -> Path:
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        raise UnavailableError("no C compiler (cc) found")
    # -march=native: the key names the CPU too, for a home directory that several machines share.
    key = "\n".join((machine.cpu(), compiler, *FLAGS, source.read_text()))
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    target = cache_directory() / f"{source.stem}-{digest}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            output = Path(scratch, target.name)
            command = [compiler, *FLAGS, str(source), "-o", str(output)]
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode:
                message = next(iter(result.stderr.splitlines()), "no message")
                raise UnavailableError(f"{compiler} failed on {source.name}: {message}")
            output.replace(target)
    return target


def cache_directory() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "fastopt-bench")
