"""GPUs that are not here: Triton compiles for them as it would for one that is, and launches are
recorded instead of made.
"""

import json
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import count
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch

#: Triton's backend, architecture and threads in a warp.
TARGETS: dict[str, tuple[str, int | str, int]] = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}


class Kernel(NamedTuple):
    """A function as it was compiled for one set of argument types and constants."""

    name: str
    files: dict[str, Path]  # by suffix: .ptx, .cubin, .amdgcn, ...

    def text(self, suffix: str) -> str:
        return self.files[suffix].read_text()

    @property
    def metadata(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.text(".json"))
        return found


_devices = count()  # Triton keeps the kernels of each apart


class Driver:
    """What `triton.runtime.driver` needs to see of a GPU.

    Attributes:
        compiled: the kernels that were compiled, or found in Triton's cache on disk.
        launched: the kernels that were launched.
    """

    def __init__(self, target: str) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget(*TARGETS[target])
        self.device = next(_devices)
        self.compiled: list[Kernel] = []
        self.launched: list[Kernel] = []
        self._kernels: dict[str, Kernel] = {}  # by hash

    def activate(self) -> None:
        """From now on this is the GPU that Triton sees."""
        import triton

        from fastopt.kernels import launches

        triton.knobs.compilation.listener = self._compiles
        triton.runtime.driver.set_active(self)
        launches._options.cache_clear()  # they depend on the target

    def _compiles(
        self, *, metadata: dict[str, Any], metadata_group: dict[str, str], **_: Any
    ) -> None:
        files = {path.suffix: path for path in map(Path, metadata_group.values())}
        kernel = Kernel(metadata["name"], files)
        self.compiled.append(kernel)
        self._kernels[metadata["hash"]] = kernel

    # The methods below are those that Triton calls.

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        kernel = self._kernels[metadata.hash]
        return lambda *arguments: self.launched.append(kernel)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0

    @property
    def utils(self) -> "Driver":
        return self

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 64 * 1024}  # gfx942's; the others have more

    def load_binary(self, *arguments: Any) -> tuple[Any, ...]:
        """Module, function, registers, spills and the most threads that a program may have."""
        return None, None, 0, 0, 1024


def workers(number: int | None = None) -> ProcessPoolExecutor:
    """Processes that compile kernels, even if Triton interprets them in this one: as many as there
    are cores, or a number."""
    number = number or len(os.sched_getaffinity(0))
    return ProcessPoolExecutor(number, get_context("spawn"), initializer=_start)


def _start() -> None:
    os.environ.pop("TRITON_INTERPRET", None)  # which Triton reads when it is imported
    torch.set_num_threads(1)
