"""The tensors that a launch updates, wherever and however they lie in memory."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from fastopt.packing import Stored, extent, memory_order


@dataclass
class Target:
    """A tensor that is updated in place, of any layout.

    Args:
        stored: how it is kept, and then how the states that the rule updates are. Codes, and the
            second arrays of packings, have no gaps and lie in the memory order of the tensor.
        grad: of the dtype and strides that its gradients will have.
        gap: before which of the states one is missing that the rule can have.
        group: the row of the settings.
        number: its place in the optimizer.
        step: fp32, 0-dim, on the device; None where the host counts, or nobody.
    """

    stored: Sequence[Stored]
    grad: Tensor
    gap: int | None = None
    group: int = 0
    number: int = 0
    step: Tensor | None = None

    @property
    def param(self) -> Tensor:
        return self.stored[0].a

    @property
    def arrays(self) -> list[Tensor]:
        """The first arrays."""
        return [stored.a for stored in self.stored]

    @property
    def is_odd(self) -> bool:
        """Whether its tensors have gaps, or lie in different orders: kernels need `Staged` then."""
        dims = memory_order(self.param)
        return not all(tensor.permute(dims).is_contiguous() for tensor in (*self.arrays, self.grad))

    @property
    def extent(self) -> tuple[int, int]:
        """The addresses from the parameter's first element to the end of its last."""
        begin = self.param.data_ptr()
        return begin, begin + extent(self.param)


class Staged:
    """Stands in for a target: without gaps, all in the memory order of the parameter."""

    def __init__(self, target: Target) -> None:
        self.dims = memory_order(target.param)
        views = [array.detach().permute(self.dims) for array in target.arrays]
        self.written = [view.contiguous() for view in views]
        self.copies = [(c, v) for c, v in zip(self.written, views, strict=True) if c is not v]
        self.grads: tuple[Tensor, ...] = ()

    def take_grad(self, grad: Tensor) -> tuple[int, int]:
        """The gradient's addresses for the update, and for the norm, which goes by the gradient's
        own memory order."""
        orders = self.dims, memory_order(grad)
        # Kept until the kernels that read them have been launched.
        self.grads = tuple(grad.detach().permute(dims).contiguous() for dims in orders)
        return self.grads[0].data_ptr(), self.grads[1].data_ptr()

    def load(self) -> None:
        for copy, view in self.copies:
            copy.copy_(view)

    def store(self) -> None:
        for copy, view in self.copies:
            view.copy_(copy)
        self.grads = ()


def waves(extents: Sequence[tuple[int, int]], active: Sequence[int]) -> list[int]:
    """For each active target, one more than the latest wave of the earlier ones that it shares
    memory with; -1 for the others. Views that interleave count as sharing."""
    found = [-1] * len(extents)
    for i in active:
        found[i] = 0
    by_address = sorted((extents[i], i) for i in active if extents[i][0] < extents[i][1])
    cluster: list[int] = []
    end = 0
    for (begin, stop), i in by_address:
        if begin >= end:
            _number(cluster, extents, found)
            cluster = []
        cluster.append(i)
        end = max(end, stop)
    _number(cluster, extents, found)
    return found


def _number(cluster: list[int], extents: Sequence[tuple[int, int]], found: list[int]) -> None:
    """Numbers the waves of targets that are connected by shared memory."""
    if len(cluster) < 2:
        return
    # The latest wave that writes each address from starts[k] to starts[k + 1].
    starts, latest = [0], [-1]
    for i in sorted(cluster):
        begin, end = extents[i]
        first, last = bisect_right(starts, begin) - 1, bisect_left(starts, end)
        found[i] = max(latest[first:last]) + 1
        new_starts, new_latest = [begin, end], [found[i], latest[last - 1]]
        if starts[first] < begin:
            new_starts, new_latest = [starts[first], *new_starts], [latest[first], *new_latest]
        if last < len(starts) and starts[last] == end:
            del new_starts[-1], new_latest[-1]
        starts[first:last], latest[first:last] = new_starts, new_latest
