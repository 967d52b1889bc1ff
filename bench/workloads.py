"""What the optimizers run on: lists of parameter shapes, and where their gradients come from."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch
from torch import Tensor

SHAPES = Path(__file__).with_name("shapes.json")
CPU = torch.device("cpu")

# Up to this the step is host overhead and the data sits in the cache; above it, memory traffic.
SMALL = 1_000_000
LARGE = 1_000_000_000  # from here on a step takes seconds on a CPU, and tens of gigabytes


@dataclass(frozen=True)
class Workload:
    """Parameter shapes, in order, and where they were taken from; the dtype they are run in."""

    name: str
    source: str
    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype = torch.float32

    @property
    def elements(self) -> int:
        return sum(map(prod, self.shapes))

    @property
    def small(self) -> bool:
        return self.elements <= SMALL

    @property
    def large(self) -> bool:
        return self.elements >= LARGE

    def head(self, elements: int) -> Workload:
        """The tensors, in order, that are no more than so many elements together: for a look."""
        kept, left = [], elements
        for shape in self.shapes:
            if prod(shape) <= left:
                kept.append(shape)
                left -= prod(shape)
        if len(kept) == len(self.shapes):
            return self
        return replace(self, name=f"part of {self.name}", shapes=tuple(kept))

    def parameters(self, device: torch.device = CPU) -> list[Tensor]:
        """New parameters with gradients."""
        params = [noise(shape, self.dtype, device).requires_grad_() for shape in self.shapes]
        for param in params:
            param.grad = noise(tuple(param.shape), self.dtype, device)
        return params

    def renew_gradients(self, params: list[Tensor]) -> None:
        """Replace the gradients as ``zero_grad(set_to_none=True)`` and a backward pass do.

        Each lands at another address, since the old ones are kept until then, and no Python object
        exists for it before the optimizer asks. Large gradients stay: the allocator would return
        memory of the same size, and a step over them waits for their bytes and not for their
        addresses.
        """
        if self.small:
            kept = [param.grad for param in params]
            for param in params:
                param.grad = None
            torch.autograd.backward(torch.cat([param.flatten() for param in params]).sum())
            del kept


def doubles(params: list[Tensor]) -> list[Tensor]:
    """Other parameters with the same values and gradients."""
    made = [param.detach().clone().requires_grad_() for param in params]
    for double, param in zip(made, params, strict=True):
        double.grad = param.grad
    return made


def noise(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Normal numbers, a pattern repeated: timing needs ordinary values, not good randomness."""
    count = prod(shape)
    pattern = torch.randn(min(count, 2**16), dtype=dtype, device=device)
    return pattern.repeat(-(-count // 2**16))[:count].clone().view(shape)


def many_small(tensors: int, elements: int = 64) -> Workload:
    """The workload of the host-overhead sweep."""
    return Workload(f"{tensors} x {elements}", "synthetic", ((elements,),) * tensors)


def load() -> dict[str, Workload]:
    """The workloads of ``shapes.json``, checked against the totals stated there.

    A layout is a list of ``[repetitions, [shape, ...]]``. Small workloads come first: large ones
    leave a fragmented heap behind, which would slow the small ones' gradients.
    """
    workloads = {}
    for name, entry in json.loads(SHAPES.read_text()).items():
        shapes = tuple(
            tuple(shape)
            for times, block in entry["layout"]
            for _ in range(times)
            for shape in block
        )
        workload = Workload(name, entry["source"], shapes)
        if (len(shapes), workload.elements) != (entry["tensors"], entry["parameters"]):
            raise ValueError(
                f"{SHAPES.name}: {name} has {len(shapes)} tensors and {workload.elements} "
                f"parameters, not {entry['tensors']} and {entry['parameters']}"
            )
        workloads[name] = workload
    return workloads
