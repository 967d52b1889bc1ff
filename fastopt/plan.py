"""One step: what to update, with which backend, and whether that still holds at the next step."""

from __future__ import annotations

import functools
import math
from array import array
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import dispatch, reference, settings
from .devices import capturing, moved
from .items import Item, Place, Undo, find, make_states, take_back
from .scalars import Rows

if TYPE_CHECKING:
    from .optimizers import Optimizer


class Part:
    """The parameters on one device that the Triton backend updates."""

    def __init__(
        self, number: int, optimizer: Optimizer, items: list[Item], on_device: bool
    ) -> None:
        kernels = dispatch.triton_kernels()
        assert kernels is not None
        rule = optimizer.rule
        self.number = number
        self.params = [item.param for item in items]
        self.device = self.params[0].device
        self.kernels = kernels
        self.tensors = kernels.MultiTensor(
            rule.name,
            len(rule.scalar_names),
            [item.target(rule, not on_device) for item in items],
            optimizer._captured,
            on_device,
        )

    def begin(self, native: Any, rows: Rows, scalars: bytes, n_rows: int) -> None:
        """Tells the device of a step: of its gradients, and of ``scalars`` or the settings."""
        row_of = None
        if self.tensors.on_device:
            scalars = rows.settings(self.device, self.kernels.address_of)
            n_rows = len(rows.groups)
        else:
            row_of = native.scalars_of(self.number)
        if not self.tensors.on_device and self.is_captured:
            raise RuntimeError(
                "a step that becomes part of a CUDA graph needs capturable=True, so that the GPU "
                "computes its scalars at each replay"
            )
        grads = native.grads(self.number)
        odd_grads = [self._odd_grad(i, array("q", grads)[i]) for i in self.tensors.odd]
        self.tensors.begin(native.pattern(), grads, odd_grads, scalars, n_rows, row_of)

    def _odd_grad(self, i: int, address: int) -> Tensor | None:
        grad = self.params[i].grad
        if (self.kernels.NO_GRAD if grad is None else grad.data_ptr()) != address:
            raise RuntimeError(
                "another thread replaced a gradient while the optimizer began a step: nothing was "
                "changed"
            )
        return grad

    @property
    def is_captured(self) -> bool:
        """Whether what is launched now becomes part of a CUDA graph."""
        return capturing(self.device)


class Plan:
    """What a step of an optimizer has to do.

    Making one validates every tensor and makes the missing states: slow, and in Python. `holds`
    tells, in C++ and fast, whether it is good for another step, with the gradients there are then.

    Args:
        undo: gets what takes the states back that are made.

    Raises:
        RuntimeError, ValueError: something cannot be updated.
    """

    def __init__(self, optimizer: Optimizer, rows: Rows, undo: Undo) -> None:
        self.rule = optimizer.rule
        self.groups = optimizer.param_groups
        self.state = optimizer.state
        self.settings = _settings(optimizer)
        self.backend = optimizer.backend
        self.on_device = rows.on_device
        # All that may raise comes before the states are made: they would pass for old ones later.
        rows.check()
        for g, group in enumerate(self.groups):
            settings.check_group(self.rule, group, g, optimizer.defaults)
        places = [
            Place(group, g, i)
            for g, group in enumerate(optimizer.param_groups)
            for i in range(len(group["params"]))
        ]
        params = [
            (place.group_index, place.param, find(optimizer, place, number, self.settings))
            for number, place in enumerate(places)
        ]
        items = [item for *_, item in params if item is not None]
        self.norm_options = norm_options([param for _, param, _ in params])
        make_states(optimizer, items, self.on_device, undo)
        self.others = [
            item for item in items if item.backend == "reference" and item.grad is not None
        ]
        by_device: dict[torch.device, list[Item]] = {}
        for item in items:
            if item.backend == "triton":
                by_device.setdefault(item.param.device, []).append(item)
        self.parts = [
            Part(number, optimizer, members, self.on_device)
            for number, members in enumerate(by_device.values(), start=1)
        ]
        part_of = {
            id(item): number
            for number, members in enumerate(by_device.values(), start=1)
            for item in members
        }
        # A graph copies the parts' tables at its replays: until then they are not there.
        self.is_captured = any(part.is_captured for part in self.parts)
        #: Whether anything is updated outside of `parts`.
        self.on_host = any(id(item) not in part_of for item in items) or not self.parts
        #: Whether a gradient is not where C++ looks for it.
        self.hides_grads = any(dispatch.hides_grad(param) for _, param, _ in params)
        self.native: Any = None  # there if `parts` are
        if extension := dispatch.extension():
            self.native = extension.Plan(
                optimizer.param_groups,
                optimizer.state,
                [
                    (
                        g,
                        param,
                        item.watched(
                            self.rule,
                            part_of.get(id(item), 0),
                            scalars_here=not (self.on_device and id(item) in part_of),
                        )
                        if item and item.backend != "reference"
                        else None,
                    )
                    for g, param, item in params
                ],
            )

    @property
    def reusable(self) -> bool:
        """Whether `holds` may be asked. If not, the plan keeps gradients alive: drop it."""
        return not (self.native is None or self.others or self.is_captured or self.hides_grads)

    def holds(self, optimizer: Optimizer, rows: Rows) -> bool:
        """Whether nothing has changed since the plan was made, except where the gradients are and
        which of them are None."""
        return (
            self.native is not None
            and not dispatch.is_faking()
            and self.backend == optimizer.backend
            and self.groups is optimizer.param_groups
            and self.state is optimizer.state
            and self.on_device == rows.on_device
            and self.settings == _settings(optimizer)
            # Threads pay where they are awake for the update that follows.
            and self.native.refresh(torch.get_num_threads() if self.on_host else 1)
        )

    def run(self, optimizer: Optimizer, rows: Rows, undo: Undo) -> None:
        """Makes the step, and sets ``optimizer.grad_norm``.

        Args:
            undo: empty after the last change, and only then.
        """
        try:
            self._run(optimizer, rows, undo)
        finally:
            if self.native is not None:
                self.native.release()

    def _run(self, optimizer: Optimizer, rows: Rows, undo: Undo) -> None:
        # All that may raise comes before any change.
        cohorts = [] if self.native is None else self.native.cohorts()
        scalars = array("d")
        for group, step in cohorts:
            if self.parts:
                scalars.extend(rows.table(group, step))
            else:
                rows.scalars(group, step)
        for item in self.others:
            if capturing(item.param.device):
                raise RuntimeError(
                    "a step of the reference backend cannot become part of a CUDA graph: see "
                    "fastopt.backends() for why parameters on a GPU are not updated by triton"
                )
            rows.table(item.group, self._next_step(item))
        for part in self.parts:
            part.begin(self.native, rows, scalars.tobytes(), len(cohorts))
            if part.is_captured:
                optimizer._captured.append((self, rows))

        clips = any(group["max_norm"] is not None for group in optimizer.param_groups)
        findings = rows.scaling.findings
        measures = clips or findings is not None
        partials: list[Any] = self._partials() if measures else [None] * len(self.parts)
        total = None  # the norm before it is unscaled, where the host has to know it
        if measures and (self.on_host or (findings is not None and not self.on_device)):
            total = self._norm(partials)
        skips = self.on_host and rows.scaling.skips
        if findings is not None and total is not None:
            skips = not math.isfinite(total)
            findings[torch.device("cpu")] = torch.full((), float(skips), device="cpu")
        norm = total * rows.inv_scale if clips and total is not None else None
        host_norm = None if norm is None else torch.full((), norm, **self.norm_options)
        if skips:
            take_back(undo)
            optimizer.grad_norm = host_norm
            return
        self._update_others(rows, norm, undo)
        if not clips and not self.on_device:
            partials = [None] * len(self.parts)
        norms = {}
        for part, of_norm in zip(self.parts, partials, strict=True):
            scaling = rows.scaling.to(part.device) if self.on_device else ()
            if not self.on_device and of_norm is not None and rows.inv_scale != 1:
                of_norm = of_norm * rows.inv_scale**2
            of_part = part.tensors.update(of_norm, self.norm_options["dtype"], *scaling)
            if clips:
                norms[part.device] = of_part
        native_rows = [
            (*rows.driver(group, norm, step), *rows.scalars(group, step))
            for group, step in (cohorts if self.on_host else [])
        ]
        # Last, and in one call, which no interrupt can divide: with this the step is made.
        if self.native is None:
            undo.clear()
        else:  # counts the steps of `parts` too
            threads = torch.get_num_threads() if self.on_host else 1
            self.native.update(native_rows, threads, undo)
        of_parts = norms.get(self.norm_options["device"], next(iter(norms.values()), None))
        optimizer.grad_norm = host_norm if of_parts is None else of_parts

    def _update_others(self, rows: Rows, norm: float | None, undo: Undo) -> None:
        """Updates what the reference takes; until the step is made, with a copy of all of it."""
        for item in self.others:
            step = self._next_step(item)
            param, *states = item.stored
            written = [array for stored in item.stored for array in stored.arrays]
            if "step" in item.state:
                written.append(item.state["step"])
            undo.append(
                functools.partial(_copy, [tensor.detach().clone() for tensor in written], written)
            )
            assert item.grad is not None
            reference.update_(
                self.rule.update,
                param,
                item.grad,
                dict(zip(item.names, states, strict=True)),
                rows.scalars(item.group, step),
                *rows.driver(item.group, norm, step),
                item.number,
            )
            if "step" in item.state:
                item.state["step"] += 1

    def _next_step(self, item: Item) -> float:
        if "step" in item.state:
            return float(item.state["step"]) + 1
        return 1.0 if item.fresh else 2.0

    def _partials(self) -> list[Any]:
        """For each part, on its device: numbers that add up to the sum of all squares."""
        partials = [part.tensors.norm_partials() for part in self.parts]
        if not partials or (len(partials) == 1 and not self.on_host):
            return partials
        totals = [part.kernels.total(p) for part, p in zip(self.parts, partials, strict=True)]
        if self.on_host:
            on_host = self._sum_of_squares_on_host()
            totals.append(torch.full((), on_host, dtype=torch.float64, device="cpu"))
        return [torch.stack([moved(total, part.device) for total in totals]) for part in self.parts]

    def _norm(self, partials: list[Any]) -> float:
        """The norm for the host, which has to wait for all parts."""
        if not self.parts:
            return math.sqrt(self._sum_of_squares_on_host())
        return math.sqrt(float(self.parts[0].kernels.total(partials[0])))

    def _sum_of_squares_on_host(self) -> float:
        total = 0.0
        if self.native is not None:
            total += self.native.sum_of_squares(torch.get_num_threads())
        if grads := [item.grad for item in self.others if item.grad is not None]:
            total += float(reference.power_sum(grads, 2))
        return total


@torch.no_grad()
def _copy(sources: list[Tensor], targets: list[Tensor]) -> None:
    for source, target in zip(sources, targets, strict=True):
        target.copy_(source)


def _settings(optimizer: Optimizer) -> list[Any]:
    """What decides on the states of each param group."""
    return [
        (optimizer.rule.states(group), *map(group.get, ("master_weights", "state_dtype", "seed")))
        for group in optimizer.param_groups
    ]


def norm_options(tensors: list[Tensor]) -> dict[str, Any]:
    """Dtype and device of the norm of these tensors: fp32, or fp64 where any of them is."""
    double = any(tensor.dtype == torch.float64 for tensor in tensors)
    return {
        "dtype": torch.float64 if double else torch.float32,
        "device": tensors[0].device if tensors else None,
    }
