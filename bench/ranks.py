"""Contenders on DTensors: a process for each rank, which take their turns together."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist

from . import clocks
from .contenders import Rule
from .isolate import Child
from .modes import Case
from .turns import Local
from .workloads import Gradients, Workload


class Ranks:
    """One that takes its turns in several processes at once: the last to be ready counts."""

    own_process = True

    def __init__(self, case: Case, rule: Rule, workload: Workload, device: torch.device) -> None:
        self.name, self.precision = case.name, case.precision
        self.folder = TemporaryDirectory()
        store = (Path(self.folder.name) / "store").as_uri()
        self.children = [
            Child(Rank, case, rule, workload, device, rank, store) for rank in range(workload.ranks)
        ]
        try:
            self.working_set: int = self.call("size")[0]
        except BaseException:
            self.close()
            raise

    def call(self, method: str, *arguments: Any) -> list[Any]:
        for child in self.children:
            child.send(method, *arguments)
        return [child.receive() for child in self.children]

    def operate(self, operation: str) -> None:
        self.call("operate", operation)

    def needed(self, operation: str) -> int:
        needed: int = self.call("needed", operation)[0]
        return needed

    def take(self, clock: int, number: int) -> dict[str, int]:
        times: list[dict[str, int]] = self.call("take", clock, number)
        return {what: max(each[what] for each in times) for what in times[0]}

    def close(self) -> None:
        for child in self.children:
            child.close()
        self.folder.cleanup()


class Rank(Local):
    """What is in one of the processes."""

    def __init__(
        self,
        case: Case,
        rule: Rule,
        workload: Workload,
        device: torch.device,
        rank: int,
        store: str,
    ) -> None:
        torch.set_num_threads(max(1, torch.get_num_threads() // workload.ranks))
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=workload.ranks)
        params = workload.parameters(device, case.dtype)
        gradients = Gradients(workload, params)
        super().__init__(case, rule, params, gradients, clocks.of(device, workload.elements))

    def take(self, clock: int, number: int) -> dict[str, int]:
        assert self.gradients
        self.gradients.renew(self.params, number)
        dist.barrier()  # who comes late would make the others wait in their turn
        return self.clocks[clock](self.run)

    def size(self) -> int:
        return self.working_set
