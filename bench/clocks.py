"""Stopwatches: each runs something and tells nanoseconds, by the name of what they are."""

from collections.abc import Callable
from time import perf_counter_ns

import torch

from . import workloads

Run = Callable[[], None]
Clock = Callable[[Run], dict[str, int]]

WALL, HOST, DEVICE = "wall", "host", "device"


def wall(run: Run) -> dict[str, int]:
    """Until the call returns, which on a CPU is when the work is done."""
    start = perf_counter_ns()
    run()
    return {WALL: perf_counter_ns() - start}


def host_and_wall(run: Run) -> dict[str, int]:
    """From an idle GPU: until the call returns, and until the work is done."""
    torch.cuda.synchronize()
    start = perf_counter_ns()
    run()
    returned = perf_counter_ns()
    torch.cuda.synchronize()
    return {HOST: returned - start, WALL: perf_counter_ns() - start}


class DeviceClock:
    """What the GPU takes by itself: it sleeps until everything has been launched."""

    MOST = 80_000_000  # cycles; a contender that waits for the GPU would wait for any number

    def __init__(self) -> None:
        self.cycles = 10_000_000

    def __call__(self, run: Run) -> dict[str, int]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        while True:
            torch.cuda._sleep(self.cycles)  # type: ignore[no-untyped-call]
            start.record()
            run()
            end.record()
            if not start.query() or self.cycles >= self.MOST:  # type: ignore[no-untyped-call]
                break
            self.cycles *= 2  # it woke up too early
        end.synchronize()
        return {DEVICE: round(1e6 * start.elapsed_time(end))}


def of(device: torch.device, elements: int) -> list[Clock]:
    """The clocks that tell something about a step over so many elements.

    On a CPU, which is busy until the call returns, there is but one time. On a GPU, what matters of
    small tensors is the host's, and of large ones the device's.
    """
    if device.type != "cuda":
        return [wall]
    if elements <= workloads.SMALL:
        return [host_and_wall]
    return [DeviceClock()] if elements >= workloads.LARGE else [DeviceClock(), host_and_wall]
