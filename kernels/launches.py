"""Launches the kernels over all tensors of a device at once."""

from __future__ import annotations

import functools
from array import array
from collections.abc import Sequence
from itertools import chain
from typing import Any, Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastopt import _C
from fastopt.rule import ASSIGN, Rule
from fastopt.step.devices import capturing, guard
from fastopt.step.params import Target

from .norm import clip, reduce_chunks, reduce_partials
from .rules import RULES
from .staged import Staged
from .tables import CHUNK, OWN, THREADS
from .update import compute_scalars, update

DTYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.uint8: tl.uint8,
}
NO_GRAD = -1  # in place of a gradient's address, as in csrc/plan.h
INTERPRETED = not isinstance(update, triton.JITFunction)  # TRITON_INTERPRET=1


class _Chunks(NamedTuple):
    """Some targets, cut into the chunks of a launch.

    Args:
        programs: how many.
        words: int64 [programs]: what `tables.locate` reads.
        slots: int64 [programs]: places in the list of partial norms.
    """

    programs: int
    words: Tensor
    slots: Tensor


class _Kind(NamedTuple):
    """What targets of one launch have in common.

    Args:
        wave: targets that share memory are updated one after the other, in launches of their own.
        dtypes: of parameter, gradient and states; of the first arrays of a packing.
        packings: theirs.
        codes: how many of them share a scale.
        gap: as in `Rule.gap`.
        piece: what they are of the whole tensors, by whose places random numbers go.
    """

    wave: int
    dtypes: tuple[tl.dtype, ...]
    packings: tuple[str, ...]
    codes: int
    gap: int | None
    piece: Literal["whole", "run", "runs"]


def _kind(rule: Rule, target: Target) -> _Kind:
    """Of a target of the first wave."""
    a, *states = (DTYPES[stored.a.dtype] for stored in target.stored)
    # What the kernels need not be told twice.
    packing, *others = (
        "master" if stored.packing.startswith("master") else stored.packing
        for stored in target.stored
    )
    dtypes = (a, DTYPES[target.grad.dtype], *states)
    packings = packing, "plain", *others
    codes = max(stored.block for stored in target.stored)
    piece = "runs" if target.piece.run else "run" if target.piece.offset else "whole"
    return _Kind(0, dtypes, packings, codes, rule.gap(target.names), piece)


def _columns(targets: Sequence[Target], written: list[list[Tensor]]) -> list[list[int]]:
    """Those of the table of tensors.

    Args:
        written: in place of the targets' own first arrays.
    """
    values = max(map(len, written))
    return [
        [
            target.param.numel(),
            target.group,
            0 if target.step is None else target.step.data_ptr(),
            target.number,
            *target.piece,
            0 if (sums := target.stored[0].sums) is None else sums.data_ptr(),
            *chain.from_iterable(
                (a.data_ptr(), 0 if stored.b is None else stored.b.data_ptr())
                for a, stored in zip(arrays, target.stored, strict=True)
            ),
            *[0] * 2 * (values - len(arrays)),
        ]
        for target, arrays in zip(targets, written, strict=True)
    ]


def rules() -> dict[str, tuple[str, ...]]:
    """For each rule the names of its scalars, then of the states that it can have."""
    return {name: tuple(rule.update.arg_names[2:]) for name, rule in RULES.items()}


class MultiTensor:
    """The tensors of one device that a step updates: their tables in its memory, and the launches.

    A step is `begin`, then `norm_partials` where gradients are to be clipped, then `update`.
    Nothing in it waits for the device.

    Args:
        targets: at least one; all on one device.
        captured: where to keep what a CUDA graph will use at its replays.
        on_device: the device counts the steps and computes the scalars.
    """

    def __init__(
        self,
        rule: Rule,
        targets: Sequence[Target],
        captured: list[Any],
        on_device: bool = False,
    ) -> None:
        self.rule = RULES[rule.name]
        self.assigns = rule is ASSIGN
        self.n_scalars = len(rule.scalar_names)
        self.captured = captured
        self.on_device = on_device
        self.device = targets[0].param.device
        self.staged = {i: Staged(target) for i, target in enumerate(targets) if target.is_odd}
        written = [target.arrays for target in targets]
        for i, staged in self.staged.items():
            written[i] = staged.written
        self.numels = [target.param.numel() for target in targets]
        self.extents = [target.extent for target in targets]
        self.kinds = [_kind(rule, target) for target in targets]
        self.norm_classes = [target.norm_class for target in targets]
        n = len(targets)
        columns = _columns(targets, written)
        self.tensors = self._upload(torch.tensor(columns, dtype=torch.int64, device="cpu").t())
        self.own_row = array("q", range(n)).tobytes()
        self.words = b""
        self.words_there = self._empty(0)
        self.scalars = self._empty(n if on_device else 0, OWN.value + self.n_scalars)
        self.pattern: object = None
        self.stream: object = None

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
        of_norm = b""
        if self.staged:
            for_update, for_norm = array("q", grads), array("q", grads)
            for (i, staged), grad in zip(self.staged.items(), odd_grads, strict=True):
                if grad is not None:
                    for_update[i], for_norm[i] = staged.take_grad(grad)
            grads, of_norm = for_update.tobytes(), for_norm.tobytes()
        if row_of is None:
            row_of = self.own_row
        words = self._follow(row_of + grads + of_norm + rows)
        self.n_rows, self.row_size = n_rows, len(rows) // (8 * max(n_rows, 1))
        self.row_of, self.grads = words[:n], words[n : 2 * n]
        self.norm_grads = words[2 * n : 3 * n] if of_norm else self.grads
        self.rows = words[3 * n :] if of_norm else words[2 * n :]
        self._share_with_stream()

    def norm_partials(self, order: float = 2.0) -> Tensor:
        """Of each chunk of the gradients the norm, to the power of its order 1, 2 or inf: fp64."""
        with guard(self.device):
            for dtype, chunks in self.norm_launches:
                reduce_chunks[(chunks.programs,)](
                    self.tensors,
                    self.norm_grads,
                    chunks.words,
                    chunks.slots,
                    self.partials,
                    DTYPE=dtype,
                    ORDER=order,
                    **_options(),
                )
        return self.partials

    def by_class(self, partials: Tensor) -> list[Tensor]:
        """What `norm_partials` returns, of each norm class."""
        return [*partials.split(self.class_slots)]

    def update(
        self,
        partials: Tensor | None = None,
        norm_dtype: torch.dtype = torch.float32,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        finds_inf: bool = False,
    ) -> Tensor | None:
        """Updates the targets that have a gradient.

        Args:
            partials: of the norm by which to clip; may be those of several devices.
            norm_dtype: that of the result.
            grad_scale: if `on_device`: fp32, one element: divides the gradients first.
            found_inf: if `on_device`: likewise; nothing is updated where it is not 0.
            finds_inf: set `found_inf`, which is not read, to whether the norm is not finite.

        Returns:
            the norm, 0-dim; None without `partials`.
        """
        norm = None
        if partials is not None:
            norm = torch.empty((), dtype=norm_dtype, device=self.device)
        with guard(self.device):
            if partials is not None and not self.on_device:
                self._clip(partials, norm)
            for wave, (staged, launches) in enumerate(self.by_wave):
                if self.on_device:
                    self._compute_scalars(wave, partials, norm, grad_scale, found_inf, finds_inf)
                for target in staged:
                    target.load()
                for kind, chunks in launches:
                    self._update(kind, chunks)
                for target in staged:
                    target.store()
        return norm

    def _clip(self, partials: Tensor, norm: Tensor | None) -> None:
        clip[(1,)](
            partials,
            partials.shape[0],
            self.rows,
            self.n_rows,
            self.row_size,
            norm,
            ASSIGNS=self.assigns,
            **_options(),
        )

    def _compute_scalars(
        self,
        wave: int,
        partials: Tensor | None,
        norm: Tensor | None,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        finds_inf: bool,
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
            RULE_SCALARS=self.rule.scalars,
            N_SETTINGS=self.row_size // 2,  # as values and as addresses
            FINDS_INF=finds_inf,
            **_options(),
        )

    def _update(self, kind: _Kind, chunks: _Chunks) -> None:
        update[(chunks.programs,)](
            self.tensors,
            self.grads,
            self.row_of,
            chunks.words,
            self.scalars if self.on_device else self.rows,
            len(self.kinds),
            RULE=self.rule.update,
            N_SCALARS=self.n_scalars,
            GAP=kind.gap,
            DTYPES=kind.dtypes,
            PACKINGS=kind.packings,
            CODES=kind.codes,
            PIECE=kind.piece,
            **_options(),
        )

    def _schedule(self, active: list[int]) -> None:
        """Plans the launches for the targets that have a gradient."""
        wave_of = _C.waves(self.extents, active)
        slots = self._slots(active)
        by_kind: dict[_Kind, list[int]] = {}
        by_dtype: dict[tl.dtype, list[int]] = {}
        for i in active:
            if self.numels[i]:
                kind = self.kinds[i]._replace(wave=wave_of[i])
                by_kind.setdefault(kind, []).append(i)
                by_dtype.setdefault(kind.dtypes[1], []).append(i)
        self.launches = [(kind, self._cut(i, slots)) for kind, i in by_kind.items()]
        # Of each wave what is staged and what is launched. One of nothing computes the norm all the
        # same.
        self.by_wave: list[tuple[list[Staged], list[tuple[_Kind, _Chunks]]]] = [
            ([], []) for _ in range(max(0, *wave_of) + 1)
        ]
        for i, staged in self.staged.items():
            if wave_of[i] >= 0:
                self.by_wave[wave_of[i]][0].append(staged)
        for kind, chunks in self.launches:
            self.by_wave[kind.wave][1].append((kind, chunks))
        if len(by_kind) == 1:  # the common case
            self.norm_launches = [(kind.dtypes[1], chunks) for kind, chunks in self.launches]
        else:
            self.norm_launches = [(dtype, self._cut(i, slots)) for dtype, i in by_dtype.items()]
        self.wave_of = self._upload(torch.tensor(wave_of, device="cpu"))
        # Zeros where there is no chunk.
        self.partials = torch.zeros(sum(self.class_slots), dtype=torch.float64, device=self.device)

    def _slots(self, active: list[int]) -> list[int]:
        """The place of each target's first chunk among all chunks, ordered by norm class."""
        slots = [0] * len(self.numels)
        self.class_slots = [0] * (max(self.norm_classes) + 1)
        for norm_class in range(len(self.class_slots)):
            first = end = sum(self.class_slots)
            for i in active:
                if self.norm_classes[i] == norm_class:
                    slots[i] = end
                    end += self._n_chunks(i)
            self.class_slots[norm_class] = max(end - first, 1)
        return slots

    def _n_chunks(self, target: int) -> int:
        return triton.cdiv(self.numels[target], CHUNK.value)

    def _cut(self, targets: list[int], slots: list[int]) -> _Chunks:
        """The chunks of some targets."""
        with torch.device("cpu"):
            first = torch.tensor([slots[i] for i in targets])
            sizes = torch.tensor([self._n_chunks(i) for i in targets])
            programs = sum(map(self._n_chunks, targets))
            index = torch.arange(programs)
            index -= (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
            target = torch.tensor(targets).repeat_interleave(sizes)
            words = target << 32 | index
            table = torch.stack([words, first.repeat_interleave(sizes) + index])
        return _Chunks(programs, *self._upload(table))

    def _empty(self, *size: int) -> Tensor:
        return torch.empty(size, dtype=torch.int64, device=self.device)

    def _follow(self, words: bytes) -> Tensor:
        """The words in the device's memory, copied only where they have changed."""
        if words != self.words or capturing(self.device):
            host = torch.frombuffer(bytearray(words), dtype=torch.int64)
            if capturing(self.device):
                # Copied by the graph at each replay, to where no other step copies to.
                there = self._upload(host)
                self.captured.append((self, there, self.launches, self.wave_of, self.partials))
                self.pattern = None  # what was uploaded since the capture began is not there yet
                return there
            if len(words) != len(self.words):
                self.words_there = self._empty(len(host))
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
            self.captured.append(pinned)
        return pinned

    def _share_with_stream(self) -> None:
        """Keeps memory that was allocated for one stream until another that uses it has done so."""
        if self.device.type == "cpu" or capturing(self.device):
            return
        stream = torch.cuda.current_stream(self.device)
        if stream != self.stream:
            tensors = [self.tensors, self.words_there, self.scalars, self.wave_of, self.partials]
            for _, chunks in (*self.launches, *self.norm_launches):
                tensors += [chunks.words, chunks.slots]
            for tensor in tensors:
                tensor.record_stream(stream)
            self.stream = stream


def total(partials: Tensor, order: float = 2.0) -> Tensor:
    """Reduces what `MultiTensor.norm_partials` returns: fp64, 0-dim."""
    result = torch.empty((), dtype=torch.float64, device=partials.device)
    with guard(partials.device):
        reduce_partials[(1,)](partials, partials.shape[0], result, ORDER=order, **_options())
    return result


def address_of(tensor: Tensor) -> int:
    """Of a one-element tensor in the table of settings: odd for a double."""
    return tensor.data_ptr() + (tensor.dtype == torch.float64)


@functools.cache
def _options() -> dict[str, Any]:
    """How kernels are compiled: without contraction to FMA, for the same bits as the reference."""
    options: dict[str, Any] = {"enable_fp_fusion": False}
    if INTERPRETED:
        return options
    warp_size = triton.runtime.driver.active.get_current_target().warp_size
    return {**options, "num_warps": THREADS.value // warp_size}
