"""Contenders in a process of their own, where their allocator or threads would disturb others.

The process makes its own parameters, gradients and states. It waits on a pipe for its turn, and
tells by its own clock how long that took.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import torch

from . import clocks
from .contenders import CrashedError, Rule, UnavailableError, told
from .modes import Case
from .turns import Local
from .workloads import Gradients, Workload

SPAWN = multiprocessing.get_context("spawn")  # a fork would inherit pools of threads without them
PATIENCE = 10  # seconds for a process to end by itself


class Child:
    """A process that makes an object, and calls its methods when asked.

    Args:
        make: what makes the object there; importable by name, as its arguments have to be.
    """

    def __init__(self, make: Callable[..., Any], *arguments: Any) -> None:
        self.pipe, there = SPAWN.Pipe()
        self.process = SPAWN.Process(
            target=serve, args=(there, torch.get_num_threads(), make, *arguments), daemon=True
        )
        self.process.start()
        there.close()

    def call(self, method: str, *arguments: Any) -> Any:
        """What the method returned.

        Raises:
            UnavailableError: it raised this.
            CrashedError: it raised another error, or its process died.
        """
        self.send(method, *arguments)
        return self.receive()

    def send(self, method: str, *arguments: Any) -> None:
        """Asks, and does not wait for the answer."""
        with suppress(OSError):  # `receive` tells that it died
            self.pipe.send((method, arguments))

    def receive(self) -> Any:
        try:
            kind, answer = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join(PATIENCE)
            raise CrashedError(f"its process died, exit code {self.process.exitcode}") from None
        if kind is not None:
            raise kind(answer)
        return answer

    def close(self) -> None:
        self.pipe.close()
        self.process.join(PATIENCE)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()


def serve(pipe: Connection, threads: int, make: Callable[..., Any], *arguments: Any) -> None:
    """The life of the process: until the other end of the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the other's to handle
    torch.set_num_threads(threads)
    made = None
    while True:
        try:
            method, given = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            if made is None:
                made = make(*arguments)
            answer = (None, getattr(made, method)(*given))
        except UnavailableError as reason:
            answer = (UnavailableError, told(reason))
        except Exception as error:
            answer = (CrashedError, told(error))
        with suppress(OSError):  # the other end may be gone
            pipe.send(answer)


class Remote:
    """One that takes its turns in a process of its own, as `turns.Local` does in this one."""

    own_process = True

    def __init__(self, case: Case, rule: Rule, workload: Workload, device: torch.device) -> None:
        self.name, self.precision = case.name, case.precision
        self.child = Child(Resident, case, rule, workload, device)
        try:
            self.working_set: int = self.child.call("size")
        except BaseException:
            self.close()
            raise

    def operate(self, operation: str) -> None:
        self.child.call("operate", operation)

    def needed(self, operation: str) -> int:
        needed: int = self.child.call("needed", operation)
        return needed

    def take(self, clock: int, number: int) -> dict[str, int]:
        times: dict[str, int] = self.child.call("take", clock, number)
        return times

    def close(self) -> None:
        self.child.close()


class Resident(Local):
    """What is in that process."""

    def __init__(self, case: Case, rule: Rule, workload: Workload, device: torch.device) -> None:
        params = workload.parameters(device, case.dtype)
        gradients = Gradients(workload, params)
        super().__init__(case, rule, params, gradients, clocks.of(device, workload.elements))

    def size(self) -> int:
        return self.working_set
