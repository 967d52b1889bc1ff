"""One step: what to update, with which backend, and whether that still holds at the next step."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from ..rule import Group, Rule
from . import checks, dispatch, shards
from .backends import Reference, Triton
from .devices import capturing, moved
from .params import Param, Place, Undo, Watched, find, make_states, take_back
from .table import Row, Scaling, Table, clipped


class Plan:
    """What a step of an optimizer has to do.

    Making one validates every tensor and makes the missing states: slow, and in Python. `holds`
    tells, in C++ and fast, whether it is good for another step, with the gradients there are then.

    Args:
        groups, states, backend, norm_group: the optimizer's.
        on_device: devices compute the scalars and count the steps of what they update.
        captured: where to keep what CUDA graphs use at their replays.
        undo: gets what takes the states back that are made.
        places: those of the parameters that the step is for, by their numbers.
        alone: there are others, and the caller sees to it that these still stand there.

    Attributes:
        reusable: `holds` may be asked. If not, the plan keeps gradients alive: drop it.

    Raises:
        RuntimeError, ValueError: something cannot be updated.
    """

    def __init__(
        self,
        rule: Rule,
        groups: list[Group],
        states: dict[Tensor, Any],
        table: Table,
        backend: str,
        norm_group: Any,
        on_device: bool,
        captured: list[Any],
        undo: Undo,
        places: dict[int, Place],
        alone: bool,
    ) -> None:
        self._made_for = groups, states, backend, norm_group, on_device
        self._table = table
        self._on_device = on_device
        # What may raise comes first: states made before an error would later look old.
        table.check()
        if backend != "auto":  # it may have been changed since `Optimizer` checked it
            dispatch.resolve(backend, rule)
        found = [
            find(rule, place, number, table.forms[place.group_index][0], states, backend)
            for number, place in places.items()
        ]
        params = [param for param in found if param is not None]
        whole = [place.param for place in places.values()]
        self._exchange = shards.Exchange(whole, norm_group)
        self._lacks_group = norm_group is None and any(map(shards.is_flat, whole))
        seen: Counter[int] = Counter()
        for param, norm_class in zip(found, self._exchange.classes, strict=True):
            if param is not None:
                param.norm_class = norm_class
                param.repeat = seen[id(param.whole)]
                seen[id(param.whole)] += 1
        make_states(rule, states, params, on_device, undo)
        # C++ watches the optimizer's dict of states as a whole, where other parameters come and go.
        self._entries = [(param, states.get(param)) for param in whole] if alone else []
        self._options = norm_options(whole)
        of_device = self._divide(rule, params, captured)
        self._native: Any = None  # there if `_devices` are
        if extension := dispatch.extension():
            items = [
                (place.group_index, place.param, self._watched(rule, param, [*of_device]))
                for place, param in zip(places.values(), found, strict=True)
            ]
            watched = ([{"params": whole}], {}) if alone else (groups, states)
            self._native = extension.Plan(*watched, items)
        self._wanted = self._native.wanted() if self._native else []
        self._threads = torch.get_num_threads() if self._on_host else 1
        # A graph copies its tables only when it is replayed. And C++ finds no gradient that a
        # subclass keeps elsewhere.
        self.reusable = not (
            self._native is None
            or self._reference
            or any(device.is_captured for device in self._devices)
            or any(map(checks.hides_grad, whole))
        )

    def _divide(
        self, rule: Rule, params: list[Param], captured: list[Any]
    ) -> dict[torch.device, list[Param]]:
        """Gives the parameters to their backends; C++ has the rest. Returns those of devices."""
        self._of_reference = [p for p in params if p.backend == "reference" and p.grad is not None]
        targets = [param.target(counts=True) for param in self._of_reference]
        self._reference = Reference(rule, targets) if targets else None
        of_device: dict[torch.device, list[Param]] = {}
        for param in params:
            if param.backend == "triton":
                of_device.setdefault(param.param.device, []).append(param)
        on_device = self._on_device
        self._devices = [
            Triton(rule, [p.target(counts=on_device) for p in members], captured, on_device)
            for members in of_device.values()
        ]
        self._params_of = [[p.whole for p in members] for members in of_device.values()]
        #: Whether anything is updated outside of `_devices`.
        self._on_host = any(p.backend != "triton" for p in params) or not self._devices
        return of_device

    def _watched(
        self, rule: Rule, param: Param | None, devices: list[torch.device]
    ) -> Watched | None:
        if param is None or param.backend == "reference":
            return None
        part = devices.index(param.param.device) + 1 if param.backend == "triton" else 0
        return param.watched(rule, part, scalars_here=not (self._on_device and part))

    def holds(
        self,
        groups: list[Group],
        states: dict[Tensor, Any],
        table: Table,
        backend: str,
        norm_group: Any,
        on_device: bool,
    ) -> bool:
        """Whether nothing has changed since the plan was made, except where the gradients are and
        which of them are None."""
        made_for = self._made_for
        if (
            checks.is_faking()
            or made_for[0] is not groups
            or made_for[1] is not states
            or made_for[2:] != (backend, norm_group, on_device)
            or (table is not self._table and table.forms != self._table.forms)
            or (
                self._entries
                and any(states.get(param) is not entries for param, entries in self._entries)
            )
        ):
            return False
        self._table = table
        # Threads pay if they are awake for the update that follows.
        self._threads = torch.get_num_threads() if self._on_host else 1
        self._wanted = self._native.begin(self._threads)
        return self._wanted is not None

    def run(
        self, scaling: Scaling, undo: Undo, sum_of_squares: Tensor | None = None
    ) -> Tensor | None:
        """Makes the step.

        Args:
            undo: emptied once the step is made.
            sum_of_squares: of all gradients on all ranks, fp64 [1]; None: to be taken here.

        Returns:
            the norm of the gradients; None if no group has a ``max_norm``.
        """
        # All that may raise comes before any change.
        table, finds = self._table, scaling.findings is not None
        wants_norm = table.clips or finds
        measures = wants_norm and sum_of_squares is None
        if measures and self._lacks_group:
            raise ValueError(shards.LACKS_GROUP)
        reads = self._on_host or not self._on_device  # whether the host may wait for the scaler's
        inv_scale = scaling.inv_scale if reads else 1.0
        skips = reads and scaling.skips
        rows = table.rows(self._wanted, inv_scale, keeps=bool(self._entries))
        of_reference = self._rows_of_reference(inv_scale) if self._reference else []
        for part, (device, params) in enumerate(zip(self._devices, self._params_of, strict=True)):
            device.begin(part + 1, self._native, params, table, rows)

        # Where C++ alone updates, it takes the norm and decides by itself.
        alone = self._native is not None and not (self._devices or self._reference)
        alone &= not (wants_norm and (self._exchange or sum_of_squares is not None))
        norm: Any = None
        squares: float | None = None
        norms: dict[torch.device, Tensor] = {}
        if not alone:
            partials: list[Tensor | None] = [None] * len(self._devices)
            if wants_norm:
                to_host = self._on_host or skips or (finds and not self._on_device)
                partials, squares = self._sums_of_squares(to_host, sum_of_squares)
            if squares is not None:
                norm = math.sqrt(squares) * inv_scale
                skips |= finds and not math.isfinite(squares)
            if not skips:
                if self._reference:
                    self._reference.update([clipped(row, norm) for row in of_reference], undo)
                norms = self._update_devices(partials, scaling, inv_scale)

        # Last, and in one call, which no interrupt can divide: with this the step is made.
        if self._native is not None:
            words = table.words(rows) if self._on_host else b""
            norm, skips = self._native.step(
                words, measures and alone, finds, norm, inv_scale, skips, self._threads, undo
            )
        elif not skips:
            undo.clear()
        if skips:
            take_back(undo)
        if scaling.findings is not None and (alone or squares is not None):
            scaling.findings[_CPU] = torch.full((), float(skips), device=_CPU)
        if not table.clips:
            return None
        if norms:
            return norms.get(self._options["device"], next(iter(norms.values())))
        return torch.full((), norm, **self._options)

    def _rows_of_reference(self, inv_scale: float) -> list[Row]:
        if any(capturing(param.param.device) for param in self._of_reference):
            raise RuntimeError(
                "a step of the reference backend cannot become part of a CUDA graph: see "
                "fastopt.backends() for why parameters on a GPU are not updated by triton"
            )
        cohorts = [(param.group, param.next_step) for param in self._of_reference]
        return self._table.rows(cohorts, inv_scale)

    def _update_devices(
        self, partials: list[Tensor | None], scaling: Scaling, inv_scale: float
    ) -> dict[torch.device, Tensor]:
        """What Triton updates; returns the norm on each device."""
        norms = {}
        for device, of_norm in zip(self._devices, partials, strict=True):
            scaled: tuple[Any, ...] = ()
            if self._on_device:
                scaled = scaling.to(device.device)
            else:
                of_norm = of_norm if self._table.clips else None
                if of_norm is not None and inv_scale != 1:
                    of_norm = of_norm * inv_scale**2
            norm = device.tensors.update(of_norm, self._options["dtype"], *scaled)
            if self._table.clips:
                norms[device.device] = norm
        return norms

    def _sums_of_squares(
        self, to_host: bool, known: Tensor | None
    ) -> tuple[list[Tensor | None], float | None]:
        """For each of `_devices`, there: numbers that add up to the sum of all squares; and that
        sum, if the host is to wait for it."""
        if known is not None:
            copies: list[Tensor | None] = [moved(known, each.device) for each in self._devices]
            return copies, float(known) if to_host else None
        partials = [device.tensors.norm_partials() for device in self._devices]
        classes = self._exchange.n
        of_host = [0.0] * classes
        if self._native is not None and self._on_host:
            found = self._native.power_sums(2.0, self._threads)
            of_host[: len(found)] = found
        if self._reference:
            of_host = [*map(sum, zip(of_host, self._reference.power_sums(classes), strict=True))]
        if not partials and not self._exchange:
            return [], sum(of_host)
        if len(partials) > 1 or self._on_host or self._exchange:
            sums = [
                device.sums_of_squares(of_device, classes)
                for device, of_device in zip(self._devices, partials, strict=True)
            ]
            if self._on_host:
                sums.append(torch.tensor(of_host, dtype=torch.float64, device="cpu"))
            if self._exchange:
                there = self._exchange.device
                parts = torch.stack([moved(each, there) for each in sums]).sum(0)
                sums = [self._exchange(parts).sum().view(1)]
            partials = [
                torch.cat([moved(each, device.device) for each in sums]) for device in self._devices
            ]
            if not partials:
                return [], float(sums[0])
        squares = float(self._devices[0].kernels.total(partials[0])) if to_host else None
        return partials, squares


_CPU = torch.device("cpu")


def norm_options(tensors: list[Tensor]) -> dict[str, Any]:
    """Dtype and device of the norm of these tensors: fp32, or fp64 where any of them is."""
    double = any(tensor.dtype == torch.float64 for tensor in tensors)
    return {
        "dtype": torch.float64 if double else torch.float32,
        "device": tensors[0].device if tensors else None,
    }
