"""The physical bound: how long the memory traffic of a step takes with no optimizer around it.

On a CPU that is a bare loop with the same reads and writes; on a GPU, what a copy can move.
"""

import ctypes
from array import array
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import native
from .contenders import UnavailableError

WORD = 4  # bytes
CHUNK = 32 * 1024  # words
MAX_UPDATED = 4  # as in bound.c

Traffic = list[tuple[Tensor, ...]]


def traffic(optimizer: Optimizer) -> Traffic:
    """Of each parameter: its gradient, which a step reads; itself and its states, which it updates.

    The optimizer has made a step, so that the states exist.
    """
    return [
        (param.grad, param.detach(), *states(optimizer.state[param]))
        for group in optimizer.param_groups
        for param in group["params"]
    ]


def states(state: dict[str, Any]) -> Iterator[Tensor]:
    """The states that have an element per parameter; ``step`` is one number."""
    for name, value in state.items():
        if name != "step":
            yield from tensors_of(value)


def tensors_of(value: Any) -> Iterator[Tensor]:
    """What a state consists of: several tensors where it is quantised by a class of its own."""
    if type(value) is Tensor:
        yield value
    else:
        parts = getattr(value, "__dict__", {}).values()
        yield from (part for part in parts if isinstance(part, Tensor))


def bytes_moved(moved: Traffic, clip_passes: int) -> int:
    """The least that one step moves, with so many more passes over the gradients for clipping."""
    return sum(
        grad.nbytes * (1 + clip_passes) + 2 * sum(tensor.nbytes for tensor in updated)
        for grad, *updated in moved
    )


def working_set(moved: Traffic) -> int:
    """Bytes that one step touches."""
    return sum(tensor.nbytes for tensors in moved for tensor in tensors)


class Bound:
    """A contender that reads and writes what a step does, and leaves the bits as they were."""

    name = "bound"
    clip = False

    def __init__(self, moved: Traffic) -> None:
        self.updated = len(moved[0]) - 1
        if self.updated > MAX_UPDATED or any(
            not tensor.is_contiguous() or tensor.nbytes != tensors[0].nbytes or tensor.nbytes % WORD
            for tensors in moved
            for tensor in tensors
        ):
            raise UnavailableError(
                f"the bare loop takes up to {MAX_UPDATED} updated arrays, all of the same size"
            )
        self.loop = native.load("bound.c").bound
        self.loop.argtypes = [
            *(ctypes.c_void_p, ctypes.c_int64),  # the chunks
            *(ctypes.c_int, ctypes.c_int, ctypes.c_uint32, ctypes.c_int),
        ]
        self.moved = moved  # keeps the gradients' memory, too, where new ones take their place
        self.chunks = array("q")
        for tensors in moved:
            addresses = [tensor.data_ptr() for tensor in tensors]
            for begin in range(0, tensors[0].nbytes, CHUNK * WORD):
                words = min(CHUNK, (tensors[0].nbytes - begin) // WORD)
                self.chunks.extend([words, *(address + begin for address in addresses)])
                self.chunks.extend([0] * (MAX_UPDATED - self.updated))
        self.n_chunks = len(self.chunks) // (MAX_UPDATED + 2)

    def set_clip(self, clip: bool) -> None:
        self.clip = clip

    def run(self) -> None:
        address, _ = self.chunks.buffer_info()
        mask = 0
        self.loop(address, self.n_chunks, self.updated, self.clip, mask, torch.get_num_threads())


class Copy:
    """A contender that copies within the device's memory, whatever the others do."""

    name = "copy"

    def __init__(self, device: torch.device, size: int) -> None:
        self.source = torch.ones(size, dtype=torch.uint8, device=device)
        self.target = torch.empty_like(self.source)
        self.bytes_moved = 2 * size  # read and written

    def set_clip(self, clip: bool) -> None:
        pass

    def run(self) -> None:
        self.target.copy_(self.source)
