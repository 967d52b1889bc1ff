"""Launches the kernels over all tensors of a device at once."""

from __future__ import annotations

import contextlib
import functools
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import rules
from .norm import clip, reduce_chunks, reduce_partials
from .tables import CHUNK, OWN, THREADS
from .update import compute_scalars, update

DTYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
NO_GRAD = -1  # in place of a gradient's address, as in csrc/plan.h
# What CUDA graphs use, which do not tell when they are no longer replayed: some KiB for each.
_captured: list[Any] = []
INTERPRETED = not isinstance(update, triton.JITFunction)  # TRITON_INTERPRET=1


@dataclass
class Target:
    """A tensor that is updated in place, of any layout.

    Args:
        param: the tensor.
        grad: of the dtype and strides that its gradients will have.
        states: those that the rule updates.
        gap: before which of the states one is missing that the rule can have.
        group: the row of the settings.
        step: fp32, 0-dim, on the device; None where the host counts, or nobody.
    """

    param: Tensor
    grad: Tensor
    states: Sequence[Tensor] = ()
    gap: int | None = None
    group: int = 0
    step: Tensor | None = None


class _Launch(NamedTuple):
    """An update of some targets.

    Args:
        wave: targets that share memory are updated one after the other, in launches of their own.
        dtypes: of parameter, gradient and states.
        gap: as in `Target`.
        programs: how many.
        chunks: int64 [programs]: what `tables.locate` reads.
        slots: int64 [programs]: places in the list of partial norms.
    """

    wave: int
    dtypes: tuple[tl.dtype, ...]
    gap: int | None
    programs: int
    chunks: Tensor
    slots: Tensor


class MultiTensor:
    """The tensors of one device that a step updates: their tables in its memory, and the launches.

    A step is `begin`, then `norm_partials` where gradients are to be clipped, then `update`.
    Nothing in it waits for the device.

    Args:
        rule: the name of one in `rules`.
        n_scalars: how many scalars it takes.
        targets: at least one; all on one device.
        on_device: the device counts the steps and computes the scalars.
    """

    def __init__(
        self, rule: str, n_scalars: int, targets: Sequence[Target], on_device: bool = False
    ) -> None:
        self.rule = rule
        self.n_scalars = n_scalars
        self.on_device = on_device
        self.device = targets[0].param.device
        self.groups = [target.group for target in targets]
        self.kinds = [
            (
                tuple(DTYPES[t.dtype] for t in (target.param, target.grad, *target.states)),
                target.gap,
            )
            for target in targets
        ]
        self.numels = [target.param.numel() for target in targets]
        self.extents = [_extent(target.param) for target in targets]
        self.staged = {i: _Staged(target) for i, target in enumerate(targets) if _is_odd(target)}
        n_states = max(len(target.states) for target in targets)
        columns = [
            [
                target.param.numel(),
                target.group,
                0 if target.step is None else target.step.data_ptr(),
                *(t.data_ptr() for t in self._written(i, target)),
                *[0] * (n_states - len(target.states)),
            ]
            for i, target in enumerate(targets)
        ]
        self.words = b""
        self.words_there = torch.empty(0, dtype=torch.int64, device=self.device)
        self.pattern: object = None
        self.tensors = self._upload(torch.tensor(columns, dtype=torch.int64).t())
        if on_device:
            self.scalars = torch.empty(
                (len(targets), OWN.value + n_scalars), dtype=torch.int64, device=self.device
            )

    def _written(self, index: int, target: Target) -> Sequence[Tensor]:
        staged = self.staged.get(index)
        return staged.copies if staged else (target.param, *target.states)

    @property
    def odd(self) -> Sequence[int]:
        """The targets of which `begin` needs the gradients themselves."""
        return list(self.staged)

    def begin(
        self,
        pattern: object,
        grads: bytes,
        odd_grads: Sequence[Tensor | None],
        rows: bytes,
        n_rows: int,
        row_of: bytes | None = None,
    ) -> None:
        """Says what the step works on.

        Args:
            pattern: equal to that of an earlier call only if the same gradients are missing.
            grads: int64 for each target: the address of its gradient, or `NO_GRAD`.
            odd_grads: the gradients of the targets in `odd`.
            rows: the table of settings if `on_device`, else that of scalars; `n_rows` rows.
            row_of: int64 for each target: which of these scalars it takes.
        """
        n = len(self.kinds)
        if pattern != self.pattern:
            self._schedule([i for i, grad in enumerate(array("q", grads)) if grad != NO_GRAD])
            self.pattern = pattern
        if self.staged:
            addresses = array("q", grads)
            for (i, staged), grad in zip(self.staged.items(), odd_grads, strict=True):
                if grad is not None:
                    addresses[i] = staged.take_grad(grad)
            grads = addresses.tobytes()
        if row_of is None:
            row_of = array("q", range(n)).tobytes()
        words = self._follow(row_of + grads + rows)
        self.n_rows, self.row_size = n_rows, len(rows) // (8 * max(n_rows, 1))
        self.row_of, self.grads, self.rows = words[:n], words[n : 2 * n], words[2 * n :]

    def norm_partials(self, order: float = 2.0) -> Tensor:
        """Of each chunk of the gradients the norm, to the power of its order 1, 2 or inf: fp64."""
        with _guard(self.device):
            for launch in self.launches:
                reduce_chunks[(launch.programs,)](
                    self.tensors,
                    self.grads,
                    launch.chunks,
                    launch.slots,
                    self.partials,
                    DTYPE=launch.dtypes[1],
                    ORDER=order,
                    **_options(),
                )
        return self.partials

    def update(
        self,
        partials: Tensor | None = None,
        norm_dtype: torch.dtype = torch.float32,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> Tensor | None:
        """Updates the targets that have a gradient.

        Args:
            partials: of the norm by which to clip; may be those of several devices.
            norm_dtype: that of the result.
            grad_scale: if `on_device`: fp32, one element: divides the gradients first.
            found_inf: if `on_device`: likewise; nothing is updated where it is not 0.

        Returns:
            the norm, 0-dim; None without `partials`.
        """
        norm = None
        if partials is not None:
            norm = torch.empty((), dtype=norm_dtype, device=self.device)
        with _guard(self.device):
            if not self.on_device and partials is not None:
                clip[(1,)](
                    partials,
                    partials.shape[0],
                    self.rows,
                    self.n_rows,
                    self.row_size,
                    norm,
                    ASSIGNS=self.rule == "assign",
                    **_options(),
                )
            for wave in range(self.n_waves):
                if self.on_device:
                    self._compute_scalars(wave, partials, norm, grad_scale, found_inf)
                members = [self.staged[i] for i in self.staged if self.waves[i] == wave]
                for staged in members:
                    staged.load()
                for launch in self.launches:
                    if launch.wave == wave:
                        self._update(launch)
                for staged in members:
                    staged.store()
        return norm

    def _compute_scalars(
        self,
        wave: int,
        partials: Tensor | None,
        norm: Tensor | None,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        n = len(self.kinds)
        compute_scalars[(triton.cdiv(n, THREADS.value),)](
            self.tensors,
            self.wave_of,
            self.rows,
            self.scalars,
            partials,
            norm,
            grad_scale,
            found_inf,
            n,
            0 if partials is None else partials.shape[0],
            wave,
            RULE_SCALARS=getattr(rules, f"{self.rule}_scalars"),
            N_SETTINGS=self.row_size // 2,  # as values and as addresses
            **_options(),
        )

    def _update(self, launch: _Launch) -> None:
        update[(launch.programs,)](
            self.tensors,
            self.grads,
            self.row_of,
            launch.chunks,
            self.scalars if self.on_device else self.rows,
            len(self.kinds),
            RULE=getattr(rules, self.rule),
            N_SCALARS=self.n_scalars,
            GAP=launch.gap,
            DTYPES=launch.dtypes,
            **_options(),
        )

    def _schedule(self, active: list[int]) -> None:
        """Plans the launches for the targets that have a gradient."""
        n_chunks = [0] * len(self.kinds)
        for i in active:
            n_chunks[i] = triton.cdiv(self.numels[i], CHUNK.value)
        slots = [0, *accumulate(n_chunks)]
        self.waves = _waves(self.extents, active)
        self.n_waves = max(self.waves, default=-1) + 1
        members: dict[Any, list[int]] = {}
        for i in active:
            if n_chunks[i]:
                members.setdefault((self.waves[i], *self.kinds[i]), []).append(i)
        self.launches = []
        for (wave, dtypes, gap), targets in members.items():
            sizes = torch.tensor([n_chunks[i] for i in targets])
            programs = sum(n_chunks[i] for i in targets)
            index = torch.arange(programs)
            index -= (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
            target = torch.tensor(targets).repeat_interleave(sizes)
            slot = torch.tensor([slots[i] for i in targets]).repeat_interleave(sizes)
            chunks = self._upload(torch.stack([target << 32 | index, slot + index]))
            self.launches.append(_Launch(wave, dtypes, gap, programs, *chunks))
        self.wave_of = self._upload(torch.tensor(self.waves))
        # One zero where there is no chunk.
        self.partials = torch.zeros(max(slots[-1], 1), dtype=torch.float64, device=self.device)

    def _follow(self, words: bytes) -> Tensor:
        """The words in the device's memory, copied only where they have changed."""
        if words != self.words or capturing(self.device):
            host = torch.frombuffer(bytearray(words), dtype=torch.int64)
            if capturing(self.device):
                # Copied by the graph at each replay, to where no other step copies to.
                there = self._upload(host)
                _captured.append((self, there, self.launches, self.wave_of, self.partials))
                return there
            if len(words) != len(self.words):
                self.words_there = torch.empty_like(host, device=self.device)
            self.words_there.copy_(self._pinned(host), non_blocking=True)
            self.words = words
        return self.words_there

    def _upload(self, host: Tensor) -> Tensor:
        return self._pinned(host.contiguous()).to(self.device, non_blocking=True, copy=True)

    def _pinned(self, host: Tensor) -> Tensor:
        """Host memory that can be copied from without waiting; torch keeps it until it has been."""
        if self.device.type == "cpu":
            return host
        pinned = host.pin_memory()
        if capturing(self.device):
            _captured.append(pinned)
        return pinned


def total(partials: Tensor, order: float = 2.0) -> Tensor:
    """Reduces what `MultiTensor.norm_partials` returns: fp64, 0-dim."""
    result = torch.empty((), dtype=torch.float64, device=partials.device)
    with _guard(partials.device):
        reduce_partials[(1,)](partials, partials.shape[0], result, ORDER=order, **_options())
    return result


def address_of(tensor: Tensor) -> int:
    """Of a one-element tensor in the table of settings: odd for a double."""
    return tensor.data_ptr() + (tensor.dtype == torch.float64)


class _Staged:
    """Updates a target whose tensors do not lie alike through copies that do: in the memory order
    of the gradient, which is the order of the norm."""

    def __init__(self, target: Target) -> None:
        self.dims = _order(target.grad)
        self.views = [t.detach().permute(self.dims) for t in (target.param, *target.states)]
        self.copies = [v.contiguous() for v in self.views]

    def take_grad(self, grad: Tensor) -> int:
        self.grad = grad.detach().permute(self.dims).contiguous()
        return self.grad.data_ptr()

    def load(self) -> None:
        for copy, view in zip(self.copies, self.views, strict=True):
            copy.copy_(view)

    def store(self) -> None:
        for copy, view in zip(self.copies, self.views, strict=True):
            view.copy_(copy)


def _order(tensor: Tensor) -> list[int]:
    """The tensor's dimensions in the order of its memory."""
    return sorted(range(tensor.ndim), key=tensor.stride, reverse=True)


def _is_odd(target: Target) -> bool:
    dims = _order(target.grad)
    tensors = (target.param, target.grad, *target.states)
    return not all(t.permute(dims).is_contiguous() for t in tensors)


def _extent(tensor: Tensor) -> tuple[int, int]:
    """The addresses from the tensor's first element to the end of its last."""
    if tensor.numel() == 0:
        return 0, 0
    last = sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    begin = tensor.data_ptr()
    return begin, begin + (last + 1) * tensor.element_size()


def _waves(extents: list[tuple[int, int]], active: list[int]) -> list[int]:
    """For each active target, one more than the latest wave of the earlier ones that it shares
    memory with; -1 for the others. Views that interleave count as sharing."""
    waves = [-1] * len(extents)
    for i in active:
        waves[i] = 0
    by_address = sorted(extents[i] for i in active if extents[i][1])
    if all(a[1] <= b[0] for a, b in pairwise(by_address)):
        return waves
    for k, i in enumerate(active):  # quadratic, but only where any two do share
        for j in active[:k]:
            if extents[i][0] < extents[j][1] and extents[j][0] < extents[i][1]:
                waves[i] = max(waves[i], waves[j] + 1)
    return waves


def capturing(device: torch.device) -> bool:
    """Whether what is launched now becomes part of a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _guard(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@functools.cache
def _options() -> dict[str, Any]:
    """How kernels are compiled: without contraction to FMA, for the same bits as the reference."""
    options: dict[str, Any] = {"enable_fp_fusion": False}
    if INTERPRETED:
        return options
    warp_size = triton.runtime.driver.active.get_current_target().warp_size
    return {**options, "num_warps": THREADS.value // warp_size}
