"""Tensors that kernels cannot update where they are."""

from __future__ import annotations

from torch import Tensor

from fastopt.packing import memory_order
from fastopt.step.params import Target


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
