"""Which of the arrays that a step works on share memory, and whether that is well defined."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ..packing import extent


class Use(NamedTuple):
    """An array that a step reads or writes.

    Args:
        param: whose it is.
        place: names that parameter when formatted.
        key: that of a state; "" for the parameter itself, "grad" for its gradient.
    """

    param: Tensor
    place: object
    key: str
    array: Tensor

    @property
    def is_written(self) -> bool:
        return self.key != "grad"

    @property
    def begin(self) -> int:
        """The address of the first element; 0 where there is no memory: a wrapper has none."""
        return self.array.data_ptr()

    @property
    def end(self) -> int:
        """The address after the last element."""
        return self.begin + extent(self.array)

    @property
    def elements(self) -> object:
        """Equal for arrays of one parameter that have each element in the same place."""
        sizes = zip(self.array.shape, self.array.stride(), strict=True)
        dims = tuple(size_and_stride for size_and_stride in sizes if size_and_stride[0] > 1)
        return id(self.param), self.begin, self.array.element_size(), dims

    def bytes_in(self, memory: Tensor, begin: int) -> Tensor:
        """Those of this array, in a tensor that has an element for each byte from an address on."""
        size = self.array.element_size()
        strides = [stride * size for stride in self.array.stride()]
        return memory.as_strided((*self.array.shape, size), (*strides, 1), self.begin - begin)


def check(uses: Iterable[Use]) -> None:
    """Raises where the result of a step would depend on which array is written first.

    Parameters may overlap each other, as they are updated one after the other, and so may
    gradients, which are only read. A gradient may be the parameter itself, or one of its states,
    but no other part of what the step writes, and a state shares its memory with nothing else.

    Raises:
        RuntimeError: in one sentence: which arrays of which parameters; and what to do.
    """
    by_device: dict[torch.device, list[tuple[int, int, Use]]] = {}
    for use in uses:
        if begin := use.begin:
            by_device.setdefault(use.array.device, []).append((begin, use.end, use))
    for spans in by_device.values():
        spans.sort(key=lambda span: span[0])
        cluster: list[Use] = []  # connected by spans that overlap
        reach = 0
        for begin, end, use in spans:
            if begin >= reach:
                _check_cluster(cluster, reach)
                cluster = []
            cluster.append(use)
            reach = max(reach, end)
        _check_cluster(cluster, reach)


def _check_cluster(cluster: list[Use], end: int) -> None:
    """The same for arrays of one stretch of memory, by a look at each of its bytes."""
    if len(cluster) < 2 or {use.key for use in cluster} in ({""}, {"grad"}):
        return
    begin = cluster[0].begin
    # Parameters first, then states, then gradients.
    cluster = sorted(cluster, key=lambda use: (use.key != "", use.key == "grad"))
    written: dict[object, Use] = {}
    writers = torch.zeros(end - begin, dtype=torch.uint8, device="cpu")  # of each byte; 2: or more
    for use in cluster:
        here = use.bytes_in(writers, begin)
        allowed = 2 if use.key == "" else 0
        if not use.is_written and use.elements in written:
            allowed = 1
        if int(here.max()) > allowed:
            raise RuntimeError(_message(use, written.values(), writers.zero_(), begin))
        if use.is_written:
            here.add_(1).clamp_(max=2)
            written[use.elements] = use


def _message(use: Use, written: Iterable[Use], memory: Tensor, begin: int) -> str:
    use.bytes_in(memory, begin).fill_(1)
    other = next(
        other
        for other in written
        if (use.is_written or other.elements != use.elements)
        and bool(other.bytes_in(memory, begin).any())
    )
    what = f"a state {use.key!r}" if use.is_written else "a gradient"
    if other.param is not use.param:
        whose = str(other.place).rstrip(",")
        with_what = f"the state {other.key!r} of {whose}" if other.key else whose
    elif other.key:
        with_what = f"its state {other.key!r}"
    else:
        with_what = "the parameter itself"
        if not use.is_written:
            with_what += ", in another arrangement"
    return f"{use.place} has {what} that shares memory with {with_what}: clone it"
