"""Who does the work: torch operators, C++ or Triton, behind one interface.

A backend is given the tensors of one device and a rule, and can take the norm of their gradients
and update them. Clipping gradients in place is an update too: of the rule `ASSIGN`.
"""

from __future__ import annotations

import functools
import math
from array import array
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..norm import clip_coef, power_sum
from ..packing import Stored, random_bits
from ..rule import ASSIGN, CLIP_VALUE, COEF, HEAD, SEED, STEP, Rule, arithmetic_dtype, head
from . import dispatch, shards
from .devices import capturing, moved
from .params import Target, Undo, describe
from .table import Row, Table


class Reference:
    """Plain torch operators: the specification, and the fallback for tensors of any kind.

    Args:
        targets: at least one; all on one device.
    """

    def __init__(self, rule: Rule, targets: Sequence[Target]) -> None:
        self.rule = rule
        self.targets = targets
        self.device = targets[0].grad.device

    @classmethod
    def of_grads(cls, grads: Sequence[Tensor]) -> Reference:
        """For gradients that are measured or clipped in place."""
        grads = [grad.detach() for grad in grads]
        return cls(ASSIGN, [Target([Stored(grad)], grad) for grad in grads])

    def power_sum(self, order: float) -> Tensor:
        """The sum of ``abs(x)**order`` over all gradients: 0-dim, fp64; their maximum for inf."""
        return power_sum([target.grad for target in self.targets], order)

    def power_sums(self, classes: int) -> list[float]:
        """The sums of squares of each norm class."""
        grads: list[list[Tensor]] = [[] for _ in range(classes)]
        for target in self.targets:
            grads[target.norm_class].append(target.grad)
        return [float(power_sum(members, 2)) if members else 0.0 for members in grads]

    @torch.no_grad()
    def update(self, rows: Sequence[Row], undo: Undo | None = None) -> None:
        """Updates each target by its row.

        Args:
            undo: gets what takes the changes back.
        """
        for target, row in zip(self.targets, rows, strict=True):
            if undo is not None:
                undo.append(_copies(target))
            _update(self.rule, target, row)

    @torch.no_grad()
    def clip(self, norm: Tensor, max_norm: float) -> None:
        """Multiplies the gradients by what brings a norm, in double, down to ``max_norm``."""
        if max_norm != math.inf:
            coef: Any = (max_norm / (moved(norm, self.device) + 1e-6)).clamp(max=1.0)
            # A tensor, so that nothing waits for a GPU; and two of no dimension become a double.
            dtypes = [arithmetic_dtype(target.grad) for target in self.targets]
            self.update([head(coef.to(dtype)) for dtype in dtypes])

    def clamp(self, clip_value: float) -> None:
        """Clamps all elements to ±``clip_value``."""
        self._assign(head(clip_value=clip_value))

    def _assign(self, row: Row) -> None:
        self.update([row] * len(self.targets))


def _copies(target: Target) -> functools.partial[None]:
    written = [array for stored in target.stored for array in stored.arrays]
    if target.step is not None:
        written.append(target.step)
    return functools.partial(_copy, [tensor.detach().clone() for tensor in written], written)


@torch.no_grad()
def _copy(sources: list[Tensor], targets: list[Tensor]) -> None:
    for source, target in zip(sources, targets, strict=True):
        target.copy_(source)


def _update(rule: Rule, target: Target, row: Row) -> None:
    param, *states = target.stored
    dtype = arithmetic_dtype(param.a)
    place = target.number, target.piece
    random = functools.partial(random_bits, int(row[SEED]), int(row[STEP]), *place)
    g = (target.grad.to(dtype) * row[COEF]).clamp(-row[CLIP_VALUE], row[CLIP_VALUE])
    of_rule = {name: s.unpack(dtype) for name, s in zip(target.names, states, strict=True)}
    p, of_rule = rule.update(param.unpack(dtype), g, rule.Scalars(*row[len(HEAD) :]), **of_rule)
    param.pack_(p, random)
    for stored, name in zip(states, target.names, strict=True):
        stored.pack_(of_rule[name], random)
    if target.step is not None:
        target.step += 1


class Cpp(Reference):
    """The compiled extension, for gradients. A step's own are in `plan.Plan`."""

    def __init__(self, grads: list[Tensor], native: Any) -> None:
        self.grads = grads
        self.native = native

    @classmethod
    def of_plain(cls, grads: list[Tensor]) -> Cpp | None:
        """Quickly; None if any is not on the CPU, has gaps, or is not of a type that C++ knows."""
        extension = dispatch.extension()
        assert extension is not None
        native = extension.Targets.plain(grads, (Tensor, torch.nn.Parameter))
        return native and cls(grads, native)

    @classmethod
    def of_grads(cls, grads: Sequence[Tensor]) -> Cpp:
        extension = dispatch.extension()
        assert extension is not None
        return cls([*grads], extension.Targets([describe(Stored(grad)) for grad in grads]))

    def power_sum(self, order: float) -> Tensor:
        total = self.native.power_sum(order, torch.get_num_threads())
        return torch.tensor(total, dtype=torch.float64, device="cpu")

    def clip(self, norm: Tensor, max_norm: float) -> None:
        coef = clip_coef(float(norm), max_norm)
        if coef != 1.0:
            self._assign(head(coef))

    def _assign(self, row: Row) -> None:
        self.native.assign(array("d", row), torch.get_num_threads())
        torch.autograd.graph.increment_version(self.grads)


class Triton(Reference):
    """The Triton kernels."""

    def __init__(
        self,
        rule: Rule,
        targets: Sequence[Target],
        captured: list[Any] | None = None,
        on_device: bool = False,
    ) -> None:
        """
        Args:
            captured: where to keep what a CUDA graph will use at its replays.
            on_device: the device counts the steps and computes the scalars.
        """
        self.device = targets[0].grad.device  # and no gradient, which the plan must not keep
        kernels = dispatch.triton_kernels()
        assert kernels is not None
        self.kernels = kernels
        self.captured = _captured if captured is None else captured
        self.on_device = on_device
        self.tensors = kernels.MultiTensor(rule, targets, self.captured, on_device)

    @classmethod
    def of_grads(cls, grads: Sequence[Tensor]) -> Triton:
        targets = [Target([Stored(grad)], grad) for grad in map(Tensor.detach, grads)]
        made = cls(ASSIGN, targets)
        made.targets = targets
        return made

    @property
    def is_captured(self) -> bool:
        """Whether what is launched now becomes part of a CUDA graph."""
        return capturing(self.device)

    def begin(
        self, part: int, native: Any, params: Sequence[Tensor], table: Table, rows: Sequence[Row]
    ) -> None:
        """Tells the device of a step: of its gradients, and of the rows or the settings.

        Args:
            part: which one of the plan ``native`` this is.
            params: of the targets.
        """
        n_rows, row_of = len(rows), None
        kept: list[Tensor] = []
        if self.on_device:
            n_rows = len(table.forms)
            words, kept = table.for_device(self.device, self.kernels.address_of)
        else:
            row_of = native.row_of(part)
            words = table.words(rows)
        if self.is_captured:
            if not self.on_device:
                raise RuntimeError(
                    "a step that becomes part of a CUDA graph needs capturable=True, so that the "
                    "GPU computes its scalars at each replay"
                )
            self.captured.append((self, kept))
        grads = native.grads(part)
        addresses = array("q", grads)
        odd = [self._odd_grad(params[i], addresses[i]) for i in self.tensors.odd]
        self.tensors.begin(native.pattern(), grads, odd, words, n_rows, row_of)
        self.kept = kept

    def _odd_grad(self, param: Tensor, address: int) -> Tensor | None:
        grad: Tensor | None = shards.local(param.grad)
        if (self.kernels.NO_GRAD if grad is None else grad.data_ptr()) != address:
            raise RuntimeError(
                "another thread replaced a gradient while the optimizer began a step: nothing was "
                "changed"
            )
        return grad

    def sums_of_squares(self, partials: Tensor, classes: int) -> Tensor:
        """For each norm class the sum of its partials: fp64 [classes]."""
        sums = [*map(self.kernels.total, self.tensors.by_class(partials))]
        missing = torch.zeros(classes - len(sums), dtype=torch.float64, device=self.device)
        return torch.cat([torch.stack(sums), missing])

    def power_sum(self, order: float) -> Tensor:
        if order not in (1, 2, math.inf):
            return super().power_sum(order)
        self._begin(head())
        total: Tensor = self.kernels.total(self.tensors.norm_partials(order), order)
        return total

    def clip(self, norm: Tensor, max_norm: float) -> None:
        self._begin(head(max_norm=max_norm))
        square = moved(norm, self.device).square()
        self.tensors.update(square.view(1))
        self._written()

    def _assign(self, row: Row) -> None:
        self._begin(row)
        self.tensors.update()
        self._written()

    def _begin(self, row: Row) -> None:
        grads = [target.grad for target in self.targets]
        self.tensors.begin(
            pattern="all",
            grads=array("q", [grad.data_ptr() for grad in grads]).tobytes(),
            odd_grads=[grads[i] for i in self.tensors.odd],
            rows=array("d", row).tobytes(),
            n_rows=1,
            row_of=array("q", [0] * len(grads)).tobytes(),
        )

    def _written(self) -> None:
        torch.autograd.graph.increment_version([target.grad for target in self.targets])


# What CUDA graphs use, which do not tell when they are no longer replayed: small tables.
_captured: list[Any] = []
