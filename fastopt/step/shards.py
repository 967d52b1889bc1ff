"""Shards: a parameter is local memory, and where that piece lies in the whole.

All that fastopt knows of DTensors is here. Plans, kernels, packings and rules see local memory
only; states live in ``optimizer.state`` as DTensors, distributed as their parameter is.
"""

from __future__ import annotations

import math
import sys
import zlib
from collections.abc import Callable, Iterable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..packing import PACKINGS, WHOLE, Piece, memory_order
from ..precision import MASTER_DTYPES, Kept

Group = Any  # a torch.distributed.ProcessGroup


def is_shard(tensor: object) -> bool:
    """Whether it is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")  # else nobody has made one
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Any) -> Any:
    """Of a DTensor the part that this process has; anything else as it is."""
    if not is_shard(tensor):
        return tensor
    part = tensor._local_tensor
    return part.wait() if hasattr(part, "wait") else part  # a collective that still runs


def local_state(param: Tensor, state: dict[str, Any]) -> dict[str, Any]:
    """A parameter's state as this process has it, to be read only."""
    return {key: local(value) for key, value in state.items()} if is_shard(param) else state


def whole_state(param: Tensor, entries: dict[str, Any]) -> dict[str, Any]:
    """New entries of a parameter's state, made of what this process has of them."""
    if not is_shard(param):
        return entries
    return {key: part if key == "step" else like(param, part) for key, part in entries.items()}


def like(param: Any, part: Tensor) -> Tensor:
    """The DTensor that has this part here, and is distributed as the parameter is."""
    from torch.distributed.tensor import DTensor

    shape, stride, here = param.shape, param.stride(), local(param).shape
    if part.shape != here:  # scales: of each row some blocks
        shape = torch.Size([shape[0], part.shape[1] * shape[1] // here[1]])
        stride = shape[1], 1
    whole = DTensor.from_local(
        part.detach(),
        param.device_mesh,
        param.placements,
        run_check=False,
        shape=shape,
        stride=stride,
    )
    if hasattr(part, "_checksums"):
        whole._local_tensor._checksums = part._checksums  # type: ignore[attr-defined]
    return whole


def check(param: Tensor, grad: Tensor, where: object) -> None:
    """Raises where a gradient is not distributed as its parameter is.

    Raises:
        RuntimeError: as in `checks.check_dense`.
    """
    if found := _misplaced(param, grad):
        raise RuntimeError(
            f"{where} is {_kind(param)} and its gradient {found}: redistribute the gradient before "
            "the step, param.grad = param.grad.redistribute(placements=param.placements)"
        )


def check_state(param: Tensor, state: dict[str, Any], keys: Iterable[str], where: object) -> None:
    """The same of the entries of a parameter's state that a rule or a mode can have."""
    for key in (*MASTER_DTYPES, *sorted(keys)):
        if state.get(key) is not None and (found := _misplaced(param, state[key])):
            raise RuntimeError(
                f"{where} is {_kind(param)} and its state {key!r} {found}: load a state dict of a "
                "model that is distributed alike, through torch.distributed.checkpoint, or delete "
                "the parameter's entry in optimizer.state"
            )


def _kind(tensor: Any) -> str:
    if not is_shard(tensor):
        return "a plain tensor" if isinstance(tensor, Tensor) else f"a {type(tensor).__name__}"
    return f"a DTensor with the placements {tensor.placements} on {tensor.device_mesh}"


def _misplaced(param: Any, tensor: Any) -> str:
    """What a gradient or state is, where it is not distributed as its parameter; else ""."""
    if is_shard(param) and is_shard(tensor):
        if (tensor.device_mesh, tensor.placements) == (param.device_mesh, param.placements):
            return ""
    elif is_shard(param) == is_shard(tensor):
        return ""
    return _kind(tensor)


def piece(param: Tensor, forms: Iterable[Kept], where: object) -> Piece:
    """Where the elements of this process are in the whole, where random numbers go by it.

    Raises:
        ValueError: ``forms`` are not for such a shard.
    """
    random = [form for form in forms if PACKINGS[form.packing].is_random]
    if not is_shard(param) or not random:
        return WHOLE
    block = max(form.block for form in random)
    found = _piece(param, block)
    if found is None:
        blocks = f", or has parts of blocks of {block} elements" if block else ""
        raise ValueError(
            f"{where} is {_kind(param)}, of which a rank has elements too scattered for the random "
            f"numbers of one process, or in another order{blocks}: use no stochastic rounding "
            "(master_weights='stochastic', state_dtype=torch.bfloat16 or '8bit'), or shard "
            "dimension 0 of a contiguous tensor"
        )
    return found


def _piece(param: Any, block: int) -> Piece | None:
    """See `piece`. None, on all ranks alike, where it cannot be said."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, mesh, placements = param.shape, param.device_mesh, param.placements
    parts: dict[int, int] = {}  # of the dimensions that are cut
    for placement, ranks in reversed([*zip(placements, mesh.shape, strict=True)]):
        if placement.is_replicate():
            continue
        if block and placement.dim > 1:  # which the scales lack
            return None
        # A _StridedShard is cut as if those after it had been before.
        if ranks > 1 and getattr(placement, "split_factor", 1) not in (1, parts.get(placement.dim)):
            return None
        if ranks > 1:
            parts[placement.dim] = parts.get(placement.dim, 1) * ranks
    order, part = memory_order(param), local(param)
    known = [d for d in order if part.shape[d] > 1]
    if part.numel() and known != sorted(known, key=part.stride, reverse=True):
        return None  # the elements here are in another order
    if not parts:
        return WHOLE

    def size(dims: Iterable[int]) -> int:
        return math.prod(shape[d] for d in dims)

    *outer, inner = (d for d in order if d in parts)
    i = order.index(inner)
    if len(outer) > 1 or (outer and size(order[: order.index(outer[0])]) != 1):
        return None
    if block and inner != 0:  # all ranks have as much of a row, in whole blocks
        if inner != 1 or size({*order[:i]} - {0}) != 1 or shape[1] % parts[1]:
            return None
        if size(range(1, len(shape))) // parts[1] % block:
            return None
    _, begin = compute_local_shape_and_global_offset(shape, mesh, placements)
    offset = sum(begin[d] * size(order[order.index(d) + 1 :]) for d in parts)
    if size(order[:i]) == 1:
        return Piece(offset)
    return Piece(offset, math.prod(part.shape[d] for d in order[i:]), size(order[i:]))


class _Sum(NamedTuple):
    """One of the sums that a norm is made of.

    Args:
        ranks: those that have a part of it, in order; one of each set of replicas.
        span: all ranks that want it, which may be more.
    """

    ranks: tuple[int, ...]
    span: tuple[int, ...]

    @property
    def is_alone(self) -> bool:
        return len(self.span) == 1


class Exchange:
    """The sums of squares of all ranks: what makes a norm global.

    Args:
        params: all parameters of an optimizer, with a gradient or without.
        norm_group: the ranks of plain parameters, of which each has only some.

    Attributes:
        classes: for each parameter the index of the sum that it is part of.
        n: how many there are.
        spans: the ranks of each collective: one, unless there are meshes side by side.
    """

    def __init__(self, params: Sequence[Tensor], norm_group: Group | None = None) -> None:
        numbers: dict[_Sum, int] = {}
        sums = {}  # by what they depend on, because ranks of a mesh are slow to tell
        self.classes: list[int] = []
        param: Any
        for param in params:
            key = (param.device_mesh, param.placements) if is_shard(param) else None
            if key not in sums:
                sums[key] = _sum_of(param, norm_group)
            self.classes.append(numbers.setdefault(sums[key], len(numbers)))
        self.n = max(len(numbers), 1)
        wide = {each.span for key, each in sums.items() if _is_here(key) and not each.is_alone}
        self.spans = [s for s in wide if not any({*s} < {*other} for other in wide)]
        self.spans.sort()
        self._groups: dict[tuple[int, ...], Callable[[], Group]] = {}  # of spans, if they have one
        for key, each in sums.items():
            if key is None:
                self._groups[each.span] = lambda: norm_group
            elif key[0].ndim == 1:
                self._groups[each.span] = key[0].get_group
        #: Where the collectives take their tensors from.
        self.device = torch.device("cpu")
        first: Any = next(filter(is_shard, params), None)
        if first is not None:
            self.device = torch.device(first.device_mesh.device_type)
        elif params:
            self.device = params[0].device
        left = self._lay_out(params, numbers)
        self._elsewhere = [
            key[0]
            for key, each in sums.items()
            if key and not _is_here(key) and (each.is_alone or each in left)
        ]

    def _lay_out(self, params: Sequence[Any], numbers: dict[_Sum, int]) -> dict[_Sum, int]:
        """Where each sum is in what is gathered. Returns those that are in no span."""
        self._marks: list[int] = []  # of each span: what tells its parameters from others
        self._mine: list[Tensor] = []  # and what it sends: the indices of sums, then of its mark
        places = []  # of each sum, in the order of the ranks
        n_gathered = 0
        left = {each: k for each, k in numbers.items() if not each.is_alone}
        for span in self.spans:
            mine = {each: left.pop(each) for each in [*left] if {*each.span} <= {*span}}
            width = _width(len(mine))
            for i, (each, k) in enumerate(mine.items()):
                places += [(k, n_gathered + span.index(rank) * width + i) for rank in each.ranks]
            n_gathered += len(span) * width
            shapes = [
                (tuple(param.shape), param.placements)
                for param, k in zip(params, self.classes, strict=True)
                if k in mine.values() and is_shard(param)
            ]
            sent = [*mine.values()] + [self.n + len(self._marks)] * (width - len(mine))
            self._marks.append(zlib.crc32(repr(shapes).encode()))
            self._mine.append(torch.tensor(sent, device=self.device))
        if self.spans:  # else nothing is copied: a CUDA graph may be captured
            places += [(k, n_gathered + k) for each, k in numbers.items() if each.is_alone]
            # There already, because a copy to a GPU would wait for it.
            in_order = [place for _, place in sorted(places, key=itemgetter(0))]
            self._places = torch.tensor(in_order, device=self.device)
            self._marks_there = torch.tensor(self._marks, dtype=torch.float64, device=self.device)
        return left

    def __bool__(self) -> bool:
        return bool(self.spans or self._elsewhere)

    def __call__(self, squares: Tensor) -> Tensor:
        """What all ranks have, to be added up.

        Args:
            squares: fp64 [n]: this rank's part of each sum.

        Returns:
            fp64 [..]: the same on all ranks, each part once.

        Raises:
            RuntimeError: the ranks do not take part alike, or one of them is gone.
            ValueError: this rank cannot know the sums.
        """
        if self._elsewhere:
            raise ValueError(
                f"the norm of the gradients cannot be known on this rank, which is none of the "
                f"mesh {self._elsewhere[0]} of a parameter: leave the parameter out here, or set "
                "no max_norm"
            )
        found = []
        squares_and_marks = torch.cat([squares, self._marks_there])
        for span, mine, mark in zip(self.spans, self._mine, self._marks, strict=True):
            here = squares_and_marks[mine]
            there = here.new_empty(len(span) * len(here))
            unlike = False
            try:
                group = _group(span, self._groups.get(span))
                _gather(there, here, group)
                marks = there[len(here) - 1 :: len(here)]
                if there.device.type == "cpu":
                    unlike = {*marks.tolist()} != {mark}
                else:  # the host does not wait to raise: the norm is NaN
                    there = torch.where((marks == mark).all(), there, math.nan)
            except (RuntimeError, ValueError) as error:
                raise _not_exchanged(span) from error
            if unlike:
                raise _not_exchanged(span)
            found.append(there)
        # Each rank adds up the same numbers in the same order.
        return torch.cat([*found, squares])[self._places]


def _width(n: int) -> int:
    """How many doubles a rank sends: its sums, and last the mark of its parameters. The same with
    a few sums more: gloo ends the process where ranks send unlike sizes."""
    return (n // 8 + 1) * 8


def _not_exchanged(span: tuple[int, ...]) -> RuntimeError:
    return RuntimeError(
        f"the norm of the gradients could not be exchanged between the ranks {span}: each of them "
        "must take part, with the same parameters in the same order, the same meshes and max_norm"
    )


def _is_here(key: Any) -> bool:
    """Whether this rank is one of a mesh: ``key`` is (mesh, placements), or None without one."""
    return key is None or key[0].get_coordinate() is not None


def _gather(there: Tensor, here: Tensor, group: Group | None) -> None:
    import torch.distributed as dist

    gather = getattr(dist, "all_gather_single", None)  # its name from torch 2.13 on
    (gather or dist.all_gather_into_tensor)(there, here, group=group)


def _sum_of(param: Any, norm_group: Group | None) -> _Sum:
    import torch.distributed as dist

    alone = _Sum((0,), (0,))  # whatever the rank
    if not is_shard(param):
        ranks = () if norm_group is None else tuple(dist.get_process_group_ranks(norm_group))
        return _Sum(ranks, tuple(sorted(ranks))) if len(ranks) > 1 else alone
    if any(placement.is_partial() for placement in param.placements):
        raise RuntimeError(
            f"there is {_kind(param)}, whose norm is not known before it is reduced: redistribute "
            "it to Shard or Replicate"
        )
    mesh = param.device_mesh.mesh
    cut = [not placement.is_replicate() for placement in param.placements]
    if not any(cut) or mesh.numel() == 1:
        return alone  # as plain parameters, of which all ranks have the same
    some = mesh[tuple(slice(None) if is_cut else 0 for is_cut in cut)]
    return _Sum(tuple(some.flatten().tolist()), tuple(sorted(mesh.flatten().tolist())))


_new_groups: dict[tuple[int, ...], tuple[Group, Group]] = {}


def _group(ranks: tuple[int, ...], known: Callable[[], Group] | None) -> Group | None:
    """The process group of these ranks; None for that of all.

    A new one is made only where there is none: its ranks must have made equally many before.
    """
    import torch.distributed as dist

    if ranks == tuple(range(dist.get_world_size())):
        return None
    if known is not None:
        return known()
    world, group = _new_groups.get(ranks, (None, None))
    if world is not dist.group.WORLD:
        group = dist.new_group([*ranks], use_local_synchronization=True)
        _new_groups[ranks] = dist.group.WORLD, group
    return group


def is_flat(param: Tensor) -> bool:
    """Whether it belongs to FSDP1, whose ranks have plain tensors of only some elements."""
    return bool(getattr(param, "_fsdp_flattened", False))


LACKS_GROUP = (
    "the norm of parameters of FullyShardedDataParallel, of which each rank has only a part, needs "
    "norm_group=: pass the process group that they are sharded over"
)
