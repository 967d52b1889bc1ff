"""Those who take turns: told an operation, they do it when asked, and tell the time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import bound
from .clocks import Clock
from .contenders import Rule
from .modes import Case
from .records import BOUND, COPY
from .workloads import Gradients

STEP, CLIP, UNSCALE = "step", "clip + step", "unscale + clip + step"
OPERATIONS = (STEP, CLIP, UNSCALE)
MASTERS = {"master_param", "param_remainder", "error_bits"}  # fastopt's, and flashoptim's


class Turn(Protocol):
    """One of those who take turns."""

    name: str
    precision: str
    working_set: int  # bytes
    own_process: bool

    def operate(self, operation: str) -> None:
        """What it is to do from now on, or `UnavailableError`."""

    def needed(self, operation: str) -> int:
        """The least bytes that have to move for it."""

    def take(self, clock: int, number: int) -> dict[str, int]:
        """Nanoseconds, by what they are.

        Args:
            clock: the number of the one that is to tell.
            number: the round's.
        """

    def close(self) -> None:
        """It has had its last turn."""


class Local:
    """A contender in this process that has made a step."""

    own_process = False
    scaler: torch.amp.GradScaler | None = None

    def __init__(
        self,
        case: Case,
        rule: Rule,
        params: list[Tensor],
        gradients: Gradients | None,
        clocks: Sequence[Clock],
    ) -> None:
        self.name, self.precision = case.name, case.precision
        self.params, self.gradients, self.clocks = params, gradients, clocks
        self.contender = case.make(rule, params)
        self.contender.run()
        self.count_bytes()

    def count_bytes(self) -> None:
        self.moved = bound.traffic(self.contender)
        self.working_set = bound.working_set(self.moved)

    def share_states(self, pool: dict[Any, Tensor]) -> None:
        """Replaces states by those of the pool, and adds what is new there.

        Where an array lies in memory makes a difference, see `measure`.
        """
        share_states(self.contender.optimizer, pool)
        self.count_bytes()

    def operate(self, operation: str) -> None:
        self.contender.set_clip(operation != STEP)
        self.scaler = None
        if operation == UNSCALE:
            device = self.params[0].device
            self.scaler = self.contender.new_scaler(device.type)
            self.scaler.scale(torch.ones((), device=device))  # which makes the scale

    def needed(self, operation: str) -> int:
        return bound.bytes_moved(self.moved, clips=operation != STEP)

    def take(self, clock: int, number: int) -> dict[str, int]:
        if self.gradients:
            self.gradients.renew(self.params, number, scaled=self.scaler is not None)
        return self.clocks[clock](self.run)

    def run(self) -> None:
        if self.scaler:
            self.contender.run_scaled(self.scaler)
        else:
            self.contender.run()

    def close(self) -> None:
        pass


class Bound:
    """The bare loop with the traffic of one of the others."""

    name = BOUND
    own_process = False
    clips = False

    def __init__(self, of: Local) -> None:
        self.of = of
        self.precision = of.precision
        self.working_set = of.working_set
        self.loop = bound.BareLoop(of.moved)

    def operate(self, operation: str) -> None:
        self.clips = operation != STEP

    def needed(self, operation: str) -> int:
        return self.of.needed(operation)

    def take(self, clock: int, number: int) -> dict[str, int]:
        return self.of.clocks[clock](self.run)

    def run(self) -> None:
        self.loop.run(self.clips)

    def close(self) -> None:
        pass


class Copy:
    """A copy of so many bytes within the device's memory."""

    name, precision = COPY, ""
    own_process = False

    def __init__(self, device: torch.device, size: int, clocks: Sequence[Clock]) -> None:
        self.copy = bound.Copy(device, size)
        self.clocks = clocks
        self.working_set = self.copy.bytes_moved

    def operate(self, operation: str) -> None:
        pass

    def needed(self, operation: str) -> int:
        return self.copy.bytes_moved

    def take(self, clock: int, number: int) -> dict[str, int]:
        return self.clocks[clock](self.copy.run)

    def close(self) -> None:
        pass


def share_states(optimizer: Optimizer, pool: dict[Any, Tensor]) -> None:
    for number, state in enumerate(optimizer.state.values()):
        for name, value in state.items():
            if type(value) is Tensor and name != "step" and name not in MASTERS:
                key = (number, name, value.dtype, value.shape)
                state[name] = pool.setdefault(key, value)
