"""The physical bound: how long the memory traffic of a step takes with no optimizer around it.

On a CPU that is a bare loop with the same reads and writes; on a GPU, what a copy can move.
"""

import ctypes
from array import array
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import native
from .contenders import Contender, UnavailableError

CHUNK = 32 * 1024  # elements: what a thread takes at a time
MAX_UPDATED = 8  # as in bound.c

Traffic = list[tuple[Tensor, ...]]


def traffic(contender: Contender) -> Traffic:
    """Of each parameter: its gradient, which a step reads, and what it updates: the parameter
    itself, its states, and a master that the optimizer has in its place.

    The contender has made a step, so that the states exist.
    """
    optimizer = contender.optimizer
    optimized = [param for group in optimizer.param_groups for param in group["params"]]
    return [
        (
            param.grad,
            param.detach(),
            *([] if owned is param else [owned.detach()]),
            *states(optimizer.state.get(owned, {})),
        )
        for param, owned in zip(contender.params, optimized, strict=True)
    ]


def states(state: dict[str, Any]) -> Iterator[Tensor]:
    """The states that have elements for those of the parameter; ``step`` is one number."""
    for name, value in state.items():
        if name != "step":
            yield from tensors_of(value)


def tensors_of(value: Any) -> Iterator[Tensor]:
    """What a state consists of: several tensors where it is a dict, or quantised by a class of its
    own, or has checksums."""
    parts = value if isinstance(value, dict) else getattr(value, "__dict__", {})
    inner = [part for part in parts.values() if isinstance(part, (Tensor, dict))]
    if type(value) is Tensor or (isinstance(value, Tensor) and not inner):
        yield value
    for part in inner:
        yield from tensors_of(part)


def bytes_moved(moved: Traffic, clips: bool) -> int:
    """The least that one step moves; a norm, for clipping, reads the gradients once more."""
    return sum(
        grad.nbytes * (1 + clips) + 2 * sum(tensor.nbytes for tensor in updated)
        for grad, *updated in moved
    )


def working_set(moved: Traffic) -> int:
    """Bytes that one step touches."""
    return sum(tensor.nbytes for tensors in moved for tensor in tensors)


class BareLoop:
    """Reads and writes what a step does, and leaves the bits as they were."""

    def __init__(self, moved: Traffic) -> None:
        self.updated = max((len(tensors) - 1 for tensors in moved), default=0)
        if self.updated > MAX_UPDATED:
            raise UnavailableError(f"the bare loop updates up to {MAX_UPDATED} arrays")
        if not all(tensor.is_contiguous() for tensors in moved for tensor in tensors):
            raise UnavailableError("the bare loop takes contiguous arrays")
        self.loop = native.load("bound.c").bound
        self.loop.argtypes = [
            *(ctypes.c_void_p, ctypes.c_int64),  # the chunks
            *(ctypes.c_int, ctypes.c_int, ctypes.c_uint64, ctypes.c_int),
        ]
        self.moved = moved  # keeps the gradients' memory, too, where new ones take their place
        self.chunks = array("q")
        self.n_chunks = 0
        for tensors in moved:
            elements = tensors[0].numel()
            for begin in range(0, elements, CHUNK):
                end = min(begin + CHUNK, elements)
                self.n_chunks += 1
                self.chunks.append(end - begin)
                for tensor in tensors:
                    first, last = (tensor.nbytes * at // elements for at in (begin, end))
                    width = tensor.element_size() if tensor.numel() == elements else 0
                    self.chunks.extend([tensor.data_ptr() + first, last - first, width])
                self.chunks.extend([0, 0, 0] * (MAX_UPDATED + 1 - len(tensors)))

    def run(self, clips: bool) -> None:
        address, _ = self.chunks.buffer_info()
        mask = 0
        self.loop(address, self.n_chunks, self.updated, clips, mask, torch.get_num_threads())


class Copy:
    """Copies within the device's memory, whatever the others do."""

    def __init__(self, device: torch.device, size: int) -> None:
        self.source = torch.ones(size, dtype=torch.uint8, device=device)
        self.target = torch.empty_like(self.source)

    @property
    def bytes_moved(self) -> int:
        return self.source.nbytes + self.target.nbytes

    def run(self) -> None:
        self.target.copy_(self.source)
