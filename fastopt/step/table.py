"""The table of scalars: for each param group and step, the row that every backend is given."""

from __future__ import annotations

import math
import struct
from array import array
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, repeat, starmap
from operator import is_, itemgetter
from typing import Any

import torch
from torch import Tensor

from .. import precision, settings
from ..norm import clip_coef
from ..rule import HEAD, MAX_NORM, UNCLIPPED_COEF, Group, Rule, head
from .devices import is_on_device, moved

_MISSING: Any = object()
_UNSEEN = object()

Row = tuple[float, ...]


@dataclass(frozen=True)
class Scaling:
    """What a `GradScaler` leaves on an optimizer for the time of a step.

    Args:
        grad_scale: divides the gradients; None: nothing is to be done.
        found_inf: if not 0, a gradient was not finite, and the step must change nothing.
        findings: where the step, which finds that out itself by its norm, puts such a ``found_inf``
            by device; None: it need not.
    """

    grad_scale: Tensor | None = None
    found_inf: Tensor | float | None = None
    findings: dict[torch.device, Tensor] | None = None

    @cached_property
    def on_device(self) -> bool:
        """Whether the host would have to wait for them."""
        return is_on_device(self.grad_scale) or is_on_device(self.found_inf)

    @cached_property
    def inv_scale(self) -> float:
        if self.grad_scale is None:
            return 1.0
        scale = float(self.grad_scale)
        return 1.0 / scale if scale else math.inf  # torch's scaler halves it until it is 0

    @cached_property
    def skips(self) -> bool:
        return self.found_inf is not None and float(self.found_inf) != 0

    def to(self, device: torch.device) -> tuple[Tensor | None, Tensor | None, bool]:
        """Both in the memory of a device, and whether ``found_inf`` is for the device to set."""
        scale, found_inf = (
            moved(x, device) if isinstance(x, Tensor) else None
            for x in (self.grad_scale, self.found_inf)
        )
        if self.findings is not None:
            found_inf = torch.empty((), dtype=torch.float32, device=device)
            self.findings[device] = found_inf
        return scale, found_inf, self.findings is not None


class Table:
    """The rows of scalars of all param groups, by their settings at one step.

    Groups of equal settings share their rows. Good for later steps until a setting changes.

    Args:
        names: the settings that a group must have.
        last: the table of the step before, whose settings need no second check.

    Attributes:
        clips: some group has a ``max_norm``.
        forms: for each group, its states and what else decides how they are kept.
        on_device: a setting is known only to the device, which then has to compute the scalars and
            to count the steps.

    Raises:
        As `settings.check_group`.
    """

    def __init__(
        self, rule: Rule, groups: list[Group], names: Iterable[str], last: Table | None = None
    ) -> None:
        self.rule = rule
        self._packed = struct.Struct(f"{len(HEAD) + len(rule.scalar_names)}d").pack
        names = [*names]
        self._get = itemgetter(*names)
        by_group = [tuple(map(group.get, names, repeat(_MISSING))) for group in groups]
        first: dict[Any, int] = {}
        self._like = [first.setdefault(_key(values), g) for g, values in enumerate(by_group)]
        # Settings that are what they were need no second look, if they cannot change in place.
        checked = last._by_group if last else []
        self._groups: dict[int, Group] = {}
        self._mutable: dict[int, list[str]] = {}  # of each of `_groups`
        for g in first.values():
            old: Iterable[Any] = repeat(_UNSEEN)
            mutable: list[str] = []
            if last and g < len(checked):
                old, mutable = checked[g], last._mutable[last._like[g]]
            of_names = zip(names, by_group[g], old, strict=False)
            changed = [name for name, value, before in of_names if value is not before]
            changed += mutable
            if changed:
                settings.check_group(rule, groups[g], g, changed)
            self._groups[g] = dict(zip(names, by_group[g], strict=True))
            self._mutable[g] = [n for n in changed if not _is_constant(self._groups[g][n])]
        self._constant = not any(self._mutable.values())
        self._by_group: list[tuple[Any, ...]] = by_group
        self._values = list(chain.from_iterable(by_group))
        distinct = self._groups.values()
        self.clips = any(group["max_norm"] is not None for group in distinct)
        self.on_device = any(group["capturable"] for group in distinct) or (
            not self._constant and any(map(self._is_on_device, distinct))
        )
        forms = {
            g: (rule.states_of(group), [group[key] for key in (*precision.SETTINGS, "seed")])
            for g, group in self._groups.items()
        }
        self.forms = [forms[g] for g in self._like]
        self._made: dict[tuple[int, float, float], Row] = {}

    def holds(self, groups: list[Group], some: Iterable[int] | None = None) -> bool:
        """Whether all settings, or those of ``some`` groups, are what the table was made for."""
        if not self._constant or len(groups) != len(self._like):
            return False
        try:
            # By identity: numbers do not change, and tensors must not be compared here.
            if some is None:
                values = chain.from_iterable(map(self._get, groups))
                return all(map(is_, values, self._values))
            return all(all(map(is_, self._get(groups[g]), self._by_group[g])) for g in some)
        except KeyError:
            return False

    def check(self) -> None:
        """Raises early what `rows` would, without waiting for a device.

        Raises:
            ValueError: a scalar that settings make is not finite.
        """
        for g, group in self._groups.items():
            if self._constant or not self._is_on_device(group):
                self._row(g, 1.0, 1.0)

    def rows(
        self, wanted: Iterable[tuple[int, float]], inv_scale: float, keeps: bool = False
    ) -> list[Row]:
        """For each group and step a row.

        Args:
            inv_scale: of the gradients.
            keeps: take rows of the last calls again, where each parameter makes its step alone.

        Raises:
            ValueError: a hyperparameter is infinite or NaN.
        """
        made = self._made
        if not (keeps and self._constant) or len(made) > 100:
            made.clear()
        rows = []
        for group, step in wanted:
            key = self._like[group], step, inv_scale
            if key not in made:
                made[key] = self._row(*key)
            rows.append(made[key])
        return rows

    def words(self, rows: Sequence[Row]) -> bytes:
        """Rows as kernels take them."""
        # Not array("d", ...), which parses each number as an argument.
        return b"".join(starmap(self._packed, rows))

    def _row(self, g: int, step: float, inv_scale: float) -> Row:
        group = self._groups[g]
        hyperparameters = [group[key] for key in self.rule.hyperparameters]
        if not self._constant:
            hyperparameters = [_number(value) for value in hyperparameters]
        own = self.rule.scalars(step, *hyperparameters)
        if not all(map(math.isfinite, own)):
            found = dict(zip(self.rule.hyperparameters, hyperparameters, strict=True))
            raise ValueError(f"a hyperparameter is not finite, nothing was changed: {found}")
        sign = -inv_scale if group["maximize"] else inv_scale
        return (*head(sign, group["clip_value"], group["max_norm"], group["seed"], step), *own)

    def for_device(
        self, device: torch.device, address_of: Callable[[Tensor], int]
    ) -> tuple[bytes, list[Tensor]]:
        """What a device makes rows of: for each group the values of a row's head and of the
        hyperparameters, then the addresses of those that lie in the device's memory, else 0.

        Returns:
            the table, and what must live until the kernels that read it have been launched.
        """
        rows, kept = {}, []
        for g, group in self._groups.items():
            sign = -1.0 if group["maximize"] else 1.0
            values = array("d", head(sign, group["clip_value"], group["max_norm"], group["seed"]))
            addresses = array("q", [0] * len(values))
            for value in self._hyperparameters(group):
                if is_on_device(value):
                    dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
                    kept.append(moved(value.to(dtype), device))
                    values.append(0.0)
                    addresses.append(address_of(kept[-1]))
                else:
                    values.append(float(value))
                    addresses.append(0)
            rows[g] = values.tobytes() + addresses.tobytes()
        return b"".join(rows[g] for g in self._like), kept

    def _is_on_device(self, group: Group) -> bool:
        return any(map(is_on_device, self._hyperparameters(group)))

    def _hyperparameters(self, group: Group) -> Iterator[Any]:
        """In one flat list, tensors as they are."""
        for key in self.rule.hyperparameters:
            value = group[key]
            if _is_sequence(value):
                yield from value
            else:
                yield value


def clipped(row: Row, norm: float | None) -> Row:
    """A row once the norm is known; None: do not clip."""
    if norm is None:
        return row
    return row[UNCLIPPED_COEF] * clip_coef(norm, row[MAX_NORM]), *row[1:]


def _key(values: tuple[Any, ...]) -> Any:
    """Equal for groups that share their rows, and whose settings are right or wrong together."""
    types = tuple(map(type, values))
    try:
        hash(values)
    except TypeError:  # a list of betas
        values = tuple(map(_hashable, values))
    return values, types


def _hashable(value: Any) -> Any:
    if _is_sequence(value):
        return tuple(map(_hashable, value))
    return value if isinstance(value, Hashable) else object()


def _is_constant(value: Any) -> bool:
    """Whether a setting cannot change in place, as tensors and lists do."""
    if type(value) is tuple:
        return all(map(_is_constant, value))
    return not isinstance(value, Tensor) and not _is_sequence(value)


def _is_sequence(value: Any) -> bool:
    # What is common first, because abstract classes answer in Python.
    return not isinstance(value, (float, int, str, Tensor)) and isinstance(
        value, (tuple, list, Sequence)
    )


def _number(value: Any) -> Any:
    """A setting as numbers; a tensor is read, and a GPU waited for."""
    if isinstance(value, Tensor):
        return value.item()
    return tuple(map(_number, value)) if _is_sequence(value) else value
