"""What the optimizers run on: lists of parameter shapes, and where their gradients come from."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .contenders import told

Shape = tuple[int, ...]

SHAPES = Path(__file__).with_name("shapes.json")
CPU = torch.device("cpu")

# Up to this the step is host overhead and the data sits in the cache; above it, memory traffic.
SMALL = 1_000_000
PAGE = 4096  # bytes
LONG = 10_000  # rows that only embeddings have, and what is made to be huge
LARGE = 1_000_000_000  # from here on a step takes seconds on a CPU, and tens of gigabytes


@dataclass(frozen=True)
class Workload:
    """Parameter shapes, in order, and where they were taken from.

    Args:
        blocks: how often each list of shapes is repeated.
        ranks: how many share the parameters, as DTensors; 0: they are plain tensors.
    """

    name: str
    source: str
    blocks: tuple[tuple[int, tuple[Shape, ...]], ...]
    ranks: int = 0

    @cached_property
    def shapes(self) -> tuple[Shape, ...]:
        return tuple(shape for times, block in self.blocks for _ in range(times) for shape in block)

    @cached_property
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
        return replace(self, name=f"part of {self.name}", blocks=((1, tuple(kept)),))

    def scaled(self, divisor: int) -> Workload:
        """About one in ``divisor`` of the repeated layers, and of the rows of the rest's long
        tensors, as embeddings are; at least one."""
        if divisor == 1:
            return self
        blocks = []
        for times, block in self.blocks:
            if times > 1:
                blocks.append((max(1, round(times / divisor)), block))
            else:
                blocks.append((1, tuple(fewer_rows(shape, divisor) for shape in block)))
        return replace(self, name=f"{self.name} 1/{divisor}", blocks=tuple(blocks))

    def parameters(
        self, device: torch.device = CPU, dtype: torch.dtype = torch.float32
    ) -> list[Tensor]:
        """New parameters with gradients; of several ranks, of the process group that there is."""
        params = [noise(shape, dtype, device).requires_grad_() for shape in self.shapes]
        if self.ranks:
            params = sharded(params, self.ranks)
            self.renew_gradients(params)
            return params
        for param in params:
            param.grad = noise(tuple(param.shape), dtype, device)
        return params

    def renew_gradients(self, params: list[Tensor]) -> None:
        """Replace the gradients as ``zero_grad(set_to_none=True)`` and a backward pass do.

        Each lands at another address, since the old ones are kept until then, and no Python object
        exists for it before the optimizer asks. DTensors get them as from FSDP2.
        """
        if self.ranks:
            renew_local_gradients(params)
            return
        kept = [param.grad for param in params]
        for param in params:
            param.grad = None
        torch.autograd.backward(torch.cat([param.flatten() for param in params]).sum())
        del kept


class Gradients:
    """Gives parameters the gradients of each iteration, at other addresses than the last one's.

    Small workloads get them from a backward pass. In large ones, where a step waits for bytes and
    not for Python objects, they move to and fro by a page within the same memory: another
    set, elsewhere, could be faster or slower to read.

    Args:
        params: some of the dtype; other lists of them may be given to `renew`.
    """

    def __init__(self, workload: Workload, params: list[Tensor]) -> None:
        self.workload = workload
        self.places: tuple[list[Tensor], list[Tensor]] = ([], [])
        self.scaled: list[Tensor] = []
        if workload.small:
            return
        for param in params:
            count, shift = param.numel(), PAGE // param.element_size()
            memory = noise((count + shift,), param.dtype, param.device)
            for place, begin in zip(self.places, (0, shift), strict=True):
                place.append(memory[begin : begin + count].view(param.shape))
            param.grad = self.places[0][-1]

    def renew(self, params: list[Tensor], number: int, scaled: bool = False) -> None:
        """Those of the iteration with that number.

        Args:
            scaled: the last iteration divided them by a scale. They get their numbers back, which
                are ordinary ones also as those of scaled gradients.
        """
        if self.workload.small:
            self.workload.renew_gradients(params)
            return
        place = self.places[number % 2]
        for param, grad in zip(params, place, strict=True):
            param.grad = grad
        if scaled:
            if not self.scaled:
                self.scaled = [noise(tuple(g.shape), g.dtype, g.device) for g in place]
            torch._foreach_copy_(place, self.scaled)


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


def fewer_rows(shape: Shape, divisor: int) -> Shape:
    if not shape or shape[0] < LONG:
        return shape
    return (max(1, shape[0] // divisor), *shape[1:])


def many_small(tensors: int, shape: Shape = (64,)) -> Workload:
    """The workload of the host-overhead sweep."""
    return Workload(f"{tensors} x {prod(shape)}", "synthetic", ((tensors, (shape,)),))


def of_ranks(ranks: int, tensors: int = 300, elements: int = 64) -> Workload:
    """Parameters of FSDP2, of each of which a rank has so many elements: for the host's cost."""
    source = "synthetic DTensors, dimension 0 sharded"
    return Workload(f"fsdp-{ranks}", source, ((tensors, ((elements * ranks,),)),), ranks)


def sharded(wholes: list[Tensor], ranks: int) -> list[Tensor]:
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh(wholes[0].device.type, (ranks,))
    parts = (distribute_tensor(whole.detach(), mesh, [Shard(0)]) for whole in wholes)
    return [nn.Parameter(part) for part in parts]


def renew_local_gradients(params: list[Tensor]) -> None:
    from torch.distributed.tensor import DTensor

    param: Any
    for param in params:
        local = noise(param._local_tensor.shape, param.dtype, param.device)
        param.grad = DTensor(local, param._spec, requires_grad=False)


def of_model(where: str) -> Workload:
    """The parameters of a user's own model.

    Args:
        where: "module:factory". The factory takes no arguments, and returns a module, or a list of
            tensors or shapes.

    Raises:
        ValueError: there is none, it raised, or it returned something else.
    """
    module_name, _, factory_name = where.partition(":")
    if not (module_name and factory_name):
        raise ValueError(f"--model {where}: write module:factory, as in mymodel:make")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        made = getattr(importlib.import_module(module_name), factory_name)()
    except Exception as error:
        raise ValueError(
            f"--model {where} cannot be made: {told(error)}; it is called without arguments, from "
            "the current folder"
        ) from error
    if isinstance(made, nn.Module):
        made = [param for param in made.parameters() if param.requires_grad]
    try:
        shapes = tuple(
            tuple(int(size) for size in getattr(found, "shape", found)) for found in made
        )
    except TypeError:
        raise ValueError(
            f"--model {where} returned a {type(made).__name__}: return a torch.nn.Module, or a "
            "list of tensors or shapes"
        ) from None
    if not shapes:
        raise ValueError(f"--model {where} has no parameters that require gradients")
    return Workload(where, f"--model {where}", ((1, shapes),))


def load() -> dict[str, Workload]:
    """The workloads of ``shapes.json``, checked against the totals stated there.

    A layout is a list of ``[repetitions, [shape, ...]]``. Small workloads come first: large ones
    leave a fragmented heap behind, which would slow the small ones' gradients.
    """
    workloads = {}
    for name, entry in json.loads(SHAPES.read_text()).items():
        blocks = tuple((times, tuple(map(tuple, block))) for times, block in entry["layout"])
        workload = Workload(name, entry["source"], blocks)
        found = (len(workload.shapes), workload.elements)
        if found != (entry["tensors"], entry["parameters"]):
            raise ValueError(
                f"{SHAPES.name}: {name} has {found[0]} tensors and {found[1]} parameters, not "
                f"{entry['tensors']} and {entry['parameters']}"
            )
        workloads[name] = workload
    return {**workloads, **{f"fsdp-{ranks}": of_ranks(ranks) for ranks in (1, 2)}}
